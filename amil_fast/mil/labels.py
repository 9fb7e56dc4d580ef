"""Labels of bags: CSV files, targets, and splits that keep groups together."""

import csv
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amil_fast.mil.bag_sources import BagSource, open_bags
from amil_fast.utils.files import DataError
from amil_fast.utils.optional import require

TASKS = ("auto", "classification", "one_vs_rest", "regression")
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_COLUMNS = "bag_id,label[,group][,split][,fold]"


@dataclass(frozen=True)
class LabeledBags:
    """Bags with what a CSV file says about them; every list has an entry per bag, in the order of the CSV.

    Attributes:
        source: the bags.
        labels: labels as text; None where a bag has none.
        groups: group of every bag, such as its patient; None without the column.
        splits: ``"train"``, ``"val"`` or ``"test"`` per bag; None without the column.
        folds: number of the fold whose test part contains the bag, int64; None without the column.
    """

    source: BagSource
    labels: list[str | None]
    groups: list[str] | None = None
    splits: list[str] | None = None
    folds: np.ndarray | None = None

    def in_split(self, split: str) -> np.ndarray:
        """Indices of the bags of a split; with no column ``split``, all bags are in ``"train"``."""
        if self.splits is None:
            return np.arange(len(self.labels) if split == "train" else 0)
        return np.flatnonzero(np.array(self.splits) == split)


@dataclass(frozen=True)
class Targets:
    """Labels as numbers.

    Attributes:
        task: ``"classification"``, ``"one_vs_rest"`` or ``"regression"``.
        names: names of the classes, in the order of the targets; empty for regression. For two classes the second one
            is the positive class.
        values: int64 class indices, or float32 values; -1 or NaN for bags without a label.
    """

    task: str
    names: tuple[str, ...]
    values: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Bool: the bag has a label."""
        return ~np.isnan(self.values) if self.task == "regression" else self.values >= 0


def load_labeled_bags(
    path: str | os.PathLike, csv_file: str | os.PathLike | None = None, *, need_labels: bool = True
) -> LabeledBags:
    """Opens the bags that a CSV file lists; without one, all bags with the labels stored beside them.

    Args:
        path: folder of bags or bag file, as for :func:`amil_fast.mil.open_bags`.
        csv_file: a file with a header and the columns ``bag_id``, ``label`` and, optionally, ``group``, ``split``
            (train, val, test) and ``fold`` (number of the fold that tests the bag). ``bag_id`` is the name of a bag's
            file without suffix, in a bag file the bag's number from 0.
        need_labels: every bag must have a label.

    Raises:
        DataError: an unreadable or inconsistent file, with its name and row.
    """
    if csv_file is None:
        source = open_bags(path)
        if source.labels is None and need_labels:
            raise DataError(f"{path}: contains no labels; pass a CSV file with the columns {_COLUMNS}")
        labels: list[str | None] = [None] * len(source)
        return LabeledBags(source, labels if source.labels is None else list(source.labels))
    rows = _read_rows(Path(csv_file))
    columns = set(rows[0][1])

    def column(name, default=None):
        return [row.get(name) or default for _, row in rows]

    for number, row in rows:
        if need_labels and not row.get("label"):
            raise DataError(f"{csv_file}: row {number}: label: expected a value, got none for bag {row['bag_id']!r}")
    splits = folds = groups = None
    if "split" in columns:
        splits = [_split(csv_file, number, row["split"]) for number, row in rows]
    if "fold" in columns:
        folds = np.array([_fold(csv_file, number, row["fold"]) for number, row in rows])
    if "group" in columns:
        groups = column("group")
        missing = [number for (number, _), group in zip(rows, groups, strict=True) if group is None]
        if missing:
            raise DataError(f"{csv_file}: row {missing[0]}: group: expected a value, got none")
        _check_groups_are_not_split(csv_file, rows, groups, splits, "split")
        _check_groups_are_not_split(csv_file, rows, groups, folds, "fold")
    return LabeledBags(open_bags(path, column("bag_id")), column("label"), groups, splits, folds)


def make_targets(
    labels: Sequence[str | None],
    task: str = "auto",
    *,
    names: Sequence[str] | None = None,
    positive: str | None = None,
) -> Targets:
    """Converts labels to class indices or values.

    Args:
        labels: labels as text, None where unknown.
        task: one of :data:`TASKS`. ``"auto"``: regression if some label is a number with a fraction, otherwise
            classification.
        names: classes of a trained model; by default the distinct labels in order, as numbers if all are.
        positive: for two classes, the positive one; by default the second.

    Raises:
        ValueError: labels that do not fit the task.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    given = [label for label in labels if label is not None]
    numbers = _as_numbers(given)
    if task == "auto":
        fractional = numbers is not None and names is None and any(value != int(value) for value in numbers)
        task = "regression" if fractional else "classification"
        if names is None and not fractional and len(set(given)) > max(20, len(given) // 4):
            raise ValueError(f"label: {len(set(given))} distinct labels of {len(given)} bags; set the task explicitly")
    if task == "regression":
        if numbers is None:
            bad = next(label for label in given if _as_numbers([label]) is None)
            raise ValueError(f"label: expected finite numbers for regression, got {bad!r}")
        return Targets(task, (), np.array([np.nan if x is None else float(x) for x in labels], dtype=np.float32))
    if names is None:
        names = sorted(set(given), key=None if numbers is None else lambda label: (float(label), label))
        if len(names) < 2:
            raise ValueError(f"label: expected at least two classes, got {', '.join(names) or 'none'}")
        if positive is not None:
            if len(names) != 2 or positive not in names:
                raise ValueError(f"positive: expected one of two classes, got {positive!r} of {', '.join(names)}")
            names = [name for name in names if name != positive] + [positive]
    index = {name: i for i, name in enumerate(names)}
    unknown = [label for label in given if label not in index]
    if unknown:
        raise ValueError(f"label: expected one of {', '.join(names)}, got {unknown[0]!r}")
    if task == "one_vs_rest" and len(names) == 2:
        task = "classification"
    values = np.array([-1 if label is None else index[label] for label in labels], dtype=np.int64)
    return Targets(task, tuple(names), values)


def split_groups(targets: np.ndarray, groups: Sequence[str] | None, folds: int, seed: int) -> np.ndarray:
    """Assigns bags to folds: classes evenly, groups whole (scikit-learn's ``StratifiedGroupKFold``).

    Without a class of at least ``folds`` bags only the groups are considered (``GroupKFold``).

    Args:
        targets: class index or value per bag. Values are stratified by quartile.
        groups: group per bag, None: every bag is a group.
        folds: number of folds.
        seed: seed of the assignment.

    Returns:
        int64: number of the fold that tests the bag.

    Raises:
        ValueError: fewer groups than folds.
    """
    selection = require("sklearn.model_selection", "splits by group", package="scikit-learn")
    targets = np.asarray(targets)
    ids = np.arange(len(targets)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    num_groups = len(np.unique(ids))
    if not 2 <= folds <= num_groups:
        raise ValueError(f"folds: expected 2..{num_groups} (the number of groups), got {folds}")
    if targets.dtype.kind == "f":
        targets = np.searchsorted(np.quantile(targets, (0.25, 0.5, 0.75)), targets)
    if np.bincount(targets).max() >= folds:
        splitter = selection.StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    else:
        splitter = selection.GroupKFold(folds, shuffle=True, random_state=seed)
    result = np.full(len(targets), -1, dtype=np.int64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        for number, (_, test) in enumerate(splitter.split(targets, targets, ids)):
            result[test] = number
    sizes = np.bincount(result, minlength=folds)
    if sizes.min() == 0:
        raise ValueError(f"folds: the groups cannot be distributed over {folds} folds (one would be empty); use fewer")
    return result


def _read_rows(path):
    """``[(row number, {column: text})]``; rows are numbered from 1, the header, as a spreadsheet does."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            if "bag_id" not in header:
                raise DataError(f"{path}: row 1: expected the columns {_COLUMNS}, got {','.join(header) or 'nothing'}")
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{path}: row {len(rows) + 2}: expected {len(header)} fields, got another number")
                rows.append((len(rows) + 2, {name: value.strip() for name, value in row.items()}))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a CSV file: {error}") from None
    if not rows:
        raise DataError(f"{path}: expected a row per bag, got none")
    seen: dict[str, int] = {}
    for number, row in rows:
        name = row["bag_id"]
        if not name:
            raise DataError(f"{path}: row {number}: bag_id: expected a value, got none")
        if name in seen:
            raise DataError(f"{path}: row {number}: bag_id: {name!r} is also in row {seen[name]}")
        seen[name] = number
    return rows


def _split(path, number, text):
    if text.lower() not in _SPLITS:
        raise DataError(f"{path}: row {number}: split: expected train, val or test, got {text!r}")
    return _SPLITS[text.lower()]


def _fold(path, number, text):
    if not text.isdigit():
        raise DataError(f"{path}: row {number}: fold: expected a whole number, got {text!r}")
    return int(text)


def _check_groups_are_not_split(path, rows, groups, parts, column):
    if parts is None:
        return
    first: dict[str, tuple[int, object]] = {}
    for (number, _), group, part in zip(rows, groups, parts, strict=True):
        seen_in, seen = first.setdefault(group, (number, part))
        if seen != part:
            raise DataError(
                f"{path}: row {number}: {column}: group {group!r} is in {part} here and in {seen} in row {seen_in}"
            )


def _as_numbers(labels):
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None
