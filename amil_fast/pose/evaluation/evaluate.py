"""Predictions of a network for every sample of a loader: the loop under ``amil evaluate``, validation and the demo."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from amil_fast.pose.inference.predictor import Predictor

# What GroundTruth.of_samples needs of a sample, and its place in the data set.
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
        on_batch: called with each batch and its coordinates; evaluation stops where it returns False.

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
