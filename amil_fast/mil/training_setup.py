"""Preparation of a training run: network and inner validation part."""

from typing import Any

import numpy as np

from amil_fast.mil.bag_sources import BagSource
from amil_fast.mil.labels import LabeledBags, Targets, split_groups
from amil_fast.mil.settings import TrainSettings
from amil_fast.nn import MIRNet


def make_network(source: BagSource, targets: Targets, train: np.ndarray, settings: TrainSettings) -> MIRNet:
    """The network for a source and targets; statistics of the targets are those of the training part."""
    regression = targets.task == "regression"
    options: dict[str, Any] = {}
    if regression:
        values = targets.values[train].astype(np.float64)
        options = {"target_mean": float(values.mean()), "target_std": float(values.std()) or 1.0}
    return MIRNet(
        source.num_features,
        num_classes=1 if regression or len(targets.names) == 2 else len(targets.names),
        **settings.network_options(),
        task=targets.task,
        normalization=None if settings.normalization == "none" else settings.normalization,
        soft_clip=settings.soft_clip,
        label_names=targets.names,
        **options,
    )


def inner_split(
    bags: LabeledBags, targets: Targets, train: np.ndarray, validation: np.ndarray | None, settings: TrainSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Training and inner validation part of a training part, without unlabeled bags.

    Args:
        bags: labeled bags.
        targets: their targets.
        train: indices of the training part.
        validation: indices of the validation part; None: ``settings.validation`` of the training part is held out if
            training stops early, groups whole.
        settings: fraction, patience and seed.
    """
    known = targets.known
    train = train[known[train]]
    if not len(train):
        raise ValueError("expected labeled bags in the training part, got none")
    if validation is None:
        validation = np.arange(0)
        if settings.patience and settings.validation:
            groups = None if bags.groups is None else [bags.groups[i] for i in train]
            folds = max(2, round(1 / settings.validation))
            held_out = split_groups(targets.values[train], groups, folds, settings.seed) == 0
            train, validation = train[~held_out], train[held_out]
    else:
        validation = np.asarray(validation)[known[np.asarray(validation)]]
    if targets.task != "regression":
        missing = [name for i, name in enumerate(targets.names) if not (targets.values[train] == i).any()]
        if missing:
            raise ValueError(f"label: expected bags of every class in the training part, got none of {missing[0]!r}")
    return train, validation
