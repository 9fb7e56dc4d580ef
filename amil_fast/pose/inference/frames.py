"""Images and video frames as the prediction pipeline passes them on, and the thread that reads them."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from amil_fast.pose.codec import crop_matrix
from amil_fast.pose.data.augment import warp_crop
from amil_fast.pose.data.boxes import Boxes
from amil_fast.pose.data.files import read_image
from amil_fast.pose.data.inputs import is_video
from amil_fast.pose.data.video import VideoFrames
from amil_fast.utils.files import DataError


@dataclass
class Frame:
    """An image or a video frame, its people's crops, and their predictions.

    Attributes:
        source: input file.
        name: name of the output, relative to the output folder.
        number: frame number in a video; None for an image.
        image: ``(H, W, 3)`` uint8 BGR; None if it could not be read.
        boxes: ``(N, 4)`` bounding boxes (x, y, width, height) in pixels.
        rate: frames per second of the video.
        error: message for an unreadable image or frame.
        ends_video: no frame, but the end of a video.
        crops: ``(N, 3, S, S)`` uint8 RGB.
        matrices: ``(N, 2, 3)``, crop pixels to image pixels.
        coords: ``(N, K, 2)`` predicted joints in image pixels.
        scores: ``(N, K)``.
    """

    source: Path
    name: Path
    number: int | None
    image: np.ndarray | None
    boxes: np.ndarray
    rate: float = 0.0
    error: str | None = None
    ends_video: bool = False
    crops: np.ndarray | None = None
    matrices: np.ndarray | None = None
    coords: np.ndarray | list = field(default_factory=list)
    scores: np.ndarray | list = field(default_factory=list)

    def crop(self, boxes: np.ndarray, size: int, margin: float = 1.0) -> None:
        """Sets ``matrices`` and ``crops`` to square crops of ``size`` pixels around ``boxes (N, 4)``."""
        self.matrices = np.stack([crop_matrix(box, size, margin=margin) for box in boxes])
        image = np.asarray(self.image)
        self.crops = np.stack([warp_crop(image, matrix, size) for matrix in self.matrices])


class FrameReader:
    """Decodes and crops images and videos in a background thread, a few frames ahead of the network.

    Args:
        inputs: ``(file, output name)`` pairs.
        boxes: bounding boxes by name; NaN stands for the whole image.
        size: side of the crops in pixels.
        margin: side of the crop in units of the box's longer side.
    """

    def __init__(self, inputs: list[tuple[Path, Path]], boxes: Boxes, size: int, margin: float):
        self._inputs, self._boxes, self._size, self._margin = inputs, boxes, size, margin
        self._queue: queue.Queue = queue.Queue(maxsize=8)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Frame]:
        while True:
            frame = self._queue.get()
            if frame is None:
                return
            if isinstance(frame, BaseException):
                raise frame
            yield frame

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self._thread.join(timeout=10)

    def _put(self, item):
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.2)
                return

    def _run(self):
        try:
            for path, name in self._inputs:
                for frame in self._read(path, name):
                    self._put(frame)
                    if self._stopped.is_set():
                        return
            self._put(None)
        except BaseException as error:  # raised again in the consumer's thread
            self._put(error)

    def _read(self, path, name):
        """Frames of an input; the last one has an error if the input, or the rest of it, cannot be read."""
        video = is_video(path)
        try:
            for frame in self._read_video(path, name) if video else self._read_image(path, name):
                yield self._cropped(frame)
        except Exception as error:  # an input never ends the run, whatever a decoder raises
            message = str(error) if isinstance(error, DataError) else f"{path}: {type(error).__name__}: {error}"
            yield Frame(path, name, 0 if video else None, None, np.empty((0, 4)), error=message, ends_video=video)

    def _read_image(self, path, name):
        image, _ = read_image(path, upright=True)
        yield Frame(path, name, None, image, self._boxes.of(name))

    def _read_video(self, path, name):
        frames = VideoFrames(path)
        for number, image in frames:
            error = None if image is not None else f"{path}: frame {number} cannot be decoded"
            boxes = self._boxes.of(name, number) if image is not None else np.empty((0, 4))
            yield Frame(path, name, number, image, boxes, frames.rate, error)
        message = None
        if frames.missing:
            message = f"{path}: {frames.missing} of {frames.expected} frames are missing or cannot be decoded"
        yield Frame(path, name, frames.expected, None, np.empty((0, 4)), frames.rate, message, ends_video=True)

    def _cropped(self, frame):
        if frame.image is not None and len(frame.boxes):
            height, width = frame.image.shape[:2]
            frame.boxes = np.where(np.isfinite(frame.boxes), frame.boxes, (0, 0, width, height))
            frame.crop(frame.boxes, self._size, self._margin)
        return frame
