"""Networks of published methods, stacked: ``members`` independent ones, each applied to one bag.

``network(x, mask)`` takes ``x (members, N, D)`` and the bool ``mask (members, N)``, True for instances of the bag, and
returns the logits of its heads, ``(heads, members)``.
"""

import torch
from torch import nn

from amil_fast.nn.stacked import StackedLinear


class MINetDS(nn.Module):
    """MI-Net with deep supervision: three layers, each followed by dropout, max pooling and a head.

    Source: Wang et al., *Revisiting multiple instance neural networks*, Pattern Recognition 74, 2018.
    """

    widths = (256, 128, 64)

    def __init__(self, members: int, in_features: int):
        super().__init__()
        self.layers = _layers(members, in_features, self.widths)
        self.heads = nn.ModuleList(StackedLinear(members, width, 1) for width in self.widths)
        _glorot(self)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = layer(x).relu()
            dropped = nn.functional.dropout(x, 0.5, self.training)
            pooled = dropped.masked_fill(~mask[..., None], -torch.inf).amax(1, keepdim=True)
            logits.append(head(pooled)[:, 0, 0])
        return torch.stack(logits)


class AttentionNet(nn.Module):
    """Attention-based pooling of the embeddings of three layers with dropout.

    Source: Ilse, Tomczak, Welling, *Attention-based Deep Multiple Instance Learning*, ICML 2018.
    """

    widths = (256, 128, 64)

    def __init__(self, members: int, in_features: int):
        super().__init__()
        self.layers = _layers(members, in_features, self.widths)
        self.v = StackedLinear(members, 64, 64)
        self.w = StackedLinear(members, 64, 1)
        self.head = StackedLinear(members, 64, 1)
        _glorot(self)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(layer(x).relu(), 0.5, self.training)
        weights = _softmax(self.w(self.v(x).tanh()), mask)
        return self.head((weights * x).sum(1, keepdim=True))[None, :, 0, 0]


class DSMIL(nn.Module):
    """Dual-stream network; the heads are those of the bag and of the instance with the highest score.

    Source: Li, Li, Eliceiri, *Dual-stream Multiple Instance Learning Network*, CVPR 2021.
    """

    def __init__(self, members: int, in_features: int):
        super().__init__()
        self.instance_head = StackedLinear(members, in_features, 1)
        self.query = StackedLinear(members, in_features, 128)
        self.value = StackedLinear(members, in_features, in_features)
        self.bag_head = StackedLinear(members, in_features, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = self.instance_head(x)[..., 0].masked_fill(~mask, -torch.inf)
        highest, critical = scores.max(1)
        query = self.query(x)
        critical_query = query[torch.arange(len(x)), critical][:, :, None]
        weights = _softmax(query @ critical_query / query.shape[-1] ** 0.5, mask)
        # The weights sum to 1: the value of the weighted mean is the weighted mean of the values.
        bag = self.value((weights * x).sum(1, keepdim=True))
        return torch.stack([self.bag_head(bag)[:, 0, 0], highest])


def _layers(members, in_features, widths):
    pairs = zip((in_features, *widths), widths, strict=False)
    return nn.ModuleList(StackedLinear(members, before, after) for before, after in pairs)


def _glorot(network):
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, StackedLinear):
                bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
                layer.weight.uniform_(-bound, bound)
                layer.bias.zero_()


def _softmax(scores, mask):
    """Weights ``(members, N, 1)`` of the instances from scores of the same shape."""
    return scores.masked_fill(~mask[..., None], -torch.inf).softmax(1)
