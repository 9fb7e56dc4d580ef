"""Bag files: multiple-instance data sets as one ``.npz`` with bags in compressed (CSR) form."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class BagFileError(ValueError):
    """A bag file that can't be used; the message names the file and the entry."""


@dataclass(frozen=True, eq=False)
class BagData:
    """Labeled bags.

    Attributes:
        features: float32 ``(instances, D)``: the instances of bag 0, then those of bag 1, ...
        offsets: int64 ``(bags + 1,)``: bag b is ``features[offsets[b] : offsets[b + 1]]``.
        labels: int64 ``(bags,)``, 1 positive, 0 negative.
        folds: bool ``(repetitions, folds, bags)``: True where the bag is in the training part, False in the test part.
    """

    features: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    folds: np.ndarray

    @property
    def sizes(self):
        """Instances per bag: int64 ``(bags,)``."""
        return np.diff(self.offsets)

    def rows(self, bags):
        """Row numbers of the instances of ``bags`` in their order, and these bags' ``cu_seqlens``."""
        sizes = self.sizes[bags]
        cu_seqlens = np.concatenate([[0], np.cumsum(sizes)])
        return np.arange(cu_seqlens[-1]) + np.repeat(self.offsets[:-1][bags] - cu_seqlens[:-1], sizes), cu_seqlens


def load_bags(path):
    """Reads a bag file: an ``.npz`` with entries ``features``, ``offsets``, ``labels``, ``folds`` (:class:`BagData`).

    Raises:
        BagFileError: with the file's name, the entry's, what was expected and what was found. Pickled entries are
            refused.
    """
    path = Path(path)
    entries = {}
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise BagFileError(f"{path}: expected an .npz file with named entries, got a single array")
        with file:
            for name in ("features", "offsets", "labels", "folds"):
                if name not in file:
                    found = ", ".join(sorted(file.files)) or "nothing"
                    raise BagFileError(f"{path}: entry {name!r} is missing (the file holds: {found})")
                try:
                    entries[name] = file[name]
                except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
                    raise BagFileError(f"{path}: entry {name!r} can't be read: {error}") from error
    except BagFileError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BagFileError(f"{path}: can't be read as an .npz file: {reason}") from error
    return check_bag_data(**entries, source=str(path))


def check_bag_data(features, offsets, labels, folds, source="bags"):
    """Checks four arrays and returns them as :class:`BagData`; ``source`` begins each error message."""

    def expect(condition, entry, expected, got):
        if not condition:
            raise BagFileError(f"{source}: entry {entry!r}: expected {expected}, got {got}")

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

    expect(offsets.ndim == 1 and offsets.shape[0] >= 2, "offsets", "shape (bags + 1,)", f"shape {offsets.shape}")
    expect(offsets.dtype.kind in "iu", "offsets", "integers", f"dtype {offsets.dtype}")
    offsets = offsets.astype(np.int64)
    expect(offsets[0] == 0, "offsets", "the first value to be 0", f"{offsets[0]}")
    rows = features.shape[0]
    expect(offsets[-1] == rows, "offsets", f"the last value to be the {rows} rows of features", f"{offsets[-1]}")
    steps = np.diff(offsets)
    if steps.min() < 0:
        bad = int(np.argmin(steps))
        expect(False, "offsets", "values that never fall", f"{offsets[bad]} then {offsets[bad + 1]} at {bad}")

    bags = offsets.shape[0] - 1
    expect(labels.shape == (bags,), "labels", f"shape ({bags},), one per bag", f"shape {labels.shape}")
    expect(labels.dtype.kind in "fiub", "labels", "numbers", f"dtype {labels.dtype}")
    wrong = ~np.isin(labels, (0, 1))
    expect(not wrong.any(), "labels", "0 or 1", f"{labels[wrong][:1]} for bag {int(np.argmax(wrong))}")
    labels = labels.astype(np.int64)

    expect(
        folds.ndim == 3 and folds.shape[2] == bags and folds.size > 0,
        "folds",
        f"shape (repetitions, folds, {bags})",
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


def stratified_folds(labels, repetitions=5, folds=10, seed=0):
    """Folds for :class:`BagData`: in each repetition every bag is tested once, the classes spread evenly over folds.

    Args:
        labels: ``(bags,)``.

    Returns:
        bool ``(repetitions, folds, bags)``, True = training part.
    """
    labels = np.asarray(labels)
    if folds < 2 or folds > labels.shape[0]:
        raise ValueError(f"folds: expected 2..{labels.shape[0]} (the number of bags), got {folds}")
    rng = np.random.default_rng(seed)
    train = np.ones((repetitions, folds, labels.shape[0]), dtype=bool)
    for r in range(repetitions):
        # Shuffled, then sorted by class: dealing these out like cards spreads each class as evenly as can be.
        order = rng.permutation(labels.shape[0])
        order = order[np.argsort(labels[order], kind="stable")]
        train[r, np.arange(labels.shape[0]) % folds, order] = False
    return train


def save_bags(path, features, offsets, labels, folds):
    """Checks the four arrays of :class:`BagData` and writes them as a bag file."""
    data = check_bag_data(features, offsets, labels, folds, source=str(path))
    np.savez_compressed(path, features=data.features, offsets=data.offsets, labels=data.labels, folds=data.folds)
