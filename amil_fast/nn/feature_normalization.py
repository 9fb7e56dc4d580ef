"""Normalization of instance features, fitted on training bags and stored in the model."""

from collections.abc import Iterable

import torch
from torch import nn

from amil_fast.ops.bags import accumulation_dtype

NORMALIZATIONS = ("standard",)
_ROWS = 1024  # processed at once: intermediate results of 1024 features stay in the L2 cache, and bounded in memory


class FeatureStatistics:
    """Mean and deviation of every feature, accumulated over batches of instances in float64.

    Args:
        num_features: width D of the instances.

    Attributes:
        count: number of instances.
        mean: float64 ``(D,)``.
        squares: sum of squared deviations from the mean, float64 ``(D,)``.
    """

    def __init__(self, num_features: int):
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64)
        self.squares = torch.zeros(num_features, dtype=torch.float64)

    def update(self, instances: torch.Tensor) -> None:
        """Adds instances ``(n, D)``."""
        for rows in instances.split(_ROWS):
            if len(rows):
                wide = rows.double()
                mean = wide.mean(0)
                self._merge(len(rows), mean, (wide - mean).square_().sum(0))

    def merge(self, other: "FeatureStatistics") -> None:
        """Adds the instances of other statistics."""
        if other.count:
            self._merge(other.count, other.mean, other.squares)

    def _merge(self, count, mean, squares):
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.squares = self.squares + squares + difference.square() * (self.count * count / total)
        self.count = total

    def std(self) -> torch.Tensor:
        """Standard deviation of every feature (divided by the number of instances), float64 ``(D,)``."""
        return (self.squares / max(self.count, 1)).sqrt()


class FeatureNormalization(nn.Module):
    """Standardizes features by the mean and deviation of the training part, and clips them smoothly.

    Args:
        num_features: width D of the instances.
        kind: name in :data:`NORMALIZATIONS`.
        soft_clip: bound of the smooth clipping (:func:`soft_clip`) of standardized features; 0: off.

    The buffers ``mean`` and ``inverse_std``, 0 and 1 until :meth:`fit`, are part of the state dict.
    """

    mean: torch.Tensor
    inverse_std: torch.Tensor

    def __init__(self, num_features: int, kind: str = "standard", soft_clip: float = 0.0):
        super().__init__()
        if kind not in NORMALIZATIONS:
            raise ValueError(f"normalization: expected one of {', '.join(NORMALIZATIONS)}, got {kind!r}")
        if not soft_clip >= 0:
            raise ValueError(f"soft_clip: expected a number of at least 0, got {soft_clip}")
        self.kind, self.soft_clip = kind, soft_clip
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("inverse_std", torch.ones(num_features))

    def fit(self, instances: "Iterable[torch.Tensor] | FeatureStatistics") -> "FeatureNormalization":
        """Sets mean and deviation from batches of instances ``(n, D)``, or from statistics; returns itself.

        Constant features become 0.
        """
        statistics = instances
        if not isinstance(statistics, FeatureStatistics):
            statistics = FeatureStatistics(len(self.mean))
            for rows in instances:  # type: ignore[union-attr]
                statistics.update(rows)
        if not statistics.count:
            raise ValueError("instances: expected at least one instance, got none")
        self.mean.copy_(statistics.mean)
        self.inverse_std.copy_(inverse_deviation(statistics.mean, statistics.std()))
        return self

    def forward(self, instances: torch.Tensor) -> torch.Tensor:
        """Normalizes ``(..., D)``; the result has the dtype of the buffers (float64 for float64 instances)."""
        if torch.compiler.is_compiling() or (instances.requires_grad and torch.is_grad_enabled()):
            return self._normalized(instances)
        rows = instances.reshape(-1, instances.shape[-1])
        if len(rows) <= _ROWS:
            return self._normalized(instances)
        result = torch.empty(rows.shape, dtype=self._dtype(instances), device=rows.device)
        for part, out in zip(rows.split(_ROWS), result.split(_ROWS), strict=True):
            out.copy_(self._normalized(part))
        return result.view(instances.shape)

    def _dtype(self, instances):
        return torch.promote_types(accumulation_dtype(instances.dtype), self.mean.dtype)

    def _normalized(self, x):
        x = (x.to(self._dtype(x)) - self.mean) * self.inverse_std
        return soft_clip(x, self.soft_clip) if self.soft_clip else x

    def extra_repr(self) -> str:
        return f"num_features={len(self.mean)}, kind={self.kind!r}, soft_clip={self.soft_clip}"


def soft_clip(x: torch.Tensor, bound: float) -> torch.Tensor:
    """Smooth clipping to ±bound: ``x / (1 + (x/bound)⁴)^¼``, which is 1.5 % below x at half the bound."""
    squared = (x / bound).square()
    return x / torch.hypot(torch.ones_like(squared), squared).sqrt()


def inverse_deviation(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """``1 / std``, and 0 for constant features."""
    constant = std <= 1e-7 * mean.abs()  # below this, a deviation of float32 data is rounding
    return torch.where(constant, 0, 1 / torch.where(constant, 1, std))
