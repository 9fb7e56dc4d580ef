"""Two-stage prediction on whole images: a coarse pass at several scales, then crops around the predicted joints."""

from collections.abc import Callable

import numpy as np

from amil_fast.pose.codec import joints_box

# Sides of the crops of the coarse pass, all centered, in units of the image's longer side. Its scores say little about
# the better scale, those of crops around the joints do, so that several scales are refined. PCK@0.2 of the generator of
# version 0.1 with three passes on LSPET (250 validation people, by whom this was chosen / 250 others): 57.2 / 56.8;
# with the first three scales 56.3 / 56.1; with one, chosen after the coarse pass, 54.5 / 54.1.
COARSE_MARGINS = (1.0, 0.8, 2 / 3, 0.5)
_BOX_MARGIN = 1.25
# A person's box is estimated from joints above this score, if there are at least so many.
_MIN_BOX_SCORE, _MIN_BOX_JOINTS = 0.2, 4

# look(people, boxes, part): predictions (M, K, 2) and scores (M, K) for M crops, of whole images (boxes None) with
# margins times part, or around boxes (M, 4). people (M,) are indices; one may occur several times.
Look = Callable[[np.ndarray, np.ndarray | None, float], tuple[np.ndarray, np.ndarray]]


def search(look: Look, num_people: int, passes: int) -> tuple[np.ndarray, np.ndarray]:
    """Predicts people in whole images, one in each.

    The first of several passes predicts at every scale of :data:`COARSE_MARGINS`. The second predicts on crops around
    the joints found at every scale; each further one does so for the better half, by the mean score, of the candidates
    of the pass before. A candidate with too few joints is not refined.

    Args:
        look: predicts crops.
        num_people: number of people N.
        passes: number of passes; 1: whole images only.

    Returns:
        ``coords (N, K, 2)`` and ``scores (N, K)`` of the candidates with the highest mean score.
    """
    everyone = np.arange(num_people)
    parts = COARSE_MARGINS[: None if passes > 1 else 1]
    coords, scores = map(np.stack, zip(*(look(everyone, None, part) for part in parts), strict=True))
    for number in range(passes - 1):
        if number:
            coords, scores = _best(coords, scores, -(-len(coords) // 2))
        boxes = boxes_of(coords.reshape(-1, *coords.shape[2:]), scores.reshape(-1, scores.shape[2]))
        found = np.isfinite(boxes).all(1)
        candidate, person = np.nonzero(found.reshape(len(coords), num_people))
        if len(person):
            coords[candidate, person], scores[candidate, person] = look(person, boxes[found], 1.0)
    coords, scores = _best(coords, scores, 1)
    return coords[0], scores[0]


def num_crops(passes: int) -> int:
    """Number of crops of a person in :func:`search`, if no candidate is left out."""
    candidates = len(COARSE_MARGINS) if passes > 1 else 1
    total = candidates
    for number in range(passes - 1):
        candidates = -(-candidates // 2) if number else candidates
        total += candidates
    return total


def _best(coords, scores, count):
    """For every person the ``count`` candidates with the highest mean scores, in descending order."""
    order = np.argsort(-scores.mean(-1), axis=0, kind="stable")[:count]
    everyone = np.arange(scores.shape[1])
    return coords[order, everyone], scores[order, everyone]


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
