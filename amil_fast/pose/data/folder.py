"""A folder of images without ground truth."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from amil_fast.pose.data.annotations import Annotations
from amil_fast.pose.data.boxes import Boxes
from amil_fast.pose.data.errors import Problems
from amil_fast.pose.data.inputs import find_inputs, is_image
from amil_fast.pose.skeletons import Skeleton, get_skeleton
from amil_fast.utils.files import DataError


def load_folder(
    root: str | os.PathLike,
    boxes: str | os.PathLike | None = None,
    *,
    skeleton: str | Skeleton | dict[str, Any] = "lsp14",
    margin: float | None = None,
    skip_bad: bool = False,
) -> Annotations:
    """Loads the images below a folder; no joint is annotated.

    Args:
        root: the folder, searched recursively.
        boxes: JSON file of bounding boxes (see :class:`~amil_fast.pose.data.Boxes`), one person each; None: one person
            per image, with the whole image as the crop.
        skeleton: the joints.
        margin: side of the crop in units of the box's longer side; by default 1.25, and 1 for whole images.
        skip_bad: exclude and list invalid entries instead of raising.

    Raises:
        DataError: invalid files; the message names file and entry.
    """
    root, skeleton = Path(root), get_skeleton(skeleton)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    names = [str(name) for file, name in find_inputs([root]) if is_image(file)]
    table = Boxes(boxes)
    table.check_names(names)
    people = [(name, box) for name in names for box in table.of(name)]
    S, K = len(people), skeleton.num_joints
    result = Annotations(
        source=root if boxes is None else Path(boxes),
        root=root,
        skeleton=skeleton,
        images=[name for name, _ in people],
        joints=np.full((S, K, 2), np.nan),
        visibility=np.zeros((S, K), np.uint8),
        boxes=np.array([box for _, box in people]).reshape(S, 4),
        margin=margin if margin is not None else 1.0 if boxes is None else 1.25,
    )
    return result.check(Problems(skip_bad), lambda i: f"person {i}")
