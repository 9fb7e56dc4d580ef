"""Training bag classifiers, and their repeated cross-validation.

All folds of a cross-validation are models of one shape on parts of one data set, so several are trained side by side as
one :class:`amil_fast.nn.StackedMIRNet`: a step is a handful of batched products and one pooling call per level for all
of them, on as many threads as torch has.
"""

import dataclasses
import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from amil_fast.mil.set_kernel import SetKernel
from amil_fast.nn import POOLINGS, StackedMIRNet, level_loss, margin_loss, noisy_or_loss
from amil_fast.ops import squash

SCHEDULES = ("constant", "cosine")  # cosine: up over the first twentieth of the steps, then down to 0
# bce: cross-entropy of every level's score; margin: Eq. 6 on the lengths of the poolings' vectors, which are the
# probabilities then; bce+margin: their sum, scores from the heads; mil: the bag + instance loss of PAPER §4.
LOSSES = ("bce", "margin", "bce+margin", "mil")


@dataclass(frozen=True)
class MilSettings:
    """How a bag classifier is built and trained; the same for every fold.

    The defaults are the recipe of ``docs/mil_study.md``; :data:`PAPER_SETTINGS` are the paper's.
    """

    pooling: str = "adjust"
    num_iters: int = 3
    hidden: int = 128
    depth: int = 3
    residual: bool = True
    deep_supervision: bool = True
    instance_norm: float = 0.0  # 0: off
    instance_scale: float = 0.1
    bag_scale: float = 10.0
    input_dropout: float = 0.0
    dropout: float = 0.0
    soft_clip: float = 3.0  # c > 0: standardized features are bent toward ±c, see bend()
    # Of a set kernel's probability against the network's. 0.75 is the most accurate here, but says little about the
    # pooling, and keeps the MIL assumption no better than scoring heads do.
    kernel_weight: float = 0.0
    loss: str = "bce"
    epochs: int = 30
    batch_size: int = 8  # bags
    lr: float = 1e-3
    schedule: str = "cosine"
    weight_decay: float = 5e-3
    ensemble: int = 1  # networks per fold, their probabilities averaged
    seed: int = 0
    backend: str = "auto"  # of adjust pooling

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        for name in ("num_iters", "hidden", "depth", "epochs", "batch_size", "ensemble"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("lr", "instance_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("weight_decay", "instance_norm", "soft_clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        if not 0 <= self.kernel_weight <= 1:
            raise ValueError(f"kernel_weight: expected a number in [0, 1], got {self.kernel_weight}")
        for name in ("input_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")


PAPER_SETTINGS = MilSettings(
    instance_norm=0,
    instance_scale=1,
    bag_scale=1,
    input_dropout=0,
    dropout=0,
    soft_clip=0,
    kernel_weight=0,
    loss="bce",
    epochs=40,
    schedule="constant",
    ensemble=1,
)


class BagClassifiers:
    """Classifiers trained side by side, each with the standardization of its own training part.

    Each is a network, or with ``settings.kernel_weight`` a network and a :class:`SetKernel`, fitted apart on the same
    features, whose probabilities are averaged.

    Args:
        data: a :class:`amil_fast.mil.bag_files.BagData`.
        settings: a :class:`MilSettings`.
        train: bool ``(members, bags)``: the training part of each member.
        seeds: one sequence of ints per member; a member's start and the order of its bags depend on it alone (what
            dropout draws depends on its neighbors as well).
    """

    def __init__(self, data, settings, train, seeds):
        self.data, self.settings, self.train = data, settings, np.asarray(train)
        self._rngs = [np.random.default_rng(seed) for seed in seeds]
        with torch.random.fork_rng(devices=[]):  # every member is drawn again below, from its own seed
            self.net = StackedMIRNet(
                len(self.train),
                data.features.shape[1],
                hidden=settings.hidden,
                depth=settings.depth,
                pooling=settings.pooling,
                num_iters=settings.num_iters,
                residual=settings.residual,
                deep_supervision=settings.deep_supervision,
                dropout=settings.dropout,
                input_dropout=settings.input_dropout,
                instance_norm=settings.instance_norm or None,
                instance_scale=settings.instance_scale,
                bag_scale=settings.bag_scale,
                scoring="instances" if settings.loss == "mil" else "bag",
                backend=settings.backend,
            )
        for member, rng in enumerate(self._rngs):
            self.net.reset_member(member, torch.Generator().manual_seed(int(rng.integers(2**62))))
        self._dropout_seed = int(np.random.SeedSequence(seeds[0], spawn_key=(1,)).generate_state(1)[0])
        self._features = torch.from_numpy(data.features)
        statistics = [_standardization(data.features[data.rows(np.flatnonzero(part))[0]]) for part in self.train]
        self.mean, self.inverse_std = (torch.stack(s)[:, None] for s in zip(*statistics, strict=True))
        self._kernels = []

    def fit(self, on_epoch=None):
        """Trains for ``settings.epochs`` epochs; ``on_epoch(epoch)`` is called after each."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._dropout_seed)
            return self._fit(on_epoch)

    def _fit(self, on_epoch):
        s = self.settings
        labels = torch.from_numpy(self.data.labels).float()
        optimizer = torch.optim.Adam(self.net.parameters(), lr=s.lr, weight_decay=s.weight_decay, fused=True)
        steps = s.epochs * -(-int(self.train.sum(1).max()) // s.batch_size)
        step = 0
        self.net.train()
        for epoch in range(s.epochs):
            for bags in self._batches(self._shuffled(), s.batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = s.lr * (_cosine(step / steps) if s.schedule == "cosine" else 1)
                step += 1
                output, cu_seqlens = self._forward(bags)
                real = torch.from_numpy(bags >= 0)
                y = labels[torch.from_numpy(bags)]  # -1, the empty place, takes any label: its weight is 0
                weight = real / real.sum(1, keepdim=True).clamp(min=1)
                # A sum over members: each one's gradient is its own.
                loss = (self._losses(output, cu_seqlens, y) * weight).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if on_epoch is not None:
                on_epoch(epoch)
        self.net.eval()
        if s.kernel_weight:
            parts = [np.flatnonzero(part) for part in self.train]
            self._kernels = [SetKernel(*self._bags(member, part), labels[part]) for member, part in enumerate(parts)]
        return self

    @torch.no_grad()
    def predict(self, which):
        """Probabilities of the bags marked in ``which``, bool ``(members, bags)``: float32 likewise, NaN elsewhere."""
        which = np.asarray(which)
        result = np.full(which.shape, np.nan, dtype=np.float32)
        for bags in self._batches([np.flatnonzero(row) for row in which], max(self.settings.batch_size, 32)):
            probabilities = self._probabilities(self._forward(bags)[0]).numpy()
            member, place = np.nonzero(bags >= 0)
            result[member, bags[member, place]] = probabilities[member, place]
        for member, kernel in enumerate(self._kernels):
            part = np.flatnonzero(which[member])
            if not len(part):
                continue
            probabilities = kernel.probabilities(*self._bags(member, part)).numpy()
            result[member, part] += self.settings.kernel_weight * (probabilities - result[member, part])
        return result

    def _shuffled(self):
        return [rng.permutation(np.flatnonzero(part)) for rng, part in zip(self._rngs, self.train, strict=True)]

    @staticmethod
    def _batches(orders, batch_size):
        """Deals each member's bags out evenly: yields int ``(members, <= batch_size)``, -1 where a member has no more.

        All members take as many steps as the one with most bags; none gets an empty batch in between, in which an
        optimizer with momentum would still move.
        """
        steps = -(-max(len(order) for order in orders) // batch_size)
        for batches in zip(*(np.array_split(order, steps) for order in orders), strict=True):
            padded = np.full((len(orders), max(len(batch) for batch in batches)), -1)
            for row, batch in zip(padded, batches, strict=True):
                row[: len(batch)] = batch
            yield padded

    def _forward(self, bags):
        rows, cu_seqlens = pack(self.data, bags)
        x = self._standardized(rows, self.mean, self.inverse_std)
        cu_seqlens = torch.from_numpy(cu_seqlens)
        return self.net(x, cu_seqlens), cu_seqlens

    def _bags(self, member, bags):
        """The instances of ``bags`` as one member sees them, and their ``cu_seqlens``."""
        rows, cu_seqlens = self.data.rows(bags)
        return self._standardized(rows, self.mean[member], self.inverse_std[member]), torch.from_numpy(cu_seqlens)

    def _standardized(self, rows, mean, inverse_std):
        x = (self._features[torch.from_numpy(rows)] - mean) * inverse_std
        return bend(x, self.settings.soft_clip) if self.settings.soft_clip else x

    def _losses(self, output, cu_seqlens, y):
        """``(members, B)``: each bag's loss, the mean over levels. ``y (members, B)``."""
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
        if self.settings.loss == "margin":  # the heads are not trained: a bag's probability is the length of its vector
            return torch.linalg.vector_norm(self._bag_vectors(output), dim=-1).mean(0)
        return output.probabilities

    def _bag_vectors(self, output):
        """``(L, members, B, hidden)`` vectors of length < 1: the poolings', squashed where they don't do it."""
        pooled = output.pooled if self.settings.deep_supervision else output.pooled[-1:]
        return pooled if self.settings.pooling == "adjust" else squash(pooled)


def pack(data, bags):
    """The instances of several members' bags, one behind the other.

    Args:
        bags: int ``(members, B)`` bag numbers, -1 for none.

    Returns:
        rows: int64 ``(members, n)`` row numbers of ``data.features``, n the largest number of instances of a member;
            the rest is filled with row 0.
        cu_seqlens: int64 ``(members, B + 1)``.
    """
    sizes = np.where(bags >= 0, data.sizes[bags], 0)
    cu_seqlens = np.zeros((bags.shape[0], bags.shape[1] + 1), dtype=np.int64)
    np.cumsum(sizes, axis=1, out=cu_seqlens[:, 1:])
    rows = np.zeros((bags.shape[0], cu_seqlens[:, -1].max()), dtype=np.int64)
    counts = sizes.ravel()
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    member = np.repeat(np.repeat(np.arange(bags.shape[0]), bags.shape[1]), counts)
    column = np.repeat(cu_seqlens[:, :-1].ravel(), counts) + within
    rows[member, column] = np.repeat(data.offsets[:-1][bags].ravel(), counts) + within
    return rows, cu_seqlens


def bend(x, bound):
    """``x / (1 + (x/bound)⁴)^¼``: within ±bound, yet almost x up to half of it (1.5 % less there)."""
    squared = (x / bound).square()
    return x / torch.hypot(torch.ones_like(squared), squared).sqrt()


def _standardization(rows):
    """Mean and 1/std of each feature as float32 tensors; a feature that is constant here is switched off (factor 0)."""
    rows = rows.astype(np.float64)
    mean, std = rows.mean(0), rows.std(0)
    constant = std <= 1e-7 * np.abs(mean)  # float32 data: below this a deviation is rounding
    inverse = np.where(constant, 0, 1 / np.where(constant, 1, std))
    return torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(inverse.astype(np.float32))


def _cosine(done):
    """Factor on the learning rate when this share of the steps is done."""
    return min(1.0, 20 * (done + 1e-3)) * 0.5 * (1 + math.cos(math.pi * done))


def cross_validate(data, settings, *, at_once=10, on_progress=None):
    """Repeated k-fold cross-validation on the folds of ``data``.

    Each fold's model is trained on its training part (which also gives the standardization) for the fixed number of
    epochs and then applied to its test part once, at threshold 0.5.

    Args:
        data: a :class:`amil_fast.mil.bag_files.BagData`.
        settings: a :class:`MilSettings`.
        at_once: how many folds are trained side by side.
        on_progress: called with (epochs done, epochs in all) over all folds.

    Returns:
        A dict ready for JSON: ``accuracy_mean`` and ``accuracy_std`` (mean and standard deviation over repetitions of a
        repetition's mean accuracy over folds; the deviation is that of a sample, 0 for one repetition), ``auc_mean``
        (over the folds whose test part holds both classes, None where there is none), ``per_repetition``, ``per_fold``,
        ``seconds``, ``settings``, ``data``.
    """
    begin = time.perf_counter()
    repetitions, folds, bags = data.folds.shape
    parts = data.folds.reshape(-1, bags)
    probabilities = np.zeros(parts.shape, dtype=np.float32)
    # Every fold's networks, the folds of one network number side by side.
    tasks = [(network, fold) for network in range(settings.ensemble) for fold in range(len(parts))]
    done, total = 0, len(tasks) * settings.epochs
    for start in range(0, len(tasks), at_once):
        some = tasks[start : start + at_once]
        seeds = [(settings.seed, fold, network) for network, fold in some]
        train = parts[[fold for _, fold in some]]
        members = len(train)
        models = BagClassifiers(data, settings, train, seeds)

        def on_epoch(epoch, before=done, members=members):
            if on_progress is not None:
                on_progress(before + (epoch + 1) * members, total)

        for (_, fold), probability in zip(some, models.fit(on_epoch).predict(~train), strict=True):
            probabilities[fold] += probability / settings.ensemble
        done += members * settings.epochs

    per_fold = []
    for fold, (part, probability) in enumerate(zip(parts, probabilities, strict=True)):
        test = ~part
        per_fold.append(
            {
                "repetition": fold // folds,
                "fold": fold % folds,
                "bags": int(test.sum()),
                "accuracy": float(((probability[test] >= 0.5) == data.labels[test]).mean()),
                "auc": area_under_roc(probability[test], data.labels[test]),
            }
        )
    accuracy = np.array([f["accuracy"] for f in per_fold]).reshape(repetitions, folds).mean(1)
    aucs = [f["auc"] for f in per_fold if f["auc"] is not None]
    return {
        "accuracy_mean": float(accuracy.mean()),
        "accuracy_std": float(accuracy.std(ddof=1)) if repetitions > 1 else 0.0,
        "auc_mean": float(np.mean(aucs)) if aucs else None,
        "per_repetition": accuracy.tolist(),
        "per_fold": per_fold,
        "seconds": time.perf_counter() - begin,
        "settings": dataclasses.asdict(settings),
        "data": {
            "bags": bags,
            "positive": int(data.labels.sum()),
            "instances": int(data.features.shape[0]),
            "features": int(data.features.shape[1]),
            "repetitions": repetitions,
            "folds": folds,
        },
    }


def area_under_roc(scores, labels):
    """Area under the ROC curve, ties counted half; None where one class is missing."""
    if len(np.unique(labels)) < 2:
        return None
    from torchmetrics.functional.classification import binary_auroc

    return float(binary_auroc(torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(labels)))
