"""Scores of predictions for bags, with bootstrap intervals over bags or groups."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from amil_fast.mil.cross_validation import area_under_roc
from amil_fast.mil.step_loss import score_losses
from amil_fast.utils.optional import require

LEVEL = 0.95  # of the intervals
_GRID = np.linspace(0, 1, 101)  # abscissas of the curves


def best_threshold(scores: np.ndarray, values: np.ndarray) -> float:
    """The threshold of largest balanced accuracy; 0.5 if it is one of them, otherwise the one closest to it.

    Args:
        scores: probabilities of the positive class ``(B,)``.
        values: classes 0 and 1 ``(B,)``.

    Returns:
        The middle between two neighboring probabilities, or 0.5; 0.5 if only one class is present.
    """
    scores, values = np.asarray(scores, dtype=np.float64), np.asarray(values)
    if len(np.unique(values)) < 2:
        return 0.5
    distinct = np.unique(scores)
    candidates = np.concatenate([[0.5], (distinct[1:] + distinct[:-1]) / 2])
    positive, negative = np.sort(scores[values == 1]), np.sort(scores[values == 0])
    sensitivity = 1 - np.searchsorted(positive, candidates) / len(positive)
    specificity = np.searchsorted(negative, candidates) / len(negative)
    balanced = sensitivity + specificity
    best = candidates[balanced >= balanced.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - 0.5))])


def predicted_classes(scores: np.ndarray, threshold: float | np.ndarray = 0.5) -> np.ndarray:
    """Class indices: ``scores >= threshold`` for ``(B,)``, the largest probability for ``(B, C)``."""
    return (scores >= threshold).astype(np.int64) if scores.ndim == 1 else scores.argmax(1)


def evaluate_scores(
    task: str,
    names: Sequence[str],
    scores: np.ndarray,
    values: np.ndarray,
    *,
    threshold: float | np.ndarray = 0.5,
    groups: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores predictions.

    Args:
        task: task of the model.
        names: names of the classes.
        scores: probabilities ``(B,)`` or ``(B, C)``, or values.
        values: class indices, or values.
        threshold: threshold for two classes, chosen on other bags; or one per bag ``(B,)``, in a cross-validation.
        groups: group per bag; the bootstrap then resamples groups instead of bags.
        resamples: bootstrap resamples; 0: no intervals.
        seed: seed of the bootstrap.

    Returns:
        A dict for JSON: ``bags``, and per metric ``{"value", "low", "high"}`` (None where undefined); for classes
        ``confusion`` (rows: true class) and, for two, ``threshold``, ``confusion_at_half``.
    """
    scores, values = np.asarray(scores), np.asarray(values)
    if len(scores) == 0:
        raise ValueError("scores: expected at least one bag, got none")
    if task == "regression":
        columns: tuple[np.ndarray, ...] = (scores, values)
        compute: Callable[..., dict] = _regression_metrics
    else:
        columns = (scores, values, predicted_classes(scores, threshold))
        compute = _class_metrics(task, len(names))
    point = compute(*columns)
    drawn = [compute(*(column[i] for column in columns)) for i in resampled(len(values), groups, resamples, seed)]
    result: dict[str, Any] = {"bags": len(values)}
    for name, value in point.items():
        low, high = interval([d[name] for d in drawn])
        result[name] = {"value": value, "low": low, "high": high}
    if task != "regression":
        result["names"] = list(names)
        result["confusion"] = confusion(values, columns[2], len(names)).tolist()
        if scores.ndim == 1:
            result["threshold"] = threshold if np.ndim(threshold) == 0 else None
            result["confusion_at_half"] = confusion(values, predicted_classes(scores), 2).tolist()
    return result


def resampled(num_bags: int, groups: Sequence[str] | None, resamples: int, seed: int) -> list[np.ndarray]:
    """Bootstrap samples: indices of bags, drawn with replacement; with ``groups``, whole groups are drawn."""
    rng = np.random.default_rng(seed)
    if groups is None:
        return [rng.integers(0, num_bags, num_bags) for _ in range(resamples)]
    inverse = np.unique(np.asarray(groups), return_inverse=True)[1]
    members = [np.flatnonzero(inverse == g) for g in range(inverse.max() + 1)]
    return [np.concatenate([members[g] for g in rng.integers(0, len(members), len(members))]) for _ in range(resamples)]


def interval(drawn: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Percentile interval of bootstrap values; ``(None, None)`` if half of them are undefined."""
    known = [value for value in drawn if value is not None]
    if not known or len(known) < len(drawn) / 2:
        return None, None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def confusion(values: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts ``(C, C)``: rows are true classes, columns predicted ones."""
    return np.bincount(values * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def _class_metrics(task: str, num_classes: int) -> Callable[..., dict]:
    metrics = require("sklearn.metrics", "average precision", package="scikit-learn")

    def binary(scores, values, predicted):
        result = {"accuracy": float((predicted == values).mean())}
        result["accuracy_at_half"] = float((predicted_classes(scores) == values).mean())
        result["balanced_accuracy"] = _balanced_accuracy(values, predicted, 2)
        result["auc"] = area_under_roc(scores, values)
        both = len(np.unique(values)) == 2
        result["average_precision"] = float(metrics.average_precision_score(values, scores)) if both else None
        result["sensitivity"] = float(predicted[values == 1].mean()) if (values == 1).any() else None
        result["specificity"] = float(1 - predicted[values == 0].mean()) if (values == 0).any() else None
        result["log_loss"] = float(score_losses(task, scores, values).mean())
        result["brier"] = float(np.square(scores - values).mean())
        return result

    def several(scores, values, predicted):
        result = {"accuracy": float((predicted == values).mean())}
        result["balanced_accuracy"] = _balanced_accuracy(values, predicted, num_classes)
        aucs = [area_under_roc(scores[:, c], values == c) for c in range(num_classes)]
        result["auc"] = None if None in aucs else float(np.mean(aucs))  # macro average of one against the rest
        result["log_loss"] = float(score_losses(task, scores, values).mean())
        return result

    return binary if num_classes == 2 else several


def _balanced_accuracy(values, predicted, num_classes):
    counts = confusion(values, predicted, num_classes)
    sizes = counts.sum(1)
    return float((np.diag(counts)[sizes > 0] / sizes[sizes > 0]).mean())


def _regression_metrics(scores, values):
    error = scores.astype(np.float64) - values
    spread = float(np.square(values - values.mean()).sum())
    correlated = len(values) > 1 and np.std(scores) > 0 and np.std(values) > 0
    return {
        "r2": 1 - float(np.square(error).sum()) / spread if spread else None,
        "mae": float(np.abs(error).mean()),
        "rmse": float(np.sqrt(np.square(error).mean())),
        "pearson": float(np.corrcoef(scores, values)[0, 1]) if correlated else None,
    }


def curves(
    scores: np.ndarray,
    values: np.ndarray,
    *,
    groups: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    bins: int = 8,
) -> dict[str, dict[str, np.ndarray]]:
    """ROC, precision-recall and calibration curves of probabilities ``(B,)`` for classes 0 and 1, with intervals.

    Returns:
        ``"roc"``: false positive rate x, true positive rate y; ``"pr"``: recall x, precision y; ``"calibration"``: mean
        probability x of bins with equally many bags, observed frequency y. Each has ``"x", "y", "low", "high"``.
    """
    metrics = require("sklearn.metrics", "ROC and precision-recall curves", package="scikit-learn")
    scores, values = np.asarray(scores, dtype=np.float64), np.asarray(values)
    if len(np.unique(values)) < 2:
        raise ValueError("values: expected bags of both classes")
    samples = [i for i in resampled(len(values), groups, resamples, seed) if 0 < values[i].sum() < len(i)]

    def roc(i):
        fpr, tpr, _ = metrics.roc_curve(values[i], scores[i])
        return np.interp(_GRID, fpr, tpr)

    def precision_recall(i):
        precision, recall, _ = metrics.precision_recall_curve(values[i], scores[i])
        # The precision at a recall is the best one at this recall or a larger one.
        precision = np.maximum.accumulate(precision)[::-1]
        distinct, first = np.unique(recall[::-1], return_index=True)
        return np.interp(_GRID, distinct, precision[first])

    edges = np.unique(np.quantile(scores, np.linspace(0, 1, bins + 1)))
    bin_of = np.clip(np.searchsorted(edges, scores, side="right") - 1, 0, max(len(edges) - 2, 0))
    used = np.unique(bin_of)

    def observed(i):
        return np.array([values[i][bin_of[i] == b].mean() if (bin_of[i] == b).any() else np.nan for b in used])

    every = np.arange(len(values))
    result = {}
    abscissas = {"roc": _GRID, "pr": _GRID, "calibration": np.array([scores[bin_of == b].mean() for b in used])}
    for name, curve in (("roc", roc), ("pr", precision_recall), ("calibration", observed)):
        y = curve(every)
        low = high = np.full_like(y, np.nan)
        if samples:
            drawn = np.array([curve(i) for i in samples])
            low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        result[name] = {"x": abscissas[name], "y": y, "low": low, "high": high}
    return result
