"""Poolings of bags to vectors: adjust pooling and the poolings it is compared with, with the same call.

``pool(instances, mask=None, *, lengths=None, cu_seqlens=None) -> (B, D)`` takes the four input forms of
:func:`amil_fast.ops.adjust_pool`: padded with a mask, padded with lengths, packed with ``cu_seqlens``, and jagged
nested tensors. An empty bag gives 0; the values of padding (NaN included) have no effect and get zero gradient; sums
are accumulated in float32 (float64 for float64).
"""

from collections.abc import Callable

import torch
from torch import nn

from amil_fast.nn.bag_view import BagView
from amil_fast.ops.adjust_pool import adjust_pool, check_settings, pool_bags
from amil_fast.ops.bags import without_autocast


class AdjustPool(nn.Module):
    """Adjust pooling (:func:`amil_fast.ops.adjust_pool`) as a layer without parameters.

    A drop-in replacement for any pooling ``(X, mask) -> Z``. With ``return_weights``, at construction or in a call, the
    result is ``(bag, weights)``.

    Args:
        num_iters: number of iterations, 1 to 10,000.
        return_weights: also return the weights of the last iteration.
        detach_routing: stop gradients through the weights.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.

    Raises:
        TypeError: an argument of another type.
        ValueError: ``num_iters`` out of range, an unknown backend.
    """

    def __init__(
        self,
        num_iters: int = 3,
        return_weights: bool = False,
        detach_routing: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        check_settings(num_iters, return_weights, detach_routing, backend)
        self.num_iters = num_iters
        self.return_weights = return_weights
        self.detach_routing = detach_routing
        self.backend = backend

    def forward(
        self,
        instances: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        lengths: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        return_weights: bool | None = None,
        bags: BagView | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Pools bags: ``(B, N, D)`` or ``(total, D)`` -> ``(B, D)``, or ``(bag, weights)``.

        :class:`MIRNet` passes its validated ``bags`` instead of ``mask``, ``lengths`` and ``cu_seqlens``.
        """
        return_weights = self.return_weights if return_weights is None else return_weights
        if bags is None:
            return adjust_pool(
                instances,
                mask,
                lengths=lengths,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                num_iters=self.num_iters,
                return_weights=return_weights,
                detach_routing=self.detach_routing,
                backend=self.backend,
            )
        return pool_bags(
            instances,
            bags.mask,
            None,
            bags.cu_seqlens,
            self.num_iters,
            return_weights,
            self.detach_routing,
            self.backend,
            bags.max_seqlen,
        )

    def extra_repr(self) -> str:
        return (
            f"num_iters={self.num_iters}, return_weights={self.return_weights}, "
            f"detach_routing={self.detach_routing}, backend={self.backend!r}"
        )


class BasePool(nn.Module):
    """Base class: validates the bags, disables autocast around the sums, and restores the dtype of the instances."""

    _has_weights = True  # one weight per instance; max and log-sum-exp have one per instance and feature

    def __init__(self, return_weights: bool = False):
        super().__init__()
        self.return_weights = return_weights

    def forward(
        self,
        instances: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        lengths: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        return_weights: bool | None = None,
        bags: BagView | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Pools bags: ``(B, N, D)`` or ``(total, D)`` -> ``(B, D)``, or ``(bag, weights)``.

        :class:`MIRNet` passes its validated ``bags`` instead of ``mask``, ``lengths`` and ``cu_seqlens``.
        """
        return_weights = self.return_weights if return_weights is None else return_weights
        if return_weights and not self._has_weights:
            raise ValueError(f"return_weights: {type(self).__name__} has no single weight per instance")
        bags = BagView(instances, mask, lengths, cu_seqlens) if bags is None else bags.with_instances(instances)
        bag, weights = self.pool_scored(bags, self.scores(bags.x))
        return (bag, weights) if return_weights else bag

    def pool_scored(self, bags: BagView, scores: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``(bag, weights)`` of validated bags with given scores."""
        with without_autocast(bags.x.device.type):
            bag, weights = self.pool(bags, scores)
            return bag.to(bags.x.dtype), weights

    def scores(self, x: torch.Tensor) -> torch.Tensor | None:
        """Scores that determine the weights, ``(..., D) -> (...)``; None for poolings without scores."""
        return None

    def pool(self, bags: BagView, scores: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``(bag, weights)`` in the accumulation dtype."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"return_weights={self.return_weights}" if self._has_weights else ""


class MeanPool(BasePool):
    """Mean of a bag's instances; the weights are 1/m."""

    def pool(self, bags: BagView, scores: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = bags.wide()
        sizes = bags.sizes().clamp(min=1).to(x.dtype)
        weights = bags.spread(1 / sizes).expand(x.shape[:-1])
        if bags.mask is not None:
            weights = torch.where(bags.mask, weights, 0)
        return bags.sum(x) / sizes[:, None], weights


class MaxPool(BasePool):
    """Maximum of every feature over a bag's instances; ties share the gradient equally."""

    _has_weights = False

    def __init__(self):
        super().__init__()

    def pool(self, bags: BagView, scores: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        return bags.max(bags.wide()), None


class LogSumExpPool(BasePool):
    """``1/r · log(1/m Σ_i exp(r f_i))`` per feature: mean pooling for r -> 0, max pooling for r -> ∞."""

    _has_weights = False

    def __init__(self, r: float = 1.0):
        super().__init__()
        if not r > 0:
            raise ValueError(f"r: expected a positive number, got {r}")
        self.r = r

    def pool(self, bags: BagView, scores: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = bags.wide()
        largest = bags.max(x.detach())
        e = torch.exp(self.r * (x - bags.spread(largest)))
        if bags.mask is not None:
            e = torch.where(bags.mask[:, :, None], e, 0)
        sizes = bags.sizes()[:, None]
        total = torch.where(sizes == 0, 1, bags.sum(e))
        return largest + torch.log(total / sizes.clamp(min=1)) / self.r, None

    def extra_repr(self) -> str:
        return f"r={self.r}"


class AttentionPool(BasePool):
    """Attention-based pooling: ``Σ_i a_i f_i``, ``a = softmax_i(wᵀ tanh(V f_i))``.

    Args:
        in_features: width D of the instances.
        hidden: width of the attention's hidden layer.
        return_weights: also return the attention weights.

    Source: Ilse, Tomczak, Welling, *Attention-based Deep Multiple Instance Learning*, ICML 2018, Eq. 8.
    """

    def __init__(self, in_features: int, hidden: int = 128, return_weights: bool = False):
        super().__init__(return_weights)
        self.v = nn.Linear(in_features, hidden)
        self.w = nn.Linear(hidden, 1)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        return self.w(torch.tanh(self.v(x)))[..., 0]

    def pool(self, bags: BagView, scores: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert scores is not None
        weights = bags.softmax(scores.to(bags.wide().dtype))
        return bags.weighted_sum(weights), weights


class GatedAttentionPool(AttentionPool):
    """Gated attention: :class:`AttentionPool` with ``a = softmax_i(wᵀ (tanh(V f_i) ⊙ sigmoid(U f_i)))`` (Eq. 9)."""

    def __init__(self, in_features: int, hidden: int = 128, return_weights: bool = False):
        super().__init__(in_features, hidden, return_weights)
        self.u = nn.Linear(in_features, hidden)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        return self.w(torch.tanh(self.v(x)) * torch.sigmoid(self.u(x)))[..., 0]


# Name -> factory of (features, num_iters, backend).
_POOLINGS = {
    "adjust": lambda features, num_iters, backend: AdjustPool(num_iters, backend=backend),
    "mean": lambda features, num_iters, backend: MeanPool(),
    "max": lambda features, num_iters, backend: MaxPool(),
    "lse": lambda features, num_iters, backend: LogSumExpPool(),
    "attention": lambda features, num_iters, backend: AttentionPool(features),
    "gated_attention": lambda features, num_iters, backend: GatedAttentionPool(features),
}
POOLINGS = tuple(_POOLINGS)


def make_pooling(
    pooling: str | Callable[[int], nn.Module], features: int, num_iters: int = 3, backend: str = "auto"
) -> nn.Module:
    """Creates a pooling layer for instances of width ``features``.

    Args:
        pooling: name in :data:`POOLINGS`, or a callable that takes ``features`` and returns a module with the signature
            of :class:`AdjustPool`.
        features: width D of the instances.
        num_iters: iterations of adjust pooling.
        backend: backend of adjust pooling.

    Raises:
        TypeError: ``pooling`` is a module.
        ValueError: an unknown name.
    """
    if isinstance(pooling, nn.Module):
        raise TypeError(
            "pooling: expected a name or a callable that creates a module for a width, got a module: every level "
            "needs its own pooling; pass pooling=lambda features: ..."
        )
    if callable(pooling):
        return pooling(features)
    if pooling not in _POOLINGS:
        raise ValueError(f"pooling: expected one of {', '.join(map(repr, _POOLINGS))} or a callable, got {pooling!r}")
    return _POOLINGS[pooling](features, num_iters, backend)
