"""COCO keypoints: ``annotations/person_keypoints_<split>.json`` and a folder of images named like the split."""

from pathlib import Path

import numpy as np

from amil_fast.pose.data.annotations import Annotations
from amil_fast.pose.data.errors import DataError, Problems
from amil_fast.pose.data.files import read_json
from amil_fast.pose.skeletons import COCO17, get_skeleton

_MARGIN = 1.25


def load_coco(
    root, split="val2017", *, skip_bad=False, check_images=True, annotations=None, images=None, skeleton=COCO17
):
    """People with at least one annotated joint (and no crowds) of a COCO keypoints file.

    Args:
        root: folder with ``annotations/`` and the images' folder.
        split: ``"train2017"``, ``"val2017"``, or whatever ``annotations/person_keypoints_<split>.json`` exists.
        skip_bad: leave out and list what is bad instead of raising.
        check_images: see that the images are there and whole; without, only the joints are of use.
        annotations, images: file and folder, where they lie elsewhere; the folder's default is ``<root>/<split>``, or
            ``<root>/images/<split>`` or ``<root>/images`` where that exists instead.
        skeleton: what the K joints of the file are.

    Returns:
        :class:`Annotations`, ``ids`` being COCO's image ids. Raises DataError naming file and entry.
    """
    root, skeleton = Path(root), get_skeleton(skeleton)
    source = Path(annotations) if annotations else root / "annotations" / f"person_keypoints_{split}.json"
    content = read_json(source)
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise DataError(f"{source}: expected an object with the lists 'images' and 'annotations'")
    folders = [Path(images)] if images else [root / split, root / "images" / split, root / "images"]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])

    problems = Problems(skip_bad)
    files = {}
    for i, row in enumerate(content["images"]):
        try:
            files[row["id"]] = row["file_name"]
        except (KeyError, TypeError) as error:
            problems.report(source, f"images[{i}]", f"expected an object with id and file_name ({error!r})")
    K = skeleton.num_joints
    names, ids, entries, joints, visibility, boxes = [], [], [], [], [], []
    for i, row in enumerate(content["annotations"]):
        try:
            if row.get("iscrowd") or not any(row["keypoints"][2::3]):
                continue
            points = np.array(row["keypoints"], np.float64)
            box = np.array(row["bbox"], np.float64)
            if points.shape != (3 * K,):
                raise ValueError(f"expected {3 * K} numbers as keypoints ({skeleton.name}), got {points.size}")
            if box.shape != (4,) or not np.isfinite(box).all() or (box[2:] <= 0).any():
                raise ValueError(f"expected a bbox of a width and height above 0, got {row['bbox']}")
            if row["image_id"] not in files:
                raise ValueError(f"its image_id {row['image_id']!r} is not among the images")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            problems.report(source, f"annotations[{i}]", reason)
            continue
        points = points.reshape(K, 3)
        entries.append(i)
        names.append(files[row["image_id"]])
        ids.append(row["image_id"])
        joints.append(points[:, :2])
        visibility.append(np.clip(points[:, 2], 0, 2))
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
