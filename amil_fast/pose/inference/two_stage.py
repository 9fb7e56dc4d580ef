"""Two-stage prediction on whole images: a coarse pass at several scales, then crops around the predicted joints."""

import numpy as np

from amil_fast.pose.codec import joints_box

# Sides of the crops of the coarse pass, all centered, in units of the image's longer side. On LSPET (250 validation
# people, generator of version 0.1) they give 55.0 % PCK@0.2 after the second pass, the whole image alone 52.8 %; a
# fourth scale of 0.56 adds nothing.
COARSE_MARGINS = (1.0, 0.8, 2 / 3)
_BOX_MARGIN = 1.25
# A person's box is estimated from joints above this score, if there are at least so many.
_MIN_BOX_SCORE, _MIN_BOX_JOINTS = 0.2, 4


def coarse_margins(passes: int) -> tuple[float, ...]:
    """Crops of the first of ``passes`` passes: the whole image only, unless others follow."""
    return COARSE_MARGINS if passes > 1 else COARSE_MARGINS[:1]


def best_scale(coords: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Selects for each person the scale with the highest mean score.

    Args:
        coords: ``(Z, N, K, 2)``, predictions at Z scales.
        scores: ``(Z, N, K)``.

    Returns:
        ``coords (N, K, 2)`` and ``scores (N, K)``.
    """
    best = scores.mean(-1).argmax(0)
    people = np.arange(scores.shape[1])
    return coords[best, people], scores[best, people]


def boxes_of(coords: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Estimates bounding boxes from predicted joints, with a margin for hands, feet and hair.

    Args:
        coords: ``(N, K, 2)`` in pixels.
        scores: ``(N, K)``.

    Returns:
        ``(N, 4)`` float64 (x, y, width, height), NaN where too few joints have a sufficient score.
    """
    boxes = np.full((len(coords), 4), np.nan)
    for i, (joints, score) in enumerate(zip(coords, scores, strict=True)):
        confident = (score >= _MIN_BOX_SCORE) & np.isfinite(joints).all(-1)
        if confident.sum() >= _MIN_BOX_JOINTS:
            box = joints_box(joints, confident, least=8)
            assert box is not None  # there are confident joints
            x, y, w, h = box
            more = (_BOX_MARGIN - 1) * max(w, h) / 2
            boxes[i] = x - more, y - more, w + 2 * more, h + 2 * more
    return boxes
