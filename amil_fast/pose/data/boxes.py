"""Bounding boxes of people from JSON files."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from amil_fast.utils.files import DataError, read_json


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
            self._read(read_json(self.path))

    def _read(self, content):
        if isinstance(content, dict):
            rows = [
                (f"{name!r}, box {i}", {"file_name": name, "bbox": box})
                for name, boxes in content.items()
                for i, box in enumerate(boxes if isinstance(boxes, list) else [None])
            ]
        elif isinstance(content, list):
            rows = [(f"row {i}", row) for i, row in enumerate(content)]
        else:
            raise DataError(f"{self.path}: expected an object or a list, got {type(content).__name__}")
        for entry, row in rows:
            try:
                box = np.array(row["bbox"], np.float64)
                name = row["file_name"] if "file_name" in row else row["image_id"]
                frame = row.get("frame")
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{self.path}: {entry}: expected bbox and file_name or image_id ({error!r})") from None
            if box.shape != (4,) or not np.isfinite(box).all() or (box[2:] <= 0).any():
                raise DataError(
                    f"{self.path}: {entry}: expected [x, y, width, height] with positive width and height, "
                    f"got {row['bbox']}"
                )
            self._boxes.setdefault((_key(name), frame), []).append(box)

    def of(self, name: str | os.PathLike, frame: int | None = None) -> NDArray[np.float64]:
        """Boxes ``(n, 4)`` of an image or a video frame, n = 0 where there are none; NaN for the whole image."""
        if self.path is None:
            return np.full((1, 4), np.nan)
        found: list[NDArray[np.float64]] = []
        for key in dict.fromkeys((_key(str(name)), _key(Path(name).name), _key(Path(name).stem))):
            for when in dict.fromkeys((frame, None)):
                found += self._boxes.get((key, when), [])
            if found:
                break
        return np.array(found).reshape(-1, 4)


def _key(name):
    # COCO file names are zero-padded image ids.
    text = str(name)
    return int(text) if text.isdecimal() else text
