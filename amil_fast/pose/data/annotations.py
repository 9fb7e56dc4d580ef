"""Annotations of people in images, the common form of all data sets."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from amil_fast.pose.data.errors import LeftOut, Problems
from amil_fast.pose.data.files import image_size, safe_path
from amil_fast.pose.skeletons import Skeleton
from amil_fast.utils.files import DataError, brief
from amil_fast.utils.limits import MAX_COORDINATE

# Pixels by which a joint may lie outside its image: data sets count from 0 or 1 and round differently.
OUTSIDE_TOLERANCE = 2.0


@dataclass
class Annotations:
    """S people, each in one image.

    Attributes:
        source: the annotation file, for messages.
        root: folder that image names are relative to.
        skeleton: the joints.
        images: S names of image files.
        joints: ``(S, K, 2)`` float64 in image pixels, NaN where not annotated.
        visibility: ``(S, K)`` uint8 as in COCO: 0 not annotated, 1 annotated but occluded, 2 visible.
        boxes: ``(S, 4)`` float64 bounding boxes (x, y, width, height), NaN for the whole image.
        margin: side of the crop in units of the box's longer side.
        head_sizes: ``(S,)`` float64, head size of PCKh in pixels, NaN where unknown.
        ids: S identifiers of the image in result files: numbers or names.
        sizes: ``(S, 2)`` int64, width and height of the images.
        left_out: entries that ``skip_bad`` excluded.

    Raises:
        DataError: arrays whose shapes do not match.
    """

    source: Path
    root: Path
    skeleton: Skeleton
    images: list[str]
    joints: NDArray[np.float64]
    visibility: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    margin: float = 1.0
    head_sizes: NDArray[np.float64] = None  # type: ignore[assignment]  # NaN by default
    ids: list[Any] = None  # type: ignore[assignment]  # the names by default
    sizes: NDArray[np.int64] | None = None
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
        # Files hold arbitrary coordinates for joints without annotation.
        self.joints = np.where(self.visibility[..., None] > 0, self.joints, np.nan)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def valid(self) -> NDArray[np.bool_]:
        """``(S, K)`` bool, annotated joints."""
        return self.visibility > 0

    def subset(self, indices: ArrayLike) -> "Annotations":
        """The people at ``indices``, in that order; or those selected by a bool mask ``(S,)``."""
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

    def fold(self, number: int, folds: int, seed: int = 0) -> tuple["Annotations", "Annotations"]:
        """Training and test part of fold ``number`` of ``folds``."""
        test = self.fold_mask(number, folds, seed)
        return self.subset(~test), self.subset(test)

    def fold_mask(self, number: int, folds: int, seed: int = 0) -> NDArray[np.bool_]:
        """Test part of fold ``number`` of ``folds``, ``(S,)`` bool. People of the same image are never separated."""
        if not 2 <= folds <= len(set(self.images)) or not 0 <= number < folds:
            photographs = len(set(self.images))
            raise ValueError(f"fold: expected 0 <= number < folds <= {photographs} images, got {number} of {folds}")
        names = list(dict.fromkeys(self.images))
        place = dict(zip(names, np.random.default_rng(seed).permutation(len(names)) % folds, strict=True))
        return np.array([place[name] == number for name in self.images])

    def check(self, problems: Problems, entry_name: Callable[[int], str], images: bool = True) -> "Annotations":
        """Validates images and joint coordinates, and returns the valid entries.

        A missing or truncated image, or an image name that could point outside ``root``, excludes the entry. A joint
        more than 2 pixels outside its image excludes the joint, except the skeleton's derived joints.

        Args:
            problems: raises at the first problem or collects them.
            entry_name: name of an entry for messages, by index.
            images: read the header and the end of every image; otherwise only names are checked, which is sufficient
                for scoring predictions.
        """
        known: dict[str, tuple[int, int] | Exception | None] = {}
        good: list[int] = []
        sizes: list[tuple[int, int]] = []
        derived = np.isin(np.arange(self.skeleton.num_joints), self.skeleton.derived)
        visibility, joints = self.visibility.copy(), self.joints.copy()
        for i, name in enumerate(self.images):
            key = name if isinstance(name, str) else brief(name)  # from files: of any type
            if key not in known:
                try:
                    path = safe_path(self.root, name)
                    known[key] = image_size(path) if images else None
                except ValueError as error:  # including DataError
                    known[key] = error
            size = known[key]
            if isinstance(size, Exception):
                problems.report(self.source, entry_name(i), str(size))
                continue
            good.append(i)
            if size is None:
                inside, region = (np.abs(joints[i]) <= MAX_COORDINATE).all(-1), "any image"
            else:
                sizes.append(size)
                excess = np.maximum(-joints[i], joints[i] - (np.array(size) - 1)).max(-1)
                inside = (excess <= OUTSIDE_TOLERANCE) | (derived & (excess <= MAX_COORDINATE))
                region = f"the image of {size[0]} x {size[1]} pixels"
            for k in np.flatnonzero(~inside & (visibility[i] > 0)):
                x, y = joints[i, k]
                problems.report(
                    self.source,
                    f"{entry_name(i)}, joint {k} ({self.skeleton.joints[k]})",
                    f"({x:g}, {y:g}) lies outside {region}",
                )
                visibility[i, k], joints[i, k] = 0, np.nan
        sized = replace(self, joints=joints, visibility=visibility)
        result = sized.subset(good) if len(good) < len(self) else sized
        result.sizes = np.array(sizes, np.int64).reshape(-1, 2) if images else None
        result.left_out = [*self.left_out, *problems.left_out]
        return result
