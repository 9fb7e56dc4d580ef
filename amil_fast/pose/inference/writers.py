"""Output of the prediction pipeline: COCO result rows, and overlays as images and videos."""

import contextlib
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np

from amil_fast.pose.data.files import encode_image
from amil_fast.pose.data.inputs import is_video
from amil_fast.pose.data.video import count_frames, opencv_name
from amil_fast.pose.inference.frames import Frame
from amil_fast.pose.skeletons import Skeleton
from amil_fast.pose.visualization.drawing import draw_box, draw_pose
from amil_fast.utils.files import DataError, atomic_path, write_bytes

RESULTS = "predictions.json"
_LONGEST_NAME = 240


def result_rows(frame: Frame) -> Iterator[dict]:
    """COCO result rows of an image or frame, with ``bbox``, ``file_name`` and, for videos, ``frame``."""
    stem = frame.name.stem
    image_id = int(stem) if stem.isdecimal() else frame.name.as_posix()
    for box, coords, scores in zip(frame.boxes, frame.coords, frame.scores, strict=True):
        finite = np.isfinite(coords).all(-1) & np.isfinite(scores)
        points = np.where(finite[:, None], np.column_stack([coords, scores]), 0.0)
        row = {
            "image_id": image_id if frame.number is None else f"{image_id}:{frame.number}",
            "category_id": 1,
            "keypoints": [round(float(value), 4) for value in points.reshape(-1)],
            "score": round(float(points[:, 2].mean()), 6),
            "bbox": [round(float(value), 3) for value in box],
            "file_name": frame.name.as_posix(),
        }
        yield row if frame.number is None else {**row, "frame": frame.number}


def overlay_path(out: Path, name: Path) -> Path:
    """Path of an input's overlay: JPEG, PNG and AVI keep their names, other images become JPEG, other videos MP4."""
    suffix = name.suffix.lower()
    if len(os.fsencode(name.name)) > _LONGEST_NAME:  # file systems have names of up to 255 bytes
        stem = os.fsdecode(os.fsencode(name.stem)[: _LONGEST_NAME // 2])
        name = name.with_name(f"{stem}-{zlib.crc32(os.fsencode(name.name)):08x}{name.suffix}")
    if is_video(name):
        return out / (name if suffix == ".avi" else name.with_suffix(".mp4"))
    return out / (name if suffix in (".jpg", ".jpeg", ".png") else f"{name}.jpg")


def distinct_names(names: Iterable[Path]) -> list[Path]:
    """Output names, unique regardless of case and different from the results file: ``a.jpg``, ``a-2.jpg``."""
    taken, result = {RESULTS}, []
    for name in names:
        target, number = name, 1
        while str(target).lower() in taken:
            number += 1
            target = name.with_name(f"{name.stem}-{number}{name.suffix}")
        taken.add(str(target).lower())
        result.append(target)
    return result


class OverlayWriter:
    """Draws poses over images and frames; writes images individually and the frames of an input into one video.

    Args:
        out: output folder.
        skeleton: of the joints.
        min_score: joints with lower scores are not drawn.

    Attributes:
        written: files written, in order. Files appear only when complete.
        failures: messages for overlays that could not be written.
    """

    def __init__(self, out: Path, skeleton: Skeleton, min_score: float):
        self._out, self._skeleton, self._min_score = out, skeleton, min_score
        self._video: cv2.VideoWriter | None = None
        self._pending = contextlib.ExitStack()
        self._failed: Path | None = None
        self.written: list[Path] = []
        self.failures: list[str] = []

    def write(self, frame: Frame) -> None:
        """Draws on ``frame.image`` in place and writes it; finishes a video at its end. A failure is recorded."""
        if frame.source == self._failed:
            return
        try:
            self._write(frame)
        except (ValueError, OSError, MemoryError, cv2.error) as error:
            self.close()
            self._failed = frame.source
            self.failures.append(f"{frame.source}: overlay not written: {error}")

    def _write(self, frame):
        if frame.ends_video:
            self._finish_video()
            return
        if frame.image is None:
            return
        image, (height, width) = frame.image, frame.image.shape[:2]
        for box, coords, scores in zip(frame.boxes, frame.coords, frame.scores, strict=True):
            if not np.allclose(box, (0, 0, width, height)):
                draw_box(image, box)
            draw_pose(image, coords, scores >= self._min_score, skeleton=self._skeleton)
        if frame.number is None:
            self._write_image(frame.name, image)
        else:
            self._write_frame(frame, image)

    def close(self) -> None:
        """Discards an unfinished video."""
        if self._video is not None:
            self._video.release()
            self._video = None
        with contextlib.suppress(_Discarded), self._pending:
            raise _Discarded

    def _write_image(self, name, image):
        target = overlay_path(self._out, name)
        suffix = ".png" if target.suffix.lower() == ".png" else ".jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, encode_image(image, suffix))
        self.written.append(target)

    def _write_frame(self, frame, image):
        if self._video is None:
            self._open_video(frame, image)
        width, height = self._size
        if (image.shape[1] - image.shape[1] % 2, image.shape[0] - image.shape[0] % 2) != self._size:
            image = cv2.resize(image, self._size, interpolation=cv2.INTER_AREA)
        self._video.write(np.ascontiguousarray(image[:height, :width]))
        self._num_frames += 1

    def _open_video(self, frame, image):
        target = overlay_path(self._out, frame.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        codec = cv2.VideoWriter.fourcc(*("MJPG" if target.suffix.lower() == ".avi" else "mp4v"))
        height, width = (side - side % 2 for side in image.shape[:2])  # video codecs require even sides
        self._size, self._target, self._num_frames = (width, height), target, 0
        self._partial = self._pending.enter_context(atomic_path(target))
        self._video = cv2.VideoWriter(opencv_name(self._partial), codec, frame.rate, self._size)
        if not self._video.isOpened():
            raise DataError(f"{target}: this build of OpenCV cannot write the video")

    def _finish_video(self):
        if self._video is not None:
            self._video.release()
            self._video = None
            # OpenCV ignores errors of writing, such as that of a full disk.
            if (found := count_frames(self._partial)) != self._num_frames:
                raise OSError(f"{found} of {self._num_frames} frames could be read back; is the disk full?")
            self._pending.close()
            self.written.append(self._target)


class _Discarded(Exception):
    """Unwinds the atomic path of an unfinished video, which removes the temporary file."""
