"""Instance heatmaps: weights or scores of a bag's instances at their coordinates."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from amil_fast.mil.prediction import MAX_INSTANCES, has_weights, network_input
from amil_fast.nn import MIRNet
from amil_fast.utils.files import DataError, atomic_path
from amil_fast.utils.optional import require

SCALES = ("log", "rank", "linear")
VALUES = ("weights", "scores")


@torch.no_grad()
def instance_values(
    net: MIRNet,
    features: torch.Tensor,
    values: str = "weights",
    *,
    class_index: int = -1,
    max_instances: int = MAX_INSTANCES,
) -> np.ndarray:
    """Values of the instances of one bag.

    Args:
        net: a trained network, in evaluation mode.
        features: instances ``(n, D)``.
        values: ``"weights"``: weights of the pooling of the last level, with sum 1. ``"scores"``: the prediction for
            every instance as a bag by itself (a probability, or a value for regression).
        class_index: class of the scores; by default the last one, for two classes the positive one.
        max_instances: instances scored at once.

    Returns:
        float32 ``(n,)``.

    Raises:
        ValueError: an unknown name, or weights of a pooling that has none (max, lse).
    """
    if values not in VALUES:
        raise ValueError(f"values: expected one of {', '.join(VALUES)}, got {values!r}")
    parameter = next(net.parameters())
    features = network_input(net, features.to(parameter.device))
    if values == "weights":
        if not has_weights(net):
            raise ValueError(f"values: pooling {net.config['pooling']!r} has no weight per instance; use 'scores'")
        output = net(features, cu_seqlens=torch.tensor([0, len(features)], device=features.device), return_weights=True)
        assert output.weights is not None
        return output.weights[-1].float().cpu().numpy()
    scores = [
        net(rows, cu_seqlens=torch.arange(len(rows) + 1, device=rows.device)).probabilities
        for rows in features.split(max_instances)
    ]
    result = torch.cat(scores).float()
    if net.num_classes > 1:
        result = result[:, class_index]
    elif class_index == 0 and net.task == "classification":
        result = 1 - result
    return result.cpu().numpy()


def scaled_values(values: np.ndarray, scale: str = "log") -> np.ndarray:
    """Values on the scale of a heatmap.

    Args:
        values: ``(n,)``; for ``"log"`` nonnegative.
        scale: ``"log"``: log₁₀ of the value relative to the mean, bounded to ±2; ``"rank"``: 0 for the smallest to 1
            for the largest, ties at their mean; ``"linear"``: unchanged.

    Raises:
        ValueError: an unknown scale.
    """
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    values = np.asarray(values, dtype=np.float64)
    if scale == "linear" or not len(values):
        return values
    if scale == "rank":
        rank = require("scipy.stats", "ranks", package="scipy").rankdata(values)
        return (rank - 1) / max(len(values) - 1, 1)
    if values.min() < 0:
        raise ValueError("scale: 'log' is for nonnegative values; use 'rank' or 'linear'")
    with np.errstate(divide="ignore"):
        return np.clip(np.log10(values / max(values.mean(), np.finfo(float).tiny)), -2, 2)


def patch_size_of(coords: np.ndarray, attributes: Mapping[str, float] | None = None) -> float:
    """Side of the patches in the units of ``coords``: a stored attribute, or the distance between neighbors.

    TRIDENT stores ``patch_size_level0``. A ``patch_size`` at another magnification (CLAM) would be wrong in these
    units, and is not used.
    """
    stored = (attributes or {}).get("patch_size_level0")
    if stored:
        return float(stored)
    steps = [np.diff(np.unique(coords[:, axis])) for axis in range(2)]
    steps = [step for step in steps if len(step)]
    return float(min(np.median(step) for step in steps)) if steps else 1.0


def draw_heatmap(
    path: str | os.PathLike,
    coords: np.ndarray,
    values: np.ndarray,
    *,
    scale: str = "log",
    patch_size: float | None = None,
    thumbnail: np.ndarray | None = None,
    downsample: float | None = None,
    opacity: float = 0.5,
    title: str = "",
    label: str = "",
) -> None:
    """Draws values at their coordinates, over a thumbnail if there is one.

    Args:
        path: picture to write; the suffix determines the format.
        coords: upper left corners of the patches as (x, y), ``(n, 2)``.
        values: ``(n,)``, such as :func:`instance_values`.
        scale: as for :func:`scaled_values`.
        patch_size: side of the patches in the units of ``coords``; by default the distance between neighbors.
        thumbnail: image ``(H, W, 3)`` of the whole, RGB.
        downsample: units of ``coords`` per pixel of the thumbnail.
        opacity: of the heatmap over the thumbnail.
        title: text above.
        label: name of the values, at the color bar.

    Raises:
        ValueError: shapes that do not match, or a thumbnail without ``downsample``.
    """
    coords, values = np.asarray(coords, dtype=np.float64), np.asarray(values)
    if coords.shape != (len(values), 2) or not len(values):
        raise ValueError(f"coords: expected shape ({len(values)}, 2), a row per value, got {coords.shape}")
    if thumbnail is not None and not (downsample and downsample > 0):
        raise ValueError(f"downsample: expected a positive number with a thumbnail, got {downsample}")
    shown = scaled_values(values, scale)
    patch_size = patch_size_of(coords) if patch_size is None else patch_size
    grid, origin = _raster(coords, shown, patch_size)
    height, width = grid.shape
    right, bottom = origin[0] + width * patch_size, origin[1] + height * patch_size

    figure_module = require("matplotlib.figure", "heatmaps", package="matplotlib")
    if thumbnail is not None:
        assert downsample is not None
        full_width, full_height = thumbnail.shape[1] * downsample, thumbnail.shape[0] * downsample
    else:
        full_width, full_height = right - origin[0], bottom - origin[1]
    aspect = np.clip(full_height / full_width, 0.3, 3)
    side = 8 / max(aspect, 1)
    figure = figure_module.Figure(figsize=(side + 1.4, side * aspect + 0.6), layout="constrained")
    axes = figure.subplots()
    if thumbnail is not None:
        axes.imshow(thumbnail, extent=(0, full_width, full_height, 0))
    limits: dict[str, Any] = {"log": {"vmin": -2, "vmax": 2}, "rank": {"vmin": 0, "vmax": 1}}.get(scale, {})
    image = axes.imshow(
        np.ma.masked_invalid(grid),
        extent=(origin[0], right, bottom, origin[1]),
        cmap="coolwarm",
        alpha=opacity if thumbnail is not None else 1.0,
        interpolation="nearest",
        **limits,
    )
    if thumbnail is not None:
        axes.set(xlim=(0, full_width), ylim=(full_height, 0))
    axes.set(xticks=[], yticks=[], title=title)
    notes = {"log": "log₁₀ of {} / mean", "rank": "rank of {}", "linear": "{}"}
    figure.colorbar(image, ax=axes, shrink=0.7, label=notes[scale].format(label or "value"))
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=130)


def _raster(coords, values, patch_size):
    """Mean value per cell of a grid of patches, NaN where there is none; and the grid's upper left corner."""
    origin = coords.min(0)
    cells = np.rint((coords - origin) / patch_size).astype(np.int64)
    width, height = cells.max(0) + 1
    if width * height > 10**8:
        raise ValueError(f"patch_size: expected a larger one: {patch_size} gives a grid of {width} x {height} patches")
    flat = cells[:, 1] * width + cells[:, 0]
    counts = np.bincount(flat, minlength=width * height)
    total = np.bincount(flat, weights=values, minlength=width * height)
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, total / counts, np.nan).reshape(height, width), origin


def read_thumbnail(path: str | os.PathLike) -> np.ndarray:
    """An image file as RGB ``(H, W, 3)``."""
    image = require("PIL.Image", "thumbnails", package="pillow")
    try:
        with image.open(path) as opened:
            return np.asarray(opened.convert("RGB"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected an image file: {error}") from None
