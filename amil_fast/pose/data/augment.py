"""Augmentation: random parameters per crop, applied with OpenCV or with torch on any device.

Parameters depend on (seed, epoch, index) only, not on the number of workers or the order of the samples.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from amil_fast.pose.codec import resampling

# Color of cutouts, R, G, B in [0, 1]: ImageNet's mean, 0 after the normalization.
_CUTOUT_COLOR = np.array([0.485, 0.456, 0.406], np.float32)
# Weights of R, G, B in the luminance (Rec. 601), the fixed point of the saturation change.
_LUMINANCE = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random transformations; 0 (or (1, 1)) disables one.

    Attributes:
        flip: probability of a horizontal flip.
        rotation: maximum rotation in degrees, uniform in both directions.
        any_rotation: probability of a rotation by any angle instead; people in LSPET are often upside down.
        scale: minimum and maximum factor of the person's size, uniform in the logarithm.
        shift: maximum displacement in fractions of the crop's side, per axis.
        brightness: maximum change in fractions of the full range.
        contrast, saturation: maximum relative change.
        tint: maximum relative change of each of R, G, B.
        cutouts: maximum number of rectangles replaced by a uniform color; each appears with probability 1/2.
        cutout_size: minimum and maximum of their width and height in fractions of the crop's side.
    """

    flip: float = 0.5
    rotation: float = 40.0
    any_rotation: float = 0.0
    scale: tuple[float, float] = (0.75, 1.35)
    shift: float = 0.06
    brightness: float = 0.12
    contrast: float = 0.25
    saturation: float = 0.35
    tint: float = 0.06
    cutouts: int = 0
    cutout_size: tuple[float, float] = (0.1, 0.35)

    def __post_init__(self):
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale: expected 0 < smallest <= largest, got {self.scale}")
        for name in ("flip", "any_rotation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a probability, got {getattr(self, name)}")

    def draw(self, seed: int, epoch: int, index: int) -> tuple[dict[str, Any], NDArray[np.float32]]:
        """Draws the parameters of one crop.

        Returns:
            ``(geometry, color)``: keyword arguments of :func:`amil_fast.pose.codec.crop_matrix`, and the ``(3, 4)``
            float32 matrix of :func:`color_matrix`.
        """
        rng = np.random.default_rng((seed, epoch, index))
        # Always the same number of draws, so that disabling one transformation does not change the others.
        flip, turn, log_scale, any_turn = rng.random(4)
        (dx, dy), color = rng.uniform(-1, 1, 2), rng.uniform(-1, 1, 6)
        low, high = np.log(self.scale)
        geometry = {
            "flip": bool(flip < self.flip),
            "rotation": (2 * turn - 1) * (180.0 if any_turn < self.any_rotation else self.rotation),
            "scale": float(np.exp(low + log_scale * (high - low))),
            "shift": (dx * self.shift, dy * self.shift),
        }
        return geometry, color_matrix(
            brightness=color[0] * self.brightness,
            contrast=1 + color[1] * self.contrast,
            saturation=1 + color[2] * self.saturation,
            tint=1 + color[3:] * self.tint,
        )

    def draw_cutouts(self, seed: int, epoch: int, index: int) -> NDArray[np.float32]:
        """Draws the rectangles to cut out of one crop.

        Returns:
            ``(cutouts, 4)`` float32, (left, top, right, bottom) in fractions of the crop's side; 0 if not used.
        """
        # A generator of its own: parameters of :meth:`draw` do not depend on the cutouts.
        rng = np.random.default_rng((seed, epoch, index, 1))
        used = rng.random((self.cutouts, 1)) < 0.5
        extent = rng.uniform(*self.cutout_size, (self.cutouts, 2))
        low = rng.random((self.cutouts, 2)) - extent / 2
        return (used * np.concatenate([low, low + extent], 1)).astype(np.float32)


# For LSP and LSPET (gymnastics, parkour), where people appear at any angle. The lower scale covers whole images of
# LSPET, where people are about 0.6 times as large as in crops around their joints.
SPORTS = Augmentation(any_rotation=0.3, scale=(0.6, 1.3))
# For trainings of hundreds of epochs on few people.
STRONG = Augmentation(
    rotation=45.0,
    any_rotation=0.4,
    scale=(0.6, 1.4),
    shift=0.08,
    brightness=0.2,
    contrast=0.4,
    saturation=0.7,
    tint=0.12,
    cutouts=2,
)
# The same without rotations by any angle.
STRONG_UPRIGHT = dataclasses.replace(STRONG, any_rotation=0.0)


def color_matrix(
    brightness: float = 0.0,
    contrast: float = 1.0,
    saturation: float = 1.0,
    tint: Sequence[float] | NDArray[np.floating] = (1.0, 1.0, 1.0),
) -> NDArray[np.float32]:
    """Color transformation: saturation, contrast about mid-gray, tint and brightness.

    Returns:
        ``(3, 4)`` float32, to be multiplied by (R, G, B, 1) with colors in [0, 1].
    """
    mix = saturation * np.eye(3) + (1 - saturation) * _LUMINANCE
    gain = np.asarray(tint)[:, None] * contrast * mix
    offset = np.asarray(tint) * 0.5 * (1 - contrast) + brightness
    return np.column_stack([gain, offset]).astype(np.float32)


def warp_crop(
    image: NDArray[Any], matrix: NDArray[np.float64], size: int, color: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Samples one crop from a decoded image with OpenCV.

    Args:
        image: ``(H, W, 3)`` uint8 BGR.
        matrix: ``(2, 3)``, crop pixels to image pixels.
        size: side of the crop in pixels.
        color: ``(3, 4)`` of :func:`color_matrix`, or None.

    Returns:
        ``(3, size, size)`` uint8 **RGB**, black outside the image.
    """
    step = np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    factor = int(step + 1e-6)
    if factor >= 2:
        # Bilinear sampling aliases at reductions of 2 or more: reduce by area averaging first.
        height, width = image.shape[:2]
        small = max(1, round(width / factor)), max(1, round(height / factor))
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        to_small = resampling((width / small[0], height / small[1]))
        linear = matrix[:, :2] / to_small[[0, 1], [0, 1]][:, None]
        offset = (matrix[:, 2] - to_small[:, 2]) / to_small[[0, 1], [0, 1]]
        matrix = np.column_stack([linear, offset])
    crop = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    if color is not None:
        # The color matrix is in RGB order, the crop in BGR.
        crop = cv2.transform(crop, color[::-1, [2, 1, 0, 3]] * np.array([1, 1, 1, 255], np.float32))
    return np.ascontiguousarray(crop[:, :, ::-1].transpose(2, 0, 1))


def cut_out(crop: NDArray[np.uint8], cutouts: NDArray[np.float32]) -> None:
    """Fills the rectangles of :meth:`Augmentation.draw_cutouts` in a crop ``(3, size, size)`` uint8 RGB, in place."""
    color = np.round(255 * _CUTOUT_COLOR).astype(np.uint8)[:, None, None]
    # Pixels whose centers are in the rectangle; the centers are at i + 1/2 of the crop's edges.
    limits = np.clip(np.ceil(cutouts * crop.shape[-1] - 0.5), 0, None).astype(int)
    for left, top, right, bottom in limits:
        crop[:, top:bottom, left:right] = color


def cut_out_batch(crops: torch.Tensor, cutouts: torch.Tensor) -> torch.Tensor:
    """:func:`cut_out` for a batch.

    Args:
        crops: ``(B, 3, size, size)`` floating point RGB in [0, 1].
        cutouts: ``(B, n, 4)`` on the same device.

    Returns:
        The crops with the rectangles filled.
    """
    centers = (torch.arange(crops.shape[-1], device=crops.device) + 0.5) / crops.shape[-1]
    inside = (cutouts[..., :2, None] <= centers) & (centers < cutouts[..., 2:, None])  # (B, n, 2, size): x, y
    filled = (inside[:, :, 1, :, None] & inside[:, :, 0, None, :]).any(1)[:, None]
    return torch.where(filled, torch.from_numpy(_CUTOUT_COLOR).to(crops).view(3, 1, 1), crops)


def warp_batch(
    images: torch.Tensor, matrices: torch.Tensor, size: int, colors: torch.Tensor | None = None
) -> torch.Tensor:
    """Samples crops from a batch of equally large images in one ``grid_sample``, on the images' device.

    Args:
        images: ``(B, 3, P, Q)`` uint8 RGB.
        matrices: ``(B, 2, 3)`` floating point, crop pixels to image pixels.
        size: side of the crops in pixels.
        colors: ``(B, 3, 4)`` of :func:`color_matrix`, or None.

    Returns:
        ``(B, 3, size, size)`` float32 in [0, 1]; equals :func:`warp_crop` up to rounding.
    """
    B, _, P, Q = images.shape
    matrices = matrices.to(images.device, torch.float32)
    steps = torch.arange(size, device=images.device, dtype=torch.float32)
    x = (
        matrices[:, :, 0, None, None] * steps
        + matrices[:, :, 1, None, None] * steps[:, None]
        + matrices[:, :, 2, None, None]
    )
    extent = torch.tensor([Q, P], device=images.device, dtype=torch.float32)
    grid = ((2 * x.movedim(1, -1) + 1) / extent) - 1  # align_corners=False: -1 and 1 are the image's edges
    crops = torch.nn.functional.grid_sample(
        images.float() / 255, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    if colors is None:
        return crops
    colors = colors.to(images.device, torch.float32)
    return (torch.baddbmm(colors[:, :, 3:], colors[:, :, :3], crops.flatten(2)).clamp(0, 1)).view(B, 3, size, size)
