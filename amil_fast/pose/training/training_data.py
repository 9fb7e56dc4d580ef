"""Training and validation data sets of a configuration."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from amil_fast.pose.data import (
    SPORTS,
    STRONG,
    STRONG_UPRIGHT,
    Augmentation,
    CropArchive,
    PoseDataset,
    SyntheticFigures,
    load,
)
from amil_fast.pose.skeletons import Skeleton
from amil_fast.pose.training.config import SYNTHETIC, TrainConfig

_AUGMENTATIONS = {
    "none": None,
    "default": Augmentation(),
    "sports": SPORTS,
    "strong": STRONG,
    "strong-upright": STRONG_UPRIGHT,
}


@dataclass
class TrainingData:
    """Data sets of a training run.

    Attributes:
        training, validation: a :class:`~amil_fast.pose.data.PoseDataset`, or a data set with the same samples and a
            ``skeleton``; ``validation`` may be None.
        notes: messages for the user.
    """

    training: Any
    validation: Any | None
    notes: list[str] = field(default_factory=list)

    @property
    def skeleton(self) -> Skeleton:
        """Skeleton of the training data."""
        return self.training.skeleton


def training_data(config: TrainConfig, *, on_device: bool = False) -> TrainingData:
    """Loads the data sets of a configuration.

    Args:
        config: its sections ``data`` and ``run.seed`` are used.
        on_device: augment the crops of an archive on the training device instead of in the loader's workers.

    Raises:
        ValueError: no data given, or too few people for ``holdout`` or one batch; DataError for invalid data.
    """
    data, seed = config.data, config.run.seed
    augmentation = _AUGMENTATIONS[data.augmentation]
    training: Any
    validation: Any | None
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
        figures = SyntheticFigures(data.synthetic_validation, data.input_size, seed=2 * seed + 1)
        validation, left_out = figures if len(figures) else None, []
    else:
        if data.root is None:
            raise ValueError(f"data.root: {data.dataset!r} requires the data set's folder (--root) or --archive")
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
    return TrainingData(training, validation, [f"left out: {problem}" for problem in left_out])


def _parts(number, data):
    """Splits the indices into those to train on and the last ones, which are held out."""
    if data.holdout >= number:
        raise ValueError(f"data.holdout: expected less than the {number} people, got {data.holdout}")
    kept = number - data.holdout
    return np.arange(kept)[: data.limit or None], np.arange(kept, number)
