"""Backward kernels of adjust pooling: on-chip bags, and bags streamed in chunks. Notation: see adjust_pool_common.py.

With ``g = dL/ds^T``, ``e^t = dL/dsigma^t``, ``J`` the squash's Jacobian, ``s_sum^t = s^1 + ... + s^(t-1)`` and
``w_i^t = exp(f_i . s_sum^t - maximum^t) * scale^t`` from the saved softmax statistics:

    e^T = J(sigma^T)' g
    for t = T ... 2:
        x_i      = f_i . e^t                              (+ v_i, the gradient of the returned weight, for t = T)
        beta_i^t = w_i^t (x_i - sum_j w_j^t x_j)          gradient of the logit; sum_j w_j f_j . e^t = sigma^t . e^t
        h^t      = sum_i beta_i^t f_i                     gradient of s_sum^t, a term of the gradient of every earlier s
        e^(t-1)  = J(sigma^(t-1))' (h^T + ... + h^t)
    dL/df_i = w_i^1 e^1 + sum_(t >= 2) (w_i^t e^t + beta_i^t s_sum^t),   w_i^1 = 1 / m

Where the weights are close to one-hot, ``x_i - sum_j w_j x_j`` nearly vanishes, and h multiplies its rounding error by
the instances in every iteration; the subtracted mean must therefore be the weighted sum of the same rounded x_j. The
on-chip kernel computes it so. The chunk kernels, which know it only at the end of a pass, first subtract
``c = sigma^t . e^t`` and correct the remainder: with ``beta~_i = w_i (x_i - c)`` and ``delta^t = sum_i beta~_i``,

    beta_i^t = beta~_i - w_i delta^t,   h^t = sum_i beta~_i f_i - delta^t sigma^t

    w_i e^t + beta_i s_sum^t = w_i (e^t - delta^t s_sum^t) + beta~_i s_sum^t

The last line needs 2 (T - 1) numbers per instance. The chunk kernels store them, so that the pass that writes the
gradient does not read the instances again, and expand s_sum: ``sum_t beta_i^t s_sum^t = sum_(t < T) (beta_i^(t+1) + ...
+ beta_i^T) s^t`` with ``s^t = factor^t sigma^t``. The on-chip kernel accumulates the gradient in registers.

With detached routing or T = 1 this reduces to ``dL/df_i = w_i^T e^T``.
"""

import triton
import triton.language as tl
from amil_fast.kernels.adjust_pool_chunks import bag_rows, locate, merge_chunks
from amil_fast.kernels.adjust_pool_common import (
    bag_pointer,
    on_chip_rows,
    routing_sum,
    row_mask,
    squash_backward,
    squash_factor,
    zero_after_last_bag,
)


@triton.jit(do_not_specialize=["B", "N", "T", "stride_b", "stride_n"])
def adjust_pool_backward_on_chip_kernel(
    grad_bag_ptr, grad_weights_ptr, instances_ptr, mask_ptr, lengths_ptr, cu_seqlens_ptr, sigma_ptr, softmax_stats_ptr,
    grad_ptr,
    B, N, T, stride_b, stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, BAGS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ROUTING: tl.constexpr, READ: tl.constexpr, ZERO_REST: tl.constexpr,
):  # fmt: skip
    """One program computes the gradient of BAGS bags of at most BLOCK_N instances each, held in registers.

    Bytes moved: reads the instances once (never without READ, i.e. T = 1) and sigma about T / 2 times (from cache);
    writes their gradient once, 0 where masked. Accumulates in the dtype of sigma, by tree reductions over the tile.
    ROUTING: differentiate through the weights too. ZERO_REST: there is no chunk kernel, and the gradient of the rows
    after the last packed bag is set to 0. Packed bags longer than BLOCK_N are handled by the chunk kernels.
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
            maximum = tl.load(stats_ptrs + 2 * t, mask=mask_b, other=0)
            scale = tl.load(stats_ptrs + 2 * t + 1, mask=mask_b, other=0)
            w = tl.where(valid, tl.exp(tl.sum(f * s_sum[:, None, :], 2) - maximum[:, None]) * scale[:, None], 0)
            x = tl.sum(f * e[:, None, :], 2)
            if grad_weights_ptr is not None:
                x += tl.load(grad_weights_ptr + rows, mask=valid & (k == 0), other=0)
            beta = w * (x - tl.sum(w * x, 1)[:, None])
            grad += w[:, :, None] * e[:, None, :] + beta[:, :, None] * s_sum[:, None, :]
            h += tl.sum(beta[:, :, None] * f, 1)
            e = squash_backward(tl.load(sigma_ptrs + (t - 1) * D, mask=mask_s, other=0), h)
        scale = tl.load(stats_ptrs + 1, mask=mask_b, other=0)  # the logits of the first iteration are 0
        grad += scale[:, None, None] * e[:, None, :]
    else:
        logits = tl.zeros([BAGS, BLOCK_N], dtype)
        if READ:
            s_sum = routing_sum(sigma_ptrs, mask_s, T - 1, D)
            logits = tl.sum(tile.to(dtype) * s_sum[:, None, :], 2)
        maximum = tl.load(stats_ptrs + 2 * (T - 1), mask=mask_b, other=0)
        scale = tl.load(stats_ptrs + 2 * T - 1, mask=mask_b, other=0)
        w = tl.exp(logits - maximum[:, None]) * scale[:, None]
        grad = w[:, :, None] * e[:, None, :]
    grad = tl.where(valid[:, :, None], grad, 0)
    grad_ptrs = grad_ptr + (start * D)[:, None, None] + (n[None, :, None] * D + d[None, None, :])
    tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=stored[:, :, None] & (d < D)[None, None, :])
    if ZERO_REST:
        zero_after_last_bag(grad_ptr, cu_seqlens_ptr, B, N, D, BLOCK_N, BLOCK_D)


@triton.jit
def route(
    instances_ptr, mask_ptr, grad_weights_ptr, scalars_ptr, low, high, s_sum, e, maximum, scale, shift, last,
    num_rows, stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One pass over rows low..high of a bag: ``sum_i beta~_i f_i (1, BLOCK_D)`` and ``delta = sum_i beta~_i (1, 1)``.

    ``shift = sigma . e``. Stores w and beta~ to ``scalars``, two rows of ``num_rows``. Each row of a tile has its own
    sums, as in the forward pass.
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
        w = tl.where(valid, tl.exp(tl.sum(f * s_sum, 1) - maximum) * scale, 0)
        x = tl.sum(f * e, 1) - shift
        if grad_weights_ptr is not None:
            x += tl.load(grad_weights_ptr + n, mask=valid & last, other=0)
        beta = w * x
        delta += beta
        h += beta[:, None] * f
        tl.store(scalars_ptr + n, w, mask=n < high)
        tl.store(scalars_ptr + num_rows + n, beta, mask=n < high)
    return tl.sum(h, 0, keep_dims=True), tl.sum(delta[:, None], 0, keep_dims=True)


@triton.jit
def write_gradient(
    grad_ptr, mask_ptr, scalars_ptr, sigma_ptr, softmax_stats_ptr, e_ptr, factors_ptr, low, high, padding, T, num_rows,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of rows low..high of a bag, from 2 (T - 1) numbers per row, and zeros to high..padding."""
    dtype = sigma_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)[None, :]
    scale = tl.load(softmax_stats_ptr + 1)  # the weights of the first iteration, whose logits are 0
    for n0 in tl.range(low, padding, BLOCK_N, disable_licm=True):
        n = n0 + tl.arange(0, BLOCK_N)
        valid = row_mask(mask_ptr, n, high)[:, None]
        grad = scale * tl.load(e_ptr + d, mask=d < D, other=0) + tl.zeros([BLOCK_N, BLOCK_D], dtype)
        betas = tl.zeros([BLOCK_N, 1], dtype)
        for k in tl.range(T - 1, disable_licm=True):
            t = T - 1 - k
            ptrs = scalars_ptr + (t - 1) * 2 * num_rows + n[:, None]
            w = tl.load(ptrs, mask=valid, other=0)
            betas += tl.load(ptrs + num_rows, mask=valid, other=0)
            grad += w * tl.load(e_ptr + t * D + d, mask=d < D, other=0)
            sigma = tl.load(sigma_ptr + (t - 1) * D + d, mask=d < D, other=0)
            grad += betas * (tl.load(factors_ptr + t - 1) * sigma)
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
    scalars_ptr, e_ptr, factors_ptr, stats_ptr, partial_ptr, counters_ptr,
    B, N, T, first_t, num_rows, num_slots, chunk_rows, min_rows, stride_b, stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    OWN_BAGS: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One program streams one chunk: iterations T ... 2 of an unsplit bag, or one of them of a split bag.

    Launched with first_t = T - 1 (iterations count from 0), which serves all unsplit bags and the last iteration of the
    split ones, and, with SPLIT, once per further iteration of the split bags, down to 1. The partial results of a bag
    are merged by :func:`merge_chunks`. :func:`adjust_pool_backward_write_kernel` computes the gradient from the
    workspace.

    Bytes moved: reads the instances T - 1 times; writes w and beta of each iteration.
    Workspace: scalars (T - 1, 2, num_rows): w and beta~; e (B, T, D): e^t until the iteration is complete, then e^t -
    delta^t s_sum^t, except that the first row holds the running sum of h until e^1 replaces it; factors (B, T - 1): the
    squash factor of each sigma but the last; stats (slots,), partial (slots, D); counters (T, 2, slots) int32,
    zero-initialized. Accumulates in the dtype of sigma.
    Asserted by the launcher: T >= 2; unit stride along D; BLOCK_D >= D; strides in units of UNIT; contiguous gradients;
    without SPLIT, no bag has more than one chunk; grad_weights_ptr only with first_t = T - 1.
    """
    pid = tl.program_id(0)
    slot = pid
    if first_t % 2 == 1:
        slot = num_slots - 1 - pid
    first_bag, last_bag, index, chunks, first_slot, rows = locate(
        pid, slot, lengths_ptr, cu_seqlens_ptr, B, N, num_slots, chunk_rows, min_rows, OWN_BAGS
    )
    d = tl.arange(0, BLOCK_D)[None, :]
    one = tl.arange(0, 1)[None, :]
    steps = T - 1
    if SPLIT:
        steps = tl.where(chunks > 1, 1, T - 1)
        if (chunks <= 1) & (first_t < T - 1):
            last_bag = first_bag  # served by the first launch
    for k in tl.range(0, last_bag - first_bag, disable_licm=True):
        b = first_bag + k
        start, low, high, padding, work = bag_rows(
            pid, lengths_ptr, cu_seqlens_ptr, b, N, index, chunks, rows, num_slots, chunk_rows, min_rows
        )
        if work:
            row = b.to(tl.int64) * T
            sigmas_ptr = sigma_ptr + row * D
            es_ptr = e_ptr + row * D
            facts_ptr = factors_ptr + b.to(tl.int64) * (T - 1)
            if first_t == T - 1:
                e = last_e(grad_bag_ptr, sigma_ptr, b, T, D, BLOCK_D)
                if index == 0:
                    tl.store(es_ptr + first_t * D + d, e, mask=d < D)
            else:
                e = tl.load(es_ptr + first_t * D + d, mask=d < D, other=0)
            for step in tl.range(0, steps, disable_licm=True):
                t = first_t - step
                s_sum = routing_sum(sigmas_ptr + d, d < D, t, D)
                sigma = tl.load(sigmas_ptr + t * D + d, mask=d < D, other=0)
                stats = softmax_stats_ptr + (row + t) * 2
                h_t, delta = route(
                    bag_pointer(instances_ptr, cu_seqlens_ptr, b, start, stride_b, stride_n, UNIT),
                    mask_ptr if mask_ptr is None else mask_ptr + start,
                    grad_weights_ptr if grad_weights_ptr is None else grad_weights_ptr + start,
                    scalars_ptr + start + (t - 1) * 2 * num_rows, low, high, s_sum, e,
                    tl.load(stats), tl.load(stats + 1), tl.sum(sigma * e), t == T - 1, num_rows, stride_n,
                    D, UNIT, BLOCK_N, BLOCK_D, NUM_STAGES,
                )  # fmt: skip
                complete = chunks <= 1
                if SPLIT:
                    if chunks > 1:
                        complete, _, delta, h_t = merge_chunks(
                            stats_ptr, partial_ptr, counters_ptr + t * 2 * num_slots, slot, first_slot, index, chunks,
                            num_slots, delta, delta, h_t, D, False, GROUP, BLOCK_N, BLOCK_D,
                        )  # fmt: skip
                if complete:
                    h_t -= delta * sigma
                    tl.store(es_ptr + t * D + d, e - delta * s_sum, mask=d < D)
                    if t < T - 1:
                        h_t += tl.load(es_ptr + d, mask=d < D, other=0)  # the running sum
                    tl.debug_barrier()  # all threads have read the running sum, which is replaced now
                    if t > 1:
                        tl.store(es_ptr + d, h_t, mask=d < D)
                        tl.debug_barrier()
                    sigma = tl.load(sigmas_ptr + (t - 1) * D + d, mask=d < D, other=0)
                    e = squash_backward(sigma, h_t)
                    tl.store(facts_ptr + t - 1 + one, squash_factor(sigma))
                    tl.store(es_ptr + (t - 1) * D + d, e, mask=d < D)


@triton.jit(do_not_specialize=["B", "N", "T", "num_rows", "num_slots", "chunk_rows", "min_rows"])
def adjust_pool_backward_write_kernel(
    mask_ptr, lengths_ptr, cu_seqlens_ptr, sigma_ptr, softmax_stats_ptr,
    grad_ptr, scalars_ptr, e_ptr, factors_ptr,
    B, N, T, num_rows, num_slots, chunk_rows, min_rows,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, OWN_BAGS: tl.constexpr,
):  # fmt: skip
    """One program writes the gradient of one chunk, and zeros to the padding and the rows after the last packed bag.

    Bytes moved: reads 2 (T - 1) numbers per instance, and sigma and e from cache; writes the gradient once.
    Asserted by the launcher: T >= 2; the workspace was filled by the chunk kernel; the grid is that of its first
    launch.
    """
    pid = tl.program_id(0)
    first_bag, last_bag, index, chunks, first_slot, rows = locate(
        pid, pid, lengths_ptr, cu_seqlens_ptr, B, N, num_slots, chunk_rows, min_rows, OWN_BAGS
    )
    for k in tl.range(0, last_bag - first_bag, disable_licm=True):
        b = first_bag + k
        start, low, high, padding, work = bag_rows(
            pid, lengths_ptr, cu_seqlens_ptr, b, N, index, chunks, rows, num_slots, chunk_rows, min_rows
        )
        row = b.to(tl.int64) * T
        write_gradient(
            grad_ptr + start * D,
            mask_ptr if mask_ptr is None else mask_ptr + start,
            scalars_ptr + start, sigma_ptr + row * D, softmax_stats_ptr + row * 2, e_ptr + row * D,
            factors_ptr + b.to(tl.int64) * (T - 1), low, high, padding, T, num_rows, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if cu_seqlens_ptr is not None:
        zero_after_last_bag(grad_ptr, cu_seqlens_ptr, B, N, D, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=["B", "N", "T", "num_slots", "chunk_rows", "min_rows", "stride_b", "stride_n"])
def adjust_pool_backward_detached_kernel(
    grad_bag_ptr, instances_ptr, mask_ptr, lengths_ptr, cu_seqlens_ptr, sigma_ptr, softmax_stats_ptr,
    grad_ptr,
    B, N, T, num_slots, chunk_rows, min_rows, stride_b, stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    OWN_BAGS: tl.constexpr, READ: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One program writes ``dL/df_i = w_i^T e^T`` for one chunk, or for bags without a slot, and zeros to other rows.

    Bytes moved: reads the instances once (never without READ, i.e. T = 1); writes their gradient once. Chunks are
    independent, so one launch serves bags of any length.
    Asserted by the launcher: unit stride along D; BLOCK_D >= D; strides in units of UNIT; contiguous gradients; READ if
    T > 1.
    """
    pid = tl.program_id(0)
    first_bag, last_bag, index, chunks, first_slot, rows = locate(
        pid, pid, lengths_ptr, cu_seqlens_ptr, B, N, num_slots, chunk_rows, min_rows, OWN_BAGS
    )
    dtype = sigma_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)[None, :]
    step = stride_n.to(tl.int64) * UNIT
    for k in tl.range(0, last_bag - first_bag, disable_licm=True):
        b = first_bag + k
        start, low, high, padding, work = bag_rows(
            pid, lengths_ptr, cu_seqlens_ptr, b, N, index, chunks, rows, num_slots, chunk_rows, min_rows
        )
        if padding > low:
            e = last_e(grad_bag_ptr, sigma_ptr, b, T, D, BLOCK_D)
            row = b.to(tl.int64) * T
            maximum = tl.load(softmax_stats_ptr + (row + T - 1) * 2)
            scale = tl.load(softmax_stats_ptr + (row + T - 1) * 2 + 1)
            s_sum = routing_sum(sigma_ptr + row * D + d, d < D, T - 1, D)
            f_ptr = bag_pointer(instances_ptr, cu_seqlens_ptr, b, start, stride_b, stride_n, UNIT)
            for n0 in tl.range(low, padding, BLOCK_N, num_stages=NUM_STAGES, disable_licm=True):
                n = n0 + tl.arange(0, BLOCK_N)
                valid = row_mask(mask_ptr if mask_ptr is None else mask_ptr + start, n, high)[:, None]
                logits = tl.zeros([BLOCK_N, 1], dtype)
                if READ:
                    ptrs = f_ptr + n0 * step + (tl.arange(0, BLOCK_N)[:, None] * step + d)
                    f = tl.load(ptrs, mask=valid & (d < D), other=0, eviction_policy="evict_first").to(dtype)
                    logits = tl.sum(f * s_sum, 1, keep_dims=True)
                grad = tl.where(valid, tl.exp(logits - maximum) * scale * e, 0).to(grad_ptr.dtype.element_ty)
                ptrs = grad_ptr + (start + n0) * D + (tl.arange(0, BLOCK_N)[:, None] * D + d)
                tl.store(ptrs, grad, mask=(n < padding)[:, None] & (d < D))
    if cu_seqlens_ptr is not None:
        zero_after_last_bag(grad_ptr, cu_seqlens_ptr, B, N, D, BLOCK_N, BLOCK_D)
