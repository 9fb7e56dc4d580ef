"""Passes over the rows of a chunk for 16-bit instances: products on tensor cores.

Counterparts of ``attend``, ``route`` and ``write_gradient``, with the same results. Split vectors: adjust_pool_dot.py.
"""

import triton
import triton.language as tl
from amil_fast.kernels.adjust_pool_common import LOWEST, row_mask
from amil_fast.kernels.adjust_pool_dot import (
    OUTER,
    OUTER_TERMS,
    WIDTH,
    add_product,
    column_sums,
    exp,
    in_shared_memory,
    magnitude,
    product,
    split_columns,
    split_two,
    split_unit,
)


@triton.jit
def tile_pointers(
    bag_ptr, n0, stride_n, D: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pointers (BLOCK_N, BLOCK_D) to rows n0, n0 + 1, ... of a bag; CONTIGUOUS: the rows are adjacent in memory."""
    n = tl.arange(0, BLOCK_N)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    if CONTIGUOUS:
        ptrs = bag_ptr + n0 * tl.full([], D, tl.int64) + (n * D + d)
    else:
        step = stride_n.to(tl.int64) * UNIT
        ptrs = bag_ptr + n0 * step + (n * step + d)
    return ptrs


@triton.jit
def attend_dot(
    bag_ptr, mask_ptr, logits_ptr, low, high, s_sum, store_logits, stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One pass over rows low..high of a bag, as ``attend``: ``(maximum, total, sigma)``: (1, 1), (1, 1), (1, BLOCK_D).

    The rows of a tile share the running maximum, since one product sums over all of them.
    """
    dtype: tl.constexpr = bag_ptr.dtype.element_ty
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    s_sum = tl.reshape(s_sum, [BLOCK_D])
    unit, inverse = split_unit(magnitude(s_sum, dtype), dtype)
    one, one_inverse = split_unit(1.0, dtype)
    columns = split_columns(s_sum * inverse, dtype)
    maximum = LOWEST
    total = tl.zeros([BLOCK_N], tl.float32)
    sigma = tl.zeros([BLOCK_D, WIDTH], tl.float32)
    for n0 in tl.range(low, high, BLOCK_N, num_stages=NUM_STAGES, disable_licm=True):
        valid = row_mask(mask_ptr, n0 + n, high)
        ptrs = tile_pointers(bag_ptr, n0, stride_n, D, UNIT, CONTIGUOUS, BLOCK_N, BLOCK_D)
        f = in_shared_memory(tl.load(ptrs, mask=valid[:, None] & (d < D)[None, :], other=0))
        logits = tl.sum(product(f, columns), 1) * unit
        if logits_ptr is not None:
            tl.store(logits_ptr + n0 + n, logits, mask=valid & store_logits)
        logits = tl.where(valid, logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 0))
        rescale = exp(maximum - new_maximum)
        e = exp(logits - new_maximum)
        total = total * rescale + e
        sigma = add_product(sigma * rescale, tl.trans(f), split_columns(e * one_inverse, dtype))
        maximum = new_maximum
    sigma = tl.sum(sigma, 1) * one
    zero = tl.zeros([1, 1], tl.float32)
    return zero + maximum, zero + tl.sum(total, 0), sigma[None, :]


@triton.jit
def route_dot(
    instances_ptr, mask_ptr, grad_weights_ptr, scalars_ptr, low, high, s_sum, e, shift, scale, center, last, beta_rows,
    stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One pass over rows low..high of a bag, as ``route``: ``h (1, BLOCK_D)`` and ``sum_i beta_i (1, 1)``."""
    dtype: tl.constexpr = instances_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    s_sum = tl.reshape(s_sum, [BLOCK_D])
    e = tl.reshape(e, [BLOCK_D])
    s_unit, s_inverse = split_unit(magnitude(s_sum, dtype), dtype)
    e_unit, e_inverse = split_unit(magnitude(e, dtype), dtype)
    columns = split_two(s_sum * s_inverse, e * e_inverse, dtype)
    h = tl.zeros([BLOCK_D, WIDTH], tl.float32)
    delta = tl.zeros([BLOCK_N], tl.float32)
    for n0 in tl.range(low, high, BLOCK_N, num_stages=NUM_STAGES, disable_licm=True):
        n = n0 + tl.arange(0, BLOCK_N)
        valid = row_mask(mask_ptr, n, high)
        ptrs = tile_pointers(instances_ptr, n0, stride_n, D, UNIT, CONTIGUOUS, BLOCK_N, BLOCK_D)
        f = in_shared_memory(tl.load(ptrs, mask=valid[:, None] & (d < D)[None, :], other=0))
        logits, x = column_sums(product(f, columns))
        w = tl.where(valid, exp(logits * s_unit - shift) * scale, 0)
        x = x * e_unit - center
        if grad_weights_ptr is not None:
            x += tl.load(grad_weights_ptr + n, mask=valid & last, other=0)
        beta = w * x
        delta += beta
        unit, inverse = split_unit(magnitude(beta, dtype), dtype)
        if dtype == tl.float16:  # the unit differs from tile to tile
            h += product(tl.trans(f), split_columns(beta * inverse, dtype)) * unit
        else:
            h = add_product(h, tl.trans(f), split_columns(beta, dtype))
        tl.store(scalars_ptr + n, w, mask=n < high)
        tl.store(scalars_ptr + beta_rows + n, beta, mask=n < high)
    zero = tl.zeros([1, 1], tl.float32)
    return tl.sum(h, 1)[None, :], zero + tl.sum(delta, 0)


@triton.jit
def gradient_vectors(vectors_ptr, first, terms, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Vectors of terms first ... as rows (OUTER, BLOCK_D) of an outer product: high, low, high part of each."""
    d = tl.arange(0, BLOCK_D)
    c = tl.arange(0, OUTER)
    term = first + c // 3
    used = (term < terms) & (c < 3 * OUTER_TERMS)
    y = tl.load(vectors_ptr + term[:, None] * D + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0)
    high = y.to(tl.bfloat16)
    low = (y - high.to(tl.float32)).to(tl.bfloat16)
    return tl.where((c % 3 == 1)[:, None], low, high)


@triton.jit
def gradient_numbers(scalars_ptr, deltas_ptr, n, valid, scale, first, T, num_rows):
    """Numbers per row of terms first ... as columns (BLOCK_N, OUTER) of an outer product: high, high, low part.

    ``w delta`` is subtracted from beta in float32, before rounding: where the weights are one-hot, they almost cancel.
    """
    terms = 2 * T - 1
    c = tl.arange(0, OUTER)
    term = first + c // 3
    used = (term < terms) & (c < 3 * OUTER_TERMS)
    ptrs = scalars_ptr + (term - 1)[None, :] * num_rows.to(tl.int64) + n[:, None]
    x = tl.load(ptrs, mask=valid[:, None] & (used & (term > 0))[None, :], other=0)
    is_beta = used & (term >= T)
    w = tl.load(ptrs - (T - 1) * num_rows.to(tl.int64), mask=valid[:, None] & is_beta[None, :], other=0)
    x -= w * tl.load(deltas_ptr + (term - T + 1), mask=is_beta, other=0)[None, :]
    x = tl.where(valid[:, None] & (term == 0)[None, :], scale, x)
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    return tl.where((c % 3 == 2)[None, :], low, high)


@triton.jit
def write_gradient_dot(
    grad_ptr, mask_ptr, scalars_ptr, vectors_ptr, deltas_ptr, scale, low, high, padding, T, num_rows,
    D: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of rows low..high of a bag as ``write_gradient``, and zeros to high..padding.

    A tile is the product of 2 T - 1 numbers per row with 2 T - 1 vectors, OUTER_TERMS at a time; ONE_BLOCK: these are
    all.
    """
    d = tl.arange(0, BLOCK_D)
    terms = 2 * T - 1
    if ONE_BLOCK:
        vectors = gradient_vectors(vectors_ptr, 0, terms, D, BLOCK_D)
    for n0 in tl.range(low, padding, BLOCK_N, disable_licm=True):
        n = n0 + tl.arange(0, BLOCK_N)
        valid = row_mask(mask_ptr, n, high)
        if ONE_BLOCK:
            grad = product(gradient_numbers(scalars_ptr, deltas_ptr, n, valid, scale, 0, T, num_rows), vectors)
        else:
            grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for first in tl.range(0, terms, OUTER_TERMS, disable_licm=True):
                numbers = gradient_numbers(scalars_ptr, deltas_ptr, n, valid, scale, first, T, num_rows)
                grad = add_product(grad, numbers, gradient_vectors(vectors_ptr, first, terms, D, BLOCK_D))
        ptrs = grad_ptr + n0 * tl.full([], D, tl.int64) + (tl.arange(0, BLOCK_N)[:, None] * D + d[None, :])
        tl.store(ptrs, grad.to(grad_ptr.dtype.element_ty), mask=(n < padding)[:, None] & (d < D)[None, :])
