"""Curves, confusion matrices and error histograms as pictures (Matplotlib, without a display)."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from amil_fast.pose.skeletons import get_skeleton

_INK = "#33363b"


def _figure(width, height):
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK)
    axes.grid(color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)


def plot_curves(results, path=None, *, metric="PCK", marked=0.2):
    """PCK or PCKh over the threshold r (the paper's Fig. 5): a panel for the mean and one for each joint group.

    Args:
        results: name -> what the metric's ``compute()`` gave; one line each.
        path: where to save the picture, or None.
        metric: text of the axis.
        marked: a threshold to mark.

    Returns the Matplotlib figure.
    """
    first = next(iter(results.values()))
    panels = ["mean", *first["groups"]]
    columns = 4
    rows = -(-len(panels) // columns)
    figure = _figure(11.5, 2.75 * rows + 0.4)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    lines = ["#7a1fa2", "#1f6fd6", "#0a8a4a", "#e8590c", "#c2185b", "#5f6b7a"]
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_visible(False)
            continue
        name = panels[place]
        _style(axes)
        axes.axvline(marked, color="#b9bdc6", linewidth=0.9, linestyle=(0, (4, 3)))
        texts = []
        for number, (label, result) in enumerate(results.items()):
            thresholds = np.asarray(result["thresholds"])
            values = 100 * np.asarray(result["mean"] if name == "mean" else result["groups"][name])
            color = lines[number % len(lines)]
            axes.plot(thresholds, values, color=color, linewidth=1.9, label=label, clip_on=False)
            at = values[np.argmin(np.abs(thresholds - marked))]
            texts.append((f"{at:.1f}" if np.isfinite(at) else "–", color))
        for line, (text, color) in enumerate(reversed(texts)):
            axes.text(0.97, 0.05 + 0.1 * line, text, color=color, transform=axes.transAxes, ha="right", fontsize=9.5)
        axes.set_title(name, fontsize=10.5, color=_INK, fontweight="bold" if name == "mean" else "normal")
        axes.set_xlim(0, thresholds[-1])
        axes.set_ylim(0, 100)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"{metric} (%)", color=_INK)
    for column in range(columns):
        last = [axes for axes in grid[:, column] if axes.get_visible()][-1]
        last.set_xlabel("threshold r", color=_INK)
        last.tick_params(labelbottom=True)
    title = f"{metric} over r; numbers: at r = {marked:g}"
    figure.suptitle(title, fontsize=11, color=_INK, x=0.01, ha="left")
    if len(results) > 1:
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False)
    if path is not None:
        figure.savefig(path)
    return figure


def plot_confusion(counts, skeleton, path=None, *, title=None):
    """The joint confusion matrix (the paper's Fig. 7): rows are joints predicted, columns what they landed on.

    Args:
        counts: ``(K, K + 1)`` from :class:`~amil_fast.metrics.modules.JointConfusion`.
        skeleton: a :class:`~amil_fast.pose.skeletons.Skeleton` or its name.

    Cells are percent of their row. The frames mark the cells where left and right were swapped.
    """
    skeleton = get_skeleton(skeleton)
    counts = np.asarray(counts, float)
    K = len(counts)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = _figure(0.52 * (K + 4), 0.5 * (K + 2.5))
    axes = figure.subplots()
    # Errors are rare: the square root brings out the pale end.
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
            axes.add_patch(_frame(corner))
    names = list(skeleton.joints)
    axes.set_xticks(range(K + 1), [*names, "no joint"], rotation=50, ha="right", rotation_mode="anchor", fontsize=8.5)
    axes.set_yticks(range(K), names, fontsize=8.5)
    for label, color in zip(axes.get_yticklabels(), skeleton.joint_colors, strict=True):
        label.set_color(_readable(color))
    for label, color in zip(axes.get_xticklabels(), skeleton.joint_colors, strict=False):
        label.set_color(_readable(color))
    axes.axvline(K - 0.5, color=_INK, linewidth=1)
    axes.set_xlabel("landed on", color=_INK)
    axes.set_ylabel("predicted", color=_INK)
    axes.tick_params(length=0)
    axes.set_title(
        title or "Which joint a prediction landed on (%); framed: left and right swapped", fontsize=10, color=_INK
    )
    if path is not None:
        figure.savefig(path)
    return figure


def _frame(corner):
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 0.94, 0.94, fill=False, edgecolor="#e8590c", linewidth=1.1)


def _readable(color):
    """The paper's colors, dark enough for small text on white."""
    red, green, blue = (channel / 255 for channel in color)
    light = 0.299 * red + 0.587 * green + 0.114 * blue
    factor = min(1.0, 0.45 / light)
    return (red * factor, green * factor, blue * factor)


def plot_errors(histogram, skeleton, path=None, *, unit="the person's size"):
    """Each joint's error histogram, one small panel per joint, with its median and the share beyond the last bin."""
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
    if path is not None:
        figure.savefig(path)
    return figure
