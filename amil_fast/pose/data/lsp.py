"""Leeds Sports Pose (LSP) and its extended training set (LSPET), as published: ``joints.mat`` and ``images/``.

The two files differ. LSP: ``joints (3, 14, S)``, third row 1 where a joint is *occluded*; all joints are annotated.
LSPET: ``joints (14, 3, S)``, third row 1 where a joint is *annotated*; other coordinates are undefined.
"""

import os
from pathlib import Path

import numpy as np

from amil_fast.pose.codec import joints_box
from amil_fast.pose.data.annotations import Annotations
from amil_fast.pose.data.errors import Problems
from amil_fast.pose.data.files import read_mat
from amil_fast.pose.skeletons import LSP14
from amil_fast.utils.files import DataError

# Margin around the annotated joints, for hands, feet and hair.
_JOINTS_MARGIN = 1.25
_LSPET_VALIDATION = 500


def load_lsp(
    root: str | os.PathLike,
    split: str = "train",
    *,
    crop: str = "image",
    skip_bad: bool = False,
    check_images: bool = True,
) -> Annotations:
    """Loads LSP.

    Args:
        root: folder with ``joints.mat`` and ``images/im0001.jpg``, ...
        split: ``"train"``, the first half (1,000 of the 2,000 published images), ``"test"``, the rest, or ``"all"``.
        crop: ``"image"`` crops the whole image, independently of the joints, as test crops must be; ``"joints"`` crops
            the bounding box of the annotated joints.
        skip_bad: exclude and list invalid entries instead of raising.
        check_images: verify that the images exist and are complete.

    Raises:
        DataError: invalid files; the message names file and entry.
    """
    splits = {"train": lambda S: range((S + 1) // 2), "test": lambda S: range((S + 1) // 2, S), "all": range}

    def read(raw):
        return raw[:2].transpose(2, 1, 0), np.where(raw[2].T == 0, 2, 1)

    return _load(root, split, splits, crop, skip_bad, check_images, axes=(3, 14), digits=4, read=read)


def load_lspet(
    root: str | os.PathLike,
    split: str = "train",
    *,
    crop: str = "image",
    skip_bad: bool = False,
    check_images: bool = True,
) -> Annotations:
    """Loads LSPET; arguments as for :func:`load_lsp`.

    Args:
        split: ``"val"``, the last 500 images, ``"train"``, the others, or ``"all"``.
    """

    def training(S):
        if S <= _LSPET_VALIDATION:
            raise DataError(
                f"{Path(root) / 'joints.mat'}: expected more than the {_LSPET_VALIDATION} validation entries, got {S}"
            )
        return S - _LSPET_VALIDATION

    splits = {
        "train": lambda S: range(training(S)),
        "val": lambda S: range(training(S), S),
        "all": range,
    }

    def read(raw):
        return raw[:, :2].transpose(2, 0, 1), np.where(raw[:, 2].T != 0, 2, 0)

    return _load(root, split, splits, crop, skip_bad, check_images, axes=(14, 3), digits=5, read=read)


def _load(root, split, splits, crop, skip_bad, check_images, *, axes, digits, read):
    root = Path(root)
    if split not in splits:
        raise ValueError(f"split: expected one of {', '.join(map(repr, splits))}, got {split!r}")
    if crop not in ("image", "joints"):
        raise ValueError(f"crop: expected 'image' or 'joints', got {crop!r}")
    source = root / "joints.mat"
    raw = read_mat(source, "joints")["joints"]
    if raw.ndim == 2:  # MATLAB drops a trailing axis of length 1
        raw = raw[..., None]
    if raw.ndim != 3 or raw.shape[:2] != axes or raw.dtype.kind not in "fiu":
        other = {(14, 3): " (the layout of LSPET)", (3, 14): " (the layout of LSP)"}.get(raw.shape[:2], "")
        raise DataError(f"{source}: joints: expected {axes[0]} x {axes[1]} x images, got {raw.shape}{other}")
    joints, visibility = read(raw.astype(np.float64))
    S = len(joints)
    problems = Problems(skip_bad)
    files = len(list((root / "images").glob("im*.jpg")))
    if check_images and files != S:
        problems.report(source, "", f"{S} entries, but {root / 'images'} holds {files} files im*.jpg")

    images = [f"images/im{i + 1:0{digits}d}.jpg" for i in range(S)]
    boxes = np.full((S, 4), np.nan)
    if crop == "joints":
        for i in range(S):
            box = joints_box(joints[i], visibility[i] > 0, least=8)
            if box is not None:
                boxes[i] = box
    everything = Annotations(
        source=source,
        root=root,
        skeleton=LSP14,
        images=images,
        joints=joints,
        visibility=visibility.astype(np.uint8),
        boxes=boxes,
        margin=_JOINTS_MARGIN if crop == "joints" else 1.0,
        ids=list(range(1, S + 1)),
    )
    chosen = everything.subset(np.array(splits[split](S), np.int64))
    return chosen.check(problems, lambda i: f"entry {chosen.ids[i] - 1}", check_images)
