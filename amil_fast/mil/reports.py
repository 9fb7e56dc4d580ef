"""Files about predictions: a CSV with a row per bag, scores as JSON, curves and confusion matrix as a picture."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amil_fast.mil.metrics import curves, evaluate_scores, predicted_classes
from amil_fast.mil.prediction import BagPredictions
from amil_fast.utils.files import atomic_path, write_json, write_text
from amil_fast.utils.optional import require

PREDICTIONS, EVALUATION, PICTURE = "predictions.csv", "evaluation.json", "evaluation.png"


def write_predictions(
    path: str | os.PathLike,
    predictions: BagPredictions,
    task: str,
    names: Sequence[str],
    *,
    threshold: float | np.ndarray = 0.5,
    labels: Sequence[str | None] | None = None,
    columns: dict[str, Sequence[Any]] | None = None,
) -> None:
    """Writes a CSV file with a row per bag.

    The columns are ``bag_id``, ``label`` (if given), those of ``columns``, ``instances``, ``effective_instances`` (if
    the pooling has weights), and ``probability_<class>`` per class and ``predicted``, or ``prediction`` for regression.
    """
    table: dict[str, Sequence[Any]] = {"bag_id": predictions.names}
    if labels is not None:
        table["label"] = ["" if label is None else label for label in labels]
    table |= columns or {}
    table["instances"] = predictions.sizes.tolist()
    if predictions.effective is not None:
        table["effective_instances"] = [f"{value:.4g}" for value in predictions.effective]
    scores = predictions.scores
    if task == "regression":
        table["prediction"] = [f"{value:.6g}" for value in scores]
    else:
        names = names or [str(c) for c in range(2 if scores.ndim == 1 else scores.shape[1])]
        for name, column in zip(names, class_columns(scores).T, strict=True):
            table[f"probability_{name}"] = [f"{value:.6g}" for value in column]
        table["predicted"] = [names[c] for c in predicted_classes(scores, threshold)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    write_text(path, text.getvalue())


def class_columns(scores: np.ndarray) -> np.ndarray:
    """Probabilities of all classes ``(B, C)``; those of two classes are ``1 - p`` and ``p``."""
    return np.stack([1 - scores, scores], 1) if scores.ndim == 1 else scores


def write_evaluation(
    folder: str | os.PathLike,
    task: str,
    names: Sequence[str],
    scores: np.ndarray,
    values: np.ndarray,
    *,
    threshold: float | np.ndarray = 0.5,
    groups: Sequence[str] | None = None,
    resamples: int = 1000,
    title: str = "",
) -> dict[str, Any]:
    """Writes ``evaluation.json`` and ``evaluation.png`` to a folder; returns :func:`evaluate_scores`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    result = evaluate_scores(task, names, scores, values, threshold=threshold, groups=groups, resamples=resamples)
    write_json(folder / EVALUATION, result)
    draw_evaluation(
        folder / PICTURE, result, task, names, scores, values, groups=groups, resamples=resamples, title=title
    )
    return result


def draw_evaluation(
    path: str | os.PathLike,
    result: dict[str, Any],
    task: str,
    names: Sequence[str],
    scores: np.ndarray,
    values: np.ndarray,
    *,
    groups: Sequence[str] | None = None,
    resamples: int = 1000,
    title: str = "",
) -> None:
    """Draws ROC, precision-recall and calibration curves with 95 % intervals, and the confusion matrix.

    For several classes the curves are those of each class against the rest, without intervals. For regression,
    predictions over values.
    """
    figure_module = require("matplotlib.figure", "pictures", package="matplotlib")
    if task == "regression":
        figure = figure_module.Figure(figsize=(4.6, 4.4), layout="constrained")
        axes = figure.subplots()
        axes.plot(values, scores, "o", ms=4, alpha=0.6)
        limits = [min(values.min(), scores.min()), max(values.max(), scores.max())]
        axes.plot(limits, limits, color="0.5", lw=1)
        axes.set(xlabel="value", ylabel="prediction", title=title)
    else:
        figure = figure_module.Figure(figsize=(15, 4.2), layout="constrained")
        panels = figure.subplots(1, 4)
        _draw_curves(panels[:3], names, scores, values, groups, resamples)
        _draw_confusion(panels[3], np.array(result["confusion"]), names)
        figure.suptitle(title)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=110)


def _draw_curves(panels, names, scores, values, groups, resamples):
    binary = scores.ndim == 1
    for c in [1] if binary else range(len(names)):
        of_class = values == c
        if of_class.all() or not of_class.any():
            continue
        probability = scores if binary else scores[:, c]
        found = curves(probability, of_class.astype(int), groups=groups, resamples=resamples if binary else 0)
        for axes, name in zip(panels, ("roc", "pr", "calibration"), strict=True):
            curve, style = found[name], "o-" if name == "calibration" else "-"
            axes.plot(curve["x"], curve["y"], style, color=f"C{c}", ms=4, label=names[c])
            if binary and np.isfinite(curve["low"]).any():
                axes.fill_between(curve["x"], curve["low"], curve["high"], color=f"C{c}", alpha=0.2, lw=0)
    for axes in (panels[0], panels[2]):
        axes.plot([0, 1], [0, 1], color="0.7", lw=1)
    panels[0].set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
    panels[1].set(xlabel="recall", ylabel="precision", title="precision-recall", ylim=(0, 1.03))
    panels[2].set(xlabel="predicted probability", ylabel="observed frequency", title="calibration")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(loc="lower right", title="class")


def _draw_confusion(axes, counts, names):
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*counts.shape):
        color = "white" if share[row, column] > 0.6 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color)
    ticks = np.arange(len(names))
    axes.set_xticks(ticks, names, rotation=45 if max(map(len, names)) > 6 else 0)
    axes.set_yticks(ticks, names)
    axes.set(xlabel="predicted", ylabel="true", title="confusion")


def summary_lines(result: dict[str, Any]) -> list[str]:
    """The scores of :func:`evaluate_scores` as lines of text, with 95 % intervals."""
    lines = []
    shown = {
        "auc": "AUC",
        "average_precision": "average precision",
        "accuracy": "accuracy",
        "balanced_accuracy": "balanced accuracy",
        "sensitivity": "sensitivity",
        "specificity": "specificity",
        "log_loss": "log-loss",
        "r2": "R²",
        "mae": "mean absolute error",
        "rmse": "root mean square error",
        "pearson": "correlation",
    }
    at_half = result.get("accuracy_at_half")
    if at_half is not None and result["threshold"] != 0.5:
        where = "thresholds" if result["threshold"] is None else f"threshold {result['threshold']:.3f}"
        shown["accuracy"] = f"accuracy at the {where} chosen on training data"
        lines.append(f"accuracy at 0.5: {_number(at_half)}")
    rows = [f"{text}: {_number(result[name])}" for name, text in shown.items() if name in result]
    return rows[:2] + lines + rows[2:] if "auc" in result else rows


def _number(entry):
    if entry["value"] is None:
        return "-"
    text = f"{entry['value']:.3f}"
    return text if entry["low"] is None else f"{text} ({entry['low']:.3f} to {entry['high']:.3f})"
