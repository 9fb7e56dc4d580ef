"""Device functions shared by the forward and the backward kernels of adjust pooling.

Notation (see ``amil_fast/ops/adjust_pool.py`` and the paper): ``f`` instances, ``b`` logits, ``w`` weights, ``sigma``
the weighted sums before the squash, ``s`` after it, ``s_sum`` the running sum of s, T the number of iterations.

Because the logits start at 0, those of iteration t are ``b_i = f_i . s_sum`` with ``s_sum = s^1 + ... + s^(t-1)``:
every iteration is single-query attention with the instances as keys and values, and nothing of the size of the
instances is stored.

Vectors of a bag have shape (G, BLOCK_D), G bags at a time. Offsets into tensors of instances are 64-bit; a row number
within a bag fits 32 bits (the launcher asserts it). Row strides are passed in units of UNIT elements, the largest power
of two up to 16 bytes that divides them, so that the compiler knows that rows are aligned and loads 16 bytes at a time.

``disable_licm`` keeps the compiler from hoisting out of the outer loops what the inner ones hold in registers anyway
(addresses, tiles turned to float32): with it 90-130 registers per thread, without it 190-250 for the same kernels.
"""

import triton
import triton.language as tl

# Stands for -inf where a running maximum starts: finite, so that the difference of two of them is 0 and not NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def squash_factor(sigma):
    """``n / (1 + n^2)`` with ``n = ||sigma||`` per row: ``(G, BLOCK_D) -> (G, 1)``; s = factor * sigma (Eq. 3)."""
    n_squared = tl.sum(sigma * sigma, 1, keep_dims=True)
    return tl.sqrt(n_squared) / (1 + n_squared)


@triton.jit
def squash_backward(sigma, grad):
    """The squash's Jacobian, transposed, times ``grad``: both (G, BLOCK_D).

    ``c grad + (c' / n) (sigma . grad) sigma`` with ``c = n / (1 + n^2)`` and ``c' = (1 - n^2) / (1 + n^2)^2``; 0 at 0.
    """
    n_squared = tl.sum(sigma * sigma, 1, keep_dims=True)
    dot = tl.sum(sigma * grad, 1, keep_dims=True)
    n = tl.sqrt(n_squared)
    one_plus = 1 + n_squared
    slope = (1 - n_squared) / (one_plus * one_plus) / tl.where(n > 0, n, 1)
    return tl.where(n > 0, (n / one_plus) * grad + (slope * dot) * sigma, 0)


@triton.jit
def routing_sum(sigma_ptrs, mask_d, count, D: tl.constexpr):
    """``s^1 + ... + s^count`` from the saved sigma: pointers (G, BLOCK_D) to the bags' first rows -> (G, BLOCK_D).

    Added in the order in which the forward pass adds them, so that both passes see the same logits bit for bit.
    """
    s_sum = tl.zeros(sigma_ptrs.shape, sigma_ptrs.dtype.element_ty)
    for t in range(count):
        sigma = tl.load(sigma_ptrs + t * D, mask=mask_d, other=0)
        s_sum += squash_factor(sigma) * sigma
    return s_sum


@triton.jit
def bag_extent(lengths_ptr, cu_seqlens_ptr, b, N):
    """First row of bag b in the flattened instances (int64) and its number of rows (int32). Scalars."""
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + b + 1).to(tl.int64) - start).to(tl.int32)
    else:
        start = b.to(tl.int64) * N
        if lengths_ptr is not None:
            length = tl.load(lengths_ptr + b).to(tl.int32)
        else:
            length = N
    return start, length


@triton.jit
def find_bag(cu_seqlens_ptr, row, B):
    """The bag of packed bags that row ``row`` lies in: a binary search, so that the host need not know."""
    low = B * 0
    high = B
    while high - low > 1:  # cu_seqlens[low] <= row < cu_seqlens[high]
        middle = (low + high) // 2
        below = tl.load(cu_seqlens_ptr + middle).to(tl.int64) <= row
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def bag_pointer(instances_ptr, cu_seqlens_ptr, b, start, stride_b, stride_n, UNIT: tl.constexpr):
    """Pointer to the first instance of bag b, whose first row is ``start`` if the bags are packed."""
    if cu_seqlens_ptr is not None:
        offset = start * (stride_n.to(tl.int64) * UNIT)
    else:
        offset = b.to(tl.int64) * (stride_b.to(tl.int64) * UNIT)
    return instances_ptr + offset


@triton.jit
def locate(pid, slot, lengths_ptr, cu_seqlens_ptr, B, N, num_slots, chunk_rows, min_rows, OWN_BAGS: tl.constexpr):
    """What a program of a chunk kernel works on. The grid is a function of shapes alone; the sizes are looked up here.

    The first ``num_slots`` programs each serve a slot. Padded bags have ``ceil(N / chunk_rows)`` slots each; those past
    a bag's length are idle. Packed bags have a slot at each row that is a multiple of ``chunk_rows``; a bag is shared
    evenly by the slots whose row lies in it. So ``ceil(total / chunk_rows)`` slots serve any mix of lengths, and no
    chunk has more than twice ``chunk_rows`` rows. Packed bags that no slot's row lies in are shorter than
    ``chunk_rows``: the programs after the slots' look through the bags, OWN_BAGS each, and take those.

    Returns scalars: the first bag and the end of the range of bags to look at (:func:`bag_rows`), one for a slot's
    program; the chunk's index in the bag; the number of chunks of the bag, 0 where the slot is idle and for the
    programs after the slots'; the slot of the bag's first chunk; and the number of rows of a chunk.
    """
    if pid >= num_slots:
        b = (pid - num_slots) * OWN_BAGS
        last_bag = tl.minimum(b + OWN_BAGS, B)
        index = slot * 0
        chunks = slot * 0
        first_slot = slot
        rows = N
    else:
        if cu_seqlens_ptr is not None:
            b = find_bag(cu_seqlens_ptr, slot.to(tl.int64) * chunk_rows, B)
            start, length = bag_extent(lengths_ptr, cu_seqlens_ptr, b, N)
            first_slot = ((start + chunk_rows - 1) // chunk_rows).to(tl.int32)
            chunks = ((start + length - 1) // chunk_rows).to(tl.int32) + 1 - first_slot
            rows = (length + chunks - 1) // chunks
            index = slot - first_slot
            chunks = tl.where(length > min_rows, chunks, 0)
        else:
            slots_per_bag = (N + chunk_rows - 1) // chunk_rows
            b = slot // slots_per_bag
            start, length = bag_extent(lengths_ptr, cu_seqlens_ptr, b, N)
            first_slot = b * slots_per_bag
            chunks = tl.maximum((length + chunk_rows - 1) // chunk_rows, 1)
            rows = chunk_rows
            index = slot - first_slot
            chunks = tl.where(index < chunks, chunks, 0)
        last_bag = b + 1
    return b, last_bag, index, chunks, first_slot, rows


@triton.jit
def bag_rows(pid, lengths_ptr, cu_seqlens_ptr, b, N, index, chunks, rows, num_slots, chunk_rows, min_rows):
    """The rows of bag b, out of :func:`locate`'s range, that program ``pid`` works on.

    Returns scalars: first row of the bag in the flattened instances (int64); within the bag, first and last (exclusive)
    row of the chunk, and the end of the padding to be filled after it (not above the last row, if there is none);
    whether there is anything to compute.
    """
    start, length = bag_extent(lengths_ptr, cu_seqlens_ptr, b, N)
    low = index * rows
    high = tl.minimum(low + rows, length)
    if cu_seqlens_ptr is None:
        padding = tl.minimum(low + rows, N)
        work = chunks > 0
    else:
        without_slot = (start + chunk_rows - 1) // chunk_rows * chunk_rows >= start + length
        work = tl.where(pid < num_slots, chunks > 0, without_slot & (length > min_rows))
        padding = tl.where(work, high, low)
    return start, low, high, padding, work


@triton.jit
def row_mask(mask_ptr, n, high):
    """Which of the rows n of a bag, up to ``high``, are real."""
    valid = n < high
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + n, mask=valid, other=0) != 0)
    return valid


@triton.jit
def arrive(counter_ptr, expected):
    """Counts this program in; True for the last of ``expected`` programs, which then sees what the others have stored.

    The barrier puts all of this program's stores before the atomic's release; its acquire, and the barrier by which the
    result reaches all threads, put the others' before the loads that follow (``.cg``: past the L1 cache).
    """
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
