"""Bags on disk: sizes are read from headers, features only when a bag is used.

Three layouts: a folder with one file per bag (``.h5``, ``.pt``, ``.npy``, ``.npz``); torchmil's folders ``features/``,
``labels/``, ``coords/`` with one file per bag in each; a bag file (:mod:`amil_fast.mil.bag_files`).
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from amil_fast.mil.bag_files import BagData, load_bags
from amil_fast.mil.feature_files import READERS, check_features
from amil_fast.utils.files import DataError


class BagSource:
    """Bags that are read one at a time.

    Attributes:
        names: identifiers of the bags.
        sizes: number of instances per bag, int64 ``(num_bags,)``.
        num_features: width D of the instances.
        labels: label of every bag as text if the source itself contains labels, otherwise None.
    """

    names: list[str]
    sizes: np.ndarray
    num_features: int
    labels: list[str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def features(self, index: int) -> torch.Tensor:
        """Instances of a bag, ``(n, D)``, float16, bfloat16 or float32, as stored (others as float32)."""
        raise NotImplementedError

    def coords(self, index: int) -> np.ndarray | None:
        """Coordinates of a bag's instances, ``(n, 2)`` as (x, y); None if the source has none."""
        return None

    def attributes(self, index: int) -> dict[str, float]:
        """Numbers stored beside the coordinates, such as ``patch_size``; empty if there are none."""
        return {}

    def positions(self, names: Sequence[str]) -> list[int]:
        """Indices of the bags with the given names.

        Raises:
            KeyError: there is no bag of a name.
        """
        index = {name: i for i, name in enumerate(self.names)}
        return [index[name] for name in names]


class BagFolder(BagSource):
    """A folder with one file of features per bag; the file name without suffix is the bag's name.

    Args:
        path: the folder, with files ``.h5``, ``.pt``, ``.npy``, ``.npz``, or with torchmil's folders ``features/``,
            ``labels/`` and ``coords/``.
        names: bags to open; None: all. A name may include the suffix of the file.

    Raises:
        DataError: no bags, an absent or ambiguous one, or a file that is not a bag; the message names the file.
    """

    def __init__(self, path: str | os.PathLike, names: Sequence[str] | None = None):
        self.path = Path(path)
        folder = self.path / "features"
        if not folder.is_dir():
            folder = self.path
        files = _feature_files(folder)
        if names is not None:
            files = _named(files, names, folder)
        if not files:
            raise DataError(f"{folder}: expected files of features ({', '.join(READERS)}), one per bag, found none")
        self.names, self._files = list(files), list(files.values())
        self._coords_files = _feature_files(self.path / "coords") if folder != self.path else {}
        shapes = [_shape(file) for file in self._files]
        self.sizes = np.array([size for size, _ in shapes], dtype=np.int64)
        self.num_features = shapes[0][1]
        for file, (_, width) in zip(self._files, shapes, strict=True):
            if width != self.num_features:
                raise DataError(
                    f"{file}: expected {self.num_features} features as in {self._files[0].name}, got {width}"
                )
        if folder != self.path and (self.path / "labels").is_dir():
            self.labels = self._read_labels(self.path / "labels")

    def features(self, index: int) -> torch.Tensor:
        file = self._files[index]
        return check_features(READERS[file.suffix].features(file), file, int(self.sizes[index]), self.num_features)

    def coords(self, index: int) -> np.ndarray | None:
        file = self._files[index]
        beside = self._coords_files.get(self.names[index])
        coords: np.ndarray | None
        if beside is not None:
            coords = READERS[beside.suffix].features(beside, entry="coords").numpy()
        else:
            coords = READERS[file.suffix].coords(file)
        if coords is None:
            return None
        if coords.ndim == 3 and coords.shape[0] == 1:
            coords = coords[0]
        if coords.ndim != 2 or coords.shape[1] < 2 or len(coords) != self.sizes[index]:
            raise DataError(
                f"{beside or file}: coords: expected shape ({self.sizes[index]}, 2), a row per instance, "
                f"got {coords.shape}"
            )
        return coords[:, :2]

    def attributes(self, index: int) -> dict[str, float]:
        file = self._files[index]
        return READERS[file.suffix].attributes(file)

    def _read_labels(self, folder):
        files = _named(_feature_files(folder), self.names, folder)
        labels = []
        for file in files.values():
            value = READERS[file.suffix].features(file, entry="labels", dims=None).flatten()
            if len(value) != 1:
                raise DataError(f"{file}: expected one label, got shape ({len(value)},)")
            labels.append(f"{value.item():g}")
        return labels


class BagFileSource(BagSource):
    """The bags of a bag file in CSR form, named by their number from 0.

    Args:
        data: bags, or the path of a bag file.
        names: bags to select; None: all.
    """

    def __init__(self, data: BagData | str | os.PathLike, names: Sequence[str] | None = None):
        path = "bags" if isinstance(data, BagData) else os.fspath(data)
        self.data = data if isinstance(data, BagData) else load_bags(data)
        every = [str(i) for i in range(len(self.data.labels))]
        self.names = every if names is None else list(names)
        unknown = [name for name in self.names if name not in set(every)]
        if unknown:
            raise DataError(f"{path}: expected bags 0..{len(every) - 1}, got {unknown[0]!r}")
        self._bags = np.array([int(name) for name in self.names], dtype=np.int64)
        self.sizes = self.data.sizes[self._bags]
        self.num_features = self.data.features.shape[1]
        self.labels = [str(label) for label in self.data.labels[self._bags]]

    def features(self, index: int) -> torch.Tensor:
        begin, end = self.data.offsets[self._bags[index] : self._bags[index] + 2]
        return torch.from_numpy(self.data.features[begin:end])


def open_bags(path: str | os.PathLike, names: Sequence[str] | None = None) -> BagSource:
    """Opens bags: a folder as a :class:`BagFolder`, a file as a :class:`BagFileSource`.

    Raises:
        DataError: the path does not exist, or contains no bags.
    """
    path = Path(path)
    if path.is_dir():
        return BagFolder(path, names)
    if not path.exists():
        raise DataError(f"{path}: expected a folder of bags or a bag file, got a path that does not exist")
    return BagFileSource(path, names)


def _feature_files(folder):
    """``{name: file}``, sorted by name."""
    files: dict[str, Path] = {}
    if not folder.is_dir():
        return files
    for file in sorted(folder.iterdir()):
        if file.suffix not in READERS or file.name.startswith("."):
            continue
        if file.stem in files:
            raise DataError(f"{file}: expected one file per bag, got {files[file.stem].name} as well")
        files[file.stem] = file
    return files


def _named(files, names, folder):
    chosen = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        found = name if name in files else stem if suffix in READERS and stem in files else None
        if found is None:
            raise DataError(f"{folder}: expected a file {name}{{{','.join(READERS)}}}, found none for bag {name!r}")
        chosen[name] = files[found]
    return chosen


def _shape(file):
    shape = READERS[file.suffix].shape(file)
    if len(shape) != 2 or shape[1] < 1:
        raise DataError(f"{file}: features: expected shape (instances, D), got {tuple(shape)}")
    return shape
