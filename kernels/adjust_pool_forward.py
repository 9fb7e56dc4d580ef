"""Forward kernels of adjust pooling: bags on chip, and bags in chunks. See adjust_pool_common.py for the notation.

Iteration t, with ``s_sum = s^1 + ... + s^(t-1)``:

    b_i = f_i . s_sum,   w = softmax(b),   sigma^t = sum_i w_i f_i,   s^t = squash(sigma^t)

Stored for the backward pass: sigma (B, T, D) and lse (B, T), the log-sum-exp of b (0 for an empty bag), in
the accumulation dtype.
"""

import triton
import triton.language as tl
from amil_fast.kernels.adjust_pool_common import (
    LOWEST,
    arrive,
    bag_pointer,
    bag_rows,
    locate,
    routing_sum,
    row_mask,
    squash_factor,
)


@triton.jit(do_not_specialize=["B", "N", "T", "stride_b", "stride_n"])
def adjust_pool_forward_on_chip_kernel(
    instances_ptr, mask_ptr, lengths_ptr, cu_seqlens_ptr,
    bag_ptr, weights_ptr, sigma_ptr, lse_ptr,
    B, N, T, stride_b, stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, BAGS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program pools BAGS bags of at most BLOCK_N instances each, held in registers from the first read on.

    Moves: the instances once, in; T (D + 1) numbers per bag, out. Accumulates in sigma's dtype, by tree reductions over
    the tile. Packed bags longer than BLOCK_N are left to the chunk kernel.
    Asserted by the launcher: unit stride along D; BLOCK_D >= D; BLOCK_N >= N for padded bags; strides in units of UNIT.
    """
    dtype = sigma_ptr.dtype.element_ty
    b = tl.program_id(0) * BAGS + tl.arange(0, BAGS)
    mask_b = b < B
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + b, mask=mask_b, other=0).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + b + 1, mask=mask_b, other=0).to(tl.int64) - start).to(tl.int32)
        mask_b = mask_b & (length <= BLOCK_N)
        bag_ptrs = instances_ptr + start * (stride_n.to(tl.int64) * UNIT)
    else:
        start = b.to(tl.int64) * N
        length = tl.zeros([BAGS], tl.int32) + N
        if lengths_ptr is not None:
            length = tl.load(lengths_ptr + b, mask=mask_b, other=0).to(tl.int32)
        bag_ptrs = instances_ptr + b * (stride_b.to(tl.int64) * UNIT)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    valid = (n[None, :] < length[:, None]) & mask_b[:, None]  # (BAGS, BLOCK_N)
    offs_w = start[:, None] + n[None, :]
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + offs_w, mask=valid, other=0) != 0)
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
        divisor = tl.where(total == 0, 1, total)
        w = w / divisor[:, None]
        sigma = tl.sum(w[:, :, None] * f, 1)
        s = squash_factor(sigma) * sigma
        s_sum += s
        tl.store(sigma_ptrs + t * D, sigma, mask=mask_s)
        lse = tl.where(total == 0, 0, maximum + tl.log(divisor))
        tl.store(lse_ptr + b.to(tl.int64) * T + t, lse, mask=mask_b)
    tl.store(bag_ptr + (b.to(tl.int64) * D)[:, None] + d[None, :], s, mask=mask_s)
    if weights_ptr is not None:
        inside = valid
        if cu_seqlens_ptr is None:
            inside = (n < N)[None, :] & mask_b[:, None]
        tl.store(weights_ptr + offs_w, tl.where(valid, w, 0), mask=inside)


@triton.jit
def attend(
    bag_ptr, mask_ptr, logits_ptr, low, high, s_sum, store_logits, stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One pass over rows low..high of a bag: ``(maximum, total, sigma)``, shapes (1, 1), (1, 1), (1, BLOCK_D).

    ``total = sum_i exp(b_i - maximum)``, ``sigma = sum_i exp(b_i - maximum) f_i``, not yet divided by it. Each of the
    BLOCK_N rows of a tile keeps its own running maximum and sums, so that the loop has no reduction over rows: warps
    run on without waiting for each other until the end. Stores the logits if ``store_logits`` and there is a pointer.
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
    return merge(maximum, total, sigma)


@triton.jit
def merge(maximum, total, sigma):
    """Results (R,), (R,), (R, BLOCK_D) of R sets of rows -> those of their union: (1, 1), (1, 1), (1, BLOCK_D)."""
    maximum = maximum[:, None]
    new_maximum = tl.max(maximum, 0, keep_dims=True)
    rescale = tl.exp(maximum - new_maximum)
    total = tl.sum(total[:, None] * rescale, 0, keep_dims=True)
    return new_maximum, total, tl.sum(sigma * rescale, 0, keep_dims=True)


@triton.jit
def merge_chunks(
    stats_ptr, partial_ptr, first, step, count, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Merges the partial results in the slots ``first, first + step, ...``, ``count`` of them, in this order."""
    dtype = partial_ptr.dtype.element_ty
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    maximum = tl.full([BLOCK_N], LOWEST, dtype)
    total = tl.zeros([BLOCK_N], dtype)
    sigma = tl.zeros([BLOCK_N, BLOCK_D], dtype)
    for n0 in range(0, count, BLOCK_N):
        there = n0 + n < count
        slots = (first + (n0 + n) * step).to(tl.int64)
        m = tl.load(stats_ptr + slots * 2, mask=there, other=LOWEST, cache_modifier=".cg")
        z = tl.load(stats_ptr + slots * 2 + 1, mask=there, other=0, cache_modifier=".cg")
        ptrs = partial_ptr + (slots * D)[:, None] + d[None, :]
        x = tl.load(ptrs, mask=there[:, None] & (d < D)[None, :], other=0, cache_modifier=".cg")
        new_maximum = tl.maximum(maximum, m)
        rescale = tl.exp(maximum - new_maximum)
        scale = tl.exp(m - new_maximum)
        total = total * rescale + z * scale
        sigma = sigma * rescale[:, None] + x * scale[:, None]
        maximum = new_maximum
    return merge(maximum, total, sigma)


@triton.jit
def store_chunk(stats_ptr, partial_ptr, slot, maximum, total, sigma, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores one partial result: maximum and total to stats (slots, 2), sigma to partial (slots, D)."""
    d = tl.arange(0, BLOCK_D)[None, :]
    one = tl.arange(0, 1)[None, :]
    tl.store(stats_ptr + slot.to(tl.int64) * 2 + one, maximum)
    tl.store(stats_ptr + slot.to(tl.int64) * 2 + 1 + one, total)
    tl.store(partial_ptr + slot.to(tl.int64) * D + d, sigma, mask=d < D)


@triton.jit
def store_iteration(
    bag_ptr, sigma_ptr, lse_ptr, b, t, T, maximum, total, sigma, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Stores what iteration t (from 0) of bag b yields, the bag vector in the last one; returns s (1, BLOCK_D)."""
    d = tl.arange(0, BLOCK_D)[None, :]
    one = tl.arange(0, 1)[None, :]
    divisor = tl.where(total == 0, 1, total)
    sigma = sigma / divisor
    s = squash_factor(sigma) * sigma
    row = b.to(tl.int64) * T + t
    tl.store(sigma_ptr + row * D + d, sigma, mask=d < D)
    tl.store(lse_ptr + row + one, tl.where(total == 0, 0, maximum + tl.log(divisor)))
    if t == T - 1:
        tl.store(bag_ptr + b.to(tl.int64) * D + d, s, mask=d < D)
    return s


@triton.jit(do_not_specialize=["B", "N", "T", "first_t", "num_slots", "chunk_rows", "min_rows", "stride_b", "stride_n"])
def adjust_pool_forward_chunks_kernel(
    instances_ptr, mask_ptr, lengths_ptr, cu_seqlens_ptr,
    bag_ptr, weights_ptr, sigma_ptr, lse_ptr,
    stats_ptr, partial_ptr, counters_ptr,
    B, N, T, first_t, num_slots, chunk_rows, min_rows, stride_b, stride_n,
    D: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    OWN_BAGS: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One program streams one chunk of a bag: all T iterations of a bag of one chunk, one iteration of a longer one.

    Launched with first_t = 0, which serves every bag of one chunk and the first iteration of the longer ones, and, with
    SPLIT, once more for each further iteration of those. The partial results of a bag's chunks are merged, in the order
    of the chunks, by whichever program is the last to arrive: the chunks of a group of GROUP by the last of the group,
    the groups by the last of the bag. The last iteration leaves the logits in the weights.

    Moves: the instances T times (from the L2 cache, as far as they are still there: every other launch goes through the
    slots backwards); per chunk and iteration 2 x (D + 2) numbers. Accumulates in sigma's dtype.
    Workspace: stats (slots, 2), partial (slots, D), counters (T, 2, slots) int32, which are 0.
    Asserted by the launcher: unit stride along D; BLOCK_D >= D; strides in units of UNIT; no bag has more than one
    chunk without SPLIT. Packed bags of at most min_rows are somebody else's.
    """
    pid = tl.program_id(0)
    slot = pid
    if first_t % 2 == 1:
        slot = num_slots - 1 - pid
    first_bag, last_bag, index, chunks, first_slot, rows = locate(
        pid, slot, lengths_ptr, cu_seqlens_ptr, B, N, num_slots, chunk_rows, min_rows, OWN_BAGS
    )
    d = tl.arange(0, BLOCK_D)[None, :]
    last_t = T
    if SPLIT:
        last_t = tl.where(chunks > 1, first_t + 1, T)
        if (chunks <= 1) & (first_t > 0):
            last_bag = first_bag  # was done in the first launch
    for k in tl.range(0, last_bag - first_bag, disable_licm=True):
        b = first_bag + k
        start, low, high, padding, work = bag_rows(
            pid, lengths_ptr, cu_seqlens_ptr, b, N, index, chunks, rows, num_slots, chunk_rows, min_rows
        )
        if work:
            s_sum = routing_sum(sigma_ptr + b.to(tl.int64) * T * D + d, d < D, first_t, D)
            for t in tl.range(first_t, last_t, disable_licm=True):
                maximum, total, sigma = attend(
                    bag_pointer(instances_ptr, cu_seqlens_ptr, b, start, stride_b, stride_n, UNIT),
                    mask_ptr if mask_ptr is None else mask_ptr + start,
                    weights_ptr if weights_ptr is None else weights_ptr + start,
                    low, high, s_sum, t == T - 1, stride_n, D, UNIT, BLOCK_N, BLOCK_D, NUM_STAGES,
                )  # fmt: skip
                complete = chunks <= 1
                if SPLIT:
                    if chunks > 1:
                        store_chunk(stats_ptr, partial_ptr, slot, maximum, total, sigma, D, BLOCK_D)
                        counts_ptr = counters_ptr + t * 2 * num_slots
                        group = index // GROUP * GROUP
                        group_chunks = tl.minimum(chunks - group, GROUP)
                        if arrive(counts_ptr + first_slot + group, group_chunks):
                            first = first_slot + group
                            maximum, total, sigma = merge_chunks(
                                stats_ptr, partial_ptr, first, 1, group_chunks, D, BLOCK_N, BLOCK_D
                            )
                            tl.debug_barrier()  # all threads have read what the group's result now replaces
                            store_chunk(stats_ptr, partial_ptr, first, maximum, total, sigma, D, BLOCK_D)
                            groups = (chunks + GROUP - 1) // GROUP
                            if arrive(counts_ptr + num_slots + first_slot, groups):
                                maximum, total, sigma = merge_chunks(
                                    stats_ptr, partial_ptr, first_slot, GROUP, groups, D, BLOCK_N, BLOCK_D
                                )
                                complete = chunks > 1
                if complete:
                    s_sum += store_iteration(bag_ptr, sigma_ptr, lse_ptr, b, t, T, maximum, total, sigma, D, BLOCK_D)


@triton.jit(do_not_specialize=["B", "N", "T", "num_slots", "chunk_rows", "min_rows"])
def adjust_pool_forward_weights_kernel(
    mask_ptr, lengths_ptr, cu_seqlens_ptr, weights_ptr, lse_ptr,
    B, N, T, num_slots, chunk_rows, min_rows,
    OWN_BAGS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program turns the logits of one chunk, which the chunk kernel left in the weights, into ``exp(b - lse)``.

    Moves one number per instance in and out; writes 0 for masked instances and padding. The launcher's grid is that of
    the chunk kernel's first launch.
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
        lse = tl.load(lse_ptr + b.to(tl.int64) * T + T - 1)
        for n0 in range(low, padding, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            valid = row_mask(mask_ptr if mask_ptr is None else mask_ptr + start, n, high)
            logits = tl.load(weights_ptr + start + n, mask=valid, other=0)
            tl.store(weights_ptr + start + n, tl.where(valid, tl.exp(logits - lse), 0), mask=n < padding)
