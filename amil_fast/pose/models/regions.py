"""The block that generator and discriminator are stacked from: an MI-RNet over the regions of a feature map."""

import torch
from torch import nn
from torch.nn import functional as F

from amil_fast.nn.pooling import make_pooling


class RegionBlock(nn.Module):
    r"""``G_n`` of the paper: every pixel of a feature map is an instance, the map is their bag.

    .. math::
        x^l = \mathrm{ReLU}(A_l x^{l-1} + B_l X^{l-1} + c_l), \quad X^l = M^l(x^l) + X^{l-1}, \quad l = 1..L

    with :math:`x^0` the maps given, :math:`X^0` the bag vector of the block below (none: 0) and :math:`M^l` the pooling
    over all regions. :math:`A_l` are the paper's fully connected layers (1 × 1 convolutions). Joining the bag vector to
    every region's features before the next layer is the product with :math:`B_l`, made once per bag. Where every region
    has seen the whole body, region j is scored for joint k:

    .. math::
        z_{jk} = a_k \cdot x_j^L + b_k \cdot X^L + c_k

    Args:
        widths: channels of each map given to :meth:`forward`.
        features: width of every layer.
        outputs: K.
        depth: L.
        pooling: a name of :data:`amil_fast.nn.POOLINGS`, or ``"none"``: no bag vectors, regions know of no other.
        num_iters, backend: of adjust pooling.
        residual: add the bag vector of the level below.
        first: there is no block below, and so no :math:`X^0`.
        bag_scale: factor on what the poolings give. Squash makes vectors of length < 1, next to which a region's
            features, of length about :math:`\sqrt{\text{features}}`, are loud.
        prior: heatmap value that scores start from.
    """

    def __init__(
        self,
        widths,
        features,
        outputs,
        *,
        depth=3,
        pooling="adjust",
        num_iters=3,
        residual=True,
        first=True,
        bag_scale=1.0,
        prior=0.02,
        backend="auto",
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
                layer.weight.normal_(0, (2 / fan_in) ** 0.5)
            for layer in [*self.layers, *(self.bags or ())]:
                layer.weight.normal_(0, (2 / features) ** 0.5)
            for layer in [self.score] + ([self.bag_score] if self.bags is not None else []):
                layer.weight.normal_(0, 0.1 * features**-0.5)
            for layer in [self.inputs[0], *self.layers, self.score]:
                layer.bias.zero_()
            # 1 − exp(−softplus(z)) is sigmoid(z): maps start nearly empty, as they end.
            self.score.bias.fill_(torch.logit(torch.tensor(prior)).item())

    def forward(self, *maps, bag=None):
        """
        Args:
            maps: ``(B, N, C_i)`` each, N = h · w regions in row-major order.
            bag: ``(B, features)`` of the block below, or None.

        Returns:
            ``(scores (B, N, K), regions (B, N, features), bag (B, features) or None)``
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
            x = x + self.bags[level - len(self.pools)](bag)[:, None]  # the last is for the last level
        x = F.relu(x)
        pooled = self.pools[level](x)
        if self.bag_scale != 1:
            pooled = pooled * self.bag_scale
        return x, pooled if bag is None or not self.residual else pooled + bag


class RegionStack(nn.ModuleList):
    """N blocks on the same feature map Y: :math:`X_1 = G_1(Y)`, :math:`X_n = G_n(Y, X_{n-1})`; the bag vector is handed
    on as well.

    Args:
        blocks: N, at least 0.
        features: channels of Y, and width of every layer.
        outputs, options: of :class:`RegionBlock`.
    """

    def __init__(self, blocks, features, outputs, **options):
        super().__init__(
            RegionBlock([features] if n == 0 else [features, features], features, outputs, first=n == 0, **options)
            for n in range(blocks)
        )

    def forward(self, Y):
        """Every block's scores ``(B, K, h, w)`` for ``Y (B, features, h, w)``."""
        height, width = Y.shape[2:]
        maps, bag, scores = (regions(Y),), None, []
        for block in self:
            z, X, bag = block(*maps, bag=bag)
            maps = (maps[0], X)
            scores.append(as_maps(z, height, width))
        return scores


def regions(maps):
    """``(B, C, h, w)`` as ``(B, h · w, C)``: a view where the maps are channels-last, else a copy."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def as_maps(x, height, width):
    """``(B, h · w, C)`` as channels-last ``(B, C, h, w)``, a view."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def probability(scores, scale):
    """``1 − exp(−λ softplus(z))`` (12), in float32 (float64 for float64)."""
    wide = scores.double() if scores.dtype == torch.float64 else scores.float()
    return -torch.expm1(-scale * F.softplus(wide)) if scale != 1 else torch.sigmoid(wide)
