"""Validated bags, with sums, maxima and softmaxes over the instances of padded and packed bags alike."""

from __future__ import annotations

import torch

from amil_fast.ops.bags import accumulation_dtype, bag_index, bag_mask, check_bag_values, check_bags, check_max_seqlen


class BagView:
    """Bags in canonical form, with the reductions over instances that the poolings are written in.

    A network validates its input once, by constructing a view; :meth:`with_instances` then passes the same bags with
    other instances from layer to layer.

    Args:
        instances: ``(B, N, D)``, ``(total, D)`` or a jagged nested tensor, as for :func:`amil_fast.ops.adjust_pool`.
        mask: ``(B, N)``, nonzero for instances.
        lengths: ``(B,)``.
        cu_seqlens: ``(B + 1,)``.

    Attributes:
        instances: ``(B, N, D)`` or ``(total, D)``; padding holds arbitrary values.
        mask: bool ``(B, N)`` of padded bags; None if there is no padding.
        cu_seqlens: ``(B + 1,)`` of packed bags, otherwise None.
        max_seqlen: upper bound of the lengths of packed bags, if a nested tensor carries it, otherwise None.
        num_bags: B.

    Raises:
        TypeError, ValueError: as :func:`amil_fast.ops.adjust_pool`.
    """

    def __init__(
        self,
        instances: torch.Tensor,
        mask: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ):
        self.max_seqlen = check_max_seqlen(instances, cu_seqlens, None)
        instances, mask, lengths, cu_seqlens = check_bags(instances, mask, lengths, cu_seqlens)
        self._all_in_bags = False  # known without synchronization: no packed row follows the last bag
        if instances.device.type == "cpu" and not torch.compiler.is_compiling():
            check_bag_values(instances, lengths, cu_seqlens)
            self._all_in_bags = cu_seqlens is not None and int(cu_seqlens[-1]) == instances.shape[0]
        self.instances = instances
        self._x: torch.Tensor | None = None
        self._bag_indices: torch.Tensor | None = None
        self.cu_seqlens = cu_seqlens
        if cu_seqlens is not None:
            self.mask = None
            self.num_bags = cu_seqlens.shape[0] - 1
        else:
            self.mask = bag_mask(instances, mask, lengths)
            self.num_bags = instances.shape[0]

    def with_instances(self, instances: torch.Tensor) -> BagView:
        """View of the same bags with other instances: ``(B, N, D')`` or ``(total, D')``, not validated."""
        view = BagView.__new__(BagView)
        view.instances = instances
        view._x = None
        view.mask, view.cu_seqlens, view.num_bags = self.mask, self.cu_seqlens, self.num_bags
        view.max_seqlen, view._all_in_bags = self.max_seqlen, self._all_in_bags
        view._bag_indices = None if self.cu_seqlens is None else self.bag_indices
        return view

    @property
    def x(self) -> torch.Tensor:
        """Instances with zeros in the padding, so that its values reach neither results nor gradients."""
        if self._x is None:  # not functools.cached_property, which torch.compile cannot trace on Python 3.11
            if self.cu_seqlens is None:
                mask = self.mask
            else:
                mask = None if self._all_in_bags else self.bag_indices < self.num_bags
            self._x = self.instances if mask is None else torch.where(mask[..., None], self.instances, 0)
        return self._x

    @property
    def bag_indices(self) -> torch.Tensor:
        """Bag index of every row of packed bags: int64 ``(total,)``, ``num_bags`` after the last bag.

        Lazy, since adjust pooling does not need it.
        """
        if self._bag_indices is None:
            self._bag_indices = bag_index(self.instances, self.cu_seqlens)
        return self._bag_indices

    def wide(self) -> torch.Tensor:
        """:attr:`x` in the accumulation dtype: float64 for float64, float32 otherwise."""
        return self.x.to(accumulation_dtype(self.x.dtype))

    def sizes(self) -> torch.Tensor:
        """Number of instances per bag: int64 ``(B,)``."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.diff().long()
        if self.mask is not None:
            return self.mask.sum(1)
        return torch.full((self.num_bags,), self.instances.shape[1], device=self.instances.device)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum per bag: ``(..., D)`` -> ``(B, D)``. The padding of ``values`` must hold 0."""
        if self.cu_seqlens is None:
            return values.sum(1)
        sums = values.new_zeros(self.num_bags + 1, *values.shape[1:]).index_add(0, self.bag_indices, values)
        return sums[: self.num_bags]

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Maximum per bag: ``(..., D)`` -> ``(B, D)``, 0 for empty bags. Ties share the gradient equally."""
        if self.cu_seqlens is None:
            if values.shape[1] == 0:
                return values.new_zeros(self.num_bags, *values.shape[2:])
            if self.mask is None:
                return values.amax(1)
            largest = values.masked_fill(~self.mask[:, :, None], -torch.inf).amax(1)
            return torch.where(self.mask.any(1)[:, None], largest, 0)
        zeros = values.new_zeros(self.num_bags + 1, *values.shape[1:])
        index = self.bag_indices[:, None].expand_as(values)
        return zeros.scatter_reduce(0, index, values, "amax", include_self=False)[: self.num_bags]

    def softmax(self, scores: torch.Tensor) -> torch.Tensor:
        """Softmax over the instances of every bag, 0 in the padding: ``(B, N)`` or ``(total,)`` -> the same."""
        if self.cu_seqlens is None:
            if self.mask is None:
                return torch.softmax(scores, 1)
            # The weights of an empty bag are uniform before the second line sets them to 0.
            scores = scores.masked_fill(~self.mask, torch.finfo(scores.dtype).min)
            return torch.where(self.mask, torch.softmax(scores, 1), 0)
        e = torch.exp(scores - self.spread(self.max(scores.detach()[:, None]))[:, 0])
        if self._all_in_bags:
            return e / self.spread(self.sum(e))
        real = self.bag_indices < self.num_bags
        return torch.where(real, e, 0) / torch.where(real, self.spread(self.sum(e)), 1)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Repeats a value per bag for each of its instances: ``(B, ...)`` -> ``(B, 1, ...)`` or ``(total, ...)``.

        Rows after the last packed bag get 0.
        """
        if self.cu_seqlens is None:
            return values[:, None]
        return torch.cat([values, values.new_zeros(1, *values.shape[1:])])[self.bag_indices]

    def weighted_sum(self, weights: torch.Tensor) -> torch.Tensor:
        """``Σ_i w_i x_i`` in the accumulation dtype: ``(B, D)``."""
        x = self.wide()
        if self.cu_seqlens is None:
            return torch.einsum("bn,bnd->bd", weights, x)
        return self.sum(weights[:, None] * x)
