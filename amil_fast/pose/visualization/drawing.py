"""Poses drawn over pictures, and contact sheets of many of them (OpenCV, anti-aliased, in the paper's colors)."""

import cv2
import numpy as np

from amil_fast.pose.skeletons import get_skeleton

_SHIFT = 4  # fractional bits of OpenCV's fixed-point coordinates
_PAPER = (250, 250, 250)
_INK = (40, 40, 40)
# OpenCV's own circles of two or three pixels are diamonds.
_CIRCLE = np.stack([np.cos(np.arange(24) * np.pi / 12), np.sin(np.arange(24) * np.pi / 12)], -1)
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_pose(image, joints, shown=None, *, skeleton, thickness=None):
    """Draws one person's limbs and joints over an image, in place, and returns it.

    Args:
        image: ``(H, W, 3)`` uint8 BGR.
        joints: ``(K, 2)`` in its pixels.
        shown: ``(K,)`` bool, joints to draw; a limb is drawn where both ends are. By default those that are finite.
        skeleton: a :class:`~amil_fast.pose.skeletons.Skeleton` or its name.
        thickness: of a limb in pixels; by default it goes with the size of the person.
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
    # A dark rim keeps light limbs legible on light ground.
    for rim in (True, False):
        for (a, b), color in zip(skeleton.limbs, skeleton.limb_colors, strict=True):
            if shown[a] and shown[b]:
                _bar(image, joints[a], joints[b], thickness + (1.4 if rim else 0), (25, 25, 25) if rim else color[::-1])
    for k in np.flatnonzero(shown):
        radius = 0.8 * thickness + 0.4
        _disc(image, joints[k], radius + 0.9, (25, 25, 25))
        _disc(image, joints[k], radius, skeleton.joint_colors[k][::-1])
    return image


def draw_box(image, box, thickness=1):
    """Draws a box ``(x, y, width, height)`` over an image, in place, and returns it; NaN draws nothing."""
    if np.isfinite(box).all():
        x, y, w, h = (float(value) for value in box)
        corners = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]]) - 0.5
        points = np.round(corners * (1 << _SHIFT)).astype(np.int32)
        cv2.polylines(image, [points], True, (25, 25, 25), thickness + 2, cv2.LINE_AA, _SHIFT)
        cv2.polylines(image, [points], True, (245, 245, 245), thickness, cv2.LINE_AA, _SHIFT)
    return image


def _bar(image, a, b, width, color):
    """A line of any width with round ends; OpenCV's own have whole widths only."""
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


def to_picture(image, side=None):
    """A crop ``(3, S, S)`` uint8 or float in [0, 1], RGB, tensor or array, as ``(side, side, 3)`` uint8 BGR.

    Returns ``(picture, factor)``; crop pixel x is at ``factor * x + (factor - 1) / 2``.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8:
        image = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    picture = np.ascontiguousarray(image.transpose(1, 2, 0)[:, :, ::-1])
    side = side or picture.shape[0]
    factor = side / picture.shape[0]
    if factor != 1:
        method = cv2.INTER_CUBIC if factor > 1 else cv2.INTER_AREA
        picture = cv2.resize(picture, (side, side), interpolation=method)
    return picture, factor


def pose_tile(image, joints, shown=None, *, skeleton, side=240):
    """A crop with a pose over it: ``(side, side, 3)`` uint8 BGR. ``joints (K, 2)`` are in crop pixels."""
    picture, factor = to_picture(image, side)
    return draw_pose(picture, np.asarray(joints) * factor + (factor - 1) / 2, shown, skeleton=skeleton)


def contact_sheet(rows, *, captions=None, titles=None, heading=None, gap=6):
    """Pictures in a grid.

    Args:
        rows: list of lists of ``(side, side, 3)`` uint8 BGR pictures, all of one size; rows may differ in length.
        captions: a text below each picture, in the same nesting, or None.
        titles: a text to the left of each row, or None.
        heading: a text above it all, or None.

    Returns:
        ``(H, W, 3)`` uint8 BGR.
    """
    if not rows or not any(rows):
        raise ValueError("rows: expected at least one picture")
    side = rows[0][0].shape[0]
    size = side / 460  # of the font
    line = round(side * 0.11) if captions else 0
    left = round(side * 0.42) if titles else gap
    top = round(side * 0.17) if heading else gap
    columns = max(len(row) for row in rows)
    sheet = np.full((top + len(rows) * (side + line + gap), left + columns * (side + gap), 3), _PAPER, np.uint8)
    if heading:
        _text(sheet, heading, (gap, round(top * 0.68)), size * 1.35)
    for r, row in enumerate(rows):
        y = top + r * (side + line + gap)
        if titles:
            for i, part in enumerate(titles[r].split("\n")):
                _text(sheet, part, (gap, y + round(side * (0.09 + 0.1 * i))), size * 1.05)
        for c, picture in enumerate(row):
            x = left + c * (side + gap)
            sheet[y : y + side, x : x + side] = picture
            if captions and captions[r][c]:
                _text(sheet, captions[r][c], (x + 2, y + side + round(line * 0.72)), size, side - 4)
    return sheet


def _text(image, text, place, size, room=None):
    (width, _), _ = cv2.getTextSize(text, _FONT, size, 1)
    if room and width > room:
        size *= room / width
    cv2.putText(image, text, place, _FONT, size, _INK, 1, cv2.LINE_AA)


def sample_sheet(dataset, keys, *, columns=8, side=200, heading=None):
    """Contact sheet of samples of a pose data set with their joints, for looking at what a network is fed.

    ``keys``: what to ask the data set for. Captions name sample, epoch and whether it was mirrored.
    """
    skeleton = dataset.skeleton
    tiles, captions = [], []
    for key in keys:
        sample = dataset[key]
        tiles.append(
            pose_tile(sample["image"], sample["joints"], sample["visibility"] > 0, skeleton=skeleton, side=side)
        )
        epoch, index = key if isinstance(key, tuple) else (0, key)
        captions.append(f"#{index} epoch {epoch}{', mirrored' if sample['flipped'] else ''}")
    parts = range(0, len(tiles), columns)
    return contact_sheet(
        [tiles[i : i + columns] for i in parts], captions=[captions[i : i + columns] for i in parts], heading=heading
    )


def comparison_sheet(crops, targets, predictions, valid, errors, *, skeleton, number=6, side=200, heading=None):
    """Contact sheet of the best, median and worst samples, ground truth beside prediction.

    Args:
        crops: function of a sample's index giving ``(image (3, S, S), to_image (2, 3))``, its picture.
        targets, predictions: ``(N, K, 2)`` in image pixels; ``valid (N, K)`` bool.
        errors: ``(N,)`` what samples are ranked by, NaN = not ranked.
        number: samples in each row.
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


def best_median_worst(errors, number):
    """Indices of the ``number`` samples of the smallest, middle and largest errors; NaN left out."""
    ranked = np.argsort(errors, kind="stable")[: int(np.isfinite(errors).sum())]
    number = min(number, len(ranked))
    middle = (len(ranked) - number) // 2
    return {
        "best": ranked[:number].tolist(),
        "median": ranked[middle : middle + number].tolist(),
        "worst": ranked[len(ranked) - number :][::-1].tolist(),
    }
