"""COCO keypoints: ``annotations/person_keypoints_<split>.json`` and the images in a folder of the split's name."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from amil_fast.pose.data.annotations import Annotations
from amil_fast.pose.data.boxes import read_box
from amil_fast.pose.data.errors import BAD_ENTRY, Problems, reason
from amil_fast.pose.skeletons import COCO17, Skeleton, get_skeleton
from amil_fast.utils.files import DataError, brief, read_json

_MARGIN = 1.25


def load_coco(
    root: str | os.PathLike,
    split: str = "val2017",
    *,
    skip_bad: bool = False,
    check_images: bool = True,
    annotations: str | os.PathLike | None = None,
    images: str | os.PathLike | None = None,
    skeleton: str | Skeleton | dict[str, Any] = COCO17,
) -> Annotations:
    """Loads the people of a COCO keypoints file that have at least one annotated joint; crowds are excluded.

    Args:
        root: folder with ``annotations/`` and the image folder.
        split: ``"train2017"``, ``"val2017"``, or any other for which ``annotations/person_keypoints_<split>.json``
            exists.
        skip_bad: exclude and list invalid entries instead of raising.
        check_images: verify that the images exist and are complete.
        annotations, images: file and folder, if elsewhere. The image folder is by default ``<root>/<split>``,
            ``<root>/images/<split>`` or ``<root>/images``, the first that exists.
        skeleton: the K joints of the file.

    Returns:
        :class:`~amil_fast.pose.data.Annotations` with COCO's image ids as ``ids``.

    Raises:
        DataError: invalid files; the message names file and entry.
    """
    root, skeleton = Path(root), get_skeleton(skeleton)
    source = Path(annotations) if annotations else root / "annotations" / f"person_keypoints_{split}.json"
    content = read_json(source, dict, "an object with the lists 'images' and 'annotations'")
    if not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise DataError(f"{source}: expected an object with the lists 'images' and 'annotations'")
    folders = [Path(images)] if images else [root / split, root / "images" / split, root / "images"]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])

    problems = Problems(skip_bad)
    files = {}
    for i, row in enumerate(content["images"]):
        try:
            files[row["id"]] = row["file_name"]
        except BAD_ENTRY as error:
            problems.report(source, f"images[{i}]", f"expected an object with id and file_name: {reason(error)}")
    K = skeleton.num_joints
    names, ids, entries, joints, visibility, boxes = [], [], [], [], [], []
    for i, row in enumerate(content["annotations"]):
        try:
            if row.get("iscrowd") or not any(row["keypoints"][2::3]):
                continue
            points = np.array(row["keypoints"], np.float64)
            box = read_box(row["bbox"])
            if points.shape != (3 * K,):
                raise ValueError(f"expected {3 * K} numbers as keypoints ({skeleton.name}), got {points.size}")
            if row["image_id"] not in files:
                raise ValueError(f"image_id {brief(row['image_id'])} is not among the images")
        except BAD_ENTRY as error:
            problems.report(source, f"annotations[{i}]", reason(error))
            continue
        points = points.reshape(K, 3)
        entries.append(i)
        names.append(files[row["image_id"]])
        ids.append(row["image_id"])
        joints.append(points[:, :2])
        visibility.append(np.clip(np.nan_to_num(points[:, 2]), 0, 2))
        boxes.append(box)
    result = Annotations(
        source=source,
        root=folder,
        skeleton=skeleton,
        images=names,
        joints=np.array(joints).reshape(-1, K, 2),
        visibility=np.array(visibility).reshape(-1, K).astype(np.uint8),
        boxes=np.array(boxes).reshape(-1, 4),
        margin=_MARGIN,
        ids=ids,
    )
    return result.check(problems, lambda i: f"annotations[{entries[i]}]", check_images)
