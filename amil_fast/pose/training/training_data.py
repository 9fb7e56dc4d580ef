"""What a pose network is trained and validated on, from a configuration."""

from dataclasses import dataclass

import numpy as np
import torch

from amil_fast.pose.data import SPORTS, Augmentation, CropArchive, PoseDataset, SyntheticFigures, load
from amil_fast.pose.training.config import SYNTHETIC

_AUGMENTATIONS = {"none": None, "default": Augmentation(), "sports": SPORTS}


@dataclass
class TrainingData:
    """Data sets as :class:`~amil_fast.pose.data.PoseDataset`; ``validation`` may be None.

    ``notes`` are for the user."""

    training: torch.utils.data.Dataset
    validation: torch.utils.data.Dataset | None
    notes: list

    @property
    def skeleton(self):
        return self.training.skeleton


def training_data(config, *, on_device=False):
    """The data sets of a :class:`~amil_fast.pose.training.config.TrainConfig`.

    Args:
        on_device: packed crops are augmented on the training device.

    Raises:
        ValueError: nothing to read, or too few people for ``holdout`` or one batch; DataError from the data itself.
    """
    data, seed = config.data, config.run.seed
    augmentation = _AUGMENTATIONS[data.augmentation]
    notes = []
    if data.archive is not None:
        whole = CropArchive(data.archive, data.input_size)
        parts = _parts(len(whole), data)
        training = CropArchive(
            data.archive,
            data.input_size,
            augmentation=augmentation,
            seed=seed,
            indices=parts[0],
            on_device=on_device,
        )
        validation = CropArchive(data.archive, data.input_size, indices=parts[1]) if data.holdout else None
        if validation is None and data.archive_validation is not None:
            validation = CropArchive(data.archive_validation, data.input_size)
        left_out = whole.settings["left_out"]
    elif data.dataset == SYNTHETIC:
        training = SyntheticFigures(data.synthetic, data.input_size, seed=2 * seed, augmentation=augmentation)
        validation = SyntheticFigures(data.synthetic_validation, data.input_size, seed=2 * seed + 1)
        validation, left_out = validation if len(validation) else None, []
    else:
        if data.root is None:
            raise ValueError(f"data.root: {data.dataset!r} needs its folder (--root), or --archive")
        people = load(data.dataset, data.root, data.split, training=True, skip_bad=data.skip_bad)
        parts = _parts(len(people), data)
        left_out = [str(problem) for problem in people.left_out]
        if data.holdout:
            held = people.subset(parts[1])
        else:
            held = load(data.dataset, data.root, data.validation_split, skip_bad=data.skip_bad)
            left_out += [str(problem) for problem in held.left_out]
        training = PoseDataset(people.subset(parts[0]), data.input_size, augmentation=augmentation, seed=seed)
        validation = PoseDataset(held, data.input_size)
    if len(training) < data.batch_size:
        raise ValueError(f"data.batch_size: expected at most the {len(training)} people, got {data.batch_size}")
    if validation is not None and validation.skeleton is not training.skeleton:
        raise ValueError(
            f"data.archive_validation: expected {training.skeleton.name} as in training, got {validation.skeleton.name}"
        )
    notes += [f"left out: {problem}" for problem in left_out]
    return TrainingData(training, validation, notes)


def _parts(number, data):
    """Indices to train on, and the last ones, which are kept back."""
    if data.holdout >= number:
        raise ValueError(f"data.holdout: expected less than the {number} people there are, got {data.holdout}")
    kept = number - data.holdout
    return np.arange(kept)[: data.limit or None], np.arange(kept, number)
