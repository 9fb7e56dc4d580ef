"""MPII Human Pose: HRNet's JSON files with ``gt_valid.mat``, and the official MATLAB file.

Both count pixels from 1; :class:`Annotations` count from 0. As in Newell et al., a person's crop is the square of side
1.25 x 200 x ``scale`` pixels around ``center``, shifted down by 15 x ``scale``.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amil_fast.pose.data.annotations import Annotations
from amil_fast.pose.data.boxes import read_box
from amil_fast.pose.data.errors import BAD_ENTRY, Problems, reason
from amil_fast.pose.data.files import read_mat
from amil_fast.pose.skeletons import MPII16
from amil_fast.utils.files import DataError, read_json

_K = MPII16.num_joints
_PIXELS_PER_SCALE = 200.0
_MARGIN = 1.25
_SPLITS = ("train", "valid", "trainval", "test")
_MATLAB_FILE = "mpii_human_pose_v1_u12_1.mat"


def load_mpii(
    root: str | os.PathLike,
    split: str = "train",
    *,
    skip_bad: bool = False,
    check_images: bool = True,
    annotations: str | os.PathLike | None = None,
    head_boxes: str | os.PathLike | None = None,
) -> Annotations:
    """Loads MPII from HRNet's JSON files, ``annot/<split>.json`` and ``images/``.

    Args:
        root: the data set's folder.
        split: ``"train"``, ``"valid"`` (Tompson's 2,958 people), ``"trainval"`` or ``"test"`` (no joints).
        skip_bad: exclude and list invalid entries instead of raising.
        check_images: verify that the images exist and are complete.
        annotations: the JSON file, if elsewhere.
        head_boxes: ``gt_valid.mat`` for the split ``"valid"``; by default ``annot/gt_valid.mat`` if it exists. Without
            it, head sizes are computed from upper neck and head top.

    Raises:
        DataError: invalid files; the message names file and entry.
    """
    root = Path(root)
    _check_split(split)
    source = Path(annotations) if annotations else root / "annot" / f"{split}.json"
    rows = read_json(source, list, "a list of people")
    problems = Problems(skip_bad)
    people, entries = [], []
    for i, row in enumerate(rows):
        try:
            people.append(_person_of_row(row, needs_joints=split != "test"))
            entries.append(i)
        except BAD_ENTRY as error:
            problems.report(source, f"entry {i}", reason(error))
    boxes = None
    if split == "valid":
        box_file = Path(head_boxes) if head_boxes else root / "annot" / "gt_valid.mat"
        if box_file.exists():
            boxes = read_head_boxes(box_file)
            if len(boxes) != len(rows):
                raise DataError(f"{box_file}: {len(boxes)} head boxes, but {source} has {len(rows)} people")
            boxes = boxes[entries]
    return _annotations(source, root, people, entries, boxes, problems, check_images)


def read_head_boxes(path: str | os.PathLike) -> NDArray[np.float64]:
    """Reads ``headboxes_src`` of a MATLAB file: ``(S, 4)`` (x1, y1, x2, y2)."""
    raw = read_mat(path, "headboxes_src")["headboxes_src"]
    if raw.ndim == 2:
        raw = raw[..., None]
    if raw.ndim != 3 or raw.shape[:2] != (2, 2):
        raise DataError(f"{path}: headboxes_src: expected 2 x 2 x people, got {raw.shape}")
    return raw.transpose(2, 0, 1).reshape(-1, 4).astype(np.float64)


def load_mpii_mat(
    root: str | os.PathLike,
    split: str = "trainval",
    *,
    skip_bad: bool = False,
    check_images: bool = True,
    annotations: str | os.PathLike | None = None,
    tompson: str | os.PathLike | None = None,
) -> Annotations:
    """Loads MPII from the official MATLAB file.

    Args:
        root: folder with ``mpii_human_pose_v1_u12_1.mat`` and ``images/``.
        split: ``"trainval"``, all people annotated in training images; ``"valid"``, Tompson's validation people;
            ``"train"``, the others; ``"test"``, people in test images with a position and a scale.
        skip_bad: exclude and list invalid entries instead of raising.
        check_images: verify that the images exist and are complete.
        annotations: the MATLAB file, if elsewhere.
        tompson: file with ``RELEASE_img_index`` and ``RELEASE_person_index`` (``detections.mat`` of Tompson's split),
            required for ``"train"`` and ``"valid"``.

    Raises:
        DataError: invalid files; the message names file and entry.
    """
    root = Path(root)
    _check_split(split)
    source = Path(annotations) if annotations else root / _MATLAB_FILE
    release = read_mat(source, "RELEASE", structs=True)["RELEASE"]
    try:
        images, training = _listed(release.annolist), np.atleast_1d(release.img_train)
    except AttributeError as error:
        raise DataError(f"{source}: RELEASE: {reason(error)}") from None
    if len(images) != len(training):
        raise DataError(f"{source}: annolist has {len(images)} images, img_train {len(training)}")
    held_out = _tompson_people(tompson, len(images)) if split in ("train", "valid") else set()

    problems = Problems(skip_bad)
    people, entries, boxes = [], [], []
    for i, image in enumerate(images):
        if bool(training[i]) != (split != "test"):
            continue
        for j, rect in enumerate(_listed(getattr(image, "annorect", None))):
            if split in ("train", "valid") and ((i, j) in held_out) != (split == "valid"):
                continue
            if not _listed(getattr(rect, "objpos", None)) or not np.size(getattr(rect, "scale", ())):
                continue  # people in a crowd have neither
            points = _listed(getattr(getattr(rect, "annopoints", None), "point", None))
            if not points and split != "test":
                continue
            try:
                people.append(_person_of_rect(image.image.name, rect, points))
                entries.append((i, j))
                corners: list[Any] = [getattr(rect, name, ()) for name in ("x1", "y1", "x2", "y2")]
                boxes.append([float(corner) if np.size(corner) else np.nan for corner in corners])
            except BAD_ENTRY as error:
                problems.report(source, f"image {i}, person {j}", reason(error))
    return _annotations(source, root, people, entries, np.array(boxes).reshape(-1, 4), problems, check_images)


def _check_split(split):
    if split not in _SPLITS:
        raise ValueError(f"split: expected one of {', '.join(map(repr, _SPLITS))}, got {split!r}")


def _listed(value):
    """An array of structures, as squeezed by ``squeeze_me``, as a list."""
    if value is None:
        return []
    return [value] if not isinstance(value, np.ndarray) else list(value.reshape(-1))


def _tompson_people(path, num_images):
    if path is None:
        raise ValueError("tompson: expected the file with Tompson's validation people for this split, got None")
    content = read_mat(path, "RELEASE_img_index", "RELEASE_person_index")
    images, people = (content[key].reshape(-1).astype(int) for key in ("RELEASE_img_index", "RELEASE_person_index"))
    if len(images) != len(people) or (len(images) and not 1 <= images.min() <= images.max() <= num_images):
        raise DataError(f"{path}: image or person numbers do not match the {num_images} images of the data set")
    return set(zip((images - 1).tolist(), (people - 1).tolist(), strict=True))


def _person_of_row(row, needs_joints):
    center, scale = np.array(row["center"], np.float64), float(row["scale"])
    joints, visible = np.full((_K, 2), np.nan), np.zeros(_K)
    if needs_joints or "joints" in row:
        joints, visible = np.array(row["joints"], np.float64), np.array(row["joints_vis"], np.float64)
    if center.shape != (2,) or joints.shape != (_K, 2) or visible.shape != (_K,):
        shapes = f"{center.shape}, {joints.shape}, {visible.shape}"
        raise ValueError(f"expected center (2,), joints ({_K}, 2), joints_vis ({_K},), got {shapes}")
    return _person(row["image"], center, scale, joints - 1, np.where(visible > 0, 2, 0))


def _person_of_rect(name, rect, points):
    joints, visibility = np.full((_K, 2), np.nan), np.zeros(_K)
    for point in points:
        k = int(point.id)
        if not 0 <= k < _K:
            raise ValueError(f"expected joint ids from 0 to {_K - 1}, got {k}")
        hidden = str(getattr(point, "is_visible", "")) == "0"
        joints[k], visibility[k] = (float(point.x) - 1, float(point.y) - 1), 1 if hidden else 2
    center = np.array([float(rect.objpos.x), float(rect.objpos.y)])
    return _person(str(name), center, float(rect.scale), joints, visibility)


def _person(name, center, scale, joints, visibility):
    if not (np.isfinite(center).all() and np.isfinite(scale) and scale > 0):
        raise ValueError(f"expected a finite center and a positive scale, got {center.tolist()}, {scale}")
    side = _PIXELS_PER_SCALE * scale
    x, y = center - 1 + np.array([0.0, 15 * scale])
    return name, joints, visibility, read_box([x + 0.5 - side / 2, y + 0.5 - side / 2, side, side])


def _annotations(source, root, people, entries, head_boxes, problems, check_images):
    names, joints, visibility, boxes = zip(*people, strict=True) if people else ((), (), (), ())
    joints, visibility = np.array(joints).reshape(-1, _K, 2), np.array(visibility).reshape(-1, _K)
    a, b = MPII16.head_segment
    both = (visibility[:, a] > 0) & (visibility[:, b] > 0)
    head_sizes = np.where(both, MPII16.head_factor * np.linalg.norm(joints[:, a] - joints[:, b], axis=-1), np.nan)
    if head_boxes is not None:
        by_box = 0.6 * np.linalg.norm(head_boxes[:, 2:] - head_boxes[:, :2], axis=-1)
        head_sizes = np.where(np.isfinite(by_box), by_box, head_sizes)
    result = Annotations(
        source=source,
        root=Path(root) / "images",
        skeleton=MPII16,
        images=list(names),
        joints=joints,
        visibility=visibility.astype(np.uint8),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        margin=_MARGIN,
        head_sizes=head_sizes,
    )

    def entry_name(i):
        entry = entries[i]
        return f"image {entry[0]}, person {entry[1]}" if isinstance(entry, tuple) else f"entry {entry}"

    return result.check(problems, entry_name, check_images)
