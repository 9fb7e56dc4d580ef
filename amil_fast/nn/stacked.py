"""Many small networks trained side by side, for cross-validation and ensembles."""

from typing import Any

import torch
from torch import nn

from amil_fast.nn.bag_view import BagView
from amil_fast.nn.losses import noisy_or_of
from amil_fast.nn.mirnet import MIRNet, MIROutput
from amil_fast.nn.pooling import AttentionPool, make_pooling


class StackedLinear(nn.Module):
    """Batched linear layers: ``(members, n, in_features) -> (members, n, out_features)``."""

    def __init__(self, members: int, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        bound = in_features**-0.5  # the initialization of nn.Linear
        # Transposed with respect to nn.Linear: gradients then have the layout of the parameter, which saves a copy.
        self.weight = nn.Parameter(torch.empty(members, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, out_features).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias[:, None], x, self.weight)

    def extra_repr(self) -> str:
        return f"members={self.weight.shape[0]}, in_features={self.in_features}, out_features={self.out_features}"


class StackedMIRNet(MIRNet):
    """``members`` independent :class:`MIRNet` of one shape, each with its own parameters and its own bags.

    Small networks are dominated by call overhead; here one batched product per layer and one pooling call per level
    serve all members. With losses summed over members and an element-wise optimizer (SGD, Adam) the result is that of
    training them separately.

    Args:
        members: number of networks.
        in_features: width of an instance.
        args: further arguments of :class:`MIRNet`.
        kwargs: further arguments of :class:`MIRNet`.
    """

    def __init__(self, members: int, in_features: int, *args: Any, **kwargs: Any):
        self._members = members
        super().__init__(in_features, *args, **kwargs)

    def _linear(self, in_features, out_features):
        return StackedLinear(self._members, in_features, out_features)

    def _pooling(self, pooling, features, num_iters, backend):
        pool = make_pooling(pooling, features, num_iters, backend)
        if isinstance(pool, AttentionPool):
            for name, layer in list(pool.named_children()):
                setattr(pool, name, self._linear(layer.in_features, layer.out_features))
        elif any(True for _ in pool.parameters()):
            raise ValueError(f"pooling: {type(pool).__name__} has parameters and no stacked form")
        return pool

    @property
    def config(self) -> dict[str, Any]:
        raise TypeError("StackedMIRNet has no file format; load a member's state dict into a MIRNet and save that")

    def reset_member(self, member: int, generator: torch.Generator) -> None:
        """Initializes one member's parameters from ``generator``, independently of the other members."""
        layer: Any
        with torch.no_grad():
            for layers, gain in ((self.layers, 2.0), (self.heads, 1.0)):
                for layer in layers:
                    layer.weight[member].normal_(0, (gain / layer.in_features) ** 0.5, generator=generator)
                    layer.bias[member].zero_()
            for pool in self.pools:
                for layer in pool.children():
                    for parameter in layer.parameters():
                        bound = layer.in_features**-0.5
                        parameter[member].uniform_(-bound, bound, generator=generator)

    def member(self, member: int) -> dict[str, torch.Tensor]:
        """State dict of one member, for a :class:`MIRNet` with the same arguments."""
        # Weights are (in, out) here and (out, in) in nn.Linear.
        return {name: value[member].clone().t().contiguous() for name, value in self.state_dict().items()}

    def forward(  # type: ignore[override]  # the bags of a member are always packed
        self, instances: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> MIROutput:
        """Classifies the bags of all members.

        Args:
            instances: ``(members, n, in_features)``.
            cu_seqlens: ``(members, B + 1)``: bag b of member k is
                ``instances[k, cu_seqlens[k, b] : cu_seqlens[k, b + 1]]``. Every row starts at 0; instances after its
                end are padding and must be finite. Members with fewer bags have empty ones.

        Returns:
            :class:`MIROutput` with ``(members, B)`` in place of B, without instance weights (see :meth:`member`).
        """
        members, n, _ = instances.shape
        if members != self._members or cu_seqlens.shape[0] != members:
            raise ValueError(
                f"instances, cu_seqlens: expected {self._members} members, got {members} and {cu_seqlens.shape[0]}"
            )
        bags = BagView(instances.flatten(0, 1), cu_seqlens=self.flat_cu_seqlens(cu_seqlens, n))
        return self._levels(instances, bags, return_weights=False)

    @staticmethod
    def flat_cu_seqlens(cu_seqlens: torch.Tensor, n: int) -> torch.Tensor:
        """Offsets of all members' bags, ``(members * (B + 1) + 1,)``; the padding of a member is its last bag.

        With it, one pooling call serves all members without gathering rows.
        """
        starts = torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device)[:, None] * n
        flat = (cu_seqlens + starts).flatten()
        return torch.cat([flat, flat.new_tensor([cu_seqlens.shape[0] * n])])

    def _pool(self, pool, x, bags, return_weights):
        members, _, features = x.shape
        if isinstance(pool, AttentionPool):
            bag, _ = pool.pool_scored(bags.with_instances(x.flatten(0, 1)), pool.scores(x).flatten())
        else:
            bag, _ = super()._pool(pool, x.flatten(0, 1), bags, return_weights)
        return bag.view(members, -1, features)[:, :-1], None

    def _score_instances(self, head, f, X, bags):
        members, n, features = f.shape
        X = torch.cat([X, X.new_zeros(members, 1, features)], 1).flatten(0, 1)  # the last one for the padding
        z = head(f + bags.spread(X).view(members, n, features))
        log_p, log_not_p = noisy_or_of(bags.with_instances(z.flatten(0, 1)))
        return (log_p - log_not_p).view(members, -1, 1)[:, :-1], z
