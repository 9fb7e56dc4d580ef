"""PCK as functions of tensors; :mod:`amil_fast.metrics.modules` has torchmetrics classes."""

from collections.abc import Sequence

import torch

__all__ = ["pck", "normalized_errors", "area_under_curve"]


def pck(
    predictions: torch.Tensor,
    targets: torch.Tensor,
    normalizer: torch.Tensor,
    valid: torch.Tensor,
    thresholds: torch.Tensor | Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Percentage of correct keypoints, as a fraction: joint k of sample s is correct at threshold r if

    .. math:: \|\hat y_{sk} - y_{sk}\| / n_s \le r \qquad (21)

    Args:
        predictions: ``(S, K, 2)`` floating point, (x, y) in pixels; NaN is wrong.
        targets: ``(S, K, 2)``, (x, y) in pixels.
        normalizer: ``(S,)``, size :math:`n_s` of the person in pixels: a joint distance (PCK) or the head size (PCKh).
            Samples without a positive, finite size are left out.
        valid: ``(S, K)`` bool, annotated joints; other values of ``targets`` are ignored.
        thresholds: ``(T,)``.

    Returns:
        ``(by_joint (T, K), pooled (T,))``, float64 fractions in [0, 1]: per joint, and over all valid joints of all
        samples. NaN where nothing is counted.

    Raises:
        ValueError: shapes that do not match.

    Notes:
        Distances are computed in float64 and compared in the dtype of ``thresholds`` (float64 for a sequence), so that
        an error of exactly r is correct.

    Source: Shamsolmoali et al., AMIL, ACM TOMM 2020, Eq. 21; Yang and Ramanan, TPAMI 2013.
    """
    errors, counted = normalized_errors(predictions, targets, normalizer, valid)
    thresholds = torch.as_tensor(
        thresholds, device=errors.device, dtype=None if torch.is_tensor(thresholds) else torch.float64
    )
    if thresholds.ndim != 1:
        raise ValueError(f"thresholds: expected shape (T,), got {tuple(thresholds.shape)}")
    if not thresholds.is_floating_point():
        thresholds = thresholds.double()
    correct = count_correct(errors, thresholds).double()
    number = counted.sum(0).double()
    return correct / number, correct.sum(1) / number.sum()


def normalized_errors(
    predictions: torch.Tensor, targets: torch.Tensor, normalizer: torch.Tensor, valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances in units of the person's size; arguments as for :func:`pck`.

    Returns:
        ``errors (S, K)`` float64, infinite for NaN predictions and NaN where nothing is counted, and
        ``counted (S, K)`` bool: valid joints of samples with a size.
    """
    predictions, targets, normalizer, valid = map(torch.as_tensor, (predictions, targets, normalizer, valid))
    _check(predictions, targets, normalizer, valid)
    size = normalizer.double()
    counted = (valid != 0) & ((size > 0) & torch.isfinite(size))[:, None]
    errors = torch.linalg.vector_norm(predictions.double() - targets.double(), dim=-1) / size[:, None]
    errors = torch.where(torch.isnan(errors), torch.inf, errors)
    return torch.where(counted, errors, torch.nan), counted


def count_correct(errors: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Number of errors ``(S, K)`` at or below each threshold ``(T,)``: ``(T, K)`` int64. NaN is not counted."""
    errors = errors.to(thresholds.dtype)
    return (
        torch.stack([(errors <= r).sum(0) for r in thresholds])
        if len(thresholds)
        else errors.new_zeros((0, errors.shape[1]), dtype=torch.int64)
    )


def area_under_curve(thresholds: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Mean of a curve ``values (T, ...)`` over ascending ``thresholds (T,)``, by the trapezoidal rule: ``(...)``.

    With thresholds from 0 to 0.5 this is the AUC of MPII.

    Raises:
        ValueError: fewer than two thresholds.
    """
    if len(thresholds) < 2:
        raise ValueError(f"thresholds: expected at least 2, got {len(thresholds)}")
    return torch.trapezoid(values, thresholds.to(values), dim=0) / (thresholds[-1] - thresholds[0]).to(values)


def _check(predictions, targets, normalizer, valid):
    for name, tensor in (("predictions", predictions), ("targets", targets)):
        if tensor.ndim != 3 or tensor.shape[-1] != 2:
            raise ValueError(f"{name}: expected shape (S, K, 2), got {tuple(tensor.shape)}")
    if predictions.shape != targets.shape:
        raise ValueError(
            f"targets: expected the shape of predictions {tuple(predictions.shape)}, got {tuple(targets.shape)}"
        )
    S, K, _ = predictions.shape
    for name, tensor, shape in (("normalizer", normalizer, (S,)), ("valid", valid, (S, K))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
