"""Which ingredient of a bag classifier makes the difference: cross-validations over a grid of settings, resumable."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amil_fast.mil.bag_files import BagData
from amil_fast.mil.training import PAPER_SETTINGS, MilSettings, cross_validate
from amil_fast.nn import MIRNet

GROUPS = ("pooling", "network", "ingredients", "all")


@dataclass(frozen=True)
class Cell:
    """One row of the study's table."""

    group: str
    label: str
    settings: MilSettings


def study_cells(groups=("pooling", "network", "ingredients"), **changes):
    """The rows of the study.

    Args:
        groups: ``"pooling"``: every pooling with the default recipe. ``"network"``: adjust and mean pooling × residual
            × deep supervision × loss. ``"ingredients"``: the default recipe with one ingredient taken out or one more
            put in, and the paper's settings with one put in. ``"all"``: every pooling × residual × deep supervision ×
            loss.
        changes: settings that replace those of every row, for example ``seed=1``.
    """
    base = dataclasses.replace(MilSettings(ensemble=1), **changes)
    paper = dataclasses.replace(PAPER_SETTINGS, **changes)
    poolings = [(f"adjust, T = {T}", {"pooling": "adjust", "num_iters": T}) for T in (1, 2, 3, 4, 5)]
    poolings += [(name, {"pooling": name}) for name in ("mean", "max", "lse", "attention", "gated_attention")]
    cells = []
    for group in groups:
        if group not in GROUPS:
            raise ValueError(f"groups: expected some of {', '.join(GROUPS)}, got {group!r}")
        if group == "pooling":
            cells += [Cell(group, label, dataclasses.replace(base, **pooling)) for label, pooling in poolings]
        elif group == "ingredients":
            off = {
                "instance and bag scale": {"instance_scale": 1.0, "bag_scale": 1.0},
                "soft clip": {"soft_clip": 0.0},
                "cosine schedule": {"schedule": "constant"},
            }
            kernel = {"kernel_weight": 0.75}
            extra = {
                "margin loss": {"loss": "bce+margin"},
                "dropout": {"input_dropout": 0.3, "dropout": 0.3},
                "instance norm": {"instance_norm": 20.0},  # 2 once scaled
                "set kernel": kernel,
                "set kernel, max": {"pooling": "max", **kernel},
            }
            cells.append(Cell(group, "recipe", base))
            for name, setting in off.items():
                cells.append(Cell(group, f"recipe without {name}", dataclasses.replace(base, **setting)))
            for name, setting in extra.items():
                cells.append(Cell(group, f"recipe with {name}", dataclasses.replace(base, **setting)))
            cells.append(Cell(group, "recipe, 5 networks", dataclasses.replace(base, ensemble=5)))
            cells.append(Cell(group, "set kernel alone", dataclasses.replace(base, kernel_weight=1.0)))
            cells.append(Cell(group, "paper's settings", paper))
            for name, setting in off.items():
                back = {field: getattr(base, field) for field in setting}
                cells.append(Cell(group, f"paper's settings with {name}", dataclasses.replace(paper, **back)))
            cells.append(Cell(group, "paper's settings with set kernel", dataclasses.replace(paper, **kernel)))
            cells.append(Cell(group, "paper's settings, mean", dataclasses.replace(paper, pooling="mean")))
        else:
            for label, pooling in poolings if group == "all" else [poolings[2], poolings[5]]:
                for residual in (True, False):
                    for deep in (True, False):
                        for loss in ("bce", "margin", "bce+margin", "mil"):
                            settings = dataclasses.replace(
                                base, **pooling, residual=residual, deep_supervision=deep, loss=loss
                            )
                            name = f"{label}, {'residual' if residual else 'plain'}, "
                            name += f"{'every level' if deep else 'last level'}, {loss}"
                            cells.append(Cell(group, name, settings))
    return cells


def run_study(files, cells, path, *, repetitions=None, on_cell=None):
    """Runs the cells that ``path`` does not hold yet, and writes it after each.

    Args:
        files: name -> :class:`amil_fast.mil.bag_files.BagData`.
        cells: of :func:`study_cells`.
        path: JSON file, made or continued.
        repetitions: use the first ones of each file only.
        on_cell: called with (number done, number in all, label) before each cell.

    Returns:
        ``{"results": {key: result}}``, the file's content; a key is a file's name, the repetitions and the settings.
    """
    path = Path(path)
    content = json.loads(path.read_text()) if path.exists() else {"results": {}}
    tasks = [(name, cell) for cell in cells for name in files]
    for number, (name, cell) in enumerate(tasks):
        if on_cell is not None:
            on_cell(number, len(tasks), f"{name}: {cell.label}")
        data = _first_repetitions(files[name], repetitions)
        key = _key(name, data, cell)
        if key in content["results"]:
            continue
        result = cross_validate(data, cell.settings, at_once=data.folds.shape[0] * data.folds.shape[1])
        del result["per_fold"]
        networks = data.folds.shape[0] * data.folds.shape[1] * cell.settings.ensemble
        result["ms_per_epoch"] = 1000 * result["seconds"] / (networks * cell.settings.epochs)
        result["parameters"] = _parameters(result["data"]["features"], cell.settings)
        content["results"][key] = result
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
    return content


def _first_repetitions(data, repetitions):
    folds = data.folds if repetitions is None else data.folds[:repetitions]
    return BagData(data.features, data.offsets, data.labels, folds)


def _key(name, data, cell):
    settings = dataclasses.asdict(cell.settings)
    del settings["backend"]  # backends differ in rounding only
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


def rows(files, cells, content, repetitions=None):
    """``(cell, {file name: result})`` for the cells whose results are complete."""
    table = []
    for cell in cells:
        keys = {name: _key(name, _first_repetitions(data, repetitions), cell) for name, data in files.items()}
        if all(key in content["results"] for key in keys.values()):
            table.append((cell, {name: content["results"][key] for name, key in keys.items()}))
    return table


def to_markdown(table):
    """The table as Markdown: accuracy ± its deviation over repetitions and AUC per file, their means, time, size."""
    if not table:
        return ""
    names = list(table[0][1])
    head = ["", *(f"{name} acc. / AUC" for name in names), "mean acc. / AUC", "ms per epoch", "parameters"]
    lines = []
    group = None
    for cell, results in table:
        if cell.group != group:
            group = cell.group
            lines += ["", f"| {' | '.join([f'**{group}**', *head[1:]])} |", "|" + "---|" * len(head)]
        columns = [f"{r['accuracy_mean']:.3f} ± {r['accuracy_std']:.3f} / {_auc(r):.3f}" for r in results.values()]
        accuracy = np.mean([r["accuracy_mean"] for r in results.values()])
        auc = np.mean([_auc(r) for r in results.values()])
        time = np.mean([r["ms_per_epoch"] for r in results.values()])
        sizes = [r["parameters"] for r in results.values()]
        size = f"{min(sizes) // 1000}k" if min(sizes) == max(sizes) else f"{min(sizes) // 1000}-{max(sizes) // 1000}k"
        lines.append(f"| {' | '.join([cell.label, *columns, f'{accuracy:.3f} / {auc:.3f}', f'{time:.1f}', size])} |")
    return "\n".join(lines[1:]) + "\n"


def _auc(result):
    return float("nan") if result["auc_mean"] is None else result["auc_mean"]


def draw(path, table):
    """Writes a picture: accuracy of every row, one panel per file, the bar its deviation over repetitions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(table[0][1])
    labels = [cell.label for cell, _ in table]
    groups = [cell.group for cell, _ in table]
    figure, axes = plt.subplots(
        1, len(names), figsize=(4.5 + 3.2 * len(names), 1.2 + 0.24 * len(labels)), sharey=True, layout="constrained"
    )
    colors = {group: f"C{i}" for i, group in enumerate(dict.fromkeys(groups))}
    y = np.arange(len(labels))
    for panel, name in zip(np.atleast_1d(axes), names, strict=True):
        accuracy = np.array([results[name]["accuracy_mean"] for _, results in table])
        deviation = np.array([results[name]["accuracy_std"] for _, results in table])
        for group, color in colors.items():
            of = np.array([g == group for g in groups])
            panel.errorbar(accuracy[of], y[of], xerr=deviation[of], fmt="o", ms=4, lw=1, color=color, label=group)
        panel.set_title(name)
        panel.set_xlabel("accuracy")
        panel.grid(alpha=0.3)
    first = np.atleast_1d(axes)[0]
    first.set_yticks(y, labels, fontsize=8)
    first.invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)
