"""Ablation study of bag classifiers: resumable cross-validations over a grid of settings."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amil_fast.mil.bag_files import BagData
from amil_fast.mil.cross_validation import cross_validate, format_accuracy
from amil_fast.mil.settings import LOSSES, PAPER_SETTINGS, MilSettings
from amil_fast.nn import MIRNet
from amil_fast.utils.files import DataError, atomic_path, read_json, write_json

GROUPS = ("pooling", "network", "ingredients", "all")


@dataclass(frozen=True)
class StudyRow:
    """Row of the study's table: one setting, cross-validated on every file."""

    group: str
    label: str
    settings: MilSettings


def study_rows(groups: Iterable[str] = ("pooling", "network", "ingredients"), **changes: Any) -> list[StudyRow]:
    """Returns the rows of the study.

    Args:
        groups: ``"pooling"``: every pooling with the default recipe. ``"network"``: adjust and mean pooling × residual
            × deep supervision × loss. ``"ingredients"``: the default recipe with one ingredient removed or added, and
            the paper's settings with one added. ``"all"``: every pooling × residual × deep supervision × loss.
        changes: settings that override those of every row, for example ``seed=1``.

    Raises:
        ValueError: an unknown group.
    """
    base = dataclasses.replace(MilSettings(ensemble=1), **changes)
    paper = dataclasses.replace(PAPER_SETTINGS, **changes)
    poolings: list[tuple[str, dict[str, Any]]]
    poolings = [(f"adjust, T = {T}", {"pooling": "adjust", "num_iters": T}) for T in (1, 2, 3, 4, 5)]
    poolings += [(name, {"pooling": name}) for name in ("mean", "max", "lse", "attention", "gated_attention")]
    rows: list[StudyRow] = []
    for group in groups:
        if group not in GROUPS:
            raise ValueError(f"groups: expected some of {', '.join(GROUPS)}, got {group!r}")
        if group == "pooling":
            rows += [StudyRow(group, label, dataclasses.replace(base, **pooling)) for label, pooling in poolings]
        elif group == "ingredients":
            off: dict[str, dict[str, Any]] = {
                "instance and bag scale": {"instance_scale": 1.0, "bag_scale": 1.0},
                "soft clip": {"soft_clip": 0.0},
                "cosine schedule": {"schedule": "constant"},
            }
            extra: dict[str, dict[str, Any]] = {
                "margin loss": {"loss": "bce+margin"},
                "dropout": {"input_dropout": 0.3, "dropout": 0.3},
                "instance norm": {"instance_norm": 20.0},  # 2 once scaled
            }
            rows.append(StudyRow(group, "recipe", base))
            for name, setting in off.items():
                rows.append(StudyRow(group, f"recipe without {name}", dataclasses.replace(base, **setting)))
            for name, setting in extra.items():
                rows.append(StudyRow(group, f"recipe with {name}", dataclasses.replace(base, **setting)))
            rows.append(StudyRow(group, "recipe, 5 networks", dataclasses.replace(base, ensemble=5)))
            rows.append(StudyRow(group, "paper's settings", paper))
            for name, setting in off.items():
                back = {field: getattr(base, field) for field in setting}
                rows.append(StudyRow(group, f"paper's settings with {name}", dataclasses.replace(paper, **back)))
            rows.append(StudyRow(group, "paper's settings, mean", dataclasses.replace(paper, pooling="mean")))
        else:
            for label, pooling in poolings if group == "all" else [poolings[2], poolings[5]]:
                for residual in (True, False):
                    for deep in (True, False):
                        for loss in LOSSES:
                            settings = dataclasses.replace(
                                base, **pooling, residual=residual, deep_supervision=deep, loss=loss
                            )
                            name = f"{label}, {'residual' if residual else 'plain'}, "
                            name += f"{'every level' if deep else 'last level'}, {loss}"
                            rows.append(StudyRow(group, name, settings))
    return rows


def run_study(
    files: dict[str, BagData],
    rows: list[StudyRow],
    path: str | os.PathLike,
    *,
    repetitions: int | None = None,
    on_row: Callable[[int, int, str], object] | None = None,
) -> dict:
    """Runs the cross-validations whose results ``path`` does not contain yet; writes ``path`` after each.

    Args:
        files: name -> bags.
        rows: of :func:`study_rows`.
        path: JSON file, created or continued.
        repetitions: number of repetitions of each file to use, from the first; None: all.
        on_row: called with (number done, total number, label) before each cross-validation.

    Returns:
        ``{"results": {key: result}}``, the content of the file; a key consists of file name, repetitions and settings.

    Raises:
        DataError: ``path`` exists and does not contain results of a study.
    """
    path = Path(path)
    content = read_json(path, dict, "the results of a study") if path.exists() else {"results": {}}
    if not isinstance(content.get("results"), dict):
        raise DataError(f"{path}: expected the results of a study: an object with the entry 'results'")
    tasks = [(name, row) for row in rows for name in files]
    for number, (name, row) in enumerate(tasks):
        if on_row is not None:
            on_row(number, len(tasks), f"{name}: {row.label}")
        data = _first_repetitions(files[name], repetitions)
        key = _key(name, data, row)
        if key in content["results"]:
            continue
        num_folds = data.folds.shape[0] * data.folds.shape[1]
        result = cross_validate(data, row.settings, at_once=num_folds)
        del result["per_fold"]
        networks = num_folds * row.settings.ensemble
        result["ms_per_epoch"] = 1000 * result["seconds"] / (networks * row.settings.epochs)
        result["parameters"] = _parameters(result["data"]["features"], row.settings)
        content["results"][key] = result
        write_json(path, content, indent=1)
    return content


def _first_repetitions(data, repetitions):
    folds = data.folds if repetitions is None else data.folds[:repetitions]
    return BagData(data.features, data.offsets, data.labels, folds)


def _key(name, data, row):
    settings = dataclasses.asdict(row.settings)
    del settings["backend"], settings["method"]  # backends differ in rounding only; every row is a network
    return json.dumps({"file": name, "repetitions": len(data.folds), **settings}, sort_keys=True)


def _parameters(features, settings):
    net = MIRNet(
        features,
        hidden=settings.hidden,
        depth=settings.depth,
        pooling=settings.pooling,
        deep_supervision=settings.deep_supervision,
    )
    return settings.ensemble * sum(p.numel() for p in net.parameters())


def complete_rows(
    files: dict[str, BagData], rows: list[StudyRow], content: dict, repetitions: int | None = None
) -> list[tuple[StudyRow, dict[str, dict]]]:
    """``(row, {file name: result})`` for the rows with results for all files."""
    table = []
    for row in rows:
        keys = {name: _key(name, _first_repetitions(data, repetitions), row) for name, data in files.items()}
        if all(key in content["results"] for key in keys.values()):
            table.append((row, {name: content["results"][key] for name, key in keys.items()}))
    return table


def to_markdown(table: list[tuple[StudyRow, dict[str, dict]]]) -> str:
    """Markdown table: accuracy ± standard deviation over repetitions and AUC per file, means, time, parameters."""
    if not table:
        return ""
    names = list(table[0][1])
    head = ["", *(f"{name} acc. / AUC" for name in names), "mean acc. / AUC", "ms per epoch", "parameters"]
    lines = []
    group = None
    for row, results in table:
        if row.group != group:
            group = row.group
            lines += ["", f"| {' | '.join([f'**{group}**', *head[1:]])} |", "|" + "---|" * len(head)]
        columns = [f"{format_accuracy(r)} / {_auc(r):.3f}" for r in results.values()]
        accuracy = np.mean([r["accuracy_mean"] for r in results.values()])
        auc = np.mean([_auc(r) for r in results.values()])
        time = np.mean([r["ms_per_epoch"] for r in results.values()])
        sizes = [r["parameters"] for r in results.values()]
        size = f"{min(sizes) // 1000}k" if min(sizes) == max(sizes) else f"{min(sizes) // 1000}-{max(sizes) // 1000}k"
        lines.append(f"| {' | '.join([row.label, *columns, f'{accuracy:.3f} / {auc:.3f}', f'{time:.1f}', size])} |")
    return "\n".join(lines[1:]) + "\n"


def _auc(result):
    return float("nan") if result["auc_mean"] is None else result["auc_mean"]


def draw(path: str | os.PathLike, table: list[tuple[StudyRow, dict[str, dict]]]) -> None:
    """Plots the accuracy of every row, one panel per file; bars are standard deviations over repetitions."""
    from matplotlib.figure import Figure

    names = list(table[0][1])
    labels = [row.label for row, _ in table]
    groups = [row.group for row, _ in table]
    figure = Figure(figsize=(4.5 + 3.2 * len(names), 1.2 + 0.24 * len(labels)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(names), sharey=True))
    colors = {group: f"C{i}" for i, group in enumerate(dict.fromkeys(groups))}
    y = np.arange(len(labels))
    for panel, name in zip(panels, names, strict=True):
        accuracy = np.array([results[name]["accuracy_mean"] for _, results in table])
        deviation = np.array([results[name]["accuracy_std"] or 0.0 for _, results in table])
        for group, color in colors.items():
            of = np.array([g == group for g in groups])
            panel.errorbar(accuracy[of], y[of], xerr=deviation[of], fmt="o", ms=4, lw=1, color=color, label=group)
        panel.set_title(name)
        panel.set_xlabel("accuracy")
        panel.grid(alpha=0.3)
    panels[0].set_yticks(y, labels, fontsize=8)
    panels[0].invert_yaxis()
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=110)
