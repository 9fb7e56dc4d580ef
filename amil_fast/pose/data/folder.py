"""A folder of images without ground truth, with boxes from a JSON file or the whole image."""

from pathlib import Path

import numpy as np

from amil_fast.pose.data.annotations import Annotations
from amil_fast.pose.data.errors import DataError, Problems
from amil_fast.pose.data.video import Boxes, find_inputs, is_image
from amil_fast.pose.skeletons import get_skeleton


def load_folder(root, boxes=None, *, skeleton="lsp14", margin=None, skip_bad=False):
    """People in the images below ``root``: one for each box of the JSON file ``boxes`` (see
    :class:`~amil_fast.pose.data.video.Boxes`), or one covering each whole image.

    ``margin`` is by default 1.25 around boxes and 1 around whole images. No joint is annotated. Returns
    :class:`Annotations`; raises DataError naming file and entry.
    """
    root, skeleton = Path(root), get_skeleton(skeleton)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder")
    names = [str(name) for file, name in find_inputs([root]) if is_image(file)]
    table = Boxes(boxes)
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
