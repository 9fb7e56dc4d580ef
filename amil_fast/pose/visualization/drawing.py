"""Poses and boxes drawn over images (OpenCV, anti-aliased, in the colors of the paper)."""

import cv2
import numpy as np
import torch

from amil_fast.pose.skeletons import Skeleton, get_skeleton

_SHIFT = 4  # fractional bits of OpenCV's fixed-point coordinates
# cv2.circle draws a radius of two or three pixels as a diamond.
_CIRCLE = np.stack([np.cos(np.arange(24) * np.pi / 12), np.sin(np.arange(24) * np.pi / 12)], -1)


def draw_pose(
    image: np.ndarray,
    joints: np.ndarray,
    shown: np.ndarray | torch.Tensor | None = None,
    *,
    skeleton: str | Skeleton,
    thickness: float | None = None,
) -> np.ndarray:
    """Draws a person's limbs and joints over an image, in place, and returns it.

    Args:
        image: ``(H, W, 3)`` uint8 BGR.
        joints: ``(K, 2)`` in image pixels.
        shown: ``(K,)`` bool, joints to draw; a limb is drawn if both ends are. By default all finite joints.
        skeleton: a :class:`~amil_fast.pose.skeletons.Skeleton` or its name.
        thickness: of a limb in pixels; by default proportional to the person's extent.

    Raises:
        ValueError: ``joints`` or ``shown`` of the wrong shape.
    """
    skeleton = get_skeleton(skeleton)
    joints = np.asarray(joints, np.float64)
    finite = np.isfinite(joints).all(-1) & (np.abs(joints) < 1e6).all(-1)
    shown = finite if shown is None else np.asarray(shown, bool) & finite
    if joints.shape != (skeleton.num_joints, 2) or shown.shape != (skeleton.num_joints,):
        raise ValueError(f"joints: expected ({skeleton.num_joints}, 2) for {skeleton.name}, got {joints.shape}")
    if not shown.any():
        return image
    if thickness is None:
        extent = np.ptp(joints[shown], axis=0).max()
        thickness = float(np.clip(extent * 0.022, 1.6, max(2.0, max(image.shape[:2]) / 90)))
    # The dark rim keeps light limbs visible on a light background.
    for rim in (True, False):
        for (a, b), color in zip(skeleton.limbs, skeleton.limb_colors, strict=True):
            if shown[a] and shown[b]:
                _bar(image, joints[a], joints[b], thickness + (1.4 if rim else 0), (25, 25, 25) if rim else color[::-1])
    for k in np.flatnonzero(shown):
        radius = 0.8 * thickness + 0.4
        _disc(image, joints[k], radius + 0.9, (25, 25, 25))
        _disc(image, joints[k], radius, skeleton.joint_colors[k][::-1])
    return image


def draw_box(image: np.ndarray, box: np.ndarray, thickness: int = 1) -> np.ndarray:
    """Draws a box ``(x, y, width, height)`` over an image, in place, and returns it; a box with NaN is not drawn."""
    if np.isfinite(box).all():
        x, y, w, h = (float(value) for value in box)
        corners = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]]) - 0.5
        points = np.round(corners * (1 << _SHIFT)).astype(np.int32)
        cv2.polylines(image, [points], True, (25, 25, 25), thickness + 2, cv2.LINE_AA, _SHIFT)
        cv2.polylines(image, [points], True, (245, 245, 245), thickness, cv2.LINE_AA, _SHIFT)
    return image


def _bar(image, a, b, width, color):
    """Line of fractional width with round ends; cv2.line takes integer widths only."""
    along = b - a
    length = np.linalg.norm(along)
    if length > 1e-6:
        normal = np.array([-along[1], along[0]]) / length * (width / 2)
        outline = np.array([a + normal, b + normal, b - normal, a - normal])
        cv2.fillPoly(image, [np.round(outline * (1 << _SHIFT)).astype(np.int32)], color, cv2.LINE_AA, _SHIFT)
    _disc(image, a, width / 2, color)
    _disc(image, b, width / 2, color)


def _disc(image, middle, radius, color):
    outline = np.asarray(middle) + radius * _CIRCLE
    cv2.fillPoly(image, [np.round(outline * (1 << _SHIFT)).astype(np.int32)], color, cv2.LINE_AA, _SHIFT)


def to_bgr(image: np.ndarray | torch.Tensor, side: int | None = None) -> tuple[np.ndarray, float]:
    """Converts a crop ``(3, S, S)``, uint8 or float in [0, 1], RGB, to ``(side, side, 3)`` uint8 BGR.

    Returns:
        ``(image, factor)``; crop pixel x is at ``factor * x + (factor - 1) / 2``.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8:
        image = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    bgr = np.ascontiguousarray(image.transpose(1, 2, 0)[:, :, ::-1])
    side = side or bgr.shape[0]
    factor = side / bgr.shape[0]
    if factor != 1:
        method = cv2.INTER_CUBIC if factor > 1 else cv2.INTER_AREA
        bgr = cv2.resize(bgr, (side, side), interpolation=method)
    return bgr, factor


def pose_tile(
    image: np.ndarray | torch.Tensor,
    joints: np.ndarray | torch.Tensor,
    shown: np.ndarray | torch.Tensor | None = None,
    *,
    skeleton: str | Skeleton,
    side: int = 240,
) -> np.ndarray:
    """Crop with a pose drawn over it: ``(side, side, 3)`` uint8 BGR; ``joints (K, 2)`` in crop pixels."""
    tile, factor = to_bgr(image, side)
    return draw_pose(tile, np.asarray(joints) * factor + (factor - 1) / 2, shown, skeleton=skeleton)
