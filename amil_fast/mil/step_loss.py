"""Loss of a bag classifier per bag, and the class weights."""

import numpy as np
import torch
from torch.nn import functional as F

from amil_fast.nn import MIRNet, level_loss


def class_weights(values: np.ndarray, num_classes: int) -> np.ndarray:
    """Weights of the classes inversely proportional to their frequencies, ``N / (C n_c)``: 1 on average over bags."""
    counts = np.bincount(values, minlength=num_classes)
    return (len(values) / (num_classes * np.maximum(counts, 1))).astype(np.float32)


def bag_losses(net: MIRNet, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss per bag, mean over levels: cross-entropy, its sum over classes for one-vs-rest, squared error for values.

    Args:
        net: the network, for its task.
        logits: ``(L, B)`` or ``(L, B, C)``.
        targets: ``(B,)``, class indices or standardized values.

    Returns:
        ``(B,)``.
    """
    if net.task == "regression":
        return (logits - targets).square().mean(0)
    if net.task == "one_vs_rest":
        one_hot = F.one_hot(targets, logits.shape[-1]).to(logits.dtype).expand_as(logits)
        return F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(-1).mean(0)
    return level_loss(logits, targets, reduction="none").mean(0)


def score_losses(task: str, scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Loss of every bag's prediction: log-loss, or squared error for regression; ``(B,)``.

    Args:
        task: task of the network.
        scores: predicted probabilities ``(B,)`` or ``(B, C)``, or values.
        values: class indices, or values.
    """
    if task == "regression":
        return np.square(scores - values)
    scores = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    if scores.ndim == 1:
        return -np.log(np.where(values == 1, scores, 1 - scores))
    if task == "one_vs_rest":
        of_class = np.arange(scores.shape[1]) == values[:, None]
        return -np.log(np.where(of_class, scores, 1 - scores)).sum(1)
    return -np.log(scores[np.arange(len(values)), values])
