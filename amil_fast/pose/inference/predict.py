"""Prediction on images, folders and videos: overlays and one file of results."""

import contextlib
import json
import os
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch

from amil_fast.pose.codec import crop_matrix, joints_box
from amil_fast.pose.data.augment import warp_crop
from amil_fast.pose.data.boxes import Boxes
from amil_fast.pose.data.files import read_image
from amil_fast.pose.data.inputs import find_inputs, is_video
from amil_fast.pose.data.video import VideoFrames
from amil_fast.pose.visualization.drawing import draw_box, draw_pose
from amil_fast.utils.files import DataError

_BOX_MARGIN = 1.25
# Joints above this score say where the person is, if there are so many of them.
_SURE, _ENOUGH = 0.2, 4


@dataclass
class Report:
    """What a run did. ``unreadable`` lists what could not be read, as texts; ``seconds`` includes reading and writing,
    ``network_seconds`` is the part spent in the network and the decoder."""

    pictures: int = 0
    people: int = 0
    unreadable: list = field(default_factory=list)
    written: list = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0
    network_seconds: float = 0.0

    @property
    def images_per_second(self):
        return self.pictures / self.seconds if self.seconds else 0.0


@dataclass
class _Picture:
    """One image or frame on its way."""

    source: Path
    name: Path
    frame: int | None
    image: np.ndarray | None
    boxes: np.ndarray
    rate: float = 0.0
    error: str | None = None
    ends_video: bool = False
    crops: np.ndarray | None = None
    matrices: np.ndarray | None = None
    coords: list = field(default_factory=list)
    scores: list = field(default_factory=list)


def predict(
    predictor,
    inputs,
    out,
    *,
    boxes=None,
    batch_size=16,
    overlays=True,
    min_score=0.1,
    margin=None,
    passes=1,
    on_progress=None,
    on_problem=None,
):
    """Finds the people in images and videos.

    Args:
        predictor: a :class:`~amil_fast.pose.inference.predictor.Predictor`, or any callable of
            the same signature with ``size`` and ``skeleton``.
        inputs: files and folders.
        out: folder for ``predictions.json`` and the overlays, which keep their names (and folders).
        boxes: JSON file of boxes (see :class:`~amil_fast.pose.data.Boxes`); None: one person in each whole image.
        batch_size: crops the network sees at once.
        overlays: write pictures and videos with the poses over them.
        min_score: joints below it are not drawn (they are in the results all the same).
        margin: side of the crop in units of the box's longer side; by default 1.25, and 1 for whole images.
        passes: how often the network looks at a whole image: from the second time on at a crop around the joints it
            found. Where boxes are given it looks once.
        on_progress: called with (pictures done, pictures in all or None where a video doesn't say).
        on_problem: called with a text for everything that can't be read; the rest goes on.

    Returns:
        :class:`Report`. An interrupted run (KeyboardInterrupt) keeps what was finished: files appear under their names
        only when whole, and ``predictions.json`` holds all pictures done so far.

    Raises:
        DataError: an input that isn't there or of no known kind, no input at all, a bad file of boxes, an overlay that
            would overwrite its input.
    """
    if passes < 1:
        raise ValueError(f"passes: expected at least 1, got {passes}")
    table = Boxes(boxes)
    out = Path(out)
    # What an earlier run left in a folder inside an input folder is no input.
    found = [(path, name) for path, name in find_inputs(inputs) if name == Path(path.name) or not _inside(path, out)]
    if not found:
        raise DataError(f"{', '.join(map(str, inputs))}: no image or video found")
    found = [(path, name) for (path, _), name in zip(found, _distinct([name for _, name in found]), strict=True)]
    for path, name in found:
        if overlays and _target(out, name).resolve() == path.resolve():
            raise DataError(f"{out}: expected another folder, the overlay would overwrite {path}")
    out.mkdir(parents=True, exist_ok=True)
    report, rows = Report(), []
    total = _count(found)
    margin = margin if margin is not None else 1.0 if boxes is None else _BOX_MARGIN
    began = time.perf_counter()
    reader = _Reader(found, table, predictor.size, margin)
    sink = _Sink(out, predictor.skeleton, min_score, report) if overlays else None
    waiting, crops = deque(), 0

    def problem(text):
        report.unreadable.append(text)
        if on_problem:
            on_problem(text)

    def look(run):
        """The network on the crops of some pictures."""
        start = time.perf_counter()
        images = torch.from_numpy(np.concatenate([picture.crops for picture in run]))
        matrices = torch.from_numpy(np.concatenate([picture.matrices for picture in run]))
        coords, scores = [], []
        for part in torch.arange(len(images)).split(batch_size):
            one, other = predictor(images[part], matrices[part])
            coords.append(one.numpy())
            scores.append(other.numpy())
        coords, scores = np.concatenate(coords), np.concatenate(scores)
        report.network_seconds += time.perf_counter() - start
        at = 0
        for picture in run:
            n = len(picture.crops)
            picture.coords, picture.scores = coords[at : at + n], scores[at : at + n]
            at += n

    def finish():
        """Runs the network over what is waiting and writes it, in order."""
        run = [picture for picture in waiting if picture.crops is not None and len(picture.crops)]
        if run:
            look(run)
        for _ in range(passes - 1 if boxes is None else 0):
            run = [picture for picture in run if _zoom(picture, predictor.size)]
            if run:
                look(run)
        while waiting:
            picture = waiting.popleft()
            if picture.error:
                problem(picture.error)
            if sink:
                sink.take(picture)
            if picture.image is not None:
                report.pictures += 1
                report.people += len(picture.coords)
                rows.extend(_rows(picture))
            if on_progress and not picture.ends_video:
                on_progress(report.pictures + len(report.unreadable), total)

    try:
        for picture in reader:
            waiting.append(picture)
            crops += 0 if picture.crops is None else len(picture.crops)
            # Pictures without people mustn't pile up either.
            if crops >= batch_size or len(waiting) >= batch_size:
                finish()
                crops = 0
        finish()
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        reader.stop()
        if sink:
            sink.close()
    results = out / "predictions.json"
    write_whole(results, json.dumps(rows).encode())
    report.written.append(results)
    report.seconds = time.perf_counter() - began
    return report


def boxes_of(coords, scores):
    """Boxes (x, y, width, height) around what was found of people, ``(N, 4)``, with room for hands, feet and hair; NaN
    where too little was found.

    Args:
        coords: ``(N, K, 2)``; scores: ``(N, K)``.
    """
    found = np.full((len(coords), 4), np.nan)
    for i, (joints, score) in enumerate(zip(coords, scores, strict=True)):
        sure = (score >= _SURE) & np.isfinite(joints).all(-1)
        if sure.sum() >= _ENOUGH:
            x, y, w, h = joints_box(joints, sure, least=8)
            more = (_BOX_MARGIN - 1) * max(w, h) / 2
            found[i] = x - more, y - more, w + 2 * more, h + 2 * more
    return found


def _zoom(picture, size):
    """Crops a whole image again around what was found in it; False where that was too little."""
    boxes = boxes_of(picture.coords, picture.scores)
    if not np.isfinite(boxes).all():
        return False
    picture.matrices = np.stack([crop_matrix(box, size) for box in boxes])
    picture.crops = np.stack([warp_crop(picture.image, matrix, size) for matrix in picture.matrices])
    return True


def write_whole(path, data):
    """Writes bytes so that the file is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _inside(path, folder):
    return folder.resolve() in path.resolve().parents


def _target(out, name):
    """The overlay's file: JPEG and PNG keep their names, as AVI does; other images become JPEG, other videos MP4."""
    suffix = name.suffix.lower()
    if is_video(name):
        return out / (name if suffix == ".avi" else name.with_suffix(".mp4"))
    return out / (name if suffix in (".jpg", ".jpeg", ".png") else f"{name}.jpg")


def _distinct(names):
    """Names of outputs: two inputs of the same name don't overwrite each other, nor the results."""
    taken, result = {"predictions.json"}, []
    for name in names:
        target, number = name, 1
        while str(target).lower() in taken:
            number += 1
            target = name.with_name(f"{name.stem}-{number}{name.suffix}")
        taken.add(str(target).lower())
        result.append(target)
    return result


def _count(found):
    total = 0
    for path, _ in found:
        expected = 1
        if is_video(path):
            with contextlib.suppress(DataError):
                expected = VideoFrames(path).expected or None
        if expected is None:
            return None
        total += expected
    return total


def _rows(picture):
    """COCO result rows of a picture."""
    stem = picture.name.stem
    image_id = int(stem) if stem.isdecimal() else picture.name.as_posix()
    for box, coords, scores in zip(picture.boxes, picture.coords, picture.scores, strict=True):
        finite = np.isfinite(coords).all(-1) & np.isfinite(scores)
        points = np.where(finite[:, None], np.column_stack([coords, scores]), 0.0)
        row = {
            "image_id": image_id if picture.frame is None else f"{image_id}:{picture.frame}",
            "category_id": 1,
            "keypoints": [round(float(value), 4) for value in points.reshape(-1)],
            "score": round(float(points[:, 2].mean()), 6),
            "bbox": [round(float(value), 3) for value in box],
            "file_name": picture.name.as_posix(),
        }
        yield row if picture.frame is None else {**row, "frame": picture.frame}


class _Reader:
    """Decodes and crops in a thread of its own, a few pictures ahead of the network."""

    def __init__(self, found, table, size, margin):
        self._found, self._table, self._size, self._margin = found, table, size, margin
        self._queue, self._stopped = queue.Queue(maxsize=8), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __iter__(self):
        while True:
            picture = self._queue.get()
            if picture is None:
                return
            if isinstance(picture, BaseException):
                raise picture
            yield picture

    def stop(self):
        self._stopped.set()
        self._thread.join(timeout=10)

    def _put(self, item):
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.2)
                return

    def _run(self):
        try:
            for path, name in self._found:
                for picture in self._video(path, name) if is_video(path) else self._image(path, name):
                    self._put(self._cropped(picture))
                    if self._stopped.is_set():
                        return
            self._put(None)
        except BaseException as error:  # whatever it is, it belongs to the caller
            self._put(error)

    def _image(self, path, name):
        try:
            image, _ = read_image(path, upright=True)
        except DataError as error:
            yield _Picture(path, name, None, None, np.empty((0, 4)), error=str(error))
            return
        yield _Picture(path, name, None, image, self._table.of(name))

    def _video(self, path, name):
        try:
            frames = VideoFrames(path)
            for number, frame in frames:
                error = None if frame is not None else f"{path}: frame {number} can't be decoded"
                boxes = self._table.of(name, number) if frame is not None else np.empty((0, 4))
                yield _Picture(path, name, number, frame, boxes, frames.rate, error)
        except DataError as error:
            yield _Picture(path, name, 0, None, np.empty((0, 4)), error=str(error), ends_video=True)
            return
        error = None
        if frames.missing:
            error = f"{path}: {frames.missing} of {frames.expected} frames are missing or can't be decoded"
        yield _Picture(path, name, frames.expected, None, np.empty((0, 4)), frames.rate, error, ends_video=True)

    def _cropped(self, picture):
        if picture.image is None or not len(picture.boxes):
            return picture
        height, width = picture.image.shape[:2]
        picture.boxes = np.where(np.isfinite(picture.boxes), picture.boxes, (0, 0, width, height))
        picture.matrices = np.stack([crop_matrix(box, self._size, margin=self._margin) for box in picture.boxes])
        picture.crops = np.stack([warp_crop(picture.image, matrix, self._size) for matrix in picture.matrices])
        return picture


class _Sink:
    """Draws and writes overlays: images one by one, frames into one video for each input."""

    def __init__(self, out, skeleton, min_score, report):
        self._out, self._skeleton, self._min_score, self._report = out, skeleton, min_score, report
        self._video = self._partial = self._target = None

    def take(self, picture):
        if picture.ends_video:
            self._end_video()
            return
        if picture.image is None:
            return
        image, (height, width) = picture.image, picture.image.shape[:2]
        for box, coords, scores in zip(picture.boxes, picture.coords, picture.scores, strict=True):
            if not np.allclose(box, (0, 0, width, height)):
                draw_box(image, box)
            draw_pose(image, coords, scores >= self._min_score, skeleton=self._skeleton)
        if picture.frame is None:
            self._write_image(picture.name, image)
        else:
            self._write_frame(picture, image)

    def _write_image(self, name, image):
        target = _target(self._out, name)
        suffix = ".png" if target.suffix.lower() == ".png" else ".jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        options = [cv2.IMWRITE_JPEG_QUALITY, 92] if suffix == ".jpg" else []
        write_whole(target, cv2.imencode(suffix, image, options)[1].tobytes())
        self._report.written.append(target)

    def _write_frame(self, picture, image):
        # Codecs want even sides.
        height, width = (side - side % 2 for side in image.shape[:2])
        if self._video is None:
            self._target = _target(self._out, picture.name)
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._partial = self._target.with_name(f".{self._target.stem}.partial{self._target.suffix}")
            codec = cv2.VideoWriter.fourcc(*("MJPG" if self._target.suffix.lower() == ".avi" else "mp4v"))
            self._size = (width, height)
            self._video = cv2.VideoWriter(str(self._partial), codec, picture.rate, self._size)
            if not self._video.isOpened():
                self._discard()
                raise DataError(f"{self._target}: this installation of OpenCV can't write the video")
        if (width, height) != self._size:
            image = cv2.resize(image, self._size, interpolation=cv2.INTER_AREA)
        self._video.write(np.ascontiguousarray(image[: self._size[1], : self._size[0]]))

    def _end_video(self):
        if self._video is not None:
            self._video.release()
            os.replace(self._partial, self._target)
            self._report.written.append(self._target)
            self._video = self._partial = None

    def _discard(self):
        if self._video is not None:
            self._video.release()
            self._video = None
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)
            self._partial = None

    def close(self):
        """A video that wasn't written to its end is removed."""
        self._discard()
