"""Device functions for bags streamed in chunks: assignment of chunks to programs, and merging of partial results.

Both passes reduce each chunk of a split bag to a partial result ``(maximum, total, vector)`` of shapes (1, 1), (1, 1)
and (1, BLOCK_D). Forward (SOFTMAX): an online softmax, with ``total = sum_i exp(b_i - maximum)`` and ``vector = sum_i
exp(b_i - maximum) f_i``. Backward: plain sums; there is no maximum, and the value in its place is ignored.
"""

import triton
import triton.language as tl
from amil_fast.kernels.adjust_pool_common import LOWEST, bag_extent


@triton.jit
def find_bag(cu_seqlens_ptr, slot, B, chunk_rows):
    """Packed bag that slot ``slot`` belongs to, by binary search on the device (no host synchronization)."""
    low = B * 0
    high = B
    while high - low > 1:  # first slot of low <= slot < first slot of high
        middle = (low + high) // 2
        below = tl.load(cu_seqlens_ptr + middle).to(tl.int64) // chunk_rows + middle <= slot
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def locate(slot, lengths_ptr, cu_seqlens_ptr, B, N, chunk_rows, min_rows, SPLIT: tl.constexpr):
    """Work assigned to a slot of a chunk kernel. The grid depends on shapes alone; sizes are read on the device.

    A slot serves at most one chunk of ``chunk_rows`` rows of one bag. Padded bags have ``ceil(N / chunk_rows)`` slots
    each. Packed bag b, in rows start..end, has the slots ``start // chunk_rows + b`` ... ``end // chunk_rows + b``, at
    least as many as chunks, so that ``N // chunk_rows + B`` slots serve any mix of lengths. Without SPLIT, bag b has
    slot b alone, for all of its rows.

    Returns scalars: the bag; its first row in the flattened instances (int64); the index of the chunk in the bag; the
    number of chunks of the bag, at least 1, or 0 if it is served on chip (packed bags of at most ``min_rows`` rows);
    the slot of the first chunk; and the chunk's first row and exclusive last row in the bag and the exclusive end of
    the padding after it. Slots with ``index >= chunks`` have padding at most.
    """
    if cu_seqlens_ptr is not None:
        b = slot
        first_slot = slot
        if SPLIT:
            b = find_bag(cu_seqlens_ptr, slot, B, chunk_rows)
        start, length = bag_extent(lengths_ptr, cu_seqlens_ptr, b, N)
        rows = length
        if SPLIT:
            first_slot = (start // chunk_rows).to(tl.int32) + b
            rows = chunk_rows
    else:
        slots_per_bag = (N + chunk_rows - 1) // chunk_rows
        b = slot // slots_per_bag
        start, length = bag_extent(lengths_ptr, cu_seqlens_ptr, b, N)
        first_slot = b * slots_per_bag
        rows = chunk_rows
    index = slot - first_slot
    chunks = tl.maximum((length + chunk_rows - 1) // chunk_rows, 1)
    if not SPLIT:
        chunks = tl.minimum(chunks, 1)
    low = index * rows
    high = tl.minimum(low + rows, length)
    if cu_seqlens_ptr is None:
        padding = tl.minimum(low + rows, N)
    else:
        chunks = tl.where(length > min_rows, chunks, 0)
        padding = tl.where(index < chunks, high, low)
    return b, start, index, chunks, first_slot, low, high, padding


@triton.jit
def reduce_rows(maximum, total, vector, SOFTMAX: tl.constexpr):
    """Reduces R partial results (R,), (R,), (R, BLOCK_D) to one: (1, 1), (1, 1), (1, BLOCK_D)."""
    total = total[:, None]
    if SOFTMAX:
        maximum = maximum[:, None]
        new_maximum = tl.max(maximum, 0, keep_dims=True)
        rescale = tl.exp(maximum - new_maximum)
        total = tl.sum(total * rescale, 0, keep_dims=True)
        vector = tl.sum(vector * rescale, 0, keep_dims=True)
    else:
        total = tl.sum(total, 0, keep_dims=True)
        vector = tl.sum(vector, 0, keep_dims=True)
        new_maximum = total
    return new_maximum, total, vector


@triton.jit
def load_partials(
    stats_ptr, partial_ptr, first, step, count,
    D: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merges the ``count`` partial results in slots ``first, first + step, ...``, in this order.

    The loads bypass L1 (``.cg``), which is not coherent with the stores of other programs.
    """
    dtype = partial_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    maximum = tl.full([BLOCK_N], LOWEST, dtype)
    total = tl.zeros([BLOCK_N], dtype)
    vector = tl.zeros([BLOCK_N, BLOCK_D], dtype)
    for n0 in range(0, count, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        mask_n = n < count
        slots = (first + n * step).to(tl.int64)
        ptrs = partial_ptr + (slots * D)[:, None] + d[None, :]
        x = tl.load(ptrs, mask=mask_n[:, None] & (d < D)[None, :], other=0, cache_modifier=".cg")
        if SOFTMAX:
            m = tl.load(stats_ptr + slots * 2, mask=mask_n, other=LOWEST, cache_modifier=".cg")
            z = tl.load(stats_ptr + slots * 2 + 1, mask=mask_n, other=0, cache_modifier=".cg")
            new_maximum = tl.maximum(maximum, m)
            rescale = tl.exp(maximum - new_maximum)
            scale = tl.exp(m - new_maximum)
            total = total * rescale + z * scale
            vector = vector * rescale[:, None] + x * scale[:, None]
            maximum = new_maximum
        else:
            total += tl.load(stats_ptr + slots, mask=mask_n, other=0, cache_modifier=".cg")
            vector += x
    return reduce_rows(maximum, total, vector, SOFTMAX)


@triton.jit
def store_partial(
    stats_ptr, partial_ptr, slot, maximum, total, vector, D: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Stores a partial result: maximum and total to stats (slots, 2), or total to stats (slots,); vector to partial."""
    d = tl.arange(0, BLOCK_D)[None, :]
    one = tl.arange(0, 1)[None, :]
    slot = slot.to(tl.int64)
    if SOFTMAX:
        tl.store(stats_ptr + slot * 2 + one, maximum)
        tl.store(stats_ptr + slot * 2 + 1 + one, total)
    else:
        tl.store(stats_ptr + slot + one, total)
    tl.store(partial_ptr + slot * D + d, vector, mask=d < D)


@triton.jit
def arrive(counter_ptr, expected):
    """Increments an arrival counter; returns True for the last of ``expected`` programs.

    All stores of the other programs before their arrival are then visible to it: the barrier orders the stores of all
    threads before the release of the atomic, and the acquire, together with the barrier that broadcasts the result to
    all threads, orders them before subsequent loads that bypass L1 (``.cg``).
    """
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1


@triton.jit
def merge_chunks(
    stats_ptr, partial_ptr, counters_ptr, slot, first_slot, index, chunks, num_slots, maximum, total, vector,
    D: tl.constexpr, SOFTMAX: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Publishes the partial result of one chunk of a split bag; the last program to arrive merges those of the bag.

    Two levels, each in the order of the chunks, so that the result does not depend on the order of arrival: the last
    program of a group of GROUP chunks merges the group, the last one of all groups merges the groups.
    ``counters_ptr``: (2, num_slots) int32, the counters of this iteration, initially 0.

    Returns whether this program holds the merged result of the bag, and the result ``(maximum, total, vector)``.
    """
    store_partial(stats_ptr, partial_ptr, slot, maximum, total, vector, D, SOFTMAX, BLOCK_D)
    complete = chunks < 1  # False; the caller has more than one chunk
    group = index // GROUP * GROUP
    group_chunks = tl.minimum(chunks - group, GROUP)
    first = first_slot + group
    if arrive(counters_ptr + first, group_chunks):
        maximum, total, vector = load_partials(
            stats_ptr, partial_ptr, first, 1, group_chunks, D, SOFTMAX, BLOCK_N, BLOCK_D
        )
        tl.debug_barrier()  # all threads have read the slot that the result of the group replaces
        store_partial(stats_ptr, partial_ptr, first, maximum, total, vector, D, SOFTMAX, BLOCK_D)
        groups = (chunks + GROUP - 1) // GROUP
        if arrive(counters_ptr + num_slots + first_slot, groups):
            maximum, total, vector = load_partials(
                stats_ptr, partial_ptr, first_slot, GROUP, groups, D, SOFTMAX, BLOCK_N, BLOCK_D
            )
            complete = chunks > 1
    return complete, maximum, total, vector
