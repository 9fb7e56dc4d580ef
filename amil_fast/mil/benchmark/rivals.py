"""Published methods with the settings of their publications, except for the scoring."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from amil_fast.mil.bag_files import BagData
from amil_fast.mil.benchmark import rival_networks
from amil_fast.mil.benchmark.methods import Predictions


@dataclass(frozen=True)
class Rival:
    """Network and training, one bag per step.

    Attributes:
        network: ``network(members, in_features)``, of :mod:`~amil_fast.mil.benchmark.rival_networks`.
        optimizer: ``optimizer(network)``.
        learning_rate: factor on the learning rate, a function of the number of steps and of epochs done.
        epochs: passes over the training part.
        loss_weights: weights of the heads' cross-entropies in the loss.
        score_weights: weights of the heads' probabilities in the prediction.
        balanced: weight positive bags by the number of negative ones / that of positive ones.
        clip: bound to which standardized features are clipped.
        peeking: also predict by the epoch and threshold of the highest accuracy on the test part.
    """

    network: Callable[[int, int], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    learning_rate: Callable[[int, int], float]
    epochs: int
    loss_weights: tuple[float, ...] = (1.0,)
    score_weights: tuple[float, ...] = (1.0,)
    balanced: bool = False
    clip: float = math.inf
    peeking: bool = False

    def run(self, data: BagData, train: np.ndarray, seed: int) -> Predictions:
        """Trains the networks of all folds side by side and predicts the test parts."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _Training(self, data, train, seed).predictions()


class _Training:
    def __init__(self, rival, data, train, seed):
        self.rival, self.data, self.train = rival, data, train
        self.rng = np.random.default_rng(seed)
        statistics = [data.standardization(part) for part in train]
        self.mean, self.inverse_std = (torch.stack(s)[:, None] for s in zip(*statistics, strict=True))
        self.features = torch.from_numpy(data.features)
        self.labels = torch.from_numpy(data.labels).float()
        self.network = rival.network(len(train), data.features.shape[1])
        positive = torch.tensor([data.labels[part].mean() for part in train]).clamp(1e-6, 1 - 1e-6)
        self.positive_weight = ((1 - positive) / positive).float() if rival.balanced else torch.ones(len(train))
        self.loss_weights = torch.tensor(rival.loss_weights)[:, None]
        self.score_weights = torch.tensor(rival.score_weights)[:, None]

    def predictions(self):
        optimizer = self.rival.optimizer(self.network)
        base = [group["lr"] for group in optimizer.param_groups]
        best = None
        step = 0
        for epoch in range(self.rival.epochs):
            for bags in self._order().T:
                for group, rate in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = rate * self.rival.learning_rate(step, epoch)
                step += 1
                optimizer.zero_grad()
                self._loss(bags).backward()
                optimizer.step()
            if self.rival.peeking:
                best = best_thresholds(self._predict(), self.data.labels, best)
        return Predictions(self._predict(), None if best is None else best[1])

    def _order(self):
        """Bags of an epoch, ``(members, steps)``. Members with fewer bags than others repeat some.

        The order of every member is random, but in each step all have bags of similar size, which saves padding.
        """
        steps = int(self.train.sum(1).max())
        places = self.rng.permutation(steps)
        orders = [self.rng.permutation(np.flatnonzero(part)) for part in self.train]
        by_size = [order[np.argsort(self.data.sizes[order], kind="stable")] for order in orders]
        return np.stack([np.resize(order, steps)[places] for order in by_size])

    def _loss(self, bags):
        """Loss of one bag per member, summed over the members, so that each member's gradient is its own."""
        logits = self.network(*self._batch(bags))
        y = self.labels[torch.from_numpy(bags)].expand(logits.shape)
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits, y, pos_weight=self.positive_weight, reduction="none"
        )
        return (self.loss_weights * losses).sum()

    @torch.no_grad()
    def _predict(self):
        result = np.full(self.train.shape, np.nan)
        tests = [np.flatnonzero(~part) for part in self.train]
        members = np.arange(len(tests))
        self.network.eval()
        for place in range(max(len(test) for test in tests)):
            bags = np.array([test[min(place, len(test) - 1)] for test in tests])
            probabilities = self.network(*self._batch(bags)).sigmoid()
            result[members, bags] = (self.score_weights * probabilities).sum(0).numpy()
        self.network.train()
        return result

    def _batch(self, bags):
        sizes = self.data.sizes[bags]
        places = np.arange(sizes.max())
        mask = places < sizes[:, None]
        rows = np.where(mask, self.data.offsets[bags][:, None] + places, 0)
        x = (self.features[torch.from_numpy(rows)] - self.mean) * self.inverse_std
        return x.clamp(-self.rival.clip, self.rival.clip), torch.from_numpy(mask)


def best_thresholds(
    probabilities: np.ndarray, labels: np.ndarray, best: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of every fold with its best threshold, and the probabilities moved so that it is .5.

    Args:
        probabilities: ``(folds, num_bags)``, NaN outside the test part.
        labels: ``(num_bags,)``.
        best: results of earlier epochs, which are kept where they are more accurate.
    """
    if best is None:
        accuracies, moved = np.full(len(probabilities), -1.0), np.full(probabilities.shape, np.nan)
    else:
        accuracies, moved = best[0].copy(), best[1].copy()
    for fold, p in enumerate(probabilities):
        test = ~np.isnan(p)
        thresholds = np.append(np.unique(p[test]), 1.0)
        correct = ((p[test] >= thresholds[:, None]) == labels[test]).mean(1)
        if correct.max() > accuracies[fold]:
            accuracies[fold] = correct.max()
            moved[fold] = _move(p, thresholds[np.argmax(correct)])
    return accuracies, moved


def _move(p, threshold):
    """Probabilities with ``threshold`` moved to .5, linearly below and above it."""
    return np.where(p < threshold, 0.5 * p / threshold, 0.5 + 0.5 * (p - threshold) / max(1 - threshold, 1e-12))


def _nesterov(network):
    """SGD with Nesterov momentum and the penalty .005 ‖W‖² on the weights, that is, weight decay .01."""
    weights = [p for p in network.parameters() if p.dim() == 3]
    biases = [p for p in network.parameters() if p.dim() == 2]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": biases}]
    return torch.optim.SGD(groups, lr=5e-4, momentum=0.9, nesterov=True, fused=True)


def _momentum(network):
    return torch.optim.SGD(network.parameters(), lr=5e-4, momentum=0.9, weight_decay=5e-3, fused=True)


def _adam(network):
    return torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.9), weight_decay=5e-3, fused=True)


def mi_net_ds(**changes: Any) -> Rival:
    """MI-Net with deep supervision: learning rate 5e-4, divided by 1 + 1e-4 × the number of steps."""
    return Rival(
        rival_networks.MINetDS,
        _nesterov,
        learning_rate=lambda step, epoch: 1 / (1 + 1e-4 * step),
        epochs=50,
        loss_weights=(1.0, 1.0, 1.0),
        score_weights=(1 / 3, 1 / 3, 1 / 3),
        **changes,
    )


def attention() -> Rival:
    """Attention-based pooling: SGD with momentum .9, learning rate 5e-4, weight decay 5e-3."""
    return Rival(rival_networks.AttentionNet, _momentum, learning_rate=lambda step, epoch: 1.0, epochs=100)


def dsmil() -> Rival:
    """DSMIL: Adam with learning rate 2e-4 and a cosine schedule; mean of the two cross-entropies; the bag's score."""
    epochs = 80
    return Rival(
        rival_networks.DSMIL,
        _adam,
        learning_rate=lambda step, epoch: 0.5 * (1 + math.cos(math.pi * epoch / epochs)),
        epochs=epochs,
        loss_weights=(0.5, 0.5),
        score_weights=(1.0, 0.0),
        balanced=True,
        peeking=True,
    )
