"""Frames of videos, images of folders, and the boxes of people in them."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from amil_fast.pose.codec import crop_matrix
from amil_fast.pose.data.augment import warp_crop
from amil_fast.pose.data.errors import DataError
from amil_fast.pose.data.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, read_json


class VideoFrames:
    """The frames of a video file, in order.

    Iterating yields ``(number, frame)``: the frame ``(H, W, 3)`` uint8 BGR, upright, or None where it can't be decoded
    and the rest goes on. ``rate`` is in frames per second, ``expected`` the number of frames the file's header
    promises (0 where it promises nothing), ``missing`` (after the iteration) how many of these never came: containers
    drop what is broken without saying which.
    """

    # So many frames in a row that can't be decoded are taken for the end of the file.
    _PATIENCE = 25

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{self.path}: there is no such video")
        capture = self._open()
        self.rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        self.expected = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self.missing = 0
        capture.release()

    def _open(self):
        capture = cv2.VideoCapture(str(self.path))
        if not capture.isOpened():
            raise DataError(f"{self.path}: expected a video, it can't be opened (damaged, or a format unknown here)")
        return capture

    def __iter__(self):
        capture = self._open()
        number, failures = 0, 0
        try:
            while True:
                try:
                    there, frame = capture.read()
                except cv2.error:
                    there, frame = False, None
                if there and frame is not None:
                    for lost in range(failures):
                        yield number + lost, None
                    number += failures
                    failures = 0
                    yield number, frame
                    number += 1
                    continue
                failures += 1
                if number + failures > self.expected or failures > self._PATIENCE:
                    break
        finally:
            capture.release()
        self.missing = max(0, self.expected - number)


def find_inputs(paths):
    """Files and folders (searched to the bottom) to a list of ``(file, name)``: images and videos, in a stable order.

    ``name`` is the file's path relative to the folder it was found in. DataError for a path that isn't there and for a
    file of unknown kind; what else lies in a folder is passed over.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if is_image(file) or is_video(file))
            found += [(file, file.relative_to(path)) for file in inside if not file.name.startswith(".")]
        elif not path.exists():
            raise DataError(f"{path}: there is no such file or folder")
        elif is_image(path) or is_video(path):
            found.append((path, Path(path.name)))
        else:
            kinds = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
            raise DataError(f"{path}: expected an image or a video ({kinds})")
    return found


def is_image(path):
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_video(path):
    return path.suffix.lower() in VIDEO_SUFFIXES


class Boxes:
    """Boxes of people from a JSON file, by image and frame; the whole image where the file is None.

    The file is one of

    - an object: file name -> list of boxes ``[x, y, width, height]``;
    - a list of rows with ``bbox`` and ``file_name`` (or ``image_id``: a name, or a number that is the file's stem, as
    in
      COCO), for videos with ``frame`` too (without it the box holds for all frames). COCO result rows are such rows.
    """

    def __init__(self, path=None):
        self.path = None if path is None else Path(path)
        self._boxes = {}
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
                    f"{self.path}: {entry}: expected [x, y, width, height], both above 0, got {row['bbox']}"
                )
            self._boxes.setdefault((_key(name), frame), []).append(box)

    def of(self, name, frame=None):
        """``(n, 4)`` float64 boxes in that image or frame, n = 0 where nobody is; NaN for the whole image."""
        if self.path is None:
            return np.full((1, 4), np.nan)
        found = []
        for key in dict.fromkeys((_key(str(name)), _key(Path(name).name), _key(Path(name).stem))):
            for when in dict.fromkeys((frame, None)):
                found += self._boxes.get((key, when), [])
            if found:
                break
        return np.array(found).reshape(-1, 4)


def _key(name):
    # COCO names its files by the zero-filled image id.
    text = str(name)
    return int(text) if text.isdecimal() else text


class VideoPeople(torch.utils.data.IterableDataset):
    """Crops of the people in the frames of videos, in order.

    Args:
        paths: the video files.
        boxes: JSON file of boxes (see :class:`Boxes`), or None: one crop of each whole frame.
        size: side of the square crop in pixels.
        margin: side of the crop in units of the box's longer side; by default 1.25, and 1 for whole frames.
        every: take every so many-th frame.

    Yields dicts: ``image (3, size, size)`` uint8 RGB, ``to_image (2, 3)`` float32 from crop pixels to the frame's,
    ``box (4,)`` float64, ``video`` the place in ``paths``, ``frame`` its number. Several workers take turns by video.
    Frames that can't be decoded are passed over; a video that can't be opened raises DataError.
    """

    def __init__(self, paths, boxes=None, *, size=256, margin=None, every=1):
        self.paths, self.size, self.every = [Path(path) for path in paths], size, every
        self.margin = margin if margin is not None else 1.0 if boxes is None else 1.25
        self._boxes = Boxes(boxes)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for video in range(first, len(self.paths), step):
            path = self.paths[video]
            for number, frame in VideoFrames(path):
                if frame is None or number % self.every:
                    continue
                for box in self._boxes.of(path.name, number):
                    box = np.where(np.isfinite(box), box, (0, 0, frame.shape[1], frame.shape[0]))
                    matrix = crop_matrix(box, self.size, margin=self.margin)
                    yield {
                        "image": torch.from_numpy(warp_crop(frame, matrix, self.size)),
                        "to_image": torch.from_numpy(matrix.astype(np.float32)),
                        "box": torch.from_numpy(box),
                        "video": torch.tensor(video),
                        "frame": torch.tensor(number),
                    }


@dataclass(frozen=True)
class Clip:
    """One video of UCF11: its file, class, and group (clips of a group share actor or background)."""

    path: Path
    label: str
    group: str

    def frames(self):
        """The clip's frames, as :class:`VideoFrames`."""
        return VideoFrames(self.path)


def find_ucf11(root, classes=None):
    """UCF YouTube Action: ``<root>/<class>/<group>/<clip>.mpg`` (or .avi), in a stable order.

    ``classes``: only these. Folders without videos (the annotations) are passed over. Raises DataError where there are
    none.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder")
    clips = [
        Clip(path, path.parts[-3], path.parts[-2])
        for path in sorted(root.glob("*/*/*"))
        if is_video(path) and (classes is None or path.parts[-3] in classes)
    ]
    for label in classes or ():
        if not any(clip.label == label for clip in clips):
            raise DataError(f"{root / label}: expected videos at {label}/<group>/<clip>.mpg, found none")
    if not clips:
        raise DataError(f"{root}: expected videos at <class>/<group>/<clip>.mpg, found none")
    return clips
