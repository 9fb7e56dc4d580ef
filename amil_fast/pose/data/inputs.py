"""Discovery of image and video files."""

import os
from collections.abc import Iterable
from pathlib import Path

from amil_fast.utils.files import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".mpg", ".mpeg", ".webm", ".m4v", ".wmv"})


def is_image(path: Path) -> bool:
    """True for the suffix of an image file."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_video(path: Path) -> bool:
    """True for the suffix of a video file."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(paths: Iterable[str | os.PathLike]) -> list[tuple[Path, Path]]:
    """Lists images and videos.

    Args:
        paths: files, and folders that are searched recursively; hidden and other files in a folder are ignored.

    Returns:
        ``(file, name)`` pairs in a deterministic order; ``name`` is relative to the folder in ``paths``.

    Raises:
        DataError: a path does not exist, or a file is neither an image nor a video.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if is_image(file) or is_video(file))
            found += [(file, file.relative_to(path)) for file in inside if not file.name.startswith(".")]
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        elif is_image(path) or is_video(path):
            found.append((path, Path(path.name)))
        else:
            kinds = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
            raise DataError(f"{path}: expected an image or a video ({kinds})")
    return found
