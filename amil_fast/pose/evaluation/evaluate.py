"""Prediction for every sample of a loader or data set: the loop of ``amil evaluate``, validation and the demo."""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import torch

from amil_fast.pose.data.annotations import Annotations
from amil_fast.pose.data.dataset import PoseDataset
from amil_fast.pose.data.loader import PoseLoader
from amil_fast.pose.inference.predictor import Predictor
from amil_fast.pose.inference.two_stage import search

# Entries of a sample that GroundTruth.of_samples needs, and its index.
TRUTH_FIELDS = ("index", "image_joints", "visibility", "head_size")


def predict_batches(
    predictor: Predictor,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    fields: tuple[str, ...] = TRUTH_FIELDS,
    on_batch: Callable[[dict[str, torch.Tensor], torch.Tensor], object] | None = None,
) -> dict[str, np.ndarray] | None:
    """Runs ``predictor`` over all batches.

    Args:
        predictor: crops to keypoints in image pixels.
        batches: dicts with ``image (B, 3, S, S)``, ``to_image (B, 2, 3)`` and ``fields``, such as a
            :class:`~amil_fast.pose.data.PoseLoader` gives.
        fields: entries of the batches to return beside the predictions.
        on_batch: called with each batch and its coordinates; evaluation stops if it returns False.

    Returns:
        ``coords (S, K, 2)``, ``scores (S, K)`` and the ``fields``, in the order of ``batches``; None if stopped.
    """
    rows = []
    for batch in batches:
        coords, scores = predictor(batch["image"], batch["to_image"])
        rows.append(
            {name: batch[name].numpy() for name in fields} | {"coords": coords.numpy(), "scores": scores.numpy()}
        )
        if on_batch is not None and on_batch(batch, coords) is False:
            return None
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def predict_people(
    predictor: Predictor,
    people: Annotations,
    *,
    batch_size: int = 32,
    passes: int = 1,
    on_progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Predicts the joints of all people of a data set.

    Args:
        predictor: crops to joints in image pixels.
        people: the data set.
        batch_size: crops per call of the network.
        passes: 2 or more for two-stage prediction (:func:`~amil_fast.pose.inference.two_stage.search`), for people
            without bounding boxes.
        on_progress: called with the number of crops of every batch.

    Returns:
        ``(S, K, 2)`` float32 in image pixels.

    Raises:
        ValueError: another skeleton than the network's, or ``passes`` above 1 for people with boxes.
    """
    if predictor.skeleton is not people.skeleton:
        raise ValueError(
            f"skeleton: expected {people.skeleton.name} of the data set, the network predicts {predictor.skeleton.name}"
        )
    if passes > 1 and not np.isnan(people.boxes).all():
        raise ValueError("passes: expected 1 for people with boxes; more are for whole images (--crop image)")

    def look(which, boxes, part):
        crops = people.subset(which)
        if boxes is not None:
            crops = dataclasses.replace(crops, boxes=boxes)
        found = predict_batches(
            predictor,
            PoseLoader(PoseDataset(crops, predictor.size, margin=people.margin * part), batch_size, shuffle=False),
            fields=(),
            on_batch=lambda batch, _: on_progress(len(batch["index"])) if on_progress is not None else None,
        )
        assert found is not None  # on_batch never returns False
        return found["coords"], found["scores"]

    return search(look, len(people), passes)[0]
