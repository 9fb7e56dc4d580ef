"""Augmentation: which random numbers a crop gets, and the two ways to apply them (OpenCV, or torch on any device).

The numbers depend on (seed, epoch, index) only: neither the number of workers nor the order of the samples matters.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch

from amil_fast.pose.codec import crop_matrix, resampling

# Weights of R, G, B in the luminance (Rec. 601), about which saturation is changed.
_LUMINANCE = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes; 0 (or (1, 1)) switches one off.

    Attributes:
        flip: probability of a mirror image.
        rotation: the person is turned by up to so many degrees either way, uniformly.
        any_rotation: probability of a turn by any angle instead: people in LSPET are often upside down.
        scale: smallest and largest factor of the person's size (uniform in its logarithm).
        shift: the person is moved by up to this fraction of the crop's side, each way.
        brightness, contrast: up to this fraction of the full range is added, and of the contrast.
        saturation: up to this fraction of the saturation is added or taken away.
        tint: up to this fraction is added to or taken from each of R, G, B.
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

    def __post_init__(self):
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale: expected 0 < smallest <= largest, got {self.scale}")
        for name in ("flip", "any_rotation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a probability, got {getattr(self, name)}")

    def draw(self, seed, epoch, index):
        """The numbers for one crop.

        Returns ``(geometry, color)``: keyword arguments of :func:`crop_matrix`, and the ``(3, 4)`` float32 matrix of
        :func:`color_matrix`.
        """
        rng = np.random.default_rng((seed, epoch, index))
        # All numbers are drawn, used or not: switching one change off leaves the others as they were.
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


# Training on LSP and LSPET (gymnastics, parkour): many people at any angle. In a whole image of LSPET people are
# about 0.6 times as large as in a crop around their joints: a network trained on either finds them in the other.
SPORTS = Augmentation(any_rotation=0.3, scale=(0.6, 1.3))


def color_matrix(brightness=0.0, contrast=1.0, saturation=1.0, tint=(1.0, 1.0, 1.0)):
    """Matrix ``(3, 4)`` float32 on (R, G, B, 255): saturation, then contrast about mid-gray, tint and brightness."""
    mix = saturation * np.eye(3) + (1 - saturation) * _LUMINANCE
    gain = np.asarray(tint)[:, None] * contrast * mix
    offset = np.asarray(tint) * 0.5 * (1 - contrast) + brightness
    return np.column_stack([gain, offset]).astype(np.float32)


def warp_crop(image, matrix, size, color=None):
    """One crop from a decoded image.

    Args:
        image: ``(H, W, 3)`` uint8 BGR.
        matrix: ``(2, 3)``, crop pixels to the image's.
        size: side of the crop.
        color: ``(3, 4)`` from :func:`color_matrix`, or None.

    Returns:
        ``(3, size, size)`` uint8 **RGB**; what lies outside the image is black.
    """
    step = np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    factor = int(step + 1e-6)
    if factor >= 2:
        # Bilinear sampling skips pixels when it shrinks by 2 or more: average them first.
        height, width = image.shape[:2]
        small = max(1, round(width / factor)), max(1, round(height / factor))
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        to_small = resampling((width / small[0], height / small[1]))
        linear = matrix[:, :2] / to_small[[0, 1], [0, 1]][:, None]
        offset = (matrix[:, 2] - to_small[:, 2]) / to_small[[0, 1], [0, 1]]
        matrix = np.column_stack([linear, offset])
    crop = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    if color is not None:
        # The matrix reads and writes RGB, the crop is BGR.
        crop = cv2.transform(crop, color[::-1, [2, 1, 0, 3]] * np.array([1, 1, 1, 255], np.float32))
    return np.ascontiguousarray(crop[:, :, ::-1].transpose(2, 0, 1))


def warp_batch(images, matrices, size, colors=None):
    """Crops from a batch of equally large images in one ``grid_sample``, on the images' device.

    Args:
        images: ``(B, 3, P, Q)`` uint8 RGB.
        matrices: ``(B, 2, 3)`` floating point, crop pixels to image pixels.
        size: side of the crops.
        colors: ``(B, 3, 4)`` from :func:`color_matrix`, or None.

    Returns:
        ``(B, 3, size, size)`` float32 in [0, 1]. What :func:`warp_crop` gives, up to its rounding.
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
    grid = ((2 * x.movedim(1, -1) + 1) / extent) - 1  # align_corners=False: -1 and 1 are the outer edges
    crops = torch.nn.functional.grid_sample(
        images.float() / 255, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    if colors is None:
        return crops
    colors = colors.to(images.device, torch.float32)
    return (torch.baddbmm(colors[:, :, 3:], colors[:, :, :3], crops.flatten(2)).clamp(0, 1)).view(B, 3, size, size)


__all__ = ["SPORTS", "Augmentation", "color_matrix", "crop_matrix", "warp_batch", "warp_crop"]
