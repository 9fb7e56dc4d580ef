"""Bag files: multiple-instance data sets as one ``.npz`` with bags in compressed (CSR) form."""

import os
from dataclasses import dataclass

import numpy as np
import torch

from amil_fast.nn import FeatureStatistics
from amil_fast.utils.files import DataError, atomic_path
from amil_fast.utils.numpy_files import read_npz

_ENTRIES = ("features", "offsets", "labels", "folds")
_EXPECTED = f"a bag file: an .npz archive with the entries {', '.join(_ENTRIES)}"


@dataclass(frozen=True, eq=False)
class BagData:
    """Labeled bags in compressed (CSR) form, with folds.

    Attributes:
        features: float32 ``(instances, D)``: the instances of bag 0, then those of bag 1, ...
        offsets: int64 ``(num_bags + 1,)``: bag b is ``features[offsets[b] : offsets[b + 1]]``.
        labels: int64 ``(num_bags,)``, 1 positive, 0 negative.
        folds: bool ``(repetitions, folds, num_bags)``, True in the training part, False in the test part.
    """

    features: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    folds: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Number of instances per bag: int64 ``(num_bags,)``."""
        return np.diff(self.offsets)

    def rows(self, bag_indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers in ``features`` of the instances of some bags, in this order, and their ``cu_seqlens``."""
        sizes = self.sizes[bag_indices]
        cu_seqlens = np.concatenate([[0], np.cumsum(sizes)])
        shift = np.repeat(self.offsets[:-1][bag_indices] - cu_seqlens[:-1], sizes)
        return np.arange(cu_seqlens[-1]) + shift, cu_seqlens

    def statistics(self, train: np.ndarray) -> FeatureStatistics:
        """Statistics of the instances of a training part, bool ``(num_bags,)``."""
        statistics = FeatureStatistics(self.features.shape[1])
        statistics.update(torch.from_numpy(self.features[self.rows(np.flatnonzero(train))[0]]))
        return statistics

    def standardization(self, train: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and 1/std of each feature over the instances of a training part, bool ``(num_bags,)``.

        float32 ``(D,)`` each; the factor of a constant feature is 0.
        """
        _, mean, inverse_std = self.statistics(train).normalization("standard")
        return mean.float(), inverse_std.float()


def load_bags(path: str | os.PathLike) -> BagData:
    """Reads a bag file: an ``.npz`` archive with entries ``features``, ``offsets``, ``labels``, ``folds``.

    Raises:
        DataError: with the names of file and entry, what was expected and what was found. Nothing is unpickled.
    """
    return check_bag_data(**read_npz(path, _ENTRIES, _EXPECTED), source=str(path))


def check_bag_data(
    features: np.ndarray, offsets: np.ndarray, labels: np.ndarray, folds: np.ndarray, source: str = "bags"
) -> BagData:
    """Checks four arrays and returns them as :class:`BagData`.

    Raises:
        DataError: an array of the wrong shape, dtype or content; the message starts with ``source``.
    """

    def expect(condition, entry, expected, got):
        if not condition:
            raise DataError(f"{source}: entry {entry!r}: expected {expected}, got {got}")

    features, offsets, labels, folds = (np.asarray(a) for a in (features, offsets, labels, folds))
    expect(features.ndim == 2, "features", "shape (instances, D)", f"shape {features.shape}")
    expect(features.dtype.kind in "fiub", "features", "numbers", f"dtype {features.dtype}")
    expect(features.shape[1] > 0, "features", "at least one feature", f"shape {features.shape}")
    with np.errstate(over="ignore"):
        features = np.ascontiguousarray(features, dtype=np.float32)
    finite = np.isfinite(features)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        expect(False, "features", "finite float32 values", f"{features[row, column]} in row {row}, column {column}")

    expect(offsets.ndim == 1 and offsets.shape[0] >= 2, "offsets", "shape (num_bags + 1,)", f"shape {offsets.shape}")
    expect(offsets.dtype.kind in "iu", "offsets", "integers", f"dtype {offsets.dtype}")
    offsets = offsets.astype(np.int64)
    expect(offsets[0] == 0, "offsets", "the first value to be 0", f"{offsets[0]}")
    rows = features.shape[0]
    expect(offsets[-1] == rows, "offsets", f"the last value to be the {rows} rows of features", f"{offsets[-1]}")
    decreasing = offsets[1:] < offsets[:-1]  # a difference of int64 values can wrap around
    if decreasing.any():
        bad = int(np.argmax(decreasing))
        expect(False, "offsets", "non-decreasing values", f"{offsets[bad]} then {offsets[bad + 1]} at {bad}")

    num_bags = offsets.shape[0] - 1
    expect(labels.shape == (num_bags,), "labels", f"shape ({num_bags},), one per bag", f"shape {labels.shape}")
    expect(labels.dtype.kind in "fiub", "labels", "numbers", f"dtype {labels.dtype}")
    wrong = ~np.isin(labels, (0, 1))
    expect(not wrong.any(), "labels", "0 or 1", f"{labels[wrong][:1]} for bag {int(np.argmax(wrong))}")
    labels = labels.astype(np.int64)

    expect(
        folds.ndim == 3 and folds.shape[2] == num_bags and folds.size > 0,
        "folds",
        f"shape (repetitions, folds, {num_bags})",
        f"shape {folds.shape}",
    )
    expect(folds.dtype.kind in "fiub" and np.isin(folds, (0, 1)).all(), "folds", "bool values", f"dtype {folds.dtype}")
    folds = folds.astype(bool)
    for part, used in (("training", folds), ("test", ~folds)):
        empty = ~used.any(-1)
        if empty.any():
            repetition, fold = np.argwhere(empty)[0]
            expect(False, "folds", f"bags in every {part} part", f"none in repetition {repetition}, fold {fold}")
    return BagData(features, offsets, labels, folds)


def stratified_folds(labels: np.ndarray, repetitions: int = 5, folds: int = 10, seed: int = 0) -> np.ndarray:
    """Stratified folds for :class:`BagData`: in each repetition every bag is in exactly one test part.

    Args:
        labels: ``(num_bags,)``.
        repetitions: number of partitions.
        folds: number of parts, 2 to ``num_bags``.
        seed: seed of the partitions.

    Returns:
        bool ``(repetitions, folds, num_bags)``, True in the training part.

    Raises:
        ValueError: ``folds`` out of range.
    """
    labels = np.asarray(labels)
    if folds < 2 or folds > labels.shape[0]:
        raise ValueError(f"folds: expected 2..{labels.shape[0]} (the number of bags), got {folds}")
    rng = np.random.default_rng(seed)
    train = np.ones((repetitions, folds, labels.shape[0]), dtype=bool)
    for r in range(repetitions):
        # Shuffled, then sorted by class: assigning the folds in turn distributes each class evenly.
        order = rng.permutation(labels.shape[0])
        order = order[np.argsort(labels[order], kind="stable")]
        train[r, np.arange(labels.shape[0]) % folds, order] = False
    return train


def save_bags(
    path: str | os.PathLike, features: np.ndarray, offsets: np.ndarray, labels: np.ndarray, folds: np.ndarray
) -> None:
    """Checks the four arrays of :class:`BagData` and writes them to a bag file, atomically.

    As in :func:`numpy.savez`, ``.npz`` is appended to a path that does not end in it.
    """
    data = check_bag_data(features, offsets, labels, folds, source=str(path))
    path = os.fspath(path)
    path = path if path.endswith(".npz") else f"{path}.npz"
    with atomic_path(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, features=data.features, offsets=data.offsets, labels=data.labels, folds=data.folds)
