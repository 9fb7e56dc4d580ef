"""Adjust pooling in plain PyTorch, written as the equations of the paper: the specification of every backend.

Differentiable to any order by autograd, whose backward pass moves 20 to 40 times the bytes of the fused backends.
"""

import functools

import torch

from amil_fast.ops.bags import accumulation_dtype, bag_index, bag_mask, without_autocast


def squash(sigma: torch.Tensor) -> torch.Tensor:
    """``‖σ‖² / (1 + ‖σ‖²) · σ / ‖σ‖`` (Eq. 3) over the last axis, computed as ``σ · ‖σ‖ / (1 + ‖σ‖²)``.

    Value and gradient are 0 at 0."""
    n_squared = sigma.square().sum(-1, keepdim=True)
    zero = n_squared == 0
    n = torch.where(zero, 1.0, n_squared).sqrt()
    return sigma * torch.where(zero, 0.0, n / (1 + n_squared))


def adjust_pool_reference(instances, mask=None, *, lengths=None, cu_seqlens=None, num_iters=3, detach_routing=False):
    """Returns ``(bag, weights)`` of bags in the canonical form of :func:`amil_fast.ops.bags.check_bags`."""
    with without_autocast(instances.device.type):
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
        w = _softmax_padded(b, mask)  # (4)
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
        w = _softmax_packed(b, index, num_bags + 1)  # (4)
        weighted = w[:, None] * (f if t == T else f_routing)
        sigma = f.new_zeros(num_bags + 1, f.shape[1]).index_add(0, index, weighted)  # (2)
        s = squash(sigma)  # (3)
        if t < T:
            b = b + (f_routing * s[index]).sum(-1)  # (5)
    return s[:num_bags], torch.where(real, w, 0)


def _softmax_padded(b, mask):
    if mask is None:
        return torch.softmax(b, dim=1)
    # The weights of an empty bag are uniform before they become 0.
    return torch.where(mask, torch.softmax(b.masked_fill(~mask, torch.finfo(b.dtype).min), dim=1), 0)


def _softmax_packed(b, index, num_bags):
    b_max = b.new_full((num_bags,), -torch.inf).scatter_reduce(0, index, b.detach(), "amax")
    e = torch.exp(b - b_max[index])
    return e / e.new_zeros(num_bags).index_add(0, index, e)[index]


def adjust_pool_jvp(instances, tangent, mask=None, *, lengths=None, cu_seqlens=None, num_iters=3, detach_routing=False):
    """Derivatives of ``(bag, weights)`` along ``tangent``, which has the shape of ``instances``: forward-mode AD.

    The equations of the reference, each followed by its differential.
    """
    with without_autocast(instances.device.type):
        dtype = accumulation_dtype(instances.dtype)
        f, df = instances.to(dtype), tangent.to(dtype)
        if cu_seqlens is None:
            mask = bag_mask(instances, mask, lengths)
            if mask is not None:
                f, df = (torch.where(mask[:, :, None], x, 0) for x in (f, df))
            softmax = functools.partial(_softmax_padded, mask=mask)

            def bag_sum(x):  # (B, N, ...) -> (B, ...)
                return x.sum(1)

            def spread(x):  # (B, ...) -> (B, 1, ...)
                return x[:, None]
        else:
            # Rows after the last bag form one more bag of zeros, as in _pool_packed.
            index, num_bags = bag_index(instances, cu_seqlens), cu_seqlens.shape[0]
            real = index < num_bags - 1
            f, df = (torch.where(real[:, None], x, 0) for x in (f, df))
            softmax = functools.partial(_softmax_packed, index=index, num_bags=num_bags)

            def bag_sum(x):  # (total, ...) -> (B + 1, ...)
                return x.new_zeros(num_bags, *x.shape[1:]).index_add(0, index, x)

            def spread(x):  # (B + 1, ...) -> (total, ...)
                return x[index]

        f_routing, df_routing = (f.detach(), torch.zeros_like(df)) if detach_routing else (f, df)
        b = db = f.new_zeros(f.shape[:-1])
        for t in range(1, num_iters + 1):
            g, dg = (f, df) if t == num_iters else (f_routing, df_routing)
            w = softmax(b)  # (4)
            dw = w * (db - spread(bag_sum(w * db)))
            sigma = bag_sum(w[..., None] * g)  # (2)
            d_sigma = bag_sum(dw[..., None] * g + w[..., None] * dg)
            s, ds = _squash_jvp(sigma, d_sigma)  # (3)
            if t < num_iters:
                b = b + (f_routing * spread(s)).sum(-1)  # (5)
                db = db + (f_routing * spread(ds) + df_routing * spread(s)).sum(-1)
        if cu_seqlens is not None:
            ds = ds[:-1]
        return ds.to(instances.dtype), dw


def _squash_jvp(sigma, d_sigma):
    """``squash(sigma)`` and its derivative along ``d_sigma``, 0 at 0."""
    n_squared = sigma.square().sum(-1, keepdim=True)
    zero = n_squared == 0
    n = torch.where(zero, 1.0, n_squared).sqrt()
    factor = torch.where(zero, 0.0, n / (1 + n_squared))
    dn = (sigma * d_sigma).sum(-1, keepdim=True) / n
    d_factor = torch.where(zero, 0.0, (1 - n_squared) / (1 + n_squared).square() * dn)
    return sigma * factor, d_sigma * factor + sigma * d_factor
