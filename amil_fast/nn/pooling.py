"""Poolings of bags to vectors: adjust pooling and the ones it is compared with, all behind one call.

``pool(instances, mask=None, *, lengths=None, cu_seqlens=None) -> (B, D)`` takes the four input forms of
:func:`amil_fast.adjust_pool`: padded with a mask, padded with lengths, packed with ``cu_seqlens``, and jagged nested
tensors. In all of them an empty bag gives 0, padding changes nothing whatever it holds (NaN included) and gets zero
gradient, and sums are taken in float32 (float64 for float64).
"""

import torch
from torch import nn

from amil_fast.nn.bag_view import BagView
from amil_fast.ops import adjust_pool


class AdjustPool(nn.Module):
    """Adjust pooling as a layer without parameters; the arguments are those of :func:`amil_fast.adjust_pool`.

    It stands wherever a pooling ``(X, mask) -> Z`` does. With ``return_weights`` (here, or for one call) the result is
    ``(bag, weights)``.
    """

    def __init__(self, num_iters=3, return_weights=False, detach_routing=False, backend="auto"):
        super().__init__()
        self.num_iters = num_iters
        self.return_weights = return_weights
        self.detach_routing = detach_routing
        self.backend = backend

    def forward(self, instances, mask=None, *, lengths=None, cu_seqlens=None, return_weights=None):
        return adjust_pool(
            instances,
            mask,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            num_iters=self.num_iters,
            return_weights=self.return_weights if return_weights is None else return_weights,
            detach_routing=self.detach_routing,
            backend=self.backend,
        )

    def extra_repr(self):
        return (
            f"num_iters={self.num_iters}, return_weights={self.return_weights}, "
            f"detach_routing={self.detach_routing}, backend={self.backend!r}"
        )


class _Pool(nn.Module):
    """Checks the bags, switches autocast off around the sums, and returns the instances' dtype."""

    _has_weights = True  # one weight per instance; max and log-sum-exp weigh every feature differently

    def __init__(self, return_weights=False):
        super().__init__()
        self.return_weights = return_weights

    def forward(self, instances, mask=None, *, lengths=None, cu_seqlens=None, return_weights=None):
        return_weights = self.return_weights if return_weights is None else return_weights
        if return_weights and not self._has_weights:
            raise ValueError(f"return_weights: {type(self).__name__} has no single weight per instance")
        bags = BagView(instances, mask, lengths, cu_seqlens)
        bag, weights = self.pool_scored(bags, self.scores(bags.x))
        return (bag, weights) if return_weights else bag

    def pool_scored(self, bags, scores):
        """``(bag, weights)`` of a :class:`BagView` whose instances are scored already."""
        with torch.autocast(bags.x.device.type, enabled=False):
            bag, weights = self.pool(bags, scores)
            return bag.to(bags.x.dtype), weights

    def scores(self, x):
        """Scores from which the pooling takes its weights, ``(..., D) -> (...)``; None where it needs none."""
        return

    def pool(self, bags, scores):
        raise NotImplementedError

    def extra_repr(self):
        return f"return_weights={self.return_weights}" if self._has_weights else ""


class MeanPool(_Pool):
    """The mean of a bag's instances; the weights are 1/m."""

    def pool(self, bags, scores):
        x = bags.wide()
        sizes = bags.sizes().clamp(min=1).to(x.dtype)
        weights = bags.spread(1 / sizes).expand(x.shape[:-1])
        if bags.mask is not None:
            weights = torch.where(bags.mask, weights, 0)
        return bags.sum(x) / sizes[:, None], weights


class MaxPool(_Pool):
    """The largest value of every feature over a bag's instances; instances that tie share the gradient evenly."""

    _has_weights = False

    def __init__(self):
        super().__init__()

    def pool(self, bags, scores):
        return bags.max(bags.wide()), None


class LogSumExpPool(_Pool):
    """``1/r · log(1/m Σ_i exp(r f_i))`` per feature: the mean for r -> 0, the maximum for r -> ∞."""

    _has_weights = False

    def __init__(self, r=1.0):
        super().__init__()
        if not r > 0:
            raise ValueError(f"r: expected a positive number, got {r}")
        self.r = r

    def pool(self, bags, scores):
        x = bags.wide()
        largest = bags.max(x.detach())
        e = torch.exp(self.r * (x - bags.spread(largest)))
        if bags.mask is not None:
            e = torch.where(bags.mask[:, :, None], e, 0)
        sizes = bags.sizes()[:, None]
        total = torch.where(sizes == 0, 1, bags.sum(e))
        return largest + torch.log(total / sizes.clamp(min=1)) / self.r, None

    def extra_repr(self):
        return f"r={self.r}"


class AttentionPool(_Pool):
    """Attention-based pooling: ``Σ_i a_i f_i``, ``a = softmax_i(wᵀ tanh(V f_i))``.

    ``in_features`` is the width D of the instances, ``hidden`` that of the attention's inner layer. Source: Ilse,
    Tomczak, Welling, *Attention-based Deep Multiple Instance Learning*, ICML 2018, Eq. 8.
    """

    def __init__(self, in_features, hidden=128, return_weights=False):
        super().__init__(return_weights)
        self.v = nn.Linear(in_features, hidden)
        self.w = nn.Linear(hidden, 1)

    def scores(self, x):
        return self.w(torch.tanh(self.v(x)))[..., 0]

    def pool(self, bags, scores):
        weights = bags.softmax(scores.to(bags.wide().dtype))
        return bags.weighted_sum(weights), weights


class GatedAttentionPool(AttentionPool):
    """Gated attention: as :class:`AttentionPool` with ``a = softmax_i(wᵀ (tanh(V f_i) ⊙ sigmoid(U f_i)))`` (Eq. 9)."""

    def __init__(self, in_features, hidden=128, return_weights=False):
        super().__init__(in_features, hidden, return_weights)
        self.u = nn.Linear(in_features, hidden)

    def scores(self, x):
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


def make_pooling(pooling, features, num_iters=3, backend="auto"):
    """A pooling layer for instances of width ``features``.

    Args:
        pooling: one of :data:`POOLINGS`, or a callable that takes ``features`` and returns a module with the call
            described at the top of this file.
        features: width D of the instances.
        num_iters, backend: for ``"adjust"``.
    """
    if isinstance(pooling, nn.Module):
        raise TypeError(
            "pooling: expected a name or a callable that makes a new module for a width, got a module: "
            "every level has a pooling of its own; write pooling=lambda features: ..."
        )
    if callable(pooling):
        return pooling(features)
    if pooling not in _POOLINGS:
        raise ValueError(f"pooling: expected one of {', '.join(map(repr, _POOLINGS))} or a callable, got {pooling!r}")
    return _POOLINGS[pooling](features, num_iters, backend)
