"""``.npy`` and ``.npz`` files of numbers, with headers checked before memory is allocated; nothing is unpickled."""

import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from amil_fast.utils.files import DataError, open_regular

# Deflate compresses by at most 1,032 : 1. An array that claims more is damaged, so that the memory for reading is
# bounded by the size of the file.
MAX_RATIO = 1032
_CHUNK = 1 << 24
# Errors of damaged files. NumPy parses the header as Python source.
DAMAGED = (
    *(ValueError, OSError, EOFError, RuntimeError, MemoryError, OverflowError, TypeError),
    *(SyntaxError, tokenize.TokenError, struct.error, zipfile.BadZipFile, zlib.error),
)


def read_npy(path: str | os.PathLike) -> NDArray[Any]:
    """Returns the array of an ``.npy`` file; raises DataError."""
    with open_regular(path) as file:
        try:
            return _read_array(file, os.fstat(file.fileno()).st_size)
        except DAMAGED as error:
            raise DataError(f"{path}: expected a NumPy file of numbers: {_reason(error)}") from None


def read_npz(
    path: str | os.PathLike, required: Iterable[str] = (), what: str = "a NumPy .npz file"
) -> dict[str, NDArray[Any]]:
    """Returns the arrays of an ``.npz`` file by name.

    Args:
        path: the file.
        required: entries that must exist; only they are read. By default all are.
        what: description of the expected file, for the message.

    Raises:
        DataError: with the names of file and entry.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            archive = zipfile.ZipFile(file)
        except DAMAGED:
            raise DataError(f"{path}: expected {what}") from None
        members = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        arrays = {}
        for name in required or members:
            if name not in members:
                raise DataError(f"{path}: entry {name!r} is missing (found: {', '.join(sorted(members)) or 'nothing'})")
            try:
                arrays[name] = _read_member(archive, members[name], size)
            except DAMAGED as error:
                reason = _reason(error)
                raise DataError(f"{path}: entry {name!r}: expected an array of numbers, got {reason}") from None
        return arrays


def _read_member(archive, entry, file_size):
    if entry.compress_size > file_size or entry.file_size > MAX_RATIO * entry.compress_size + 1024:
        raise ValueError(f"{entry.file_size} bytes from {entry.compress_size} in a file of {file_size}")
    with archive.open(entry) as member:
        array = _read_array(member, entry.file_size)
        if member.read(1):  # also compares the checksum, at the end of the entry
            raise ValueError("bytes after the array")
        return array


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads ``(shape, fortran_order, dtype)`` of an array in ``.npy`` format; raises one of :data:`DAMAGED`."""
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"format version {version}")
    return (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)


def check_size(shape: tuple[int, ...], dtype: Any, size: int) -> None:
    """Raises ValueError for an array that ``size`` bytes cannot hold; ``dtype`` is NumPy's or PyTorch's."""
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"shape {shape} of {dtype} in {size} bytes")


def _read_array(file: BinaryIO, size: int) -> NDArray[Any]:
    """Reads an array in ``.npy`` format from ``size`` bytes."""
    shape, fortran_order, dtype = read_header(file)
    if dtype.kind not in "biufc":
        raise ValueError("an array of Python objects" if dtype.hasobject else f"dtype {dtype}")
    check_size(shape, dtype, size)
    count = math.prod(shape)
    array = np.empty(count, dtype)
    rest = array.view(np.uint8).data if count else memoryview(b"")
    while rest:
        got = file.readinto(rest[:_CHUNK])  # type: ignore[attr-defined]
        if not got:
            raise ValueError(f"{array.nbytes - len(rest)} of {array.nbytes} bytes")
        rest = rest[got:]
    return array.reshape(shape[::-1]).T if fortran_order else array.reshape(shape)


def _reason(error):
    return str(error) or type(error).__name__
