"""Crops of people with their joints: the map-style data set that every loader and training run reads."""

import numpy as np
import torch

from amil_fast.pose.codec import compose, crop_matrix, invert, resampling, transform
from amil_fast.pose.data.augment import warp_crop
from amil_fast.pose.data.files import read_image, safe_path


class PoseDataset(torch.utils.data.Dataset):
    """Crops of the people of an :class:`~amil_fast.pose.data.annotations.Annotations`.

    Args:
        annotations: the people.
        size: side of the square crop in pixels.
        augmentation: an :class:`~amil_fast.pose.data.augment.Augmentation`, or None.
        seed: of the augmentation.
        margin: side of the crop in units of the box's longer side; by default that of the annotations.

    ``dataset[index]`` is sample ``index`` of epoch 0; ``dataset[epoch, index]`` of any epoch (what :class:`PoseSampler`
    asks for). A sample is a dict of tensors:

    ============  ==========================  ===================================================================
    image         ``(3, size, size)`` uint8   RGB
    joints        ``(K, 2)`` float32          in crop pixels, 0 where not annotated; left and right already changed
                                              places in a mirror image
    visibility    ``(K,)`` uint8              0 not annotated, 1 hidden, 2 visible
    valid         ``(K,)`` bool               annotated, and inside the crop: what a loss may look at
    to_image      ``(2, 3)`` float32          crop pixels to image pixels
    image_joints  ``(K, 2)`` float32          in image pixels, 0 where not annotated (not swapped)
    head_size     float32                     PCKh's size in image pixels, NaN where unknown
    flipped       bool                        the crop is a mirror image
    index         int64                       place in the annotations
    ============  ==========================  ===================================================================
    """

    def __init__(self, annotations, size=256, *, augmentation=None, seed=0, margin=None):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size: expected a number of pixels, got {size!r}")
        self.annotations, self.size, self.augmentation, self.seed = annotations, size, augmentation, seed
        self.margin = annotations.margin if margin is None else margin
        self.skeleton = annotations.skeleton

    def __len__(self):
        return len(self.annotations)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = self._index(index)
        geometry, color = self._draw(epoch, index)
        image, matrix = self._crop(index, geometry, color)
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


def ground_truth(joints, visibility, matrix, size, *, skeleton, flip, head_size, index):
    """What a sample of :class:`PoseDataset` holds besides its picture.

    Args:
        joints: ``(K, 2)`` in image pixels, NaN where not annotated; ``visibility (K,)`` uint8.
        matrix: ``(2, 3)``, crop pixels to the image's.
        size: side of the crop.
        flip: the crop is a mirror image, in which left and right joints change places.
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
