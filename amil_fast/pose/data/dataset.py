"""Map-style data set of person crops with joints."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from amil_fast.pose.codec import compose, crop_matrix, invert, resampling, transform
from amil_fast.pose.data.annotations import Annotations
from amil_fast.pose.data.augment import Augmentation, cut_out, warp_crop
from amil_fast.pose.data.files import read_image, safe_path
from amil_fast.pose.skeletons import Skeleton


class PoseDataset(torch.utils.data.Dataset):
    """Crops of the people of an :class:`~amil_fast.pose.data.Annotations`.

    ``dataset[index]`` is a sample of epoch 0, ``dataset[epoch, index]`` of any epoch (the keys of
    :class:`~amil_fast.pose.data.PoseSampler`). A sample is a dict of tensors:

    ============  ==========================  =======================================================
    image         ``(3, size, size)`` uint8   RGB
    joints        ``(K, 2)`` float32          crop pixels, 0 where not annotated; left and right are
                                              swapped in a flipped crop
    visibility    ``(K,)`` uint8              0 not annotated, 1 occluded, 2 visible
    valid         ``(K,)`` bool               annotated and inside the crop, for losses
    to_image      ``(2, 3)`` float32          matrix from crop pixels to image pixels
    image_joints  ``(K, 2)`` float32          image pixels, 0 where not annotated; never swapped
    head_size     float32                     head size of PCKh in image pixels, NaN if unknown
    flipped       bool                        the crop is flipped horizontally
    index         int64                       index in the annotations
    ============  ==========================  =======================================================

    Args:
        annotations: the people.
        size: side of the square crop in pixels.
        augmentation: random transformations, or None.
        seed: seed of the augmentation.
        margin: side of the crop in units of the box's longer side; by default that of the annotations.
    """

    def __init__(
        self,
        annotations: Annotations,
        size: int = 256,
        *,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        margin: float | None = None,
    ):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size: expected a positive number of pixels, got {size!r}")
        self.annotations, self.size, self.augmentation, self.seed = annotations, size, augmentation, seed
        self.margin = annotations.margin if margin is None else margin
        self.skeleton = annotations.skeleton

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = self._index(index)
        geometry, color = self._draw(epoch, index)
        image, matrix = self._crop(index, geometry, color)
        if self.augmentation is not None:
            cut_out(image, self.augmentation.draw_cutouts(self.seed, epoch, index))
        return {"image": torch.from_numpy(image), **self._ground_truth(index, matrix, geometry.get("flip", False))}

    def _ground_truth(self, index, matrix, flip):
        people = self.annotations
        return ground_truth(
            people.joints[index],
            people.visibility[index],
            matrix,
            self.size,
            skeleton=self.skeleton,
            flip=flip,
            head_size=people.head_sizes[index],
            index=index,
        )

    def _index(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected less than {len(self)}, got {index}")
        return int(index) % len(self)

    def _draw(self, epoch, index):
        return ({}, None) if self.augmentation is None else self.augmentation.draw(self.seed, epoch, index)

    def _crop(self, index, geometry, color):
        annotations = self.annotations
        box = annotations.boxes[index]
        whole = bool(np.isnan(box[0]))
        shrink = 1.0 if whole else max(box[2:]) * self.margin / (self.size * geometry.get("scale", 1.0))
        image, reduction = read_image(safe_path(annotations.root, annotations.images[index]), shrink=shrink)
        if whole:
            box = (0, 0, image.shape[1], image.shape[0])
        matrix = crop_matrix(box, self.size, margin=self.margin, **geometry)
        to_decoded = compose(invert(resampling(reduction)), matrix) if reduction > 1 else matrix
        return warp_crop(image, to_decoded, self.size, color), matrix


def ground_truth(
    joints: NDArray[np.float64],
    visibility: NDArray[np.uint8],
    matrix: NDArray[np.float64],
    size: int,
    *,
    skeleton: Skeleton,
    flip: bool,
    head_size: float,
    index: int,
) -> dict[str, Any]:
    """All entries of a :class:`PoseDataset` sample except the image.

    Args:
        joints: ``(K, 2)`` in image pixels, NaN where not annotated.
        visibility: ``(K,)`` uint8.
        matrix: ``(2, 3)``, crop pixels to image pixels.
        size: side of the crop in pixels.
        skeleton: the joints.
        flip: the crop is flipped, so that left and right joints swap.
        head_size: head size of PCKh in image pixels.
        index: index in the annotations.
    """
    order = list(skeleton.flip_index) if flip else slice(None)
    in_crop = transform(invert(matrix), joints)[order]
    inside = ((in_crop >= -0.5) & (in_crop < size - 0.5)).all(-1)
    visibility = np.ascontiguousarray(visibility[order])
    return {
        "joints": torch.from_numpy(np.nan_to_num(in_crop).astype(np.float32)),
        "visibility": torch.from_numpy(visibility),
        "valid": torch.from_numpy(inside & (visibility > 0)),
        "to_image": torch.from_numpy(matrix.astype(np.float32)),
        "image_joints": torch.from_numpy(np.nan_to_num(joints).astype(np.float32)),
        "head_size": torch.tensor(head_size, dtype=torch.float32),
        "flipped": torch.tensor(bool(flip)),
        "index": torch.tensor(index),
    }
