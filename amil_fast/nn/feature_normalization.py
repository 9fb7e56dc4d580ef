"""Normalization of instance features, fitted on training bags and stored in the model."""

from collections.abc import Iterable

import torch
from torch import nn

from amil_fast.ops.bags import accumulation_dtype

NORMALIZATIONS = ("auto", "standard", "scale")
SPARSE = 0.9  # fraction of zeros from which on non-negative features are called sparse
_VALUES = 2**16  # processed at once: intermediate results stay in the L2 cache and are not returned to the system


class FeatureStatistics:
    """Mean and deviation of every feature, accumulated over batches of instances in float64.

    Args:
        num_features: width D of the instances.

    Attributes:
        count: number of instances.
        mean: float64 ``(D,)``.
        squares: sum of squared deviations from the mean, float64 ``(D,)``.
        negative: True if a value is negative.
        zeros: number of values that are 0, counted until one is negative.
    """

    def __init__(self, num_features: int):
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64)
        self.squares = torch.zeros(num_features, dtype=torch.float64)
        self.negative, self.zeros = False, 0

    def update(self, instances: torch.Tensor) -> None:
        """Adds instances ``(n, D)``."""
        for rows in instances.split(_rows_at_once(len(self.mean))):
            if len(rows):
                wide = rows.double()
                mean = wide.mean(0)
                self._merge(len(rows), mean, (wide - mean).square_().sum(0))
                if not self.negative:
                    self.negative = bool((rows < 0).any())
                    self.zeros += rows.numel() - int(rows.count_nonzero())

    def merge(self, other: "FeatureStatistics") -> None:
        """Adds the instances of other statistics."""
        if other.count:
            self._merge(other.count, other.mean, other.squares)
            self.zeros += other.zeros
            self.negative |= other.negative

    def _merge(self, count, mean, squares):
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.squares = self.squares + squares + difference.square() * (self.count * count / total)
        self.count = total

    def std(self) -> torch.Tensor:
        """Standard deviation of every feature (divided by the number of instances), float64 ``(D,)``."""
        return (self.squares / max(self.count, 1)).sqrt()

    def root_mean_square(self) -> float:
        """Root mean square over all instances and features."""
        return float((self.squares / max(self.count, 1) + self.mean.square()).mean().sqrt())

    @property
    def sparse(self) -> bool:
        """True if no value is negative and at least :data:`SPARSE` of them are 0, as for word counts or tf-idf."""
        return not self.negative and self.zeros >= SPARSE * self.count * len(self.mean)

    def normalization(self, kind: str) -> tuple[str, torch.Tensor, torch.Tensor]:
        """Returns the kind (``"auto"`` replaced by the chosen one), the mean to subtract and the factor to apply.

        Both are float64 ``(D,)``.
        """
        if kind == "auto":
            kind = "scale" if self.sparse else "standard"
        if kind == "scale":
            scale = self.root_mean_square()
            return kind, torch.zeros_like(self.mean), torch.full_like(self.mean, 1 / scale if scale else 0.0)
        return kind, self.mean, _inverse_deviation(self.mean, self.std())


class FeatureNormalization(nn.Module):
    """Normalization of features by statistics of the training part.

    Args:
        num_features: width D of the instances.
        kind: ``"standard"``: every feature is standardized and clipped smoothly; ``"scale"``: all features are divided
            by their common root mean square, which keeps zeros and ratios, for sparse features, whose rare values
            standardization and clipping would level; ``"auto"``: chosen by :meth:`fit`, ``"scale"`` if no value is
            negative and 90 % or more are 0.
        soft_clip: bound of the smooth clipping (:func:`soft_clip`) of standardized features; 0: off.

    Attributes:
        kind: the chosen kind after :meth:`fit`.

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
        """Sets kind, mean and factor from batches of instances ``(n, D)``, or from statistics; returns itself.

        Constant features become 0 if standardized.
        """
        statistics = instances
        if not isinstance(statistics, FeatureStatistics):
            statistics = FeatureStatistics(len(self.mean))
            for rows in instances:  # type: ignore[union-attr]
                statistics.update(rows)
        if not statistics.count:
            raise ValueError("instances: expected at least one instance, got none")
        self.kind, mean, factor = statistics.normalization(self.kind)
        self.mean.copy_(mean)
        self.inverse_std.copy_(factor)
        return self

    def forward(self, instances: torch.Tensor) -> torch.Tensor:
        """Normalizes ``(..., D)``; the result has the dtype of the buffers (float64 for float64 instances)."""
        if torch.compiler.is_compiling() or (instances.requires_grad and torch.is_grad_enabled()):
            return self._normalized(instances)
        rows = instances.reshape(-1, instances.shape[-1])
        at_once = _rows_at_once(rows.shape[1])
        if len(rows) <= at_once:
            return self._normalized(instances)
        result = torch.empty(rows.shape, dtype=self._dtype(instances), device=rows.device)
        for part, out in zip(rows.split(at_once), result.split(at_once), strict=True):
            out.copy_(self._normalized(part))
        return result.view(instances.shape)

    def _dtype(self, instances):
        return torch.promote_types(accumulation_dtype(instances.dtype), self.mean.dtype)

    def _normalized(self, x):
        x = (x.to(self._dtype(x)) - self.mean) * self.inverse_std
        return soft_clip(x, self.soft_clip) if self.soft_clip and self.kind == "standard" else x

    def extra_repr(self) -> str:
        return f"num_features={len(self.mean)}, kind={self.kind!r}, soft_clip={self.soft_clip}"


def _rows_at_once(num_features):
    return max(_VALUES // max(num_features, 1), 1)


def soft_clip(x: torch.Tensor, bound: float | torch.Tensor) -> torch.Tensor:
    """Smooth clipping to ±bound: ``x / (1 + (x/bound)⁴)^¼``, which is 1.5 % below x at half the bound.

    A tensor of bounds is broadcast; an infinite bound does not clip.
    """
    squared = (x / bound).square()
    return x / torch.hypot(torch.ones_like(squared), squared).sqrt()


def _inverse_deviation(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """``1 / std``, and 0 for constant features."""
    constant = std <= 1e-7 * mean.abs()  # below this, a deviation of float32 data is rounding
    return torch.where(constant, 0, 1 / torch.where(constant, 1, std))
