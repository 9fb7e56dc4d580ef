"""Contact sheets: images in a grid with texts, samples of a data set, predictions beside ground truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch

from amil_fast.pose.data.dataset import PoseDataset
from amil_fast.pose.data.synthetic import SyntheticFigures
from amil_fast.pose.skeletons import Skeleton
from amil_fast.pose.visualization.drawing import pose_tile

_BACKGROUND = (250, 250, 250)
_TEXT = (40, 40, 40)
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def contact_sheet(
    rows: list[list[np.ndarray]],
    *,
    captions: list[list[str]] | None = None,
    titles: list[str] | None = None,
    heading: str | None = None,
    gap: int = 6,
) -> np.ndarray:
    """Arranges images in a grid with texts.

    Args:
        rows: images ``(side, side, 3)`` uint8 BGR of one size; rows may differ in length.
        captions: text below each image, nested as ``rows``.
        titles: text to the left of each row.
        heading: text above the grid.
        gap: space between images in pixels.

    Returns:
        ``(H, W, 3)`` uint8 BGR.

    Raises:
        ValueError: no image.
    """
    if not rows or not any(rows):
        raise ValueError("rows: expected at least one image")
    side = rows[0][0].shape[0]
    size = side / 460  # of the font
    line = round(side * 0.11) if captions else 0
    left = round(side * 0.42) if titles else gap
    top = round(side * 0.17) if heading else gap
    columns = max(len(row) for row in rows)
    sheet = np.full((top + len(rows) * (side + line + gap), left + columns * (side + gap), 3), _BACKGROUND, np.uint8)
    if heading:
        _text(sheet, heading, (gap, round(top * 0.68)), size * 1.35)
    for r, row in enumerate(rows):
        y = top + r * (side + line + gap)
        if titles:
            for i, part in enumerate(titles[r].split("\n")):
                _text(sheet, part, (gap, y + round(side * (0.09 + 0.1 * i))), size * 1.05)
        for c, tile in enumerate(row):
            x = left + c * (side + gap)
            sheet[y : y + side, x : x + side] = tile
            if captions and captions[r][c]:
                _text(sheet, captions[r][c], (x + 2, y + side + round(line * 0.72)), size, side - 4)
    return sheet


def _text(image, text, place, size, room=None):
    (width, _), _ = cv2.getTextSize(text, _FONT, size, 1)
    if room and width > room:
        size *= room / width
    cv2.putText(image, text, place, _FONT, size, _TEXT, 1, cv2.LINE_AA)


def sample_sheet(
    dataset: PoseDataset | SyntheticFigures,
    keys: Sequence[int | tuple[int, int]],
    *,
    columns: int = 8,
    side: int = 200,
    heading: str | None = None,
) -> np.ndarray:
    """Contact sheet of samples of a pose data set with their joints.

    Args:
        dataset: a pose data set.
        keys: indices, or pairs of epoch and index.
        columns: images per row.
        side: of an image in pixels.
        heading: text above the sheet.

    Returns:
        ``(H, W, 3)`` uint8 BGR; captions give index, epoch, and whether the crop is flipped.
    """
    skeleton = dataset.skeleton
    tiles, captions = [], []
    for key in keys:
        sample = dataset[key]
        tiles.append(
            pose_tile(sample["image"], sample["joints"], sample["visibility"] > 0, skeleton=skeleton, side=side)
        )
        epoch, index = key if isinstance(key, tuple) else (0, key)
        captions.append(f"#{index} epoch {epoch}{', flipped' if sample['flipped'] else ''}")
    parts = range(0, len(tiles), columns)
    return contact_sheet(
        [tiles[i : i + columns] for i in parts], captions=[captions[i : i + columns] for i in parts], heading=heading
    )


def comparison_sheet(
    crops: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    targets: np.ndarray,
    predictions: np.ndarray,
    valid: np.ndarray,
    errors: np.ndarray,
    *,
    skeleton: str | Skeleton,
    number: int = 6,
    side: int = 200,
    heading: str | None = None,
) -> np.ndarray:
    """Contact sheet of the best, median and worst samples, ground truth beside prediction.

    Args:
        crops: function of an index that returns ``(image (3, S, S), to_image (2, 3))``.
        targets: ``(N, K, 2)`` in image pixels.
        predictions: ``(N, K, 2)`` in image pixels.
        valid: ``(N, K)`` bool, annotated joints.
        errors: ``(N,)``, the ranking criterion; samples with NaN are left out.
        skeleton: of the joints.
        number: samples per row.
        side: of an image in pixels.
        heading: text above the sheet.

    Returns:
        ``(H, W, 3)`` uint8 BGR.
    """
    rows, captions = [], []
    chosen = best_median_worst(errors, number)
    for indices in chosen.values():
        row, texts = [], []
        for i in indices:
            image, to_image = crops(i)
            linear = np.linalg.inv(np.asarray(to_image)[:, :2])
            origin = np.asarray(to_image)[:, 2]
            for points, shown, what in ((targets[i], valid[i], "truth"), (predictions[i], None, "prediction")):
                in_crop = (np.asarray(points) - origin) @ linear.T
                row.append(pose_tile(image, in_crop, shown, skeleton=skeleton, side=side))
                texts.append(f"#{i} {what}" + (f", error {errors[i]:.2f}" if what == "prediction" else ""))
        rows.append(row)
        captions.append(texts)
    return contact_sheet(rows, captions=captions, titles=list(chosen), heading=heading)


def best_median_worst(errors: np.ndarray, number: int) -> dict[str, list[int]]:
    """Indices of the ``number`` samples with the smallest, median and largest errors; NaN is left out."""
    ranked = np.argsort(errors, kind="stable")[: int(np.isfinite(errors).sum())]
    number = min(number, len(ranked))
    middle = (len(ranked) - number) // 2
    return {
        "best": ranked[:number].tolist(),
        "median": ranked[middle : middle + number].tolist(),
        "worst": ranked[len(ranked) - number :][::-1].tolist(),
    }
