"""Reading with stated bounds, atomic writes, JSON: a file appears under its name only when it is complete."""

import json
import os
import re
import reprlib
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES = 1 << 30  # the largest annotation file of COCO has 0.5 GB

# The standard parser's own conversion of integers is several times faster than a function.
_LONG_BYTES, _LONG_TEXT = re.compile(rb"[0-9]{19}"), re.compile("[0-9]{19}")

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother, _repr.maxlong = 3, 100, 100, 30


class DataError(ValueError):
    """A file that does not follow its format. The message starts with the file and names the entry."""


def brief(value: object) -> str:
    """Representation of a value from a file, for messages: of bounded length, also for nested and huge values."""
    return _repr.repr(value)


@contextmanager
def open_regular(path: str | os.PathLike, what: str = "file") -> Iterator[BinaryIO]:
    """Opens a regular file for reading; raises DataError if it is missing, unreadable, a pipe, a device or a folder."""
    try:
        # Without O_NONBLOCK the opening of a named pipe waits for a writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(f"{path}: cannot be read: not a regular file")
            yield file
    except FileNotFoundError:
        raise DataError(f"{path}: no such {what}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_bytes(path: str | os.PathLike, limit: int, what: str = "file") -> bytes:
    """Content of a regular file of at most ``limit`` bytes; raises DataError."""
    with open_regular(path, what) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise DataError(f"{path}: expected at most {limit} bytes, got {size}")
        return file.read()


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; renames it to ``path`` on success, removes it on failure.

    The temporary name keeps the suffix, for writers that choose the format by it. An existing file stays as it is until
    the rename. An OSError, such as that of a full disk, names ``path``.
    """
    path = Path(path)
    # The checksum separates long names that begin alike.
    stem = os.fsdecode(os.fsencode(path.stem)[:100])
    partial = path.with_name(f".{stem}.{zlib.crc32(os.fsencode(path.name)):08x}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.strerror is None or error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes ``data`` to ``path`` atomically."""
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes ``text`` to ``path`` atomically, as UTF-8."""
    write_bytes(path, text.encode())


def to_json(content: Any, indent: int | None = 2) -> str:
    """JSON text with a final newline; ValueError for NaN and infinities, which JSON does not have."""
    return json.dumps(content, indent=indent, allow_nan=False) + "\n"


def write_json(path: str | os.PathLike, content: Any, indent: int | None = 2) -> None:
    """Writes ``content`` to ``path`` atomically, as :func:`to_json` formats it."""
    write_text(path, to_json(content, indent))


def read_json(path: str | os.PathLike, kind: type | tuple[type, ...] = object, what: str = "a JSON file") -> Any:
    """Returns the content of a JSON file.

    Args:
        path: the file, of at most :data:`MAX_JSON_BYTES`.
        kind: expected type of the content: ``dict``, ``list``, or both.
        what: description of the expected content, for the message.

    Raises:
        DataError: the file is missing, unreadable, too large, not JSON, or of another type.
    """
    return parse_json(read_bytes(path, MAX_JSON_BYTES), path, kind, what)


def parse_json(
    text: str | bytes, source: object, kind: type | tuple[type, ...] = object, what: str = "a JSON file"
) -> Any:
    """Parses JSON; raises DataError, beginning with ``source``, for other text, another type, or integers beyond 64
    bits, which no array holds."""
    try:
        long = _LONG_BYTES.search(text) if isinstance(text, bytes) else _LONG_TEXT.search(text)
        content = json.loads(text, parse_int=_int64 if long else None)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: expected a JSON file: {error}") from None
    if not isinstance(content, kind):
        raise DataError(f"{source}: expected {what}, got {type(content).__name__}")
    return content


def _int64(text):
    value = int(text) if len(text) <= 20 else 1 << 64
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"an integer of {len(text)} characters exceeds 64 bits")
    return value


def check_version(found: object, newest: int, source: object) -> None:
    """Raises DataError unless ``found`` is the number of a format version up to ``newest``."""
    if type(found) is not int or found < 0:
        raise DataError(f"{source}: version: expected a number up to {newest}, got {brief(found)}")
    if found > newest:
        raise DataError(f"{source}: version: expected at most {newest}, got {found}; update amil_fast")


def publish(folder: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Writes several files to ``folder`` so that each survives a kill or a power failure whole or not at all.

    Args:
        folder: created if necessary; files of the same names are replaced, others stay.
        write: called with an empty folder to put the files in. They are flushed to the disk and renamed in the order of
            their names, so that the presence of the last one implies the others. An OSError names the file in
            ``folder``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed here
    partial.mkdir()
    try:
        write(partial)
        written = sorted(partial.iterdir())
        for path in written:
            path.chmod(folder.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read
            _flush(path)
        for path in written:
            os.replace(path, folder / path.name)
        _flush(folder)
    except OSError as error:
        if error.strerror is None or error.filename is None:
            raise
        name = os.fspath(error.filename).replace(f"{partial}{os.sep}", f"{folder}{os.sep}", 1)
        raise OSError(error.errno, error.strerror, name) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
