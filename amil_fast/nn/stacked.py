"""Many small networks trained side by side: cross-validation folds, ensembles."""

import torch
from torch import nn

from amil_fast.nn.bag_view import BagView
from amil_fast.nn.losses import noisy_or
from amil_fast.nn.mirnet import MIRNet
from amil_fast.nn.pooling import AttentionPool, make_pooling


class StackedLinear(nn.Module):
    """``members`` linear layers in one batched product: ``(members, n, in_features) -> (members, n, out_features)``."""

    def __init__(self, members, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        bound = in_features**-0.5  # nn.Linear's initialization
        # Transposed against nn.Linear: a gradient then has its parameter's layout, which saves a copy a step.
        self.weight = nn.Parameter(torch.empty(members, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, out_features).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias[:, None], x, self.weight)

    def extra_repr(self):
        return f"members={self.weight.shape[0]}, in_features={self.in_features}, out_features={self.out_features}"


class StackedMIRNet(MIRNet):
    """``members`` independent :class:`MIRNet` of one shape, each with its own parameters and its own bags.

    Small networks spend their time in calls, not in arithmetic; here one batched product per layer and one pooling call
    per level serve all members. With losses that are summed over members and an element-wise optimizer (SGD, Adam) the
    result is that of training them one by one.

    The call ``net(instances, cu_seqlens) -> MIROutput`` takes ``instances (members, n, in_features)`` and
    ``cu_seqlens (members, B + 1)``: bag b of member k is ``instances[k, cu_seqlens[k, b] : cu_seqlens[k, b + 1]]``.
    Every ``cu_seqlens[k]`` starts at 0; rows after its end are padding and must be finite. A member with fewer bags
    than B gets empty ones. In the output each B is ``(members, B)``. Instance weights come from a member on its own
    (:meth:`member`).
    """

    def __init__(self, members, in_features, *args, **kwargs):
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

    def reset_member(self, member, generator):
        """Draws one member's parameters anew from ``generator``, whatever the other members do."""
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

    def member(self, member):
        """State of one member, to be loaded into a :class:`MIRNet` made with the same arguments."""
        # A linear layer's weight is (in, out) here and (out, in) there.
        return {name: value[member].clone().t().contiguous() for name, value in self.state_dict().items()}

    def forward(self, instances, cu_seqlens):
        members, n, _ = instances.shape
        if members != self._members or cu_seqlens.shape[0] != members:
            raise ValueError(
                f"instances, cu_seqlens: expected {self._members} members, got {members} and {cu_seqlens.shape[0]}"
            )
        return self._levels(instances, self.flat_cu_seqlens(cu_seqlens, n), return_weights=False)

    @staticmethod
    def flat_cu_seqlens(cu_seqlens, n):
        """All members' bags in one ``(members * (B + 1) + 1,)``: each member's padding becomes one more, last bag.

        So no rows need to be gathered for a pooling to serve all members in one call.
        """
        starts = torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device)[:, None] * n
        flat = (cu_seqlens + starts).flatten()
        return torch.cat([flat, flat.new_tensor([cu_seqlens.shape[0] * n])])

    def _pool(self, pool, x, cu_seqlens):
        members, _, features = x.shape
        rows = x.flatten(0, 1)
        if isinstance(pool, AttentionPool):
            bag, _ = pool.pool_scored(BagView(rows, cu_seqlens=cu_seqlens), pool.scores(x).flatten())
        else:
            bag = pool(rows, cu_seqlens=cu_seqlens)
        return bag.view(members, -1, features)[:, :-1]

    def _score_instances(self, head, f, X, cu_seqlens):
        members, n, features = f.shape
        X = torch.cat([X, X.new_zeros(members, 1, features)], 1).flatten(0, 1)  # one for the padding
        z = head(f + BagView(f.flatten(0, 1), cu_seqlens=cu_seqlens).spread(X).view(members, n, features))
        log_p, log_not_p = noisy_or(z.flatten(0, 1), cu_seqlens=cu_seqlens)
        return (log_p - log_not_p).view(members, -1, 1)[:, :-1], z
