"""Images and MATLAB files, with errors that name the file."""

import io
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from amil_fast.pose.data import mat_check
from amil_fast.utils.files import DataError, brief, open_regular, read_bytes
from amil_fast.utils.limits import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS

# Bytes at the end of a file that are searched for the image's end marker; some cameras append their own data.
_TAIL = 1 << 16


def read_mat(
    path: str | os.PathLike, *names: str, optional: Sequence[str] = (), structs: bool = False
) -> dict[str, Any]:
    """Reads variables of a MATLAB file, version 4 to 7.2.

    Args:
        path: the file.
        names: variables that must exist.
        optional: further variables, which may be missing.
        structs: return structures as objects with attributes, and 1 x 1 arrays as scalars.

    Raises:
        DataError: the file or one of ``names`` is missing, or the file is not readable.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    data = read_bytes(path, mat_check.MAX_BYTES)
    wanted = [*names, *optional]
    try:
        found = mat_check.check_mat(data, wanted)
        content = loadmat(io.BytesIO(data), variable_names=wanted, squeeze_me=structs, struct_as_record=not structs)
    except NotImplementedError:
        raise DataError(f"{path}: expected MATLAB version 7.2 or older, got 7.3; save the file with -v7") from None
    except (
        ValueError,
        TypeError,
        OSError,
        EOFError,
        IndexError,
        KeyError,
        MemoryError,
        zlib.error,
        MatReadError,
    ) as error:
        raise DataError(f"{path}: expected a MATLAB file: {error}") from None
    for name in names:
        if name not in content:
            raise DataError(
                f"{path}: expected a variable {name!r}, found {', '.join(sorted(filter(None, found))) or 'none'}"
            )
    return content


def safe_path(root: str | os.PathLike, name: str) -> Path:
    """``root / name`` for a name from an annotation file; raises ValueError if it could point outside ``root``."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"expected the name of a file, got {brief(name)}")
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root:
        raise ValueError(f"expected a path relative to the data set, got the absolute path {name!r}")
    if ".." in windows.parts or ".." in PurePosixPath(name).parts:
        raise ValueError(f"expected a path inside the data set, got {name!r} with '..'")
    return Path(root) / name


def why_truncated(head: bytes, tail: bytes) -> str | None:
    """Reason why an encoded JPEG or PNG is incomplete, None if it is complete or of another format.

    Decoders fill the missing part of a truncated JPEG with gray and report nothing.

    Args:
        head, tail: first and last bytes of the file; they may overlap.
    """
    if head[:2] == b"\xff\xd8":
        # Compare with the last start of scan; byte stuffing excludes both markers from the coded data.
        end, scan = tail.rfind(b"\xff\xd9"), tail.rfind(b"\xff\xda")
        if end < 0 or end < scan:
            return "truncated JPEG file: end marker missing"
    elif head[:8] == b"\x89PNG\r\n\x1a\n" and tail.rfind(b"IEND") < 0:
        return "truncated PNG file: last chunk missing"
    return None


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """``(width, height)`` in pixels as stored, from the file's header and end only.

    Raises:
        DataError: the file is missing, truncated, too large or not an image.
    """
    with open_regular(path, "image") as file:
        head = file.read(8)
        size = _header_size(file)
        length = file.seek(0, io.SEEK_END)
        file.seek(max(0, length - _TAIL))
        reason = why_truncated(head, file.read())
    if size is None:
        raise DataError(f"{path}: expected an image")
    if reason or (reason := _too_large(*size)):
        raise DataError(f"{path}: {reason}")
    return size


def read_image(path: str | os.PathLike, *, upright: bool = False, shrink: float = 1.0) -> tuple[NDArray[Any], int]:
    """Decodes an image file.

    Args:
        path: the file.
        upright: apply the EXIF orientation. Off for annotated images, whose annotations refer to the pixels as stored.
        shrink: factor by which the caller will shrink the image. From 2 on a JPEG is decoded at 1/2, 1/4 or 1/8 of its
            size, which is several times faster and does not alias.

    Returns:
        ``(image, reduction)``: ``(H, W, 3)`` uint8 **BGR** as in OpenCV. Pixel (x, y) is the mean of ``reduction`` x
        ``reduction`` stored pixels with its center at ``reduction * x + (reduction - 1) / 2`` of the file's.

    Raises:
        DataError: the file is missing, unreadable, truncated, not an image, or has more than
            :data:`~amil_fast.utils.limits.MAX_IMAGE_PIXELS`.
    """
    data = read_bytes(path, MAX_IMAGE_BYTES, "image")
    size = _header_size(io.BytesIO(data))
    if reason := why_truncated(data, data) or (size and _too_large(*size)):
        raise DataError(f"{path}: {reason}")
    reduction = 1
    if shrink >= 2 and data[:2] == b"\xff\xd8":
        reduction = min(8, 1 << int(math.log2(shrink)))
    flags = {
        1: cv2.IMREAD_COLOR,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }[reduction]
    image = decode_image(data, flags | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION))
    if image is None:
        raise DataError(f"{path}: expected an image, cannot be decoded")
    return image, reduction


def decode_image(data: bytes | NDArray[np.uint8], flags: int = cv2.IMREAD_COLOR) -> NDArray[Any] | None:
    """Decodes an encoded image to ``(H, W, 3)`` uint8 BGR; None if that fails or the image is too large."""
    size = _header_size(io.BytesIO(memoryview(data)))  # type: ignore[arg-type]
    if size is None or _too_large(*size):
        return None
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None


def encode_image(image: NDArray[np.uint8], suffix: str, quality: int = 92) -> bytes:
    """Encodes ``(H, W, 3)`` uint8 BGR in the format of ``suffix``; ``quality`` is that of JPEG.

    Raises:
        ValueError: an image that the format cannot represent: JPEG has at most 65,500 pixels per side.
    """
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if suffix.lower() in (".jpg", ".jpeg") else []
    try:
        done, data = cv2.imencode(suffix, image, options)
    except cv2.error:
        done = False
    if not done:
        raise ValueError(f"an image of {image.shape[1]} x {image.shape[0]} pixels cannot be written as {suffix}")
    return data.tobytes()


def _header_size(file):
    """``(width, height)`` according to the image's header; None if there is none."""
    try:
        with Image.open(file) as image:
            return image.size
    except Image.DecompressionBombError:
        return (MAX_IMAGE_PIXELS, 2)
    except Exception:  # of the parsers of 40 formats, for damaged data
        return None


def _too_large(width, height):
    if width * height > MAX_IMAGE_PIXELS:
        return f"expected an image of at most {MAX_IMAGE_PIXELS >> 20} x 2^20 pixels, got more"
    return None
