"""Forward kernels of adjust pooling: on-chip bags, and bags streamed in chunks. Notation: see adjust_pool_common.py.

Iteration t (Eq. 2-5), with ``s_sum = s^1 + ... + s^(t-1)``:

    b_i = f_i . s_sum,   w = softmax(b),   sigma^t = sum_i w_i f_i,   s^t = squash(sigma^t)

Saved for the backward pass, in the accumulation dtype: sigma (B, T, D) and softmax_stats (B, T, 2), of which w =
exp(b - shift) scale: a shift near the maximum of b, and scale = 1 / sum_i exp(b_i - shift), 0 for an empty bag. Their
product in one number, a log-sum-exp, would lose the sum at large logits.
"""

import triton
import triton.language as tl
from amil_fast.kernels.adjust_pool_chunks import locate, merge_chunks, reduce_rows
from amil_fast.kernels.adjust_pool_common import (
    LOWEST,
    bag_pointer,
    on_chip_rows,
    routing_sum,
    row_mask,
    squash_factor,
    zero_rest,
)
from amil_fast.kernels.adjust_pool_stream_dot import attend_dot


@triton.jit(do_not_specialize=["B", "N", "T", "stride_b", "stride_n"])
def adjust_pool_forward_on_chip_kernel(
    instances_ptr, mask_ptr, lengths_ptr, cu_seqlens_ptr,
    bag_ptr, weights_ptr, sigma_ptr, softmax_stats_ptr,
    B, N, T, stride_b, stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, BAGS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ALONE: tl.constexpr,
):  # fmt: skip
    """One program pools BAGS bags of at most BLOCK_N instances each, which stay in registers after a single read.

    Bytes moved: reads the instances once; writes T (D + 2) numbers per bag. Accumulates in the dtype of sigma, by tree
    reductions over the tile. Packed bags longer than BLOCK_N are handled by the chunk kernel, or, if there is none
    (ALONE), pool to NaN: they exceed max_seqlen.
    Asserted by the launcher: unit stride along D; BLOCK_D >= D; BLOCK_N >= N for padded bags; strides in units of UNIT.
    """
    dtype = sigma_ptr.dtype.element_ty
    b = tl.program_id(0) * BAGS + tl.arange(0, BAGS)
    start, mask_b, rows, valid, stored = on_chip_rows(mask_ptr, lengths_ptr, cu_seqlens_ptr, b, B, N, BAGS, BLOCK_N)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    bag_ptrs = bag_pointer(instances_ptr, cu_seqlens_ptr, b, start, stride_b, stride_n, UNIT)
    ptrs = bag_ptrs[:, None, None] + (n[None, :, None] * (stride_n.to(tl.int64) * UNIT) + d[None, None, :])
    mask_f = valid[:, :, None] & (d < D)[None, None, :]
    tile = tl.load(ptrs, mask=mask_f, other=0, eviction_policy="evict_first")

    mask_s = mask_b[:, None] & (d < D)[None, :]
    sigma_ptrs = sigma_ptr + (b.to(tl.int64) * T * D)[:, None] + d[None, :]
    s_sum = tl.zeros([BAGS, BLOCK_D], dtype)
    s = s_sum
    w = tl.zeros([BAGS, BLOCK_N], dtype)
    for t in tl.range(T, disable_licm=True):
        f = tile.to(dtype)
        logits = tl.where(valid, tl.sum(f * s_sum[:, None, :], 2), float("-inf"))
        maximum = tl.maximum(tl.max(logits, 1), LOWEST)
        w = tl.exp(logits - maximum[:, None])
        total = tl.sum(w, 1)
        scale = tl.where(total == 0, 0, 1 / total)
        w = w * scale[:, None]
        sigma = tl.sum(w[:, :, None] * f, 1)
        s = squash_factor(sigma) * sigma
        s_sum += s
        tl.store(sigma_ptrs + t * D, sigma, mask=mask_s)
        stats_ptrs = softmax_stats_ptr + (b.to(tl.int64) * T + t) * 2
        tl.store(stats_ptrs, tl.where(total == 0, 0, maximum), mask=mask_b)
        tl.store(stats_ptrs + 1, scale, mask=mask_b)
    if ALONE:  # bags excluded from mask_b only because of their length
        s = tl.where(mask_b[:, None], s, float("nan"))
        mask_s = (b < B)[:, None] & (d < D)[None, :]
    tl.store(bag_ptr + (b.to(tl.int64) * D)[:, None] + d[None, :], s, mask=mask_s)
    if weights_ptr is not None:
        tl.store(weights_ptr + rows, tl.where(valid, w, 0), mask=stored)
        if ALONE:
            zero_rest(weights_ptr, cu_seqlens_ptr, B, N, 1)


@triton.jit
def attend(
    bag_ptr, mask_ptr, logits_ptr, low, high, s_sum, store_logits, stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One pass over rows low..high of a bag; returns ``(maximum, total, sigma)``: (1, 1), (1, 1), (1, BLOCK_D).

    ``total = sum_i exp(b_i - maximum)``, ``sigma = sum_i exp(b_i - maximum) f_i``, not yet divided by ``total``. Each
    of the BLOCK_N rows of a tile has its own running maximum and sums, so that the loop has no reduction over rows and
    warps do not synchronize until the end. Stores the logits if ``store_logits`` and ``logits_ptr`` is not None.
    """
    dtype = s_sum.dtype
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    step = stride_n.to(tl.int64) * UNIT
    maximum = tl.full([BLOCK_N], LOWEST, dtype)
    total = tl.zeros([BLOCK_N], dtype)
    sigma = tl.zeros([BLOCK_N, BLOCK_D], dtype)
    for n0 in tl.range(low, high, BLOCK_N, num_stages=NUM_STAGES, disable_licm=True):
        valid = row_mask(mask_ptr, n0 + n, high)
        ptrs = bag_ptr + n0 * step + (n[:, None] * step + d[None, :])
        f = tl.load(ptrs, mask=valid[:, None] & (d < D)[None, :], other=0).to(dtype)
        logits = tl.sum(f * s_sum, 1)
        if logits_ptr is not None:
            tl.store(logits_ptr + n0 + n, logits, mask=valid & store_logits)
        logits = tl.where(valid, logits, float("-inf"))
        new_maximum = tl.maximum(maximum, logits)
        rescale = tl.exp(maximum - new_maximum)
        w = tl.exp(logits - new_maximum)
        total = total * rescale + w
        sigma = sigma * rescale[:, None] + w[:, None] * f
        maximum = new_maximum
    return reduce_rows(maximum, total, sigma, SOFTMAX=True)


@triton.jit
def store_iteration(
    bag_ptr, sigma_ptr, softmax_stats_ptr, b, t, T, maximum, total, sigma, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Stores the results of iteration t (from 0) of bag b, and the bag vector in the last; returns s (1, BLOCK_D)."""
    d = tl.arange(0, BLOCK_D)[None, :]
    one = tl.arange(0, 1)[None, :]
    scale = tl.where(total == 0, 0, 1 / total)
    sigma = sigma * scale
    s = squash_factor(sigma) * sigma
    row = b.to(tl.int64) * T + t
    tl.store(sigma_ptr + row * D + d, sigma, mask=d < D)
    tl.store(softmax_stats_ptr + row * 2 + one, tl.where(total == 0, 0, maximum))
    tl.store(softmax_stats_ptr + row * 2 + 1 + one, scale)
    if t == T - 1:
        tl.store(bag_ptr + b.to(tl.int64) * D + d, s, mask=d < D)
    return s


@triton.jit(do_not_specialize=["B", "N", "T", "first_t", "num_slots", "chunk_rows", "min_rows", "stride_b", "stride_n"])
def adjust_pool_forward_chunks_kernel(
    instances_ptr, mask_ptr, lengths_ptr, cu_seqlens_ptr,
    bag_ptr, weights_ptr, sigma_ptr, softmax_stats_ptr,
    stats_ptr, partial_ptr, counters_ptr,
    B, N, T, first_t, num_slots, chunk_rows, min_rows, stride_b, stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, CONTIGUOUS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, MERGE_N: tl.constexpr, NUM_STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program streams one chunk: all T iterations of an unsplit bag, or one iteration of a split bag.

    Launched with first_t = 0, which serves all unsplit bags and the first iteration of the split ones, and, with SPLIT,
    once per further iteration of the split bags. The partial results of a bag are merged by :func:`merge_chunks`. The
    last iteration stores the logits in place of the weights.

    Bytes moved: reads the instances T times (from L2 where they are still resident: every other launch traverses the
    slots in reverse); 2 x (D + 2) numbers per chunk and iteration. Accumulates in the dtype of sigma.
    Workspace: stats (slots, 2), partial (slots, D), counters (T, 2, slots) int32, zero-initialized.
    Asserted by the launcher: unit stride along D; BLOCK_D >= D; strides in units of UNIT; without SPLIT, no bag has
    more than one chunk; DOT for 16-bit instances only. Packed bags of at most min_rows rows are handled by the on-chip
    kernel.
    """
    slot = tl.program_id(0)
    if first_t % 2 == 1:
        slot = num_slots - 1 - slot
    b, start, index, chunks, first_slot, low, high, padding = locate(
        slot, lengths_ptr, cu_seqlens_ptr, B, N, chunk_rows, min_rows, SPLIT
    )
    d = tl.arange(0, BLOCK_D)[None, :]
    last_t = T
    work = index < chunks
    if SPLIT:
        last_t = tl.where(chunks > 1, first_t + 1, T)
        work = work & ((chunks > 1) | (first_t == 0))  # the others are served by the first launch
    if work:
        f_ptr = bag_pointer(instances_ptr, cu_seqlens_ptr, b, start, stride_b, stride_n, UNIT)
        m_ptr = mask_ptr if mask_ptr is None else mask_ptr + start
        w_ptr = weights_ptr if weights_ptr is None else weights_ptr + start
        s_sum = routing_sum(sigma_ptr + b.to(tl.int64) * T * D + d, d < D, first_t, D)
        for t in tl.range(first_t, last_t, disable_licm=True):
            if DOT:
                maximum, total, sigma = attend_dot(
                    f_ptr, m_ptr, w_ptr, low, high, s_sum, t == T - 1, stride_n, D, UNIT, CONTIGUOUS, BLOCK_N, BLOCK_D,
                    NUM_STAGES,
                )  # fmt: skip
            else:
                maximum, total, sigma = attend(
                    f_ptr, m_ptr, w_ptr, low, high, s_sum, t == T - 1, stride_n, D, UNIT, BLOCK_N, BLOCK_D, NUM_STAGES
                )
            complete = chunks <= 1
            if SPLIT:
                if chunks > 1:
                    complete, maximum, total, sigma = merge_chunks(
                        stats_ptr, partial_ptr, counters_ptr + t * 2 * num_slots.to(tl.int64), slot, first_slot, index,
                        chunks, num_slots, maximum, total, sigma, D, True, GROUP, MERGE_N, BLOCK_D,
                    )  # fmt: skip
            if complete:
                s_sum += store_iteration(
                    bag_ptr, sigma_ptr, softmax_stats_ptr, b, t, T, maximum, total, sigma, D, BLOCK_D
                )


@triton.jit(do_not_specialize=["B", "N", "T", "chunk_rows", "min_rows"])
def adjust_pool_forward_weights_kernel(
    mask_ptr, lengths_ptr, cu_seqlens_ptr, weights_ptr, softmax_stats_ptr,
    B, N, T, chunk_rows, min_rows,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program converts the logits of one chunk, stored by the chunk kernel, to weights in place.

    Bytes moved: reads and writes one number per instance; writes 0 for masked instances, padding, and rows after the
    last packed bag. The grid is that of the chunk kernel.
    """
    b, start, index, chunks, first_slot, low, high, padding = locate(
        tl.program_id(0), lengths_ptr, cu_seqlens_ptr, B, N, chunk_rows, min_rows, SPLIT
    )
    if chunks > 0:
        stats_ptr = softmax_stats_ptr + (b.to(tl.int64) * T + T - 1) * 2
        shift = tl.load(stats_ptr)
        scale = tl.load(stats_ptr + 1)
        for n0 in range(low, padding, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            valid = row_mask(mask_ptr if mask_ptr is None else mask_ptr + start, n, high)
            logits = tl.load(weights_ptr + start + n, mask=valid, other=0)
            w = tl.where(valid, tl.exp(logits - shift) * scale, 0)
            tl.store(weights_ptr + start + n, w, mask=n < padding)
    if cu_seqlens_ptr is not None:
        zero_rest(weights_ptr, cu_seqlens_ptr, B, N, 1)
