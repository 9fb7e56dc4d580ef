"""Boxes, crops and the 2 x 3 matrices between crop and image.

Coordinates are (x, y); the center of the upper left pixel is (0, 0). Boxes are (x, y, width, height) between pixel
*edges*: a whole image of W x H pixels is the box (0, 0, W, H), whose center is the point ((W - 1) / 2, (H - 1) / 2). A
matrix maps column vectors (x, y, 1) and is float64. The crop's pixels, like heatmap pixels later, are areas: an output
of S pixels covers its box from edge to edge, so that mirroring and changing the resolution shift nothing.
"""

import numpy as np

from amil_fast.ops.heatmaps import encode_heatmaps

STRIDE = 4  # image pixels per heatmap pixel, of every backbone's feature map


def crop_matrix(box, size, *, margin=1.0, scale=1.0, rotation=0.0, shift=(0.0, 0.0), flip=False):
    """Matrix ``(2, 3)`` from the pixels of a square crop to the image's.

    Args:
        box: ``(4,)``; the crop is the square around its center whose side is the longer side of the box x ``margin``.
        size: side of the crop in pixels.
        scale: the person appears this many times larger.
        rotation: the person appears turned by so many degrees, clockwise as seen (y is down).
        shift: the person appears moved by these fractions of the crop's side, (x, y).
        flip: the crop is a mirror image (rotation and shift are those seen after mirroring).
    """
    x, y, w, h = (float(value) for value in box)
    step = max(w, h) * margin / (size * scale)  # image pixels per crop pixel
    angle = np.deg2rad(rotation)
    cos, sin = np.cos(angle), np.sin(angle)
    linear = step * np.array([[cos, sin], [-sin, cos]])  # the inverse turn: from the crop to the image
    if flip:
        linear = np.array([[-1.0, 0.0], [0.0, 1.0]]) @ linear
    middle = (size - 1) / 2 + np.asarray(shift, np.float64) * size
    center = np.array([x + w / 2 - 0.5, y + h / 2 - 0.5])
    return np.column_stack([linear, center - linear @ middle])


def invert(matrix):
    """Inverse of an affine map ``(..., 2, 3)``."""
    matrix = np.asarray(matrix, np.float64)
    linear = np.linalg.inv(matrix[..., :2])
    return np.concatenate([linear, -linear @ matrix[..., 2:]], -1)


def compose(first, second):
    """The map that applies ``second``, then ``first``; both ``(2, 3)``."""
    linear = first[:, :2] @ second[:, :2]
    return np.column_stack([linear, first[:, :2] @ second[:, 2] + first[:, 2]])


def transform(matrix, points):
    """Points ``(..., 2)`` through ``matrix (2, 3)``; NaN stays NaN."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def resampling(reduction):
    """Matrix from the pixels of an image made ``reduction`` = r or (rx, ry) times smaller to the original's."""
    rx, ry = np.broadcast_to(np.asarray(reduction, np.float64), 2)
    return np.array([[rx, 0.0, (rx - 1) / 2], [0.0, ry, (ry - 1) / 2]])


def heatmap_to_image(to_image, stride):
    """Matrices ``(..., 2, 3)`` from heatmap pixels to the image, given those of the crop. NumPy or torch.

    A heatmap pixel (u, v) covers ``stride`` x ``stride`` crop pixels, with its center at ``stride * u + (stride - 1) /
    2`` and the same for v. This is what ``decode_heatmaps(affine=...)`` takes.
    """
    offset = (stride - 1) / 2
    result = to_image * stride
    result[..., 2] = to_image[..., 2] + offset * (to_image[..., 0] + to_image[..., 1])
    return result


def joints_box(joints, visible, least=1.0):
    """Box around the annotated joints ``(K, 2)``, at least ``least`` pixels wide and high; None without any."""
    points = joints[np.asarray(visible, bool)]
    if not len(points):
        return None
    low, high = points.min(0), points.max(0)
    extent = np.maximum(high - low, least)
    return np.concatenate([(low + high) / 2 - extent / 2 + 0.5, extent])


def encode_targets(joints, size, *, heatmap_std, visible):
    """Heatmaps of joints in a crop, at the generator's resolution.

    Args:
        joints: ``(B, K, 2)`` in crop pixels.
        size: side of the crop in pixels.
        heatmap_std: standard deviation of the Gaussians in heatmap pixels.
        visible: ``(B, K)`` bool; maps of other joints are 0.

    Returns:
        ``(B, K, size / 4, size / 4)`` float32.
    """
    # The center of heatmap pixel 0 lies between the crop pixels it covers.
    coords = (joints.float() - (STRIDE - 1) / 2) / STRIDE
    return encode_heatmaps(coords, size // STRIDE, size // STRIDE, heatmap_std=heatmap_std, visible=visible)[0]
