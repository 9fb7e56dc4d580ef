"""People in images: what every data set is read into."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from amil_fast.pose.data.errors import DataError, LeftOut
from amil_fast.pose.data.files import image_size, safe_path
from amil_fast.pose.skeletons import Skeleton

# Coordinates may be counted from 0 or from 1 and rounded either way: only what is farther outside than this is wrong.
OUTSIDE_TOLERANCE = 2.0


@dataclass
class Annotations:
    """S people, each in one image.

    Attributes:
        source: the annotation file, for messages.
        root: folder the image names are relative to.
        skeleton: the joints.
        images: S names of image files.
        joints: ``(S, K, 2)`` float64 in image pixels, NaN where not annotated.
        visibility: ``(S, K)`` uint8 as in COCO: 0 not annotated, 1 annotated but hidden, 2 visible.
        boxes: ``(S, 4)`` float64 (x, y, width, height) around the person, NaN for the whole image.
        margin: side of the crop in units of the box's longer side.
        head_sizes: ``(S,)`` float64, PCKh's size in pixels, NaN where unknown.
        ids: S identifiers of the image in result files: numbers, or names.
        sizes: ``(S, 2)`` int64 width and height of the images.
        left_out: what ``skip_bad`` left out.
    """

    source: Path
    root: Path
    skeleton: Skeleton
    images: list
    joints: np.ndarray
    visibility: np.ndarray
    boxes: np.ndarray
    margin: float = 1.0
    head_sizes: np.ndarray | None = None
    ids: list | None = None
    sizes: np.ndarray | None = None
    left_out: list[LeftOut] = field(default_factory=list)

    def __post_init__(self):
        S, K = len(self.images), self.skeleton.num_joints
        self.head_sizes = np.full(S, np.nan) if self.head_sizes is None else self.head_sizes
        self.ids = list(self.images) if self.ids is None else self.ids
        for name, shape in (("joints", (S, K, 2)), ("visibility", (S, K)), ("boxes", (S, 4)), ("head_sizes", (S,))):
            if getattr(self, name).shape != shape:
                raise DataError(f"{self.source}: {name}: expected {shape}, got {getattr(self, name).shape}")
        if len(self.ids) != S:
            raise DataError(f"{self.source}: ids: expected {S}, got {len(self.ids)}")
        # What a file holds for a joint that isn't annotated must not leak into anything.
        self.joints = np.where(self.visibility[..., None] > 0, self.joints, np.nan)

    def __len__(self):
        return len(self.images)

    @property
    def valid(self):
        """``(S, K)`` bool, joints that are annotated."""
        return self.visibility > 0

    def subset(self, indices):
        """The people at ``indices`` (or where a mask of S bools is true), in that order."""
        indices = np.asarray(indices)
        indices = np.flatnonzero(indices) if indices.dtype == bool else indices.astype(np.int64)
        return replace(
            self,
            images=[self.images[i] for i in indices],
            ids=[self.ids[i] for i in indices],
            joints=self.joints[indices],
            visibility=self.visibility[indices],
            boxes=self.boxes[indices],
            head_sizes=self.head_sizes[indices],
            sizes=None if self.sizes is None else self.sizes[indices],
        )

    def fold(self, number, folds, seed=0):
        """``(train, test)`` of fold ``number`` of ``folds``, each an :class:`Annotations`."""
        test = self.fold_mask(number, folds, seed)
        return self.subset(~test), self.subset(test)

    def fold_mask(self, number, folds, seed=0):
        """``(S,)`` bool, the test part of fold ``number`` of ``folds``; all people of a photograph are on one side."""
        if not 2 <= folds <= len(set(self.images)) or not 0 <= number < folds:
            photographs = len(set(self.images))
            raise ValueError(f"fold: expected 0 <= number < folds <= {photographs} images, got {number} of {folds}")
        names = list(dict.fromkeys(self.images))
        place = dict(zip(names, np.random.default_rng(seed).permutation(len(names)) % folds, strict=True))
        return np.array([place[name] == number for name in self.images])

    def check(self, problems, entry_name, images=True):
        """Looks at every image's header and every joint's place; returns what is good.

        Args:
            images: otherwise no image is looked for: only joints matter, as for scoring predictions.
            problems: a :class:`Problems` that raises at the first problem or collects them.
            entry_name: function of an index giving what to call that entry in messages.

        A missing or truncated image, or one whose path could leave the root, costs the entry; a joint outside its image
        (by more than 2 px, and unless the skeleton says that the annotators computed it) costs that joint.
        """
        known = {}
        good, sizes = [], []
        derived = np.isin(np.arange(self.skeleton.num_joints), self.skeleton.derived)
        visibility, joints = self.visibility.copy(), self.joints.copy()
        for i, name in enumerate(self.images):
            if name not in known:
                try:
                    path = safe_path(self.root, name)
                    known[name] = image_size(path) if images else None
                except ValueError as error:  # DataError too
                    known[name] = error
            size = known[name]
            if isinstance(size, Exception):
                problems.report(self.source, entry_name(i), str(size))
                continue
            good.append(i)
            if size is None:
                continue
            sizes.append(size)
            excess = np.maximum(-joints[i], joints[i] - (np.array(size) - 1)).max(-1)
            inside = (excess <= OUTSIDE_TOLERANCE) | (derived & np.isfinite(excess))
            for k in np.flatnonzero(~inside & (visibility[i] > 0)):
                x, y = joints[i, k]
                problems.report(
                    self.source,
                    f"{entry_name(i)}, joint {k} ({self.skeleton.joints[k]})",
                    f"({x:g}, {y:g}) lies outside the image of {size[0]} x {size[1]} pixels",
                )
                visibility[i, k], joints[i, k] = 0, np.nan
        sized = replace(self, joints=joints, visibility=visibility)
        result = sized.subset(good) if len(good) < len(self) else sized
        result.sizes = np.array(sizes, np.int64).reshape(-1, 2) if images else None
        result.left_out = [*self.left_out, *problems.left_out]
        return result
