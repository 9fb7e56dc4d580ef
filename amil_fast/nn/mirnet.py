"""MI-RNet, the residual multiple-instance network (PAPER §3)."""

from typing import NamedTuple

import torch
from torch import nn

from amil_fast.nn.pooling import make_pooling
from amil_fast.ops._bags import bag_mask, check_bags


class MIROutput(NamedTuple):
    """What :class:`MIRNet` returns. L scored levels, B bags, C classes; without C where ``num_classes=1``.

    Attributes:
        logits: ``(L, B)`` or ``(L, B, C)``: every level's scores, for training with deep supervision
            (:func:`amil_fast.nn.level_loss`).
        probabilities: ``(B,)`` or ``(B, C)``: the levels' probabilities (sigmoid or softmax) averaged with equal
            weights.
        embedding: ``(B, hidden)``: the last level's bag vector X^L.
        pooled: ``(depth, B, hidden)``: what each level's pooling gave, before the residual sum; its length is what
            :func:`amil_fast.nn.margin_loss` is about.
        weights: ``(depth, B, N)`` or ``(depth, total)``: the poolings' instance weights where asked for, else None.
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    embedding: torch.Tensor
    pooled: torch.Tensor
    weights: torch.Tensor | None


class MIRNet(nn.Module):
    r"""A bag classifier: fully connected layers over the instances, each followed by a pooling, whose bag vectors add
    up.

    .. math::
        x_{ij}^l = \mathrm{ReLU}(W_l x_{ij}^{l-1} + b_l), \quad X_i^1 = M^1(\{x_{ij}^1\}_j), \quad
        X_i^l = M^l(\{x_{ij}^l\}_j) + X_i^{l-1}

    and a scoring head on every :math:`X^l`. ``pooling="mean"`` with ``residual=False`` is MI-Net.

    Args:
        in_features: width of an instance.
        num_classes: 1: one neuron and a sigmoid, for labels 0 and 1. C >= 2: C neurons and a softmax, for class
            numbers.
        hidden: width of every layer.
        depth: number of layers.
        pooling: a name of :data:`amil_fast.nn.POOLINGS`, or a callable ``features -> module``.
        num_iters: of adjust pooling.
        residual: add the bag vector of the level below.
        deep_supervision: score every level; otherwise the last one only (L = 1).
        dropout: probability with which a hidden unit of an instance is dropped in training.
        backend: of adjust pooling.

    The call ``net(instances, mask=None, *, lengths=None, cu_seqlens=None, return_weights=False) -> MIROutput`` takes
    the four input forms of :func:`amil_fast.adjust_pool`. Packed bags are never padded; padding changes nothing,
    whatever it holds, and gets zero gradient. An empty bag is scored from the heads' biases alone.
    """

    def __init__(
        self,
        in_features,
        num_classes=1,
        hidden=128,
        depth=3,
        pooling="adjust",
        num_iters=3,
        residual=True,
        *,
        deep_supervision=True,
        dropout=0.0,
        backend="auto",
    ):
        super().__init__()
        sizes = {"in_features": in_features, "num_classes": num_classes, "hidden": hidden, "depth": depth}
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        self.num_classes = num_classes
        self.residual = residual
        self.deep_supervision = deep_supervision
        self.layers = nn.ModuleList(self._linear(hidden if level else in_features, hidden) for level in range(depth))
        self.pools = nn.ModuleList(self._pooling(pooling, hidden, num_iters, backend) for _ in range(depth))
        self.heads = nn.ModuleList(self._linear(hidden, num_classes) for _ in range(depth if deep_supervision else 1))
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    # What StackedMIRNet replaces.
    _linear = staticmethod(nn.Linear)
    _pooling = staticmethod(make_pooling)

    def reset_parameters(self, generator=None):
        """Weights from a normal distribution (of variance 2/fan-in before a ReLU, 1/fan-in in the heads), biases 0.

        The poolings' own parameters keep their modules' initialisation.
        """
        with torch.no_grad():
            for layers, gain in ((self.layers, 2.0), (self.heads, 1.0)):
                for layer in layers:
                    layer.weight.normal_(0, (gain / layer.in_features) ** 0.5, generator=generator)
                    layer.bias.zero_()

    def forward(self, instances, mask=None, *, lengths=None, cu_seqlens=None, return_weights=False):
        x, mask, lengths, cu_seqlens = check_bags(instances, mask, lengths, cu_seqlens)
        if cu_seqlens is None:
            mask = bag_mask(x, mask, lengths)
            if mask is not None:  # here and not only in the poolings: 0 · NaN would reach the layers' weight gradients
                x = torch.where(mask[:, :, None], x, 0)
        return self._levels(x, {"mask": mask, "cu_seqlens": cu_seqlens}, return_weights)

    def _levels(self, x, bags, return_weights):
        pooled, weights, logits = [], [], []
        X = None
        for level, (layer, pool) in enumerate(zip(self.layers, self.pools, strict=True)):
            x = self.dropout(torch.relu(layer(x)))
            if return_weights:
                m, w = self._pool(pool, x, bags, return_weights=True)
                weights.append(w)
            else:
                m = self._pool(pool, x, bags)
            X = m if X is None or not self.residual else X + m
            pooled.append(m)
            if self.deep_supervision:
                logits.append(self.heads[level](X))
        if not self.deep_supervision:
            logits.append(self.heads[0](X))
        logits = torch.stack(logits)
        if self.num_classes == 1:
            logits = logits[..., 0]
            probabilities = torch.sigmoid(logits).mean(0)
        else:
            probabilities = torch.softmax(logits, -1).mean(0)
        return MIROutput(
            logits, probabilities, X, torch.stack(pooled), torch.stack(weights) if return_weights else None
        )

    def _pool(self, pool, x, bags, **kwargs):
        return pool(x, **bags, **kwargs)
