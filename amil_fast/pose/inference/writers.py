"""Output of the prediction pipeline: COCO result rows, and overlays as images and videos."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np

from amil_fast.pose.data.inputs import is_video
from amil_fast.pose.inference.frames import Frame
from amil_fast.pose.skeletons import Skeleton
from amil_fast.pose.visualization.drawing import draw_box, draw_pose
from amil_fast.utils.files import DataError, atomic_path, write_bytes

RESULTS = "predictions.json"


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
    """

    def __init__(self, out: Path, skeleton: Skeleton, min_score: float):
        self._out, self._skeleton, self._min_score = out, skeleton, min_score
        self._video: cv2.VideoWriter | None = None
        self._pending = contextlib.ExitStack()
        self.written: list[Path] = []

    def write(self, frame: Frame) -> None:
        """Draws on ``frame.image`` in place and writes it; finishes a video at its end."""
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
        options = [cv2.IMWRITE_JPEG_QUALITY, 92] if suffix == ".jpg" else []
        write_bytes(target, cv2.imencode(suffix, image, options)[1].tobytes())
        self.written.append(target)

    def _write_frame(self, frame, image):
        if self._video is None:
            self._open_video(frame, image)
        width, height = self._size
        if (image.shape[1] - image.shape[1] % 2, image.shape[0] - image.shape[0] % 2) != self._size:
            image = cv2.resize(image, self._size, interpolation=cv2.INTER_AREA)
        self._video.write(np.ascontiguousarray(image[:height, :width]))

    def _open_video(self, frame, image):
        target = overlay_path(self._out, frame.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        codec = cv2.VideoWriter.fourcc(*("MJPG" if target.suffix.lower() == ".avi" else "mp4v"))
        height, width = (side - side % 2 for side in image.shape[:2])  # video codecs require even sides
        self._size, self._target = (width, height), target
        partial = self._pending.enter_context(atomic_path(target))
        self._video = cv2.VideoWriter(str(partial), codec, frame.rate, self._size)
        if not self._video.isOpened():
            self.close()
            raise DataError(f"{target}: this build of OpenCV cannot write the video")

    def _finish_video(self):
        if self._video is not None:
            self._video.release()
            self._video = None
            self._pending.close()
            self.written.append(self._target)


class _Discarded(Exception):
    """Unwinds the atomic path of an unfinished video, which removes the temporary file."""
