"""Readers of files that contain the features of one bag: HDF5, PyTorch, NumPy. Nothing is unpickled."""

import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from amil_fast.utils.files import DataError, open_regular
from amil_fast.utils.numpy_files import DAMAGED, MAX_RATIO, check_size, read_header, read_npy, read_npz
from amil_fast.utils.optional import require

_ROWS = 256  # checked at once
_KEPT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class _Reader:
    """Reads one format. ``entry`` is the name of the array in formats that have names."""

    def shape(self, path: Path) -> tuple[int, ...]:
        """Shape of the features, read from the header; a leading axis of length 1 before two others is dropped."""
        raise NotImplementedError

    def features(self, path: Path, entry: str = "features", dims: int | None = 2) -> torch.Tensor:
        """The array as a tensor, its leading axis of length 1 removed if there are more than ``dims`` axes."""
        raise NotImplementedError

    def coords(self, path: Path) -> np.ndarray | None:
        return None

    def attributes(self, path: Path) -> dict[str, float]:
        return {}


class _Hdf5(_Reader):
    """Datasets ``features`` and, optionally, ``coords``: the layout of CLAM and TRIDENT."""

    @contextmanager
    def _open(self, path) -> Iterator:
        h5py = require("h5py", "reading .h5 files")
        with _readable(path), open_regular(path), h5py.File(path, "r") as file:
            yield file

    def _dataset(self, file, path, entry):
        if entry not in file or not hasattr(file[entry], "shape"):
            raise DataError(f"{path}: dataset {entry!r} is missing (found: {', '.join(sorted(file)) or 'nothing'})")
        dataset = file[entry]
        _check_kind(path, entry, dataset.dtype)
        check_size(dataset.shape, dataset.dtype, MAX_RATIO * path.stat().st_size)
        return dataset

    def shape(self, path):
        with self._open(path) as file:
            return _squeezed(self._dataset(file, path, "features").shape)

    def features(self, path, entry="features", dims=2):
        with self._open(path) as file:
            dataset = self._dataset(file, path, entry)
            return _tensor(path, dataset[()], dims)

    def coords(self, path):
        with self._open(path) as file:
            return self._dataset(file, path, "coords")[()] if "coords" in file else None

    def attributes(self, path):
        with self._open(path) as file:
            found = dict(file["coords"].attrs) | dict(file.attrs) if "coords" in file else dict(file.attrs)
        return {name: float(value) for name, value in found.items() if np.ndim(value) == 0 and _is_number(value)}


class _Npy(_Reader):
    def shape(self, path):
        with _readable(path), open_regular(path) as file:
            return _npy_shape(path, file, path.stat().st_size)

    def features(self, path, entry="features", dims=2):
        return _tensor(path, read_npy(path), dims)


class _Npz(_Reader):
    """Entries ``features`` and, optionally, ``coords``; or a single entry of any name."""

    @contextmanager
    def _open(self, path) -> Iterator:
        with _readable(path), open_regular(path) as file, zipfile.ZipFile(file) as archive:
            yield archive

    def _entry(self, path, archive):
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if "offsets" in names:
            raise DataError(f"{path}: expected the features of one bag, got a bag file of many: pass its path itself")
        if "features" in names:
            return "features"
        if len(names) == 1:
            return names[0]
        raise DataError(f"{path}: entry 'features' is missing (found: {', '.join(sorted(names)) or 'nothing'})")

    def shape(self, path):
        with self._open(path) as archive:
            member = archive.getinfo(f"{self._entry(path, archive)}.npy")
            with archive.open(member) as file:
                return _npy_shape(path, file, MAX_RATIO * path.stat().st_size)

    def features(self, path, entry="features", dims=2):
        with self._open(path) as archive:
            name = entry if f"{entry}.npy" in archive.namelist() else self._entry(path, archive)
        return _tensor(path, read_npz(path, [name])[name], dims)

    def coords(self, path):
        with self._open(path) as archive:
            found = "coords.npy" in archive.namelist()
        return read_npz(path, ["coords"])["coords"] if found else None


class _Pt(_Reader):
    """A tensor, or a dict with ``features`` and, optionally, ``coords``; read with ``weights_only=True``."""

    def _load(self, path, entry):
        with _readable(path), open_regular(path):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                content = torch.load(path, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
        if isinstance(content, dict):
            content = content.get(entry)
        elif entry == "coords":
            return None
        if content is None and entry == "coords":
            return None
        if not isinstance(content, torch.Tensor) or content.layout != torch.strided or content.is_meta:
            kind = "nothing" if content is None else type(content).__name__
            raise DataError(f"{path}: expected a dense tensor, or a dict with one under {entry!r}, got {kind}")
        with _readable(path):  # an expanded tensor holds fewer numbers than its shape
            check_size(tuple(content.shape), content.dtype, MAX_RATIO * path.stat().st_size)
        return content

    def shape(self, path):
        return _squeezed(tuple(self._load(path, "features").shape))

    def features(self, path, entry="features", dims=2):
        # A copy, since the mapped pages would count as resident memory for as long as the tensor exists.
        return _squeezed_tensor(_as_float(self._load(path, entry).detach()).clone(), dims)

    def coords(self, path):
        coords = self._load(path, "coords")
        with _readable(path):  # NumPy has no bfloat16
            return None if coords is None else coords.detach().numpy().copy()


READERS: dict[str, _Reader] = {".h5": _Hdf5(), ".hdf5": _Hdf5(), ".pt": _Pt(), ".npy": _Npy(), ".npz": _Npz()}


def check_features(features: torch.Tensor, path: str | os.PathLike, size: int, width: int) -> torch.Tensor:
    """Returns ``features`` if they are finite and have the shape of the header; otherwise raises DataError."""
    if features.shape != (size, width):
        raise DataError(f"{path}: features: expected shape ({size}, {width}), got {tuple(features.shape)}")
    # In parts: temporaries of the size of a bag fragment the heap of a long-lived process to several times its needs.
    for begin in range(0, size, _ROWS):
        finite = torch.isfinite(features[begin : begin + _ROWS])
        if not bool(finite.all()):
            row, column = torch.nonzero(~finite)[0].tolist()
            row += begin
            raise DataError(
                f"{path}: features: expected finite values, got {features[row, column].item()} in row {row}, "
                f"column {column}"
            )
    return features


@contextmanager
def _readable(path) -> Iterator[None]:
    """Turns the errors of damaged or foreign files into a DataError that names the file."""
    try:
        yield
    except (DataError, ImportError):
        raise
    except (*DAMAGED, LookupError, AttributeError, AssertionError) as error:  # the last three: PyTorch's unpickler
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{path}: cannot be read: {_reason(text, path)}") from error
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: expected a file that torch.load reads with weights_only=True (tensors in dicts and lists); "
            "others are not opened, since unpickling can run code"
        ) from error


def _reason(text, path):
    if "allow_pickle" in text or "pickled data" in text:  # NumPy recommends unpickling
        return f"expected an array of numbers in the format {path.suffix}, got Python objects or another format"
    return text.splitlines()[0] if text else "damaged"


def _npy_shape(path, file, size):
    shape, _, dtype = read_header(file)
    _check_kind(path, "features", dtype)
    check_size(shape, dtype, size)
    return _squeezed(shape)


def _check_kind(path, entry, dtype):
    if dtype.kind not in "fiub":
        raise DataError(f"{path}: {entry}: expected numbers, got dtype {dtype}")


def _squeezed(shape):
    return tuple(shape[1:]) if len(shape) == 3 and shape[0] == 1 else tuple(shape)


def _squeezed_tensor(tensor, dims):
    return tensor[0] if dims is not None and tensor.dim() == dims + 1 and tensor.shape[0] == 1 else tensor


def _tensor(path, array, dims):
    array = np.asarray(array)
    _check_kind(path, "array", array.dtype)
    if array.dtype not in (np.float16, np.float32):
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return _squeezed_tensor(torch.from_numpy(np.ascontiguousarray(native).reshape(native.shape)), dims)


def _as_float(tensor):
    return tensor if tensor.dtype in _KEPT_DTYPES else tensor.float()


def _is_number(value):
    return isinstance(value, (int, float, np.integer, np.floating)) and np.isfinite(value)
