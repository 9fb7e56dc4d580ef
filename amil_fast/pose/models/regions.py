"""MI-RNet block over the regions of a feature map, shared by generator and discriminator."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from amil_fast.nn.pooling import make_pooling


class RegionBlock(nn.Module):
    r"""Block :math:`G_n`: an MI-RNet whose bag is a feature map and whose instances are its pixels (Eq. 1).

    .. math::
        x^l = \mathrm{ReLU}(A_l x^{l-1} + B_l X^{l-1} + c_l), \quad X^l = M^l(x^l) + X^{l-1}, \quad l = 1..L

    with :math:`x^0` the input maps, :math:`X^0` the bag vector of the previous block (0 in the first) and :math:`M^l`
    the pooling over all regions. :math:`A_l` are the fully connected layers of the publication (1 × 1 convolutions).
    Concatenating the bag vector to the features of every region before the next layer is equivalent to the product with
    :math:`B_l`, which is computed once per bag. The score of region j for joint k is

    .. math::
        z_{jk} = a_k \cdot x_j^L + b_k \cdot X^L + c_k

    Args:
        widths: channels of each map given to :meth:`forward`.
        features: channels of every layer.
        outputs: number of joints K.
        depth: number of levels L.
        pooling: a name in :data:`amil_fast.nn.POOLINGS`, or ``"none"``: no bag vectors, regions are independent.
        num_iters, backend: of adjust pooling.
        residual: add the bag vector of the level below.
        first: there is no previous block and hence no :math:`X^0`.
        bag_scale: factor on the pooled vectors. Squash returns vectors of length < 1, small beside the features of a
            region, whose length is about :math:`\sqrt{\text{features}}`.
        prior: heatmap value at initialization.
    """

    def __init__(
        self,
        widths: Sequence[int],
        features: int,
        outputs: int,
        *,
        depth: int = 3,
        pooling: str = "adjust",
        num_iters: int = 3,
        residual: bool = True,
        first: bool = True,
        bag_scale: float = 1.0,
        prior: float = 0.02,
        backend: str = "auto",
    ):
        super().__init__()
        self.inputs = nn.ModuleList(nn.Linear(width, features, bias=not number) for number, width in enumerate(widths))
        self.layers = nn.ModuleList(nn.Linear(features, features) for _ in range(depth - 1))
        self.score = nn.Linear(features, outputs)
        self.residual, self.bag_scale = residual, bag_scale
        if pooling == "none":
            self.pools = self.bags = None
        else:
            self.pools = nn.ModuleList(make_pooling(pooling, features, num_iters, backend) for _ in range(depth))
            joined = depth - 1 if first else depth
            self.bags = nn.ModuleList(nn.Linear(features, features, bias=False) for _ in range(joined))
            self.bag_score = nn.Linear(features, outputs, bias=False)
        with torch.no_grad():
            fan_in = sum(widths)
            for layer in self.inputs:
                layer.weight.normal_(0, (2 / fan_in) ** 0.5)  # type: ignore[operator]
            for layer in [*self.layers, *(self.bags or ())]:
                layer.weight.normal_(0, (2 / features) ** 0.5)
            for layer in [self.score] + ([self.bag_score] if self.bags is not None else []):
                layer.weight.normal_(0, 0.1 * features**-0.5)
            for layer in [self.inputs[0], *self.layers, self.score]:
                layer.bias.zero_()
            # 1 − exp(−softplus(z)) is sigmoid(z). Most targets are 0, so heatmaps start near 0.
            self.score.bias.fill_(torch.logit(torch.tensor(prior, device="cpu")).item())

    def forward(
        self, *maps: torch.Tensor, bag: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Scores the regions.

        Args:
            maps: ``(B, N, C_i)`` each, N = h · w regions in row-major order.
            bag: ``(B, features)`` of the previous block, or None.

        Returns:
            ``(scores, regions, bag)``: ``(B, N, K)``, ``(B, N, features)``, and ``(B, features)`` or None.
        """
        x = self.inputs[0](maps[0])
        for layer, extra in zip(list(self.inputs)[1:], maps[1:], strict=True):
            x = x + layer(extra)
        x, bag = self._level(0, x, bag)
        for level, layer in enumerate(self.layers, 1):
            x, bag = self._level(level, layer(x), bag)
        scores = self.score(x)
        if bag is not None:
            scores = scores + self.bag_score(bag)[:, None]
        return scores, x, bag

    def _level(self, level, x, bag):
        if self.pools is None:
            return F.relu(x), None
        if bag is not None:
            # counted from the end: with `first`, level 0 has no layer
            x = x + self.bags[level - len(self.pools)](bag)[:, None]
        x = F.relu(x)
        pooled = self.pools[level](x)
        if self.bag_scale != 1:
            pooled = pooled * self.bag_scale
        return x, pooled if bag is None or not self.residual else pooled + bag


class RegionStack(nn.ModuleList):
    """N blocks on the same feature map Y: :math:`X_1 = G_1(Y)`, :math:`X_n = G_n(Y, X_{n-1})`, with the bag vector
    passed from block to block.

    Args:
        blocks: N >= 0.
        features: channels of Y and of every layer.
        outputs, options: arguments of :class:`RegionBlock`.
    """

    def __init__(self, blocks: int, features: int, outputs: int, **options: Any):
        super().__init__(
            RegionBlock([features] if n == 0 else [features, features], features, outputs, first=n == 0, **options)
            for n in range(blocks)
        )

    def forward(self, Y: torch.Tensor) -> list[torch.Tensor]:
        """Scores ``(B, K, h, w)`` of every block for ``Y (B, features, h, w)``."""
        height, width = Y.shape[2:]
        maps: tuple[torch.Tensor, ...] = (regions(Y),)
        bag, scores = None, []
        for block in self:
            z, X, bag = block(*maps, bag=bag)
            maps = (maps[0], X)
            scores.append(as_maps(z, height, width))
        return scores


def regions(maps: torch.Tensor) -> torch.Tensor:
    """``(B, C, h, w)`` as ``(B, h · w, C)``: a view of channels-last maps, otherwise a copy."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def as_maps(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """``(B, h · w, C)`` as channels-last ``(B, C, h, w)``, a view; the inverse of :func:`regions`."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def probability(scores: torch.Tensor, scale: float) -> torch.Tensor:
    """``1 − exp(−λ softplus(z))`` (Eq. 12), in float32 (float64 for float64)."""
    wide = scores.double() if scores.dtype == torch.float64 else scores.float()
    return -torch.expm1(-scale * F.softplus(wide)) if scale != 1 else torch.sigmoid(wide)


def softmax_heatmaps(scores: torch.Tensor, heatmap_std: float) -> torch.Tensor:
    """Softmax over all regions of each map, times ``2 π heatmap_std²``, in float32 (float64 for float64).

    A Gaussian with a sum of 1 has its maximum at ``1 / (2 π heatmap_std²)``: with the factor, a map equal to the
    training target has a maximum of 1, as with other losses.
    """
    wide = scores.double() if scores.dtype == torch.float64 else scores.float()
    return wide.flatten(-2).softmax(-1).view(wide.shape) * (2 * math.pi * heatmap_std**2)


def check_sizes(**sizes: tuple[Any, int]) -> None:
    """Raises ValueError unless each ``name=(value, minimum)`` holds an int of at least ``minimum``."""
    for name, (value, minimum) in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name}: expected an int of at least {minimum}, got {value!r}")
