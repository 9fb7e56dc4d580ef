"""A test network with known predictions: locates the LSP joints, rendered as dots of known colors.

The left and right joints of a pair share a color; the one in the left half of the crop is the right joint. As for a
trained network, flipping a person thus exchanges left and right.
"""

import numpy as np
import torch

from amil_fast.pose.skeletons import LSP14

SIZE = 128


# Color index of each joint, 0 to 7, shared by the joints of a pair. Black is reserved for pixels outside the image.
_FIRST = [min(k, other) for k, other in enumerate(LSP14.flip_index)]
KINDS = [sorted(set(_FIRST)).index(first) for first in _FIRST]
_CORNERS = [[255 * (number >> bit & 1) for bit in range(3)] for number in range(1, 8)]
PALETTE = np.array([[*_CORNERS, [255, 128, 0]][kind] for kind in KINDS])
GROUND = (110, 128, 140)


class ColorFinder(torch.nn.Module):
    skeleton = "lsp14"
    input_size = SIZE
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, swapped=False):
        super().__init__()
        colors = torch.tensor(PALETTE / 255, dtype=torch.float32)
        self.register_buffer("colors", colors.flip(1) if swapped else colors)
        self.sharpness = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, images):
        distance = (images[:, None] - self.colors[None, :, :, None, None]).abs().sum(2)  # (B, K, S, S)
        found = (1 - self.sharpness * distance).clamp(min=0)
        half = images.shape[-1] // 2
        for k, name in enumerate(LSP14.joints):
            if name.startswith("right"):
                found[:, k, :, half:] = 0
            elif name.startswith("left"):
                found[:, k, :, :half] = 0
        blurred = torch.nn.functional.avg_pool2d(found, 9, stride=1, padding=4)
        return [None, torch.nn.functional.avg_pool2d(blurred, 4)]  # like stacked blocks: the last one is decoded


def build():
    return ColorFinder()


def not_a_network():
    return 3


def person(rng, width=200, height=200, box=None):
    """Returns well separated joints ``(14, 2)`` in a bounding box (x, y, w, h), the right ones in its left half."""
    x, y, w, h = box or (0, 0, width, height)
    joints = np.zeros((14, 2))
    for k, name in enumerate(LSP14.joints):
        column = 0.28 if name.startswith("right") else 0.72 if name.startswith("left") else 0.5
        joints[k] = column + rng.uniform(-0.06, 0.06), KINDS[k] / 9 + 0.11 + rng.uniform(-0.02, 0.02)
    return joints * (w, h) + (x, y)


def ground(width, height):
    """Returns a plain BGR image."""
    return np.full((height, width, 3), GROUND[::-1], np.uint8)


def paint(image, joints, radius):
    """Draws the joints as dots of their colors on a BGR image, in place."""
    import cv2

    for k, point in enumerate(joints):
        center = np.round(point * 16).astype(int).tolist()
        cv2.circle(image, center, round(radius * 16), PALETTE[k][::-1].tolist(), -1, cv2.LINE_8, 4)
    return image
