"""MI-RNet, the residual multiple-instance network (PAPER §3)."""

from typing import NamedTuple

import torch
from torch import nn

from amil_fast.nn.bag_view import BagView
from amil_fast.nn.losses import noisy_or
from amil_fast.nn.pooling import make_pooling
from amil_fast.ops.bags import accumulation_dtype, bag_mask, check_bags


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
        instance_logits: ``(L, B, N)`` or ``(L, total)`` with ``scoring="instances"``, for
            :func:`amil_fast.nn.noisy_or_loss`; else None.
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    embedding: torch.Tensor
    pooled: torch.Tensor
    weights: torch.Tensor | None
    instance_logits: torch.Tensor | None


class MIRNet(nn.Module):
    r"""A bag classifier: fully connected layers over instances, each followed by a pooling, whose bag vectors add
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
        input_dropout: the same for a feature of an instance.
        instance_norm: scale every instance's embedding to this length before it is pooled; None (the paper's) leaves it
            alone. An instance can then attract weight by its direction only, not by being loud.
        instance_scale: factor on the embeddings before they are pooled; 1 in the paper. Where embeddings are much
            longer than 1, squash keeps little more of a bag than its direction; a factor that brings them to about 1
            keeps the length as well.
        bag_scale: factor on what the poolings give before it is summed up and scored; 1 in the paper. Squash makes bag
            vectors of length < 1, from which a head that starts small learns slowly.
        scoring: ``"bag"``: the heads score :math:`X^l`. ``"instances"``: they score every instance joined with its
            bag's state, :math:`x_{ij}^l + X_i^l`, and a bag's probability is that of the noisy-or over its instances
            (:func:`amil_fast.nn.noisy_or`, λ = 1).
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
        input_dropout=0.0,
        instance_norm=None,
        instance_scale=1.0,
        bag_scale=1.0,
        scoring="bag",
        backend="auto",
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

    # What StackedMIRNet replaces.
    _linear = staticmethod(nn.Linear)
    _pooling = staticmethod(make_pooling)

    def reset_parameters(self, generator=None):
        """Weights from a normal distribution (of variance 2/fan-in before a ReLU, 1/fan-in in the heads), biases 0.

        The poolings' own parameters keep their modules' initialization.
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
        pooled, weights, logits, instance_logits = [], [], [], []
        x = self.input_dropout(x)
        X = None
        for level, (layer, pool) in enumerate(zip(self.layers, self.pools, strict=True)):
            x = self.dropout(torch.relu(layer(x)))
            f = x if self.instance_norm is None else _scaled_to(x, self.instance_norm)
            to_pool = f if self.instance_scale == 1 else f * self.instance_scale
            if return_weights:
                m, w = self._pool(pool, to_pool, bags, return_weights=True)
                weights.append(w)
            else:
                m = self._pool(pool, to_pool, bags)
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

    def _pool(self, pool, x, bags, **kwargs):
        return pool(x, **bags, **kwargs)

    def _score_instances(self, head, f, X, bags):
        z = head(f + BagView(f, **bags).spread(X))
        log_p, log_not_p = noisy_or(z, **bags)
        return log_p - log_not_p, z


def _scaled_to(x, length):
    """``x`` with its last axis scaled to ``length``; 0 stays 0, and near it the gradient stays bounded."""
    wide = x.to(accumulation_dtype(x.dtype))
    return (wide * (length * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6))).to(x.dtype)
