"""Frames of videos, and crops of the people in them."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from amil_fast.pose.codec import crop_matrix
from amil_fast.pose.data.augment import warp_crop
from amil_fast.pose.data.boxes import Boxes
from amil_fast.utils.files import DataError, open_regular
from amil_fast.utils.limits import MAX_IMAGE_PIXELS

# This many consecutive frames that cannot be decoded are treated as the end of the file.
_MAX_FAILURES = 25
_MAX_RATE, _MAX_FRAMES = 1000, 1 << 31


def opencv_name(path: Path) -> str:
    """The path for OpenCV's videos; raises DataError for a name that is not UTF-8, with which OpenCV crashes."""
    try:
        return str(path).encode().decode()
    except UnicodeEncodeError:
        raise DataError(f"{path}: expected a name in UTF-8, OpenCV reads and writes no other videos") from None


def count_frames(path: Path) -> int:
    """Number of frames of a video that can be decoded."""
    capture, number = cv2.VideoCapture(opencv_name(path)), 0
    while capture.grab():
        number += 1
    capture.release()
    return number


class VideoFrames:
    """Frames of a video file, in order.

    Iteration yields ``(number, frame)`` with ``frame`` ``(H, W, 3)`` uint8 BGR, upright, or None for a frame that
    cannot be decoded while later ones can.

    Args:
        path: the video file.

    Attributes:
        rate: frames per second.
        expected: number of frames according to the file's header, 0 if unknown.
        missing: after iteration, the difference between ``expected`` and the frames delivered. Demuxers drop damaged
            frames without reporting which.

    Raises:
        DataError: the file does not exist or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with open_regular(path, "video"):  # OpenCV would wait for a named pipe
            pass
        capture = self._open()
        rate, expected, width, height = (
            capture.get(name)
            for name in (
                cv2.CAP_PROP_FPS,
                cv2.CAP_PROP_FRAME_COUNT,
                cv2.CAP_PROP_FRAME_WIDTH,
                cv2.CAP_PROP_FRAME_HEIGHT,
            )
        )
        capture.release()
        if width * height > MAX_IMAGE_PIXELS:
            raise DataError(f"{path}: expected frames of at most {MAX_IMAGE_PIXELS >> 20} x 2^20 pixels, got more")
        self.rate = rate if 0 < rate <= _MAX_RATE else 25.0
        # Damaged headers claim any number; then the length is unknown.
        self.expected = int(expected) if 0 < expected <= _MAX_FRAMES else 0
        self.missing = 0

    def _open(self):
        capture = cv2.VideoCapture(opencv_name(self.path))
        if not capture.isOpened():
            raise DataError(f"{self.path}: expected a video, cannot be opened (damaged, or an unsupported format)")
        return capture

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.uint8] | None]]:
        capture = self._open()
        number, failures = 0, 0
        try:
            while True:
                try:
                    decoded, frame = capture.read()
                except cv2.error:
                    decoded, frame = False, None
                if decoded and frame is not None:
                    for lost in range(failures):
                        yield number + lost, None
                    number += failures
                    failures = 0
                    yield number, frame
                    number += 1
                    continue
                failures += 1
                if number + failures > self.expected or failures > _MAX_FAILURES:
                    break
        finally:
            capture.release()
        self.missing = max(0, self.expected - number)


class VideoPeople(torch.utils.data.IterableDataset):
    """Crops of the people in the frames of videos, in order.

    Iteration yields dicts: ``image (3, size, size)`` uint8 RGB, ``to_image (2, 3)`` float32 from crop pixels to frame
    pixels, ``box (4,)`` float64, ``video`` the index in ``paths``, ``frame`` the frame number. DataLoader workers share
    the work by video. Frames that cannot be decoded are skipped; a video that cannot be opened raises DataError.

    Args:
        paths: the video files.
        boxes: JSON file of bounding boxes (see :class:`~amil_fast.pose.data.Boxes`); None crops each whole frame.
        size: side of the square crop in pixels.
        margin: side of the crop in units of the box's longer side; by default 1.25, and 1 for whole frames.
        every: stride over the frames.
    """

    def __init__(
        self,
        paths: Iterable[str | os.PathLike],
        boxes: str | os.PathLike | None = None,
        *,
        size: int = 256,
        margin: float | None = None,
        every: int = 1,
    ):
        self.paths, self.size, self.every = [Path(path) for path in paths], size, every
        self.margin = margin if margin is not None else 1.0 if boxes is None else 1.25
        self._boxes = Boxes(boxes)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
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
