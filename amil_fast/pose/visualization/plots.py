"""Curves, confusion matrices and error histograms (Matplotlib figures, independent of the active backend)."""

import os

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from amil_fast.pose.skeletons import Skeleton, get_skeleton
from amil_fast.utils.files import atomic_path

_INK = "#33363b"


def _figure(width, height):
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _save(figure, path):
    if path is not None:
        with atomic_path(path) as partial:
            figure.savefig(partial)


def _style(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK)
    axes.grid(color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)


def plot_curves(
    results: dict[str, dict], path: str | os.PathLike | None = None, *, metric: str = "PCK", marked: float = 0.2
) -> Figure:
    """Plots PCK or PCKh over the threshold r (Fig. 5 of the paper): a panel for the mean and for each joint group.

    Args:
        results: name -> result of the metric; a line each.
        path: file to write, or None.
        metric: label of the axis.
        marked: threshold that is marked, with its values above the panels.
    """
    first = next(iter(results.values()))
    panels = ["mean", *first["groups"]]
    columns = 4
    rows = -(-len(panels) // columns)
    figure = _figure(11.5, 2.75 * rows + 0.4)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    lines = ["#7a1fa2", "#1f6fd6", "#0a8a4a", "#e8590c", "#c2185b", "#5f6b7a"]
    for panel, axes in enumerate(grid.flat):
        if panel >= len(panels):
            axes.set_visible(False)
            continue
        name = panels[panel]
        _style(axes)
        axes.axvline(marked, color="#b9bdc6", linewidth=0.9, linestyle=(0, (4, 3)))
        values_at = []
        for number, (label, result) in enumerate(results.items()):
            thresholds = np.asarray(result["thresholds"])
            values = 100 * np.asarray(result["mean"] if name == "mean" else result["groups"][name])
            color = lines[number % len(lines)]
            axes.plot(thresholds, values, color=color, linewidth=1.9, label=label, clip_on=False)
            at = values[np.argmin(np.abs(thresholds - marked))]
            values_at.append((f"{at:.1f}" if np.isfinite(at) else "–", color))
        axes.set_title(name, loc="left", fontsize=10.5, color=_INK, fontweight="bold" if name == "mean" else "normal")
        # Beside the title, where no curve can run through them.
        for place, (text, color) in enumerate(reversed(values_at)):
            axes.text(1 - 0.18 * place, 1.03, text, color=color, transform=axes.transAxes, ha="right", fontsize=9.5)
        axes.set_xlim(0, thresholds[-1])
        axes.set_ylim(0, 100)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"{metric} (%)", color=_INK)
    for column in range(columns):
        last = [axes for axes in grid[:, column] if axes.get_visible()][-1]
        last.set_xlabel("threshold r", color=_INK)
        last.tick_params(labelbottom=True)
    title = f"{metric} over the threshold r; numbers: r = {marked:g}"
    figure.suptitle(title, fontsize=11, color=_INK, x=0.01, ha="left")
    if len(results) > 1:
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False)
    _save(figure, path)
    return figure


def plot_confusion(
    counts: np.ndarray | torch.Tensor,
    skeleton: str | Skeleton,
    path: str | os.PathLike | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Plots the joint confusion matrix (Fig. 7 of the paper), in percent of each row; left-right swaps are framed.

    Args:
        counts: ``(K, K + 1)`` from :class:`~amil_fast.metrics.modules.JointConfusion`: rows are predicted joints,
            columns the annotated joints nearest to the predictions.
        skeleton: of the joints.
        path: file to write, or None.
        title: by default an explanation.
    """
    skeleton = get_skeleton(skeleton)
    counts = np.asarray(counts, float)
    K = len(counts)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = _figure(0.52 * (K + 4), 0.5 * (K + 2.5))
    axes = figure.subplots()
    # The square root makes rare errors visible.
    axes.imshow(np.sqrt(share), cmap="Purples", vmin=0, vmax=10, aspect="auto")
    for row in range(K):
        for column in range(K + 1):
            value = share[row, column]
            if value >= 0.05:
                text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
                shade = "white" if value > 40 else _INK
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=shade)
    for a, b in skeleton.flip_pairs:
        for row, column in ((a, b), (b, a)):
            corner = (column - 0.47, row - 0.47)
            axes.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, edgecolor="#e8590c", linewidth=1.1))
    names = list(skeleton.joints)
    axes.set_xticks(range(K + 1), [*names, "no joint"], rotation=50, ha="right", rotation_mode="anchor", fontsize=8.5)
    axes.set_yticks(range(K), names, fontsize=8.5)
    for label, color in zip(axes.get_yticklabels(), skeleton.joint_colors, strict=True):
        label.set_color(_readable(color))
    for label, color in zip(axes.get_xticklabels(), skeleton.joint_colors, strict=False):
        label.set_color(_readable(color))
    axes.axvline(K - 0.5, color=_INK, linewidth=1)
    axes.set_xlabel("nearest annotated joint", color=_INK)
    axes.set_ylabel("predicted", color=_INK)
    axes.tick_params(length=0)
    axes.set_title(
        title or "Annotated joint nearest to each prediction (%); framed: left-right swaps", fontsize=10, color=_INK
    )
    _save(figure, path)
    return figure


def _readable(color):
    """Joint color, darkened for small text on white."""
    red, green, blue = (channel / 255 for channel in color)
    light = 0.299 * red + 0.587 * green + 0.114 * blue
    factor = min(1.0, 0.45 / light)
    return (red * factor, green * factor, blue * factor)


def plot_errors(
    histogram: dict,
    skeleton: str | Skeleton,
    path: str | os.PathLike | None = None,
    *,
    unit: str = "person size",
) -> Figure:
    """Plots the error histogram of every joint, with the median and the fraction beyond the last bin.

    Args:
        histogram: result of :class:`~amil_fast.metrics.modules.JointErrors`.
        skeleton: of the joints.
        path: file to write, or None.
        unit: unit of the errors.
    """
    skeleton = get_skeleton(skeleton)
    edges, counts = np.asarray(histogram["edges"]), np.asarray(histogram["counts"], float)
    columns = 4 if skeleton.num_joints > 12 else 3
    rows = -(-skeleton.num_joints // columns)
    figure = _figure(11, 1.75 * rows + 0.5)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[skeleton.num_joints :]:
        axes.set_visible(False)
    for k, axes in zip(range(skeleton.num_joints), grid.flat, strict=False):
        _style(axes)
        share = 100 * counts[k] / max(counts[k].sum(), 1)
        color = [channel / 255 for channel in skeleton.joint_colors[k]]
        axes.bar(edges[:-1], share[:-1], np.diff(edges), align="edge", color=color, edgecolor="none")
        text = "not annotated"
        if counts[k].sum():
            passed = np.cumsum(share)
            first = int(np.argmax(passed >= 50))
            median = f"{(edges[first] + edges[first + 1]) / 2:.2f}" if first < len(edges) - 1 else f"> {edges[-1]:g}"
            text = f"median {median}, beyond {edges[-1]:g}: {share[-1]:.1f} %"
        axes.set_title(skeleton.joints[k], fontsize=9, color=_INK, loc="left")
        axes.text(0.98, 0.86, text, transform=axes.transAxes, ha="right", va="top", fontsize=7.5, color=_INK)
        axes.set_xlim(0, edges[-1])
    for axes in grid[:, 0]:
        axes.set_ylabel("%", color=_INK)
    for column in range(columns):
        last = [axes for axes in grid[:, column] if axes.get_visible()][-1]
        last.set_xlabel(f"error / {unit}", color=_INK, fontsize=8.5)
        last.tick_params(labelbottom=True)
    _save(figure, path)
    return figure
