"""MI-RNet, the residual multiple-instance network (Eq. 1)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from amil_fast.nn.bag_view import BagView
from amil_fast.nn.losses import noisy_or_of
from amil_fast.nn.pooling import AdjustPool, BasePool, make_pooling
from amil_fast.ops.bags import accumulation_dtype


class MIROutput(NamedTuple):
    """Output of :class:`MIRNet`, for L scored levels, B bags and C classes (without C for ``num_classes=1``).

    Attributes:
        logits: ``(L, B)`` or ``(L, B, C)``, scores of every level, for :func:`level_loss`.
        probabilities: ``(B,)`` or ``(B, C)``, mean over the levels' probabilities (sigmoid or softmax).
        embedding: ``(B, hidden)``, bag vector X^L of the last level.
        pooled: ``(depth, B, hidden)``, pooled vector of every level before the residual sum, for
            :func:`margin_loss`.
        weights: ``(depth, B, N)`` or ``(depth, total)``, instance weights of the poolings, or None.
        instance_logits: ``(L, B, N)`` or ``(L, total)`` with ``scoring="instances"``, for
            :func:`noisy_or_loss`; otherwise None.
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    embedding: torch.Tensor
    pooled: torch.Tensor
    weights: torch.Tensor | None
    instance_logits: torch.Tensor | None


class MIRNet(nn.Module):
    r"""Bag classifier: fully connected layers over instances, each followed by a pooling; bag vectors are summed.

    .. math::
        x_{ij}^l = \mathrm{ReLU}(W_l x_{ij}^{l-1} + b_l), \quad X_i^1 = M^1(\{x_{ij}^1\}_j), \quad
        X_i^l = M^l(\{x_{ij}^l\}_j) + X_i^{l-1}

    with a classifier head on every :math:`X^l`. ``pooling="mean"`` with ``residual=False`` is MI-Net.

    Args:
        in_features: width of an instance.
        num_classes: 1 for binary labels (one output and a sigmoid), C >= 2 for class indices (C outputs, softmax).
        hidden: width of every layer.
        depth: number of layers.
        pooling: name in :data:`POOLINGS`, or a callable ``features -> module``.
        num_iters: iterations of adjust pooling.
        residual: add the bag vector of the previous level.
        deep_supervision: score every level; otherwise the last one only (L = 1).
        dropout: dropout probability of hidden units.
        input_dropout: dropout probability of features.
        instance_norm: length to which every embedding is scaled before pooling; None, as in the paper, does not scale.
            With it, instances are weighted by direction, not by magnitude.
        instance_scale: factor on the embeddings before pooling; 1 in the paper. Squash preserves little more than the
            direction of vectors much longer than 1; a factor that brings them to about 1 preserves the length as well.
        bag_scale: factor on the pooled vectors before the sum and the heads; 1 in the paper. Squashed vectors have
            length < 1, from which a head with small initial weights learns slowly.
        scoring: ``"bag"``: the heads score :math:`X^l`. ``"instances"``: they score every instance and its bag,
            :math:`x_{ij}^l + X_i^l`, and the probability of a bag is the noisy-or over its instances
            (:func:`noisy_or`, λ = 1).
        backend: backend of adjust pooling.

    Raises:
        ValueError: a size below 1, an unknown name, ``scoring="instances"`` with several classes.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int = 1,
        hidden: int = 128,
        depth: int = 3,
        pooling: str | Callable[[int], nn.Module] = "adjust",
        num_iters: int = 3,
        residual: bool = True,
        *,
        deep_supervision: bool = True,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        instance_norm: float | None = None,
        instance_scale: float = 1.0,
        bag_scale: float = 1.0,
        scoring: str = "bag",
        backend: str = "auto",
    ):
        super().__init__()
        sizes = {"in_features": in_features, "num_classes": num_classes, "hidden": hidden, "depth": depth}
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        if scoring not in ("bag", "instances"):
            raise ValueError(f"scoring: expected 'bag' or 'instances', got {scoring!r}")
        if scoring == "instances" and num_classes != 1:
            raise ValueError(f"scoring: 'instances' is for num_classes=1, got num_classes={num_classes}")
        if instance_norm is not None and not instance_norm > 0:
            raise ValueError(f"instance_norm: expected None or a positive number, got {instance_norm}")
        self.num_classes = num_classes
        self.residual = residual
        self.deep_supervision = deep_supervision
        self.layers = nn.ModuleList(self._linear(hidden if level else in_features, hidden) for level in range(depth))
        self.pools = nn.ModuleList(self._pooling(pooling, hidden, num_iters, backend) for _ in range(depth))
        self.heads = nn.ModuleList(self._linear(hidden, num_classes) for _ in range(depth if deep_supervision else 1))
        self.dropout = nn.Dropout(dropout)
        self.input_dropout = nn.Dropout(input_dropout)
        self.instance_norm = instance_norm
        self.instance_scale = instance_scale
        self.bag_scale = bag_scale
        self.scoring = scoring
        self.reset_parameters()

    # Factories of the layers, overridden by StackedMIRNet.
    def _linear(self, in_features: int, out_features: int) -> nn.Module:
        return nn.Linear(in_features, out_features)

    def _pooling(self, pooling, features, num_iters, backend) -> nn.Module:
        return make_pooling(pooling, features, num_iters, backend)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initializes weights from a normal distribution (variance 2/fan-in, 1/fan-in in the heads) and biases to 0.

        Parameters of the poolings keep the initialization of their modules.
        """
        layer: Any
        with torch.no_grad():
            for layers, gain in ((self.layers, 2.0), (self.heads, 1.0)):
                for layer in layers:
                    layer.weight.normal_(0, (gain / layer.in_features) ** 0.5, generator=generator)
                    layer.bias.zero_()

    def forward(
        self,
        instances: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        lengths: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        return_weights: bool = False,
    ) -> MIROutput:
        """Classifies bags.

        Args:
            instances: ``(B, N, in_features)``, ``(total, in_features)`` or a jagged nested tensor, as for
                :func:`amil_fast.ops.adjust_pool`. Padding has no effect and gets zero gradient; an empty bag is scored
                by the biases of the heads.
            mask: ``(B, N)``.
            lengths: ``(B,)``.
            cu_seqlens: ``(B + 1,)``.
            return_weights: also return the instance weights of every level.
        """
        bags = BagView(instances, mask, lengths, cu_seqlens)
        # x has zeros in the padding, where 0 · NaN would otherwise reach the weight gradients of the layers.
        return self._levels(bags.x, bags, return_weights)

    def _levels(self, x, bags, return_weights):
        pooled, weights, logits, instance_logits = [], [], [], []
        x = self.input_dropout(x)
        X = None
        for level, (layer, pool) in enumerate(zip(self.layers, self.pools, strict=True)):
            x = self.dropout(torch.relu(layer(x)))
            f = x if self.instance_norm is None else _scaled_to(x, self.instance_norm)
            to_pool = f if self.instance_scale == 1 else f * self.instance_scale
            m, w = self._pool(pool, to_pool, bags, return_weights)
            if return_weights:
                weights.append(w)
            pooled.append(m)
            if self.bag_scale != 1:
                m = m * self.bag_scale
            X = m if X is None or not self.residual else X + m
            if self.deep_supervision or level == len(self.layers) - 1:
                head = self.heads[level if self.deep_supervision else 0]
                if self.scoring == "bag":
                    logits.append(head(X))
                else:
                    bag_logits, z = self._score_instances(head, f, X, bags)
                    logits.append(bag_logits)
                    instance_logits.append(z)
        logits = torch.stack(logits)
        if self.num_classes == 1:
            logits = logits[..., 0]
            probabilities = torch.sigmoid(logits).mean(0)
        else:
            probabilities = torch.softmax(logits, -1).mean(0)
        return MIROutput(
            logits,
            probabilities,
            X,
            torch.stack(pooled),
            torch.stack(weights) if weights else None,
            torch.stack(instance_logits)[..., 0] if instance_logits else None,
        )

    def _pool(self, pool, x, bags, return_weights):
        if type(pool).forward in (AdjustPool.forward, BasePool.forward):
            result = pool(x, bags=bags, return_weights=return_weights)
        else:  # a custom pooling, or a subclass that overrides forward: it takes tensors and validates them
            result = pool(
                x, mask=bags.mask, cu_seqlens=bags.cu_seqlens, **({"return_weights": True} if return_weights else {})
            )
        return result if return_weights else (result, None)

    def _score_instances(self, head, f, X, bags):
        z = head(f + bags.spread(X))
        log_p, log_not_p = noisy_or_of(bags.with_instances(z))
        return log_p - log_not_p, z


def _scaled_to(x, length):
    """Scales the last axis of ``x`` to ``length``; 0 stays 0, with a bounded gradient near 0."""
    wide = x.to(accumulation_dtype(x.dtype))
    return (wide * (length * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6))).to(x.dtype)
