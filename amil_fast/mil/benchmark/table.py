"""Table of the benchmark: accuracies with standard errors over bags, paired differences, as JSON, Markdown, picture."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from amil_fast.mil.bag_files import BagData
from amil_fast.mil.benchmark.methods import BenchmarkMethod, Predictions
from amil_fast.mil.benchmark.runner import Results
from amil_fast.mil.cross_validation import area_under_roc
from amil_fast.utils.files import atomic_path
from amil_fast.utils.optional import require


def summarize(
    results: Results, files: Mapping[str, BagData], methods: Sequence[BenchmarkMethod], reference: str
) -> dict[str, Any]:
    """Accuracies of the methods with results, for JSON.

    The accuracy of a method on a bag is the fraction of the repetitions in which its class is right at threshold .5.
    Standard errors are those of the mean over bags; for the mean over data sets these are combined as independent.
    Differences from the reference are taken bag by bag, over the repetitions that both methods have.

    Args:
        results: of :func:`~amil_fast.mil.benchmark.run_benchmark`.
        files: name -> bags.
        methods: methods to include.
        reference: name of the method of which the others' differences are given.

    Returns:
        ``{"reference": name, "data": [name], "methods": [row]}``, the rows in the order of the mean accuracy. A row has
        ``name``, ``label``, ``repetitions`` (name of the data set -> number), ``accuracy``, ``difference`` and, if
        known, ``peeking`` and ``peeking_gain`` (name of the data set or ``"mean"`` -> ``[value, standard error]``) and
        ``auc`` (name or ``"mean"`` -> mean over the folds with both classes, or None). ``"mean"`` is present, and rows
        have a place in the order, only if there are results on all data sets; the other rows come last.
    """
    rows = []
    for method in methods:
        of_method = {name: results[method.name, name] for name in files if (method.name, name) in results}
        of_reference = {name: results[reference, name] for name in of_method if (reference, name) in results}
        if of_method:
            rows.append(_row(method, of_method, {} if method.name == reference else of_reference, files))
    rows.sort(key=lambda row: -row["accuracy"].get("mean", [0.0])[0])
    return {"reference": reference, "data": list(files), "methods": rows}


def _row(method, results, of_reference, files):
    """Row of one method from its results and those of the reference (data set -> repetition -> predictions)."""
    accuracies = {name: _bag_accuracies(results[name], files[name]) for name in results}
    aucs = {name: _auc(results[name], files[name]) for name in results}
    row = {
        "name": method.name,
        "label": method.label,
        "repetitions": {name: len(predictions) for name, predictions in results.items()},
        "accuracy": _with_mean({name: _mean_and_error(values) for name, values in accuracies.items()}, files),
        "auc": aucs,
    }
    if len(aucs) == len(files):
        row["auc"] = {**aucs, "mean": None if None in aucs.values() else float(np.mean(list(aucs.values())))}
    if of_reference:
        differences = {name: _difference(results[name], of_reference[name], files[name]) for name in of_reference}
        row["difference"] = _with_mean(differences, files)
    if all(p.peeking is not None for predictions in results.values() for p in predictions.values()):
        peeking = {name: _bag_accuracies(results[name], files[name], "peeking") for name in results}
        gains = {name: _mean_and_error(peeking[name] - accuracies[name]) for name in results}
        row["peeking"] = _with_mean({name: _mean_and_error(values) for name, values in peeking.items()}, files)
        row["peeking_gain"] = _with_mean(gains, files)
    return row


def _bag_accuracies(predictions: dict[int, Predictions], data: BagData, entry: str = "probabilities") -> np.ndarray:
    """Fraction of the test parts with each bag in which it is classified correctly, ``(num_bags,)``; NaN if none."""
    p = np.concatenate([getattr(of_repetition, entry) for of_repetition in predictions.values()])
    tested = ~np.isnan(p)
    correct = tested & ((p >= 0.5) == data.labels)
    count = tested.sum(0)
    return np.where(count, correct.sum(0) / np.maximum(count, 1), np.nan)


def _difference(predictions, of_reference, data):
    common = predictions.keys() & of_reference.keys()
    values = [_bag_accuracies({r: p[r] for r in common}, data) for p in (predictions, of_reference)]
    return _mean_and_error(values[0] - values[1])


def _mean_and_error(values):
    values = values[~np.isnan(values)]
    return [float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0]


def _with_mean(by_name, files):
    if len(by_name) < len(files):
        return by_name
    pairs = np.array(list(by_name.values()))
    mean = [float(pairs[:, 0].mean()), float((pairs[:, 1] ** 2).sum() ** 0.5 / len(pairs))]
    return {**by_name, "mean": mean}


def _auc(predictions, data):
    folds = np.concatenate([of_repetition.probabilities for of_repetition in predictions.values()])
    aucs = [area_under_roc(p[~np.isnan(p)], data.labels[~np.isnan(p)]) for p in folds]
    known = [auc for auc in aucs if auc is not None]
    return float(np.mean(known)) if known else None


def to_markdown(summary: dict[str, Any]) -> str:
    """Two Markdown tables of a summary: all methods; and, if any, those that are also scored by peeking."""
    names = [*summary["data"], "mean"]
    reference = next((r["label"] for r in summary["methods"] if r["name"] == summary["reference"]), None)
    head = ["method", "repetitions", *names, *([] if reference is None else [f"mean − {reference}"])]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in summary["methods"]:
        counts = sorted(set(row["repetitions"].values()))
        cells = [row["label"], " to ".join(str(count) for count in counts[:: max(1, len(counts) - 1)])]
        for name in names:
            known = name in row["accuracy"]
            cells.append(f"{_value(row['accuracy'][name])} / {_three(row['auc'][name])}" if known else "")
        if reference is not None:
            cells.append(_value(row.get("difference", {}).get("mean"), sign=True))
        lines.append(_line(cells))
    peeking = [row for row in summary["methods"] if "peeking" in row]
    if peeking:
        head = ["method", "scoring", *names]
        lines += ["", _line(head), _line(["---"] * len(head))]
    for row in peeking:
        for scoring, entry in (("honest", "accuracy"), ("peeking", "peeking"), ("difference", "peeking_gain")):
            values = [_value(row[entry].get(name), sign=entry == "peeking_gain") for name in names]
            lines.append(_line([row["label"], scoring, *values]))
    return "\n".join(lines) + "\n"


def _line(cells):
    return f"| {' | '.join(cells)} |"


def _value(pair, sign=False):
    if pair is None:
        return ""
    return f"{_three(pair[0], sign)} ± {_three(pair[1])}"


def _three(value, sign=False):
    """Three decimals without the leading zero."""
    if value is None:
        return "-"
    text = f"{value:{'+' if sign else ''}.3f}".replace("0.", ".", 1)
    return text.replace("-", "−") if sign else text


def draw(path: str | os.PathLike, summary: dict[str, Any]) -> None:
    """Plots the accuracy of every method with its standard error, one panel per data set and one for the mean."""
    figure_module = require("matplotlib.figure", "pictures", package="matplotlib")
    names = [*summary["data"], "mean"]
    rows = summary["methods"]
    figure = figure_module.Figure(figsize=(3.5 + 2.2 * len(names), 1.2 + 0.26 * len(rows)), layout="constrained")
    y = np.arange(len(rows))
    for panel, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        values = np.array([row["accuracy"].get(name, [np.nan, np.nan]) for row in rows]).reshape(-1, 2)
        panel.errorbar(values[:, 0], y, xerr=values[:, 1], fmt="o", ms=4, lw=1, label="honest")
        peeking = [place for place, row in enumerate(rows) if name in row.get("peeking", ())]
        if peeking:
            panel.plot([rows[place]["peeking"][name][0] for place in peeking], peeking, "x", c="C3", label="peeking")
        panel.set_title(name)
        panel.set_xlabel("accuracy")
        panel.grid(alpha=0.3)
    figure.axes[0].set_yticks(y, [row["label"] for row in rows], fontsize=8)
    figure.axes[0].invert_yaxis()
    if any("peeking" in row for row in rows):
        figure.legend(*figure.axes[-1].get_legend_handles_labels(), fontsize=8, ncols=2, loc="outside lower left")
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=110)
