"""Atomic file writes and JSON: a file appears under its name only when it is complete."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A file that does not follow its format. The message starts with the file and names the entry."""


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; renames it to ``path`` on success, removes it on failure.

    The temporary name keeps the suffix, for writers that choose the format by it. An existing file stays as it is until
    the rename.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem[:200]}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
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


def read_json(path: str | os.PathLike) -> Any:
    """Returns the content of a JSON file; raises DataError where it is missing, unreadable or not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a JSON file: {error}") from None


def publish(folder: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Writes several files to ``folder`` so that each survives a kill or a power failure whole or not at all.

    Args:
        folder: created if necessary; files of the same names are replaced, others stay.
        write: called with an empty folder to put the files in. They are flushed to the disk and renamed in the order of
            their names, so that the presence of the last one implies the others.
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
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
