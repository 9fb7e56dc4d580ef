"""Reading what others wrote: images, JSON and MATLAB files, with errors that name the file."""

import io
import json
import math
from pathlib import Path, PurePosixPath, PureWindowsPath

import cv2
import numpy as np
from PIL import Image

from amil_fast.pose.data.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".mpg", ".mpeg", ".webm", ".m4v", ".wmv"})


def read_json(path):
    """The content of a JSON file; DataError where it is missing or no JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: expected a JSON file: {error}") from None


def read_mat(path, *names, structs=False):
    """The variables of a MATLAB file (version 4 to 7.2); DataError where it, or one of ``names``, is missing.

    ``structs``: structures become objects with attributes, 1 x 1 arrays their content.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        content = loadmat(path, squeeze_me=structs, struct_as_record=not structs)
    except NotImplementedError:
        raise DataError(f"{path}: a MATLAB 7.3 file; save it with -v7") from None
    except (ValueError, TypeError, OSError, EOFError, IndexError, KeyError, MemoryError, MatReadError) as error:
        raise DataError(f"{path}: expected a MATLAB file: {error}") from None
    for name in names:
        if name not in content:
            there = ", ".join(sorted(key for key in content if not key.startswith("__"))) or "nothing"
            raise DataError(f"{path}: expected a variable {name!r}, found {there}")
    return content


def safe_path(root, name):
    """``root / name``, for a name from an annotation file; ValueError where it could leave ``root``."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"expected the name of a file, got {name!r}")
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root:
        raise ValueError(f"expected a path relative to the data set, got the absolute path {name!r}")
    if ".." in windows.parts or ".." in PurePosixPath(name).parts:
        raise ValueError(f"expected a path inside the data set, got {name!r} with '..'")
    return Path(root) / name


# The end marker of an image is looked for in so many last bytes; some cameras append data of their own.
_TAIL = 1 << 16


def why_truncated(head, tail):
    """None where an encoded image reaches its own end, else the reason. JPEG and PNG; others are left to the decoder.

    ``head`` and ``tail``: its first and last bytes, which may be the same. Decoders fill what is missing of a truncated
    JPEG with gray and say nothing.
    """
    if head[:2] == b"\xff\xd8":
        # The last start of scan; stuffing keeps this pair out of the coded data.
        end, scan = tail.rfind(b"\xff\xd9"), tail.rfind(b"\xff\xda")
        if end < 0 or end < scan:
            return "truncated JPEG file: its end marker is missing"
    elif head[:8] == b"\x89PNG\r\n\x1a\n" and tail.rfind(b"IEND") < 0:
        return "truncated PNG file: its last chunk is missing"
    return None


def image_size(path):
    """``(width, height)`` in pixels as stored; DataError where the file is missing, truncated or no image.

    Looks at the file's header and end only.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            with Image.open(file) as image:
                size = image.size
            length = file.seek(0, io.SEEK_END)
            file.seek(max(0, length - _TAIL))
            reason = why_truncated(head, file.read())
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such image") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{path}: can't be read: {error.strerror}") from None
        raise DataError(f"{path}: expected an image ({type(error).__name__})") from None
    if reason:
        raise DataError(f"{path}: {reason}")
    return size


def read_image(path, *, upright=False, shrink=1.0):
    """Decodes an image file to ``(H, W, 3)`` uint8, **BGR** as OpenCV has it.

    Args:
        path: the file.
        upright: obey the camera's orientation tag. Annotations refer to the pixels as stored; photographs of users are
            to be turned.
        shrink: how many times larger than needed the picture is. From 2 on a JPEG is decoded at 1/2, 1/4 or 1/8 of
            its size, which is several times faster and free of aliasing.

    Returns:
        ``(image, reduction)``: pixel (x, y) of the returned image is the mean of ``reduction`` x ``reduction`` stored
        pixels, its center at ``reduction * x + (reduction - 1) / 2`` of the file's.

    Raises:
        DataError: missing, unreadable, truncated, or no image.
    """
    data = _read_bytes(path)
    if reason := why_truncated(data, data):
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
        raise DataError(f"{path}: expected an image, its content can't be decoded")
    return image, reduction


def decode_image(data, flags=cv2.IMREAD_COLOR):
    """Encoded bytes, or a uint8 array of them, to ``(H, W, 3)`` uint8 BGR; None where they can't be decoded."""
    buffer = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    try:
        return cv2.imdecode(buffer, flags) if len(buffer) else None
    except cv2.error:
        return None


def _read_bytes(path):
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such image") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from None
