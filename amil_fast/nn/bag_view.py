"""Sums, maxima and softmaxes over the instances of bags, for padded and packed bags alike."""

import torch

from amil_fast.ops.bags import accumulation_dtype, bag_index, bag_mask, check_bag_values, check_bags


class BagView:
    """One call's bags in canonical form, with the reductions over instances that the poolings are written in.

    Attributes:
        x: the instances, ``(B, N, D)`` or ``(total, D)``, in their own dtype; where a mask marks padding it is replaced
            by zeros, so that whatever it held reaches neither values nor gradients.
        mask: bool ``(B, N)`` of padded bags, or None where every instance is real.
        cu_seqlens: ``(B + 1,)`` of packed bags, else None.
        count: number of bags B.
    """

    def __init__(self, instances, mask=None, lengths=None, cu_seqlens=None):
        instances, mask, lengths, cu_seqlens = check_bags(instances, mask, lengths, cu_seqlens)
        if instances.device.type == "cpu" and not torch.compiler.is_compiling():
            check_bag_values(instances, lengths, cu_seqlens)
        self.cu_seqlens = cu_seqlens
        if cu_seqlens is not None:
            self.mask = None
            self.count = cu_seqlens.shape[0] - 1
            self._index = bag_index(instances, cu_seqlens)
        else:
            self.mask = bag_mask(instances, mask, lengths)
            self.count = instances.shape[0]
            self._index = None
            if self.mask is not None:
                instances = torch.where(self.mask[:, :, None], instances, 0)
        self.x = instances

    def wide(self):
        """The instances in the accumulation dtype: float64 for float64, float32 for all others."""
        return self.x.to(accumulation_dtype(self.x.dtype))

    def sizes(self):
        """Number of real instances per bag: int64 ``(B,)``."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.diff().long()
        if self.mask is not None:
            return self.mask.sum(1)
        return torch.full((self.count,), self.x.shape[1], device=self.x.device)

    def sum(self, values):
        """``values`` shaped like the instances, ``(..., D)`` -> ``(B, D)``. Padding must hold 0."""
        if self._index is None:
            return values.sum(1)
        return values.new_zeros(self.count, *values.shape[1:]).index_add(0, self._index, values)

    def max(self, values):
        """The largest value per bag, ``(..., D)`` -> ``(B, D)``, 0 for empty bags. Ties share the gradient evenly."""
        if self._index is None:
            if values.shape[1] == 0:
                return values.new_zeros(self.count, *values.shape[2:])
            if self.mask is None:
                return values.amax(1)
            largest = values.masked_fill(~self.mask[:, :, None], -torch.inf).amax(1)
            return torch.where(self.mask.any(1)[:, None], largest, 0)
        zeros = values.new_zeros(self.count, *values.shape[1:])
        index = self._index[:, None].expand_as(values)
        return zeros.scatter_reduce(0, index, values, "amax", include_self=False)

    def softmax(self, scores):
        """Softmax over the instances of every bag, 0 where masked: ``(B, N)`` or ``(total,)`` -> the same."""
        if self._index is None:
            if self.mask is None:
                return torch.softmax(scores, 1)
            # An empty bag's weights are uniform for a moment, then 0.
            scores = scores.masked_fill(~self.mask, torch.finfo(scores.dtype).min)
            return torch.where(self.mask, torch.softmax(scores, 1), 0)
        e = torch.exp(scores - self.spread(self.max(scores.detach()[:, None]))[:, 0])
        return e / self.spread(self.sum(e))

    def spread(self, values):
        """Repeats one value per bag, ``(B, ...)``, for each of its instances: ``(B, 1, ...)`` or ``(total, ...)``."""
        return values[:, None] if self._index is None else values[self._index]

    def weighted_sum(self, weights):
        """``Σ_i w_i x_i`` in the accumulation dtype: ``(B, D)``."""
        x = self.wide()
        if self._index is None:
            return torch.einsum("bn,bnd->bd", weights, x)
        return self.sum(weights[:, None] * x)
