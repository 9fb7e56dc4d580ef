"""On-chip kernels of adjust pooling for 16-bit instances: products on tensor cores, one bag per program.

Notation and equations: adjust_pool_common.py, adjust_pool_forward.py and adjust_pool_backward.py; split vectors:
adjust_pool_dot.py.
"""

import triton
import triton.language as tl
from amil_fast.kernels.adjust_pool_common import (
    LOWEST,
    bag_extent,
    bag_pointer,
    fill,
    row_mask,
    vector_squash,
    vector_squash_backward,
    zero_rest,
)
from amil_fast.kernels.adjust_pool_dot import (
    column,
    column_sums,
    exp,
    in_shared_memory,
    magnitude,
    outer_product,
    product,
    split_columns,
    split_two,
    split_unit,
)


@triton.jit
def load_bag(
    instances_ptr, mask_ptr, cu_seqlens_ptr, b, start, length, stride_b, stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Instances ``(ROWS, BLOCK_D)`` of bag b, 0 where masked, and the mask of its instances ``(ROWS,)``."""
    n = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    if FULL:
        valid = n >= 0
    else:
        valid = row_mask(mask_ptr if mask_ptr is None else mask_ptr + start, n, length)
    ptrs = bag_pointer(instances_ptr, cu_seqlens_ptr, b, start, stride_b, stride_n, UNIT)
    if CONTIGUOUS:
        ptrs += n[:, None] * D + d[None, :]
    else:
        ptrs += n[:, None] * (stride_n.to(tl.int64) * UNIT) + d[None, :]
    if FULL and D == BLOCK_D:
        f = tl.load(ptrs, eviction_policy="evict_first")
    else:
        f = tl.load(ptrs, mask=valid[:, None] & (d < D)[None, :], other=0, eviction_policy="evict_first")
    return in_shared_memory(f), valid


@triton.jit
def weighted_sum(f, w, unit, inverse):
    """``sum_i w_i f_i (BLOCK_D,)`` of the instances ``(ROWS, BLOCK_D)``; units: :func:`split_unit`."""
    return tl.sum(product(tl.trans(f), split_columns(w * inverse, f.dtype)), 1) * unit


@triton.jit
def pool_bag(
    instances_ptr, mask_ptr, cu_seqlens_ptr, bag_ptr, weights_ptr, sigma_ptr, softmax_stats_ptr,
    b, start, length, stored, stride_b, stride_n,
    T: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pools bag b of at most ROWS instances; see :func:`adjust_pool_forward_on_chip_dot_kernel`."""
    d = tl.arange(0, BLOCK_D)
    f, valid = load_bag(
        instances_ptr,
        mask_ptr,
        cu_seqlens_ptr,
        b,
        start,
        length,
        stride_b,
        stride_n,
        D,
        UNIT,
        CONTIGUOUS,
        FULL,
        ROWS,
        BLOCK_D,
    )
    one, one_inverse = split_unit(1.0, f.dtype)  # of the exponentials, which are at most 1
    sigma_ptrs = sigma_ptr + b.to(tl.int64) * T * D + d
    stats_ptr = softmax_stats_ptr + b.to(tl.int64) * T * 2

    e = tl.where(valid, 1.0, 0.0)  # exp(logits - shift); the first logits are 0
    shift = 0.0
    s = tl.zeros([BLOCK_D], tl.float32)
    s_sum = s
    scale = 0.0
    for t in tl.static_range(T):
        if t == 0:
            sigma = tl.sum(product(tl.trans(f), column(e, f.dtype)), 1)
        else:
            unit, inverse = split_unit(magnitude(s_sum, f.dtype), f.dtype)
            logits = tl.sum(product(f, split_columns(s_sum * inverse, f.dtype)), 1) * unit
            logits = tl.where(valid, logits, float("-inf"))
            shift = tl.max(logits, 0)
            if not FULL:
                shift = tl.maximum(shift, LOWEST)
            e = exp(logits - shift)
            sigma = weighted_sum(f, e, one, one_inverse)
        total = tl.sum(e, 0)
        scale = 1 / total
        if not FULL:
            scale = tl.where(total == 0, 0, scale)
        sigma *= scale
        s = vector_squash(sigma)
        s_sum += s
        tl.store(sigma_ptrs + t * D, sigma, mask=d < D)
        tl.store(stats_ptr + t * 2, shift)
        tl.store(stats_ptr + t * 2 + 1, scale)
    tl.store(bag_ptr + b.to(tl.int64) * D + d, s, mask=d < D)
    if weights_ptr is not None:
        n = tl.arange(0, ROWS)
        tl.store(weights_ptr + start + n, e * scale, mask=n < stored)


@triton.jit(do_not_specialize=["B", "N", "stride_b", "stride_n"])
def adjust_pool_forward_on_chip_dot_kernel(
    instances_ptr, mask_ptr, lengths_ptr, cu_seqlens_ptr,
    bag_ptr, weights_ptr, sigma_ptr, softmax_stats_ptr,
    B, N, stride_b, stride_n,
    T: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, FULL: tl.constexpr,
    HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """One program pools one bag of at most BLOCK_N 16-bit instances, which stay on chip after a single read.

    Bytes moved: reads the instances once; writes T (D + 2) numbers per bag. Accumulates in float32. HALF: bags of at
    most half the rows take a tile of half the size. Packed bags longer than BLOCK_N are handled by the chunk kernel,
    or, if there is none (ALONE), pool to NaN: they exceed max_seqlen.
    Asserted by the launcher: unit stride along D; BLOCK_D >= D; BLOCK_N >= N for padded bags; strides in units of UNIT;
    CONTIGUOUS: adjacent rows; FULL: every bag has BLOCK_N instances.
    """
    b = tl.program_id(0)
    start, length = bag_extent(lengths_ptr, cu_seqlens_ptr, b, N)
    stored = length if cu_seqlens_ptr is not None else N
    small = length < 0
    if HALF:
        small = length <= BLOCK_N // 2
        if small:
            pool_bag(
                instances_ptr, mask_ptr, cu_seqlens_ptr, bag_ptr, weights_ptr, sigma_ptr, softmax_stats_ptr,
                b, start, length, stored, stride_b, stride_n, T, D, UNIT, CONTIGUOUS, FULL, BLOCK_N // 2, BLOCK_D,
            )  # fmt: skip
    if (length <= BLOCK_N) & (small == 0):
        pool_bag(
            instances_ptr, mask_ptr, cu_seqlens_ptr, bag_ptr, weights_ptr, sigma_ptr, softmax_stats_ptr,
            b, start, length, stored, stride_b, stride_n, T, D, UNIT, CONTIGUOUS, FULL, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if ALONE:
        if length > BLOCK_N:
            fill(bag_ptr, b.to(tl.int64) * D, b.to(tl.int64) * D + D, float("nan"), 1024)
    if weights_ptr is not None:
        if cu_seqlens_ptr is None:
            if HALF:  # the padding that the smaller tile leaves
                covered = tl.where(length <= BLOCK_N // 2, tl.minimum(N, BLOCK_N // 2), N)
                fill(weights_ptr, start + covered, start + N, 0, 64)
        elif ALONE:
            zero_rest(weights_ptr, cu_seqlens_ptr, B, N, 1)


@triton.jit
def differentiate_bag(
    grad_bag_ptr, grad_weights_ptr, instances_ptr, mask_ptr, cu_seqlens_ptr, sigma_ptr, softmax_stats_ptr, grad_ptr,
    b, start, length, stored, stride_b, stride_n,
    T: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of bag b of at most ROWS instances; see :func:`adjust_pool_backward_on_chip_dot_kernel`."""
    n = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    f, valid = load_bag(
        instances_ptr,
        mask_ptr,
        cu_seqlens_ptr,
        b,
        start,
        length,
        stride_b,
        stride_n,
        D,
        UNIT,
        CONTIGUOUS,
        FULL,
        ROWS,
        BLOCK_D,
    )
    sigma_ptrs = sigma_ptr + b.to(tl.int64) * T * D + d
    stats_ptr = softmax_stats_ptr + b.to(tl.int64) * T * 2

    g = tl.zeros([BLOCK_D], tl.float32)
    if grad_bag_ptr is not None:
        g = tl.load(grad_bag_ptr + b.to(tl.int64) * D + d, mask=d < D, other=0).to(tl.float32)
    s_sum = tl.zeros([BLOCK_D], tl.float32)
    for t in tl.static_range(T - 1):
        s_sum += vector_squash(tl.load(sigma_ptrs + t * D, mask=d < D, other=0))
    _, e = vector_squash_backward(tl.load(sigma_ptrs + (T - 1) * D, mask=d < D, other=0), g)

    rows = ()
    vectors = ()
    h = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(T - 1):
        t = T - 1 - k
        unit, inverse = split_unit(magnitude(s_sum, f.dtype), f.dtype)
        e_unit, e_inverse = split_unit(magnitude(e, f.dtype), f.dtype)
        logits, x = column_sums(product(f, split_two(s_sum * inverse, e * e_inverse, f.dtype)))
        w = tl.where(valid, exp(logits * unit - tl.load(stats_ptr + t * 2)) * tl.load(stats_ptr + t * 2 + 1), 0)
        x = x * e_unit
        if grad_weights_ptr is not None:
            if k == 0:
                x += tl.load(grad_weights_ptr + start + n, mask=valid, other=0)
        beta = w * (x - tl.sum(w * x, 0))
        rows = rows + (w, beta)
        vectors = vectors + (e, s_sum)
        unit, inverse = split_unit(magnitude(beta, f.dtype), f.dtype)
        h += weighted_sum(f, beta, unit, inverse)
        s, e = vector_squash_backward(tl.load(sigma_ptrs + (t - 1) * D, mask=d < D, other=0), h)
        s_sum -= s
    w = tl.where(valid, tl.load(stats_ptr + 1), 0)  # the first logits are 0
    grad = outer_product(rows + (w,), vectors + (e,))
    ptrs = grad_ptr + start * D + (n[:, None] * D + d[None, :])
    tl.store(ptrs, grad.to(grad_ptr.dtype.element_ty), mask=(n < stored)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["B", "N", "stride_b", "stride_n"])
def adjust_pool_backward_on_chip_dot_kernel(
    grad_bag_ptr, grad_weights_ptr, instances_ptr, mask_ptr, lengths_ptr, cu_seqlens_ptr, sigma_ptr, softmax_stats_ptr,
    grad_ptr,
    B, N, stride_b, stride_n,
    T: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, FULL: tl.constexpr,
    HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """One program computes the gradient of one bag of at most BLOCK_N 16-bit instances, which stay on chip.

    Bytes moved: reads the instances once, and sigma twice (from cache); writes their gradient once, 0 where masked.
    Accumulates in float32; the gradient is one product, of 2 T - 1 numbers per instance with as many vectors. HALF and
    ALONE: as in the forward kernel; the gradient of bags that exceed max_seqlen is NaN.
    Asserted by the launcher: as in the forward kernel; contiguous gradients; T > 1.
    """
    b = tl.program_id(0)
    start, length = bag_extent(lengths_ptr, cu_seqlens_ptr, b, N)
    stored = length if cu_seqlens_ptr is not None else N
    small = length < 0
    if HALF:
        small = length <= BLOCK_N // 2
        if small:
            differentiate_bag(
                grad_bag_ptr, grad_weights_ptr, instances_ptr, mask_ptr, cu_seqlens_ptr, sigma_ptr, softmax_stats_ptr,
                grad_ptr, b, start, length, stored, stride_b, stride_n, T, D, UNIT, CONTIGUOUS, FULL, BLOCK_N // 2,
                BLOCK_D,
            )  # fmt: skip
            if cu_seqlens_ptr is None:  # the padding that the smaller tile leaves
                fill(grad_ptr, (start + tl.minimum(N, BLOCK_N // 2)) * D, (start + N) * D, 0, 1024)
    if (length <= BLOCK_N) & (small == 0):
        differentiate_bag(
            grad_bag_ptr, grad_weights_ptr, instances_ptr, mask_ptr, cu_seqlens_ptr, sigma_ptr, softmax_stats_ptr,
            grad_ptr, b, start, length, stored, stride_b, stride_n, T, D, UNIT, CONTIGUOUS, FULL, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if ALONE:
        if length > BLOCK_N:
            fill(grad_ptr, start * D, (start + length) * D, float("nan"), 1024)
        zero_rest(grad_ptr, cu_seqlens_ptr, B, N, D)
