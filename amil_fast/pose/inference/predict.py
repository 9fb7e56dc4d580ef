"""Prediction on images, folders and videos: COCO results and overlays."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from amil_fast.pose.data.boxes import Boxes
from amil_fast.pose.data.inputs import find_inputs, is_video
from amil_fast.pose.data.video import VideoFrames
from amil_fast.pose.inference.frames import Frame, FrameReader
from amil_fast.pose.inference.predictor import Predictor
from amil_fast.pose.inference.two_stage import search
from amil_fast.pose.inference.writers import RESULTS, OverlayWriter, distinct_names, overlay_path, result_rows
from amil_fast.utils.files import DataError, write_json

_BOX_MARGIN = 1.25


@dataclass
class PredictionSummary:
    """Result of :func:`predict`.

    Attributes:
        images: number of images and video frames processed.
        people: number of people predicted.
        unreadable: messages for inputs that could not be read.
        not_written: messages for overlays that could not be written.
        written: files written.
        interrupted: the run was interrupted; its results are those of the inputs processed before.
        seconds: total time, including reading and writing.
        network_seconds: time in the network and the decoder.
    """

    images: int = 0
    people: int = 0
    unreadable: list[str] = field(default_factory=list)
    not_written: list[str] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0
    network_seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Throughput over the total time."""
        return self.images / self.seconds if self.seconds else 0.0


def predict(
    predictor: Predictor,
    inputs: Iterable[str | os.PathLike],
    out: str | os.PathLike,
    *,
    boxes: str | os.PathLike | None = None,
    batch_size: int = 16,
    overlays: bool = True,
    min_score: float = 0.1,
    margin: float | None = None,
    passes: int = 1,
    on_progress: Callable[[int, int | None], object] | None = None,
    on_problem: Callable[[str], object] | None = None,
) -> PredictionSummary:
    """Predicts the joints of people in images and videos.

    Args:
        predictor: a :class:`Predictor`, or a callable of the same signature with attributes ``size`` and ``skeleton``.
        inputs: files and folders.
        out: folder for ``predictions.json`` and the overlays, which keep the names (and folders) of their inputs.
        boxes: JSON file of bounding boxes (:class:`~amil_fast.pose.data.Boxes`); None: one person per image, whose
            crop is the whole image.
        batch_size: crops per call of the network.
        overlays: write images and videos with the poses drawn over them.
        min_score: joints with lower scores are not drawn; the results contain them.
        margin: side of the crop in units of the box's longer side; by default 1.25, and 1 for whole images.
        passes: 2 or more for two-stage prediction on whole images
            (:func:`~amil_fast.pose.inference.two_stage.search`). Has no effect with ``boxes``.
        on_progress: called with (images done, total number, or None if a video does not state its length).
        on_problem: called with a message for every unreadable input and every overlay that could not be written; the
            others are processed.

    Returns:
        :class:`PredictionSummary`. After an interrupt (KeyboardInterrupt) complete files are kept, and
        ``predictions.json`` holds all images processed, as it does after an error of the network.

    Raises:
        DataError: a missing input or one of unknown type, no input at all, a file of boxes that is invalid or names
            none of the inputs, an overlay that would overwrite its input.
        ValueError: ``passes`` below 1.
    """
    if passes < 1:
        raise ValueError(f"passes: expected at least 1, got {passes}")
    table = Boxes(boxes)
    out = Path(out)
    found = _output_names(list(inputs), out, overlays)
    table.check_names(name for _, name in found)
    out.mkdir(parents=True, exist_ok=True)
    summary = PredictionSummary()
    rows: list[dict] = []
    total = _count_frames(found)
    margin = margin if margin is not None else 1.0 if boxes is None else _BOX_MARGIN
    began = time.perf_counter()
    reader = FrameReader(found, table, predictor.size, margin)
    writer = OverlayWriter(out, predictor.skeleton, min_score) if overlays else None
    waiting: deque[Frame] = deque()
    num_crops = 0

    def flush():
        """Predicts and writes the waiting frames, in order."""
        frames = [frame for frame in waiting if frame.crops is not None and len(frame.crops)]
        summary.network_seconds += _predict_frames(predictor, frames, batch_size)
        if frames and boxes is None and passes > 1:
            summary.network_seconds += _search_frames(predictor, frames, batch_size, margin, passes)
        while waiting:
            frame = waiting.popleft()
            problems = [frame.error] if frame.error else []
            summary.unreadable += problems
            if frame.image is not None:
                summary.images += 1
                summary.people += len(frame.coords)
                rows.extend(result_rows(frame))
            if writer:
                writer.write(frame)
                problems += writer.failures[len(summary.not_written) :]
                summary.not_written[:] = writer.failures
            for problem in problems:
                if on_problem:
                    on_problem(problem)
            if on_progress and not frame.ends_video:
                on_progress(summary.images + len(summary.unreadable), total)

    try:
        for frame in reader:
            waiting.append(frame)
            num_crops += 0 if frame.crops is None else len(frame.crops)
            # The second condition bounds the memory for frames without people.
            if num_crops >= batch_size or len(waiting) >= batch_size:
                flush()
                num_crops = 0
        flush()
    except KeyboardInterrupt:
        summary.interrupted = True
    finally:
        reader.stop()
        if writer:
            writer.close()
        write_json(out / RESULTS, rows, indent=None)
    summary.written = [*(writer.written if writer else []), out / RESULTS]
    summary.seconds = time.perf_counter() - began
    return summary


def _predict_frames(predictor, frames, batch_size):
    """Sets ``coords`` and ``scores`` of all frames; returns the time that this took."""
    if not frames:
        return 0.0
    images = torch.from_numpy(np.concatenate([frame.crops for frame in frames]))
    matrices = torch.from_numpy(np.concatenate([frame.matrices for frame in frames]))
    begin = time.perf_counter()
    results = [predictor(images[part], matrices[part]) for part in torch.arange(len(images)).split(batch_size)]
    seconds = time.perf_counter() - begin
    coords, scores = (np.concatenate([result.numpy() for result in column]) for column in zip(*results, strict=True))
    first = 0
    for frame in frames:
        last = first + len(frame.crops)
        frame.coords, frame.scores = coords[first:last], scores[first:last]
        first = last
    return seconds


def _search_frames(predictor, frames, batch_size, margin, passes):
    """Two-stage prediction for frames whose whole images are already predicted; returns the time of the network."""
    seconds = 0.0

    def look(which, boxes, part):
        nonlocal seconds
        rows = {number: np.flatnonzero(which == number) for number in np.unique(which)}  # frame -> its crops
        looked_at = [frames[number] for number in rows]
        if boxes is not None or part != 1:  # otherwise predicted already
            for frame, own in zip(looked_at, rows.values(), strict=True):
                if boxes is None:
                    frame.crop(frame.boxes, predictor.size, margin * part)
                else:
                    frame.crop(boxes[own], predictor.size)
            seconds += _predict_frames(predictor, looked_at, batch_size)
        order = np.argsort(np.concatenate(list(rows.values())))
        coords = np.concatenate([frame.coords for frame in looked_at])
        scores = np.concatenate([frame.scores for frame in looked_at])
        return coords[order], scores[order]

    coords, scores = search(look, len(frames), passes)
    for frame, joints, confidence in zip(frames, coords, scores, strict=True):
        frame.coords, frame.scores = joints[None], confidence[None]
    return seconds


def _output_names(inputs, out, overlays):
    """``(file, output name)`` of every input."""
    # Overlays of an earlier run in a folder inside an input folder are not inputs.
    found = [
        (path, name)
        for path, name in find_inputs(inputs)
        if name == Path(path.name) or out.resolve() not in path.resolve().parents
    ]
    if not found:
        raise DataError(f"{', '.join(map(str, inputs))}: no image or video found")
    paths, names = zip(*found, strict=True)
    found = list(zip(paths, distinct_names(names), strict=True))
    for path, name in found:
        if overlays and overlay_path(out, name).resolve() == path.resolve():
            raise DataError(f"{out}: expected another folder, the overlay would overwrite {path}")
    return found


def _count_frames(found):
    """Number of images and frames; None if a video does not state its length."""
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
