"""The recipe of ``amil mil cv`` with every pooling, at scales chosen on an inner split of each training part."""

from collections.abc import Callable, Sequence

import numpy as np

from amil_fast.mil.bag_files import BagData, stratified_folds
from amil_fast.mil.benchmark.methods import Predictions
from amil_fast.mil.classifiers import BagClassifiers
from amil_fast.mil.settings import MilSettings

SCALES = (0.1, 1.0)
_INNER_PARTS = 3
_INNER_SEED = 17  # apart from the seeds of the networks


def candidates(pooling: str) -> list[MilSettings]:
    """The recipe with one pooling, at every ``instance_scale`` in :data:`SCALES` that makes a difference.

    Mean and max pooling commute with the scale. Adjust pooling bounds the length of the bag vectors, so that
    ``bag_scale`` stays 10; with the other poolings it is the inverse of ``instance_scale``.
    """
    if pooling in ("mean", "max"):
        return [MilSettings(pooling=pooling)]
    return [
        MilSettings(pooling=pooling, instance_scale=scale, bag_scale=10.0 if pooling == "adjust" else 1 / scale)
        for scale in SCALES
    ]


def chosen_network(settings: Sequence[MilSettings]) -> Callable[[BagData, np.ndarray, int], Predictions]:
    """Network with those of some settings that have the smallest log-loss on an inner split of each training part.

    A third of the training part is held out, stratified; the chosen settings are trained on the whole training part.
    """

    def run(data: BagData, train: np.ndarray, seed: int) -> Predictions:
        inner = np.stack([_inner_training_part(data, part, seed + fold) for fold, part in enumerate(train)])
        held_out = train & ~inner
        losses = np.stack([_log_losses(_fitted(data, s, inner, seed, held_out), data.labels) for s in settings])
        chosen = np.argmin(losses, 0)
        probabilities = np.full(train.shape, np.nan)
        for choice in np.unique(chosen):
            folds = np.flatnonzero(chosen == choice)
            probabilities[folds] = _fitted(data, settings[choice], train[folds], seed, ~train[folds], folds)
        return Predictions(probabilities, inner_loss=losses.min(0))

    return run


def best_of(*networks: Predictions) -> Predictions:
    """Of several networks, for every fold that with the smallest log-loss on the inner split."""
    losses = np.array([network.inner_loss for network in networks])
    probabilities = np.stack([network.probabilities for network in networks])
    return Predictions(probabilities[np.argmin(losses, 0), np.arange(losses.shape[1])], inner_loss=losses.min(0))


def average(*networks: Predictions) -> Predictions:
    """Mean of the networks' probabilities."""
    return Predictions(np.mean([network.probabilities for network in networks], 0))


def _fitted(data, settings, train, seed, which, folds=None):
    """Probabilities of the bags ``which``, ``(folds, num_bags)``, of networks trained side by side."""
    seeds = [(seed, fold) for fold in (range(len(train)) if folds is None else folds)]
    return BagClassifiers(data, settings, train, seeds).fit().predict(which)


def _inner_training_part(data, part, seed):
    bags = np.flatnonzero(part)
    inner = part.copy()
    split = stratified_folds(data.labels[bags], 1, _INNER_PARTS, seed=(_INNER_SEED, seed))[0, 0]
    inner[bags[~split]] = False
    return inner


def _log_losses(probabilities, labels):
    """Mean log-loss of every fold over the bags with predictions."""
    likelihood = np.where(labels, probabilities, 1 - probabilities).astype(np.float64)
    return np.nanmean(-np.log(np.maximum(likelihood, 1e-6)), axis=1)
