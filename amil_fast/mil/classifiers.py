"""Bag classifiers trained side by side: the networks of all folds of a cross-validation as one stacked network.

The models of the folds have the same shape and are trained on parts of one data set. As one
:class:`amil_fast.nn.StackedMIRNet`, a step is a few batched matrix products and one pooling call per level.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from amil_fast.mil.bag_files import BagData
from amil_fast.mil.settings import MilSettings
from amil_fast.nn import StackedMIRNet, level_loss, margin_loss, noisy_or_loss
from amil_fast.nn.feature_normalization import soft_clip
from amil_fast.ops import squash


class BagClassifiers:
    """Classifiers trained side by side, each with features normalized by the statistics of its own training part.

    Args:
        data: bags.
        settings: architecture and training.
        train: bool ``(members, num_bags)``, the training part of each member.
        seeds: a sequence of ints per member, which alone determines its initial weights and batch order. Dropout masks
            also depend on the other members.
    """

    def __init__(self, data: BagData, settings: MilSettings, train: np.ndarray, seeds: Sequence[Sequence[int]]):
        self.data, self.settings, self.train = data, settings, np.asarray(train)
        self._generators = [np.random.default_rng(seed) for seed in seeds]
        with torch.random.fork_rng(devices=[]):  # every member is initialized below, from its own seed
            self.net = StackedMIRNet(
                len(self.train),
                data.features.shape[1],
                **settings.network_options(),
                scoring="instances" if settings.loss == "mil" else "bag",
            )
        for member, generator in enumerate(self._generators):
            self.net.reset_member(member, torch.Generator().manual_seed(int(generator.integers(2**62))))
        self._dropout_seed = int(np.random.SeedSequence(seeds[0], spawn_key=(1,)).generate_state(1)[0])
        self._features = torch.from_numpy(data.features)
        members = [self._normalization(part) for part in self.train]
        self.mean, self.inverse_std, self.bound = (torch.stack(s)[:, None] for s in zip(*members, strict=True))

    def fit(self, on_epoch: Callable[[int], object] | None = None) -> "BagClassifiers":
        """Trains for ``settings.epochs`` epochs and returns itself; ``on_epoch(epoch)`` is called after each."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._dropout_seed)
            self._fit_networks(on_epoch)
        return self

    def _fit_networks(self, on_epoch):
        s = self.settings
        labels = torch.from_numpy(self.data.labels).float()
        optimizer = torch.optim.Adam(self.net.parameters(), lr=s.lr, weight_decay=s.weight_decay, fused=True)
        steps = s.epochs * -(-int(self.train.sum(1).max()) // s.batch_size)
        step = 0
        self.net.train()
        for epoch in range(s.epochs):
            for bag_indices in self._batches(self._shuffled(), s.batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = s.lr * (cosine_factor(step / steps) if s.schedule == "cosine" else 1)
                step += 1
                output, cu_seqlens = self._forward(bag_indices)
                real = torch.from_numpy(bag_indices >= 0)
                y = labels[torch.from_numpy(bag_indices)]  # any label for -1: its weight is 0
                weight = real / real.sum(1, keepdim=True).clamp(min=1)
                # Summed over members, so that each member's gradient is its own.
                loss = (self._losses(output, cu_seqlens, y) * weight).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if on_epoch is not None:
                on_epoch(epoch)
        self.net.eval()

    @torch.no_grad()
    def predict(self, which: np.ndarray) -> np.ndarray:
        """Probabilities of the bags selected by ``which``, bool ``(members, num_bags)``.

        Returns:
            float32 ``(members, num_bags)``, NaN where not selected.
        """
        which = np.asarray(which)
        result = np.full(which.shape, np.nan, dtype=np.float32)
        for bag_indices in self._batches([np.flatnonzero(row) for row in which], max(self.settings.batch_size, 32)):
            probabilities = self._probabilities(self._forward(bag_indices)[0]).numpy()
            member, place = np.nonzero(bag_indices >= 0)
            result[member, bag_indices[member, place]] = probabilities[member, place]
        return result

    def _shuffled(self):
        pairs = zip(self._generators, self.train, strict=True)
        return [generator.permutation(np.flatnonzero(part)) for generator, part in pairs]

    @staticmethod
    def _batches(orders, batch_size):
        """Splits each member's bags evenly into batches: int ``(members, <= batch_size)``, padded with -1.

        All members take as many steps as the largest one needs. No member gets an empty batch, in which an optimizer
        with momentum would still move its weights.
        """
        steps = -(-max(len(order) for order in orders) // batch_size)
        for batches in zip(*(np.array_split(order, steps) for order in orders), strict=True):
            padded = np.full((len(orders), max(len(batch) for batch in batches)), -1)
            for row, batch in zip(padded, batches, strict=True):
                row[: len(batch)] = batch
            yield padded

    def _forward(self, bag_indices):
        rows, cu_seqlens = pack_members(self.data, bag_indices)
        x = (self._features[torch.from_numpy(rows)] - self.mean) * self.inverse_std
        if self.settings.soft_clip:
            x = soft_clip(x, self.bound)
        cu_seqlens = torch.from_numpy(cu_seqlens)
        return self.net(x, cu_seqlens), cu_seqlens

    def _normalization(self, part):
        """Mean, factor and bound of the smooth clipping for a training part, float32."""
        if self.settings.normalization == "none":
            num_features = self._features.shape[1]
            return torch.zeros(num_features), torch.ones(num_features), torch.tensor([math.inf])
        kind, mean, factor = self.data.statistics(part).normalization(self.settings.normalization)
        clipped = kind == "standard" and self.settings.soft_clip
        return mean.float(), factor.float(), torch.tensor([self.settings.soft_clip if clipped else math.inf])

    def _losses(self, output, cu_seqlens, y):
        """Loss of every bag ``(members, B)``, averaged over levels; labels ``y (members, B)``."""
        loss = 0
        if "bce" in self.settings.loss:
            loss = level_loss(output.logits.flatten(1), y.flatten(), reduction="none").mean(0).view(y.shape)
        if "margin" in self.settings.loss:
            s = self._bag_vectors(output)
            loss = loss + margin_loss(s, y.expand(s.shape[:-1]), reduction="none").mean(0)
        if self.settings.loss == "mil":
            z = output.instance_logits
            levels, members, n = z.shape
            flat = StackedMIRNet.flat_cu_seqlens(cu_seqlens, n)
            labels = torch.nn.functional.pad(y, (0, 1)).flatten()[:, None].expand(-1, levels)
            losses = noisy_or_loss(z.flatten(1).t(), labels, cu_seqlens=flat, reduction="none").loss
            loss = losses.mean(1).view(members, -1)[:, :-1]
        return loss

    def _probabilities(self, output):
        if self.settings.loss == "margin":  # the heads are untrained; the probability is the vector's length
            return torch.linalg.vector_norm(self._bag_vectors(output), dim=-1).mean(0)
        return output.probabilities

    def _bag_vectors(self, output):
        """Bag vectors of length < 1, ``(L, members, B, hidden)``: squashed unless the pooling does it."""
        pooled = output.pooled if self.settings.deep_supervision else output.pooled[-1:]
        return pooled if self.settings.pooling == "adjust" else squash(pooled)


def pack_members(data: BagData, bag_indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packs the instances of several members' bags.

    Args:
        data: bags.
        bag_indices: int ``(members, B)``, -1 for no bag.

    Returns:
        rows: int64 ``(members, n)``, row numbers in ``data.features``, n the largest number of instances of a member;
            padded with row 0.
        cu_seqlens: int64 ``(members, B + 1)``.
    """
    sizes = np.where(bag_indices >= 0, data.sizes[bag_indices], 0)
    cu_seqlens = np.zeros((bag_indices.shape[0], bag_indices.shape[1] + 1), dtype=np.int64)
    np.cumsum(sizes, axis=1, out=cu_seqlens[:, 1:])
    rows = np.zeros((bag_indices.shape[0], cu_seqlens[:, -1].max()), dtype=np.int64)
    counts = sizes.ravel()
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    member = np.repeat(np.repeat(np.arange(bag_indices.shape[0]), bag_indices.shape[1]), counts)
    column = np.repeat(cu_seqlens[:, :-1].ravel(), counts) + within
    rows[member, column] = np.repeat(data.offsets[:-1][bag_indices].ravel(), counts) + within
    return rows, cu_seqlens


def cosine_factor(done):
    """Factor on the learning rate after a fraction ``done`` of the steps."""
    return min(1.0, 20 * (done + 1e-3)) * 0.5 * (1 + math.cos(math.pi * done))
