"""Bounding boxes of people from JSON files."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from amil_fast.pose.data.errors import BAD_ENTRY, reason
from amil_fast.utils.files import DataError, brief, read_json
from amil_fast.utils.limits import MAX_COORDINATE


class Boxes:
    """Bounding boxes by image and frame.

    Args:
        path: a JSON file; None stands for one box per image that covers all of it. The file is one of

            - an object: file name -> list of boxes ``[x, y, width, height]``;
            - a list of rows with ``bbox`` and ``file_name`` (or ``image_id``: a name, or COCO's number, which is the
              stem of the file name). Rows of videos may have ``frame``; without it a box applies to all frames. COCO
              result files have this form.

    Raises:
        DataError: the file does not follow one of these formats.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        self.path = None if path is None else Path(path)
        self._boxes: dict[tuple[int | str, int | None], list[NDArray[np.float64]]] = {}
        if self.path is not None:
            self._read(read_json(self.path, (dict, list), "an object or a list"))

    def _read(self, content):
        if isinstance(content, dict):
            rows = [
                (f"{name!r}, box {i}", {"file_name": name, "bbox": box})
                for name, boxes in content.items()
                for i, box in enumerate(boxes if isinstance(boxes, list) else [None])
            ]
        else:
            rows = [(f"row {i}", row) for i, row in enumerate(content)]
        for entry, row in rows:
            try:
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object with bbox and file_name or image_id, got {brief(row)}")
                box = read_box(row["bbox"])
                name = row["file_name"] if "file_name" in row else row["image_id"]
                frame = row.get("frame")
                if not isinstance(name, str | int) or not isinstance(frame, int | None):
                    raise ValueError(f"expected a name or number, got {brief(name)} and frame {brief(frame)}")
            except BAD_ENTRY as error:
                raise DataError(f"{self.path}: {entry}: {reason(error)}") from None
            self._boxes.setdefault((_key(name), frame), []).append(box)

    def check_names(self, names: Iterable[str | os.PathLike]) -> None:
        """Raises DataError if there is a file of boxes, and it names none of these images and videos."""
        known = {name for name, _ in self._boxes}
        if self.path is not None and not any(known.intersection(_keys(name)) for name in names):
            some = ", ".join(str(name) for name in list(known)[:3]) or "nothing"
            raise DataError(f"{self.path}: expected boxes for at least one of the images, found {some}")

    def of(self, name: str | os.PathLike, frame: int | None = None) -> NDArray[np.float64]:
        """Boxes ``(n, 4)`` of an image or a video frame, n = 0 where there are none; NaN for the whole image."""
        if self.path is None:
            return np.full((1, 4), np.nan)
        found: list[NDArray[np.float64]] = []
        for key in _keys(name):
            for when in dict.fromkeys((frame, None)):
                found += self._boxes.get((key, when), [])
            if found:
                break
        return np.array(found).reshape(-1, 4)


def read_box(value: object) -> NDArray[np.float64]:
    """A bounding box ``[x, y, width, height]`` from a file as ``(4,)``; raises ValueError if it is none."""
    box = np.array(value, np.float64)
    if box.shape != (4,) or not (np.abs(box) <= MAX_COORDINATE).all() or (box[2:] <= 0).any():
        raise ValueError(
            "expected a bbox [x, y, width, height] with positive width and height, at most "
            f"{MAX_COORDINATE:.0f}, got {brief(value)}"
        )
    return box


def _keys(name):
    """Keys that refer to an image: its path, its name, and its stem, COCO's number."""
    return dict.fromkeys((_key(str(name)), _key(Path(name).name), _key(Path(name).stem)))


def _key(name):
    # COCO file names are zero-padded image ids.
    text = str(name)
    return int(text) if text.isdecimal() and len(text) < 20 else text
