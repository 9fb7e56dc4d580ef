"""Coordinate maps between image, crop and heatmaps, and the encoding of joints as heatmaps.

Conventions, everywhere in :mod:`amil_fast.pose`:

- Points are (x, y). Integer coordinates are pixel *centers*; pixel i covers [i - 1/2, i + 1/2].
- Boxes are (x, y, width, height) between pixel *edges*: an image of W x H pixels is the box (0, 0, W, H), whose center
  is the point ((W - 1) / 2, (H - 1) / 2).
- Pixels are areas. A crop or a heatmap covers its box from edge to edge, so pixel u of an image reduced by r has its
  center at r u + (r - 1) / 2 of the original (``align_corners=False``). Flips and changes of resolution therefore
  introduce no offset.
- Matrices are 2 x 3, float64, and map column vectors (x, y, 1).

Image -> crop: :func:`joints_box` and :func:`crop_matrix` (which returns the matrix from the crop to the image, the one
that warping needs). Crop -> heatmaps: :func:`encode_targets`. Heatmap -> image: :func:`heatmap_to_image`, the matrix
for ``amil_fast.decode_heatmaps(affine=...)``.
"""

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from amil_fast.ops.heatmaps import encode_heatmaps

STRIDE = 4  # crop pixels per heatmap pixel, for every backbone

_Array = TypeVar("_Array", NDArray[np.floating], torch.Tensor)


# Affine maps


def invert(matrix: ArrayLike) -> NDArray[np.float64]:
    """Inverse of affine maps ``(..., 2, 3)``."""
    matrix = np.asarray(matrix, np.float64)
    linear = np.linalg.inv(matrix[..., :2])
    return np.concatenate([linear, -linear @ matrix[..., 2:]], -1)


def compose(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Affine map ``(2, 3)`` that applies ``second``, then ``first``."""
    linear = first[:, :2] @ second[:, :2]
    return np.column_stack([linear, first[:, :2] @ second[:, 2] + first[:, 2]])


def transform(matrix: NDArray[np.float64], points: NDArray[np.floating]) -> NDArray[np.float64]:
    """Points ``(..., 2)`` mapped by ``matrix (2, 3)``; NaN stays NaN."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def resampling(reduction: float | tuple[float, float]) -> NDArray[np.float64]:
    """Matrix from the pixels of an image reduced by r, or by (rx, ry), to those of the original."""
    rx, ry = np.broadcast_to(np.asarray(reduction, np.float64), 2)
    return np.array([[rx, 0.0, (rx - 1) / 2], [0.0, ry, (ry - 1) / 2]])


# Image -> crop


def joints_box(joints: NDArray[np.floating], visible: ArrayLike, least: float = 1.0) -> NDArray[np.float64] | None:
    """Bounding box ``(4,)`` of the visible joints.

    Args:
        joints: ``(K, 2)`` in image pixels.
        visible: ``(K,)`` bool, joints to enclose.
        least: minimum width and height in pixels.

    Returns:
        (x, y, width, height), or None if no joint is visible.
    """
    points = joints[np.asarray(visible, bool)]
    if not len(points):
        return None
    low, high = points.min(0), points.max(0)
    extent = np.maximum(high - low, least)
    return np.concatenate([(low + high) / 2 - extent / 2 + 0.5, extent])


def crop_matrix(
    box: ArrayLike,
    size: int,
    *,
    margin: float = 1.0,
    scale: float = 1.0,
    rotation: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    flip: bool = False,
) -> NDArray[np.float64]:
    """Matrix ``(2, 3)`` from the pixels of a square crop to image pixels.

    Args:
        box: ``(4,)``, (x, y, width, height) in image pixels. The crop is the square around its center with ``margin`` x
            the box's longer side.
        size: side of the crop in pixels.
        margin: side of the square in units of the box's longer side.
        scale: magnification of the person in the crop.
        rotation: rotation of the person in degrees, clockwise as displayed (y points down).
        shift: displacement of the person, (x, y) in fractions of the crop's side.
        flip: flip the crop horizontally. ``rotation`` and ``shift`` apply to the flipped crop.
    """
    x, y, w, h = (float(value) for value in np.asarray(box))
    step = max(w, h) * margin / (size * scale)  # image pixels per crop pixel
    angle = np.deg2rad(rotation)
    cos, sin = np.cos(angle), np.sin(angle)
    linear = step * np.array([[cos, sin], [-sin, cos]])  # inverse rotation: from the crop to the image
    if flip:
        linear = np.array([[-1.0, 0.0], [0.0, 1.0]]) @ linear
    middle = (size - 1) / 2 + np.asarray(shift, np.float64) * size
    center = np.array([x + w / 2 - 0.5, y + h / 2 - 0.5])
    return np.column_stack([linear, center - linear @ middle])


# Crop -> heatmaps, and heatmap -> crop or image


def encode_targets(joints: torch.Tensor, size: int, *, heatmap_std: float, visible: torch.Tensor) -> torch.Tensor:
    """Training targets: one Gaussian heatmap per joint, at the generator's resolution.

    Joints in crop pixels are mapped to heatmap pixels by u = (x - (s - 1) / 2) / s with s = :data:`STRIDE`, the inverse
    of ``heatmap_to_image(identity, STRIDE)``.

    Args:
        joints: ``(B, K, 2)`` in crop pixels.
        size: side of the crop in pixels.
        heatmap_std: standard deviation of the Gaussians in heatmap pixels.
        visible: ``(B, K)`` bool; the heatmaps of other joints are 0.

    Returns:
        ``(B, K, size / 4, size / 4)`` float32.
    """
    coords = (joints.float() - (STRIDE - 1) / 2) / STRIDE
    return encode_heatmaps(coords, size // STRIDE, size // STRIDE, heatmap_std=heatmap_std, visible=visible)[0]


def heatmap_to_image(to_image: _Array, stride: int) -> _Array:
    """Matrices from heatmap pixels to the image, for ``amil_fast.decode_heatmaps(affine=...)``.

    Heatmap pixel u covers ``stride`` crop pixels per axis, with its center at ``stride * u + (stride - 1) / 2``.

    Args:
        to_image: ``(..., 2, 3)`` from crop pixels to the image; the identity gives the matrix to the crop.
        stride: crop pixels per heatmap pixel.

    Returns:
        ``(..., 2, 3)``, of the type and dtype of ``to_image``.
    """
    offset = (stride - 1) / 2
    result = to_image * stride
    result[..., 2] = to_image[..., 2] + offset * (to_image[..., 0] + to_image[..., 1])
    return result
