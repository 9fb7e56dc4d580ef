"""Leeds Sports Pose and its extended training set, as published: ``images/`` beside ``joints.mat``.

The two files differ: LSP has ``joints (3, 14, S)``, the third row 1 where a joint is *hidden* (all are annotated);
LSPET has ``joints (14, 3, S)``, the third row 1 where a joint is *annotated* (the coordinates of the others mean
nothing).
"""

from pathlib import Path

import numpy as np

from amil_fast.pose.codec import joints_box
from amil_fast.pose.data.annotations import Annotations
from amil_fast.pose.data.errors import DataError, Problems
from amil_fast.pose.data.files import read_mat
from amil_fast.pose.skeletons import LSP14

# Crops around annotated joints leave this much room for hands, feet and hair.
_JOINTS_MARGIN = 1.25
_LSPET_VALIDATION = 500


def load_lsp(root, split="train", *, crop="image", skip_bad=False, check_images=True):
    """LSP: the first half (published: 1,000 of 2,000) for ``"train"``, the rest for ``"test"``, or ``"all"``.

    Args:
        root: folder with ``joints.mat`` and ``images/im0001.jpg``, ...
        crop: ``"image"``: the crop covers the whole image, as test crops must, which may know nothing of the joints;
            ``"joints"``: it is put around the annotated joints.
        skip_bad: leave out and list what is bad instead of raising.
        check_images: see that the images are there and whole; without, only the joints are of use.

    Returns:
        :class:`Annotations`. Raises DataError naming file and entry.
    """
    splits = {"train": lambda S: range((S + 1) // 2), "test": lambda S: range((S + 1) // 2, S), "all": range}

    def read(raw):
        return raw[:2].transpose(2, 1, 0), np.where(raw[2].T == 0, 2, 1)

    return _load(root, split, splits, crop, skip_bad, check_images, axes=(3, 14), digits=4, read=read)


def load_lspet(root, split="train", *, crop="image", skip_bad=False, check_images=True):
    """LSPET: all but the last 500 images for ``"train"``, these for ``"val"``, or ``"all"``. Arguments as for LSP."""

    def training(S):
        if S <= _LSPET_VALIDATION:
            raise DataError(
                f"{Path(root) / 'joints.mat'}: {S} entries; the last {_LSPET_VALIDATION} are for validation"
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
    if raw.ndim == 2:  # MATLAB drops the last axis of a single entry
        raw = raw[..., None]
    if raw.ndim != 3 or raw.shape[:2] != axes or raw.dtype.kind not in "fiu":
        other = {(14, 3): " (the order of LSPET)", (3, 14): " (the order of LSP)"}.get(raw.shape[:2], "")
        raise DataError(f"{source}: joints: expected {axes[0]} x {axes[1]} x images, got {raw.shape}{other}")
    joints, visibility = read(raw.astype(np.float64))
    S = len(joints)
    problems = Problems(skip_bad)
    files = len(list((root / "images").glob("im*.jpg")))
    if check_images and files != S:
        problems.report(source, "", f"it has {S} entries, but {root / 'images'} holds {files} files im*.jpg")

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
