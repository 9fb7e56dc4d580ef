"""PCK and PCKh as functions of tensors; :mod:`amil_fast.metrics.modules` holds the torchmetrics classes."""

from amil_fast.metrics.functional import area_under_curve, count_correct, normalized_errors, pck

__all__ = ["pck", "normalized_errors", "count_correct", "area_under_curve"]
