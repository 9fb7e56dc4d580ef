"""Adjust pooling in plain PyTorch, written as the equations of the paper: the specification of every backend.

Differentiable to any order by autograd, whose backward pass moves 20 to 40 times the bytes of the fused backends.
"""

import torch

from amil_fast.ops.bags import accumulation_dtype, bag_index, bag_mask


def squash(sigma: torch.Tensor) -> torch.Tensor:
    """``‖σ‖² / (1 + ‖σ‖²) · σ / ‖σ‖`` (Eq. 3) over the last axis, computed as ``σ · ‖σ‖ / (1 + ‖σ‖²)``.

    Value and gradient are 0 at 0."""
    n_squared = sigma.square().sum(-1, keepdim=True)
    zero = n_squared == 0
    n = torch.where(zero, 1.0, n_squared).sqrt()
    return sigma * torch.where(zero, 0.0, n / (1 + n_squared))


def adjust_pool_reference(instances, mask=None, *, lengths=None, cu_seqlens=None, num_iters=3, detach_routing=False):
    """Returns ``(bag, weights)`` of bags in the canonical form of :func:`amil_fast.ops.bags.check_bags`."""
    with torch.autocast(instances.device.type, enabled=False):
        f = instances.to(accumulation_dtype(instances.dtype))
        if cu_seqlens is not None:
            s, w = _pool_packed(f, bag_index(instances, cu_seqlens), cu_seqlens.shape[0] - 1, num_iters, detach_routing)
        else:
            s, w = _pool_padded(f, bag_mask(instances, mask, lengths), num_iters, detach_routing)
        return s.to(instances.dtype), w


def _pool_padded(f, mask, T, detach_routing):
    """``f (B, N, D)``, ``mask (B, N)`` or None -> ``s (B, D)``, ``w (B, N)``."""
    if mask is not None:
        f = torch.where(mask[:, :, None], f, 0)  # not a product, since padding can hold NaN
    f_routing = f.detach() if detach_routing else f
    b = f.new_zeros(f.shape[:2])
    for t in range(1, T + 1):
        if mask is not None:  # the weights of an empty bag: uniform, then 0
            w = torch.where(mask, torch.softmax(b.masked_fill(~mask, torch.finfo(b.dtype).min), dim=1), 0)
        else:
            w = torch.softmax(b, dim=1)  # (4)
        sigma = torch.einsum("bn,bnd->bd", w, f if t == T else f_routing)  # (2)
        s = squash(sigma)  # (3)
        if t < T:
            b = b + torch.einsum("bnd,bd->bn", f_routing, s)  # (5)
    return s, w


def _pool_packed(f, index, num_bags, T, detach_routing):
    """``f (total, D)``, ``index (total,)`` -> ``s (num_bags, D)``, ``w (total,)``, with segment sums.

    Rows after the last bag have index ``num_bags``; they form one more bag of zeros, whose result is dropped.
    """
    real = index < num_bags
    f = torch.where(real[:, None], f, 0)  # not a product, since these rows can hold NaN
    f_routing = f.detach() if detach_routing else f
    b = f.new_zeros(f.shape[0])
    for t in range(1, T + 1):
        b_max = b.new_full((num_bags + 1,), -torch.inf).scatter_reduce(0, index, b.detach(), "amax")
        e = torch.exp(b - b_max[index])
        w = e / e.new_zeros(num_bags + 1).index_add(0, index, e)[index]  # (4)
        sigma = f.new_zeros(num_bags + 1, f.shape[1]).index_add(
            0, index, w[:, None] * (f if t == T else f_routing)
        )  # (2)
        s = squash(sigma)  # (3)
        if t < T:
            b = b + (f_routing * s[index]).sum(-1)  # (5)
    return s[:num_bags], torch.where(real, w, 0)
