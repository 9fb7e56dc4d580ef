"""Backward kernels of adjust pooling: on-chip bags, and bags streamed in chunks. Notation: see adjust_pool_common.py.

With ``g = dL/ds^T``, ``e^t = dL/dsigma^t``, ``J`` the squash's Jacobian, ``s_sum^t = s^1 + ... + s^(t-1)`` and
``w_i^t = exp(f_i . s_sum^t - shift^t) scale^t``:

    e^T = J(sigma^T)' g
    for t = T ... 2:
        x_i      = f_i . e^t                              (+ v_i, the gradient of the returned weight, for t = T)
        beta_i^t = w_i^t (x_i - sum_j w_j^t x_j)          gradient of the logit; sum_j w_j f_j . e^t = sigma^t . e^t
        h^t      = sum_i beta_i^t f_i                     gradient of s_sum^t, a term of the gradient of every earlier s
        e^(t-1)  = J(sigma^(t-1))' (h^T + ... + h^t)
    dL/df_i = w_i^1 e^1 + sum_(t >= 2) (w_i^t e^t + beta_i^t s_sum^t),   w_i^1 = 1 / m

The gradient of a bag is thus the product of 2 T - 1 numbers per instance and 2 T - 1 vectors, the e^t and the s_sum^t.
The chunk kernels store both, so that the pass that writes the gradient does not read the instances again.

``c = sum_j w_j^t x_j`` is known only at the end of a pass over chunks. The passes use ``sigma^t . e^t``, equal but for
rounding and the term of v, and sum the resulting beta, ``delta = sum_i beta_i^t``. At the end ``delta sigma^t`` is
subtracted from h^t, and ``w_i delta`` from beta_i where the gradient is written. Without this correction, the rounding
of ``x_i - c`` grows with every iteration where the weights are nearly one-hot.

With detached routing or T = 1 this reduces to ``dL/df_i = w_i^T e^T``.
"""

import triton
import triton.language as tl
from amil_fast.kernels.adjust_pool_chunks import locate, merge_chunks
from amil_fast.kernels.adjust_pool_common import (
    bag_pointer,
    fill,
    on_chip_rows,
    routing_sum,
    row_mask,
    squash_backward,
    zero_rest,
)
from amil_fast.kernels.adjust_pool_stream_dot import route_dot, tile_pointers, write_gradient_dot


@triton.jit(do_not_specialize=["B", "N", "T", "stride_b", "stride_n"])
def adjust_pool_backward_on_chip_kernel(
    grad_bag_ptr, grad_weights_ptr, instances_ptr, mask_ptr, lengths_ptr, cu_seqlens_ptr, sigma_ptr, softmax_stats_ptr,
    grad_ptr,
    B, N, T, stride_b, stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, BAGS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ROUTING: tl.constexpr, READ: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """One program computes the gradient of BAGS bags of at most BLOCK_N instances each, held in registers.

    Bytes moved: reads the instances once (never without READ, i.e. T = 1) and sigma about T / 2 times (from cache);
    writes their gradient once, 0 where masked. Accumulates in the dtype of sigma, by tree reductions over the tile.
    ROUTING: differentiate through the weights too. Packed bags longer than BLOCK_N are handled by the chunk kernels;
    if there are none (ALONE), they exceed max_seqlen, and their gradient is NaN.
    Asserted by the launcher: unit stride along D; BLOCK_D >= D; BLOCK_N >= N for padded bags; strides in units of UNIT;
    contiguous gradients; READ if T > 1; no ROUTING if T = 1.
    """
    dtype = sigma_ptr.dtype.element_ty
    b = tl.program_id(0) * BAGS + tl.arange(0, BAGS)
    start, mask_b, rows, valid, stored = on_chip_rows(mask_ptr, lengths_ptr, cu_seqlens_ptr, b, B, N, BAGS, BLOCK_N)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    mask_s = mask_b[:, None] & (d < D)[None, :]
    vectors = b.to(tl.int64)[:, None] * D + d[None, :]
    sigma_ptrs = sigma_ptr + b.to(tl.int64)[:, None] * T * D + d[None, :]
    stats_ptrs = softmax_stats_ptr + b.to(tl.int64) * T * 2

    g = tl.zeros([BAGS, BLOCK_D], dtype)
    if grad_bag_ptr is not None:
        g = tl.load(grad_bag_ptr + vectors, mask=mask_s, other=0).to(dtype)
    e = squash_backward(tl.load(sigma_ptrs + (T - 1) * D, mask=mask_s, other=0), g)

    if READ:
        bag_ptrs = bag_pointer(instances_ptr, cu_seqlens_ptr, b, start, stride_b, stride_n, UNIT)
        ptrs = bag_ptrs[:, None, None] + (n[None, :, None] * (stride_n.to(tl.int64) * UNIT) + d[None, None, :])
        mask_f = valid[:, :, None] & (d < D)[None, None, :]
        tile = tl.load(ptrs, mask=mask_f, other=0, eviction_policy="evict_first")

    if ROUTING:
        grad = tl.zeros([BAGS, BLOCK_N, BLOCK_D], dtype)
        h = tl.zeros([BAGS, BLOCK_D], dtype)
        for k in tl.range(T - 1, disable_licm=True):
            t = T - 1 - k
            f = tile.to(dtype)
            s_sum = routing_sum(sigma_ptrs, mask_s, t, D)
            shift = tl.load(stats_ptrs + t * 2, mask=mask_b, other=0)[:, None]
            scale = tl.load(stats_ptrs + t * 2 + 1, mask=mask_b, other=0)[:, None]
            w = tl.where(valid, tl.exp(tl.sum(f * s_sum[:, None, :], 2) - shift) * scale, 0)
            x = tl.sum(f * e[:, None, :], 2)
            if grad_weights_ptr is not None:
                x += tl.load(grad_weights_ptr + rows, mask=valid & (k == 0), other=0)
            beta = w * (x - tl.sum(w * x, 1)[:, None])
            grad += w[:, :, None] * e[:, None, :] + beta[:, :, None] * s_sum[:, None, :]
            h += tl.sum(beta[:, :, None] * f, 1)
            e = squash_backward(tl.load(sigma_ptrs + (t - 1) * D, mask=mask_s, other=0), h)
        w = tl.load(stats_ptrs + 1, mask=mask_b, other=0)  # the first logits are 0
        grad += w[:, None, None] * e[:, None, :]
    else:
        logits = tl.zeros([BAGS, BLOCK_N], dtype)
        if READ:
            s_sum = routing_sum(sigma_ptrs, mask_s, T - 1, D)
            logits = tl.sum(tile.to(dtype) * s_sum[:, None, :], 2)
        shift = tl.load(stats_ptrs + (T - 1) * 2, mask=mask_b, other=0)[:, None]
        w = tl.exp(logits - shift) * tl.load(stats_ptrs + (T - 1) * 2 + 1, mask=mask_b, other=0)[:, None]
        grad = w[:, :, None] * e[:, None, :]
    grad = tl.where(valid[:, :, None], grad, 0)
    grad_ptrs = grad_ptr + (start * D)[:, None, None] + (n[None, :, None] * D + d[None, None, :])
    tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=stored[:, :, None] & (d < D)[None, None, :])
    if ALONE:
        zero_rest(grad_ptr, cu_seqlens_ptr, B, N, D)
        for bag in range(tl.program_id(0) * BAGS, tl.minimum(tl.program_id(0) * BAGS + BAGS, B)):
            low = tl.load(cu_seqlens_ptr + bag).to(tl.int64)
            high = tl.load(cu_seqlens_ptr + bag + 1).to(tl.int64)
            if high - low > BLOCK_N:
                fill(grad_ptr, low * D, high * D, float("nan"), 1024)


@triton.jit
def route(
    instances_ptr, mask_ptr, grad_weights_ptr, scalars_ptr, low, high, s_sum, e, shift, scale, center, last, beta_rows,
    stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One pass over rows low..high of a bag: ``h = sum_i beta_i f_i (1, BLOCK_D)`` and ``delta = sum_i beta_i (1, 1)``.

    ``w = exp(logits - shift) scale`` and ``beta = w (f . e + v - center)``, v, the gradient of the weights, in the pass
    of the ``last`` iteration only. Stores w to ``scalars`` and beta ``beta_rows`` after it. Each row of a tile has its
    own sums, as in the forward pass.
    """
    dtype = s_sum.dtype
    d = tl.arange(0, BLOCK_D)
    step = stride_n.to(tl.int64) * UNIT
    h = tl.zeros([BLOCK_N, BLOCK_D], dtype)
    delta = tl.zeros([BLOCK_N], dtype)
    for n0 in tl.range(low, high, BLOCK_N, num_stages=NUM_STAGES, disable_licm=True):
        n = n0 + tl.arange(0, BLOCK_N)
        valid = row_mask(mask_ptr, n, high)
        ptrs = instances_ptr + n0 * step + (tl.arange(0, BLOCK_N)[:, None] * step + d[None, :])
        f = tl.load(ptrs, mask=valid[:, None] & (d < D)[None, :], other=0).to(dtype)
        w = tl.where(valid, tl.exp(tl.sum(f * s_sum, 1) - shift) * scale, 0)
        x = tl.sum(f * e, 1) - center
        if grad_weights_ptr is not None:
            x += tl.load(grad_weights_ptr + n, mask=valid & last, other=0)
        beta = w * x
        delta += beta
        h += beta[:, None] * f
        tl.store(scalars_ptr + n, w, mask=n < high)
        tl.store(scalars_ptr + beta_rows + n, beta, mask=n < high)
    return tl.sum(h, 0, keep_dims=True), tl.sum(delta[:, None], 0, keep_dims=True)


@triton.jit
def write_gradient(
    grad_ptr, mask_ptr, scalars_ptr, vectors_ptr, deltas_ptr, scale, low, high, padding, T, num_rows,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of rows low..high of a bag, from 2 (T - 1) numbers per row, and zeros to high..padding."""
    dtype = vectors_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)[None, :]
    for n0 in tl.range(low, padding, BLOCK_N, disable_licm=True):
        n = n0 + tl.arange(0, BLOCK_N)
        valid = row_mask(mask_ptr, n, high)[:, None]
        grad = scale * tl.load(vectors_ptr + d, mask=d < D, other=0) + tl.zeros([BLOCK_N, BLOCK_D], dtype)
        for t in tl.range(1, T, disable_licm=True):
            x_ptr = scalars_ptr + (t - 1) * num_rows.to(tl.int64) + n[:, None]
            w = tl.load(x_ptr, mask=valid, other=0)
            beta = tl.load(x_ptr + (T - 1) * num_rows.to(tl.int64), mask=valid, other=0) - w * tl.load(deltas_ptr + t)
            grad += w * tl.load(vectors_ptr + t * D + d, mask=d < D, other=0)
            grad += beta * tl.load(vectors_ptr + (T + t - 1) * D + d, mask=d < D, other=0)
        grad = tl.where(valid, grad, 0).to(grad_ptr.dtype.element_ty)
        ptrs = grad_ptr + n0 * tl.full([], D, tl.int64) + (tl.arange(0, BLOCK_N)[:, None] * D + d)
        tl.store(ptrs, grad, mask=(n < padding)[:, None] & (d < D))


@triton.jit
def last_e(grad_bag_ptr, sigma_ptr, b, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """``e^T = J(sigma^T)' g`` of bag b, (1, BLOCK_D); 0 without a gradient of the bag vector."""
    dtype = sigma_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)[None, :]
    g = tl.zeros([1, BLOCK_D], dtype)
    if grad_bag_ptr is not None:
        g = tl.load(grad_bag_ptr + b.to(tl.int64) * D + d, mask=d < D, other=0).to(dtype)
    return squash_backward(tl.load(sigma_ptr + (b.to(tl.int64) * T + T - 1) * D + d, mask=d < D, other=0), g)


@triton.jit(
    do_not_specialize=[
        "B",
        "N",
        "T",
        "first_t",
        "num_rows",
        "num_slots",
        "chunk_rows",
        "min_rows",
        "stride_b",
        "stride_n",
    ]
)
def adjust_pool_backward_chunks_kernel(
    grad_bag_ptr, grad_weights_ptr, instances_ptr, mask_ptr, lengths_ptr, cu_seqlens_ptr, sigma_ptr, softmax_stats_ptr,
    scalars_ptr, vectors_ptr, deltas_ptr, stats_ptr, partial_ptr, counters_ptr,
    B, N, T, first_t, num_rows, num_slots, chunk_rows, min_rows, stride_b, stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, MERGE_N: tl.constexpr, NUM_STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program streams one chunk: iterations T ... 2 of an unsplit bag, or one of them of a split bag.

    Launched with first_t = T - 1 (iterations count from 0), which serves all unsplit bags and the last iteration of the
    split ones, and, with SPLIT, once per further iteration of the split bags, down to 1. The partial results of a bag
    are merged by :func:`merge_chunks`. :func:`adjust_pool_backward_write_kernel` computes the gradient from the
    workspace.

    Bytes moved: reads the instances T - 1 times; writes w and beta of each iteration.
    Workspace: scalars (2 T - 2, num_rows): w of iterations 2 ... T, then beta; vectors (B, 2 T - 1, D): e of iterations
    1 ... T, then s_sum of 2 ... T; row 0 holds the running sum of h until e^1 replaces it. deltas (B, T): delta of each
    iteration but the first; stats (slots,), partial (slots, D); counters (T, 2, slots) int32, zero-initialized.
    Accumulates in the dtype of sigma.
    Asserted by the launcher: T >= 2; unit stride along D; BLOCK_D >= D; strides in units of UNIT; contiguous gradients;
    without SPLIT, no bag has more than one chunk; grad_weights_ptr only with first_t = T - 1; DOT for 16-bit instances
    only.
    """
    slot = tl.program_id(0)
    if first_t % 2 == 1:
        slot = num_slots - 1 - slot
    b, start, index, chunks, first_slot, low, high, padding = locate(
        slot, lengths_ptr, cu_seqlens_ptr, B, N, chunk_rows, min_rows, SPLIT
    )
    d = tl.arange(0, BLOCK_D)[None, :]
    steps = T - 1
    work = index < chunks
    if SPLIT:
        steps = tl.where(chunks > 1, 1, T - 1)
        work = work & ((chunks > 1) | (first_t == T - 1))  # the others are served by the first launch
    if work:
        row = b.to(tl.int64) * T
        sigmas_ptr = sigma_ptr + row * D
        es_ptr = vectors_ptr + (2 * row - b) * D
        f_ptr = bag_pointer(instances_ptr, cu_seqlens_ptr, b, start, stride_b, stride_n, UNIT)
        m_ptr = mask_ptr if mask_ptr is None else mask_ptr + start
        v_ptr = grad_weights_ptr if grad_weights_ptr is None else grad_weights_ptr + start
        beta_rows = (T - 1) * num_rows.to(tl.int64)
        if first_t == T - 1:
            e = last_e(grad_bag_ptr, sigma_ptr, b, T, D, BLOCK_D)
        else:
            e = tl.load(es_ptr + first_t * D + d, mask=d < D, other=0)
        for step in tl.range(0, steps, disable_licm=True):
            t = first_t - step
            s_sum = routing_sum(sigmas_ptr + d, d < D, t, D)
            center = tl.sum(tl.load(sigmas_ptr + t * D + d, mask=d < D, other=0) * e)
            shift = tl.load(softmax_stats_ptr + (row + t) * 2)
            scale = tl.load(softmax_stats_ptr + (row + t) * 2 + 1)
            x_ptr = scalars_ptr + start + (t - 1) * num_rows.to(tl.int64)
            if index == 0:  # before the pass, so that they do not occupy registers during it
                tl.store(es_ptr + (T + t - 1) * D + d, s_sum, mask=d < D)
                if t == T - 1:
                    tl.store(es_ptr + t * D + d, e, mask=d < D)
            if DOT:
                h_t, delta = route_dot(
                    f_ptr, m_ptr, v_ptr, x_ptr, low, high, s_sum, e, shift, scale, center, t == T - 1, beta_rows,
                    stride_n, D, UNIT, CONTIGUOUS, BLOCK_N, BLOCK_D, NUM_STAGES,
                )  # fmt: skip
            else:
                h_t, delta = route(
                    f_ptr, m_ptr, v_ptr, x_ptr, low, high, s_sum, e, shift, scale, center, t == T - 1, beta_rows,
                    stride_n, D, UNIT, BLOCK_N, BLOCK_D, NUM_STAGES,
                )  # fmt: skip
            complete = chunks <= 1
            if SPLIT:
                if chunks > 1:
                    complete, _, delta, h_t = merge_chunks(
                        stats_ptr, partial_ptr, counters_ptr + t * 2 * num_slots.to(tl.int64), slot, first_slot, index,
                        chunks, num_slots, delta, delta, h_t, D, False, GROUP, MERGE_N, BLOCK_D,
                    )  # fmt: skip
            if complete:
                h_t -= delta * tl.load(sigmas_ptr + t * D + d, mask=d < D, other=0)
                tl.store(deltas_ptr + row + t + tl.arange(0, 1)[None, :], delta)
                if t < T - 1:
                    h_t += tl.load(es_ptr + d, mask=d < D, other=0)  # the running sum
                tl.debug_barrier()  # all threads have read the running sum, which is replaced now
                if t > 1:
                    tl.store(es_ptr + d, h_t, mask=d < D)
                    tl.debug_barrier()
                e = squash_backward(tl.load(sigmas_ptr + (t - 1) * D + d, mask=d < D, other=0), h_t)
                tl.store(es_ptr + (t - 1) * D + d, e, mask=d < D)


@triton.jit(do_not_specialize=["B", "N", "T", "num_rows", "chunk_rows", "min_rows"])
def adjust_pool_backward_write_kernel(
    mask_ptr, lengths_ptr, cu_seqlens_ptr, softmax_stats_ptr,
    grad_ptr, scalars_ptr, vectors_ptr, deltas_ptr,
    B, N, T, num_rows, chunk_rows, min_rows,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes the gradient of one chunk, and zeros to the padding after it.

    Bytes moved: reads 2 (T - 1) numbers per instance, and 2 T - 1 vectors from cache; writes the gradient once.
    Asserted by the launcher: T >= 2; the workspace was filled by the chunk kernel; the grid is that of its first
    launch; ONE_BLOCK: see :func:`write_gradient_dot`.
    """
    b, start, index, chunks, first_slot, low, high, padding = locate(
        tl.program_id(0), lengths_ptr, cu_seqlens_ptr, B, N, chunk_rows, min_rows, SPLIT
    )
    if chunks > 0:
        row = b.to(tl.int64) * T
        scale = tl.load(softmax_stats_ptr + row * 2 + 1)
        g_ptr = grad_ptr + start * D
        m_ptr = mask_ptr if mask_ptr is None else mask_ptr + start
        v_ptr = vectors_ptr + (2 * row - b) * D
        if DOT:
            write_gradient_dot(
                g_ptr, m_ptr, scalars_ptr + start, v_ptr, deltas_ptr + row, scale, low, high, padding, T, num_rows, D,
                ONE_BLOCK, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        else:
            write_gradient(
                g_ptr, m_ptr, scalars_ptr + start, v_ptr, deltas_ptr + row, scale, low, high, padding, T, num_rows, D,
                BLOCK_N, BLOCK_D,
            )  # fmt: skip
    if cu_seqlens_ptr is not None:
        zero_rest(grad_ptr, cu_seqlens_ptr, B, N, D)


@triton.jit(do_not_specialize=["B", "N", "T", "chunk_rows", "min_rows", "stride_b", "stride_n"])
def adjust_pool_backward_detached_kernel(
    grad_bag_ptr, instances_ptr, mask_ptr, lengths_ptr, cu_seqlens_ptr, sigma_ptr, softmax_stats_ptr,
    grad_ptr,
    B, N, T, chunk_rows, min_rows, stride_b, stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, READ: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One program writes ``dL/df_i = w_i^T e^T`` for one chunk, and zeros to the padding after it.

    Bytes moved: reads the instances once (never without READ, i.e. T = 1); writes their gradient once. Chunks are
    independent, so one launch serves bags of any length.
    Asserted by the launcher: unit stride along D; BLOCK_D >= D; strides in units of UNIT; contiguous gradients; READ if
    T > 1.
    """
    b, start, index, chunks, first_slot, low, high, padding = locate(
        tl.program_id(0), lengths_ptr, cu_seqlens_ptr, B, N, chunk_rows, min_rows, SPLIT
    )
    dtype = sigma_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)[None, :]
    if (chunks > 0) & (padding > low):
        e = last_e(grad_bag_ptr, sigma_ptr, b, T, D, BLOCK_D)
        row = b.to(tl.int64) * T
        shift = tl.load(softmax_stats_ptr + (row + T - 1) * 2)
        scale = tl.load(softmax_stats_ptr + (row + T - 1) * 2 + 1)
        s_sum = routing_sum(sigma_ptr + row * D + d, d < D, T - 1, D)
        f_ptr = bag_pointer(instances_ptr, cu_seqlens_ptr, b, start, stride_b, stride_n, UNIT)
        for n0 in tl.range(low, padding, BLOCK_N, num_stages=NUM_STAGES, disable_licm=True):
            n = n0 + tl.arange(0, BLOCK_N)
            valid = row_mask(mask_ptr if mask_ptr is None else mask_ptr + start, n, high)[:, None]
            logits = tl.zeros([BLOCK_N, 1], dtype)
            if READ:
                ptrs = tile_pointers(f_ptr, n0, stride_n, D, UNIT, CONTIGUOUS, BLOCK_N, BLOCK_D)
                f = tl.load(ptrs, mask=valid & (d < D), other=0, eviction_policy="evict_first").to(dtype)
                logits = tl.sum(f * s_sum, 1, keep_dims=True)
            grad = tl.where(valid, tl.exp(logits - shift) * scale * e, 0).to(grad_ptr.dtype.element_ty)
            ptrs = grad_ptr + (start + n0) * D + (tl.arange(0, BLOCK_N)[:, None] * D + d)
            tl.store(ptrs, grad, mask=(n < padding)[:, None] & (d < D))
    if cu_seqlens_ptr is not None:
        zero_rest(grad_ptr, cu_seqlens_ptr, B, N, D)
