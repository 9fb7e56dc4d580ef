"""Device functions shared by the forward and backward kernels of adjust pooling.

Notation (Eq. 2-5; see ``amil_fast/ops/adjust_pool.py``): ``f`` instances, ``b`` logits, ``w`` weights, ``sigma`` the
weighted sum before the squash, ``s`` after it, ``s_sum`` the running sum of ``s``, ``T`` the number of iterations.

Since the logits start at 0, the logits of iteration t are ``b_i = f_i . s_sum`` with ``s_sum = s^1 + ... + s^(t-1)``.
Every iteration is therefore single-query attention with the instances as both keys and values, and nothing of the size
of the instances is stored.

Per-bag vectors have shape (G, BLOCK_D) for G bags at a time. Offsets into the instances are 64-bit; a row index within
a bag fits in 32 bits (asserted by the launcher). Row strides are passed in units of UNIT elements, the largest power of
two up to 16 bytes that divides them, so that the compiler can prove row alignment and emit 16-byte loads.

``disable_licm`` prevents the compiler from hoisting values out of the outer loops that the inner loops keep in
registers anyway (addresses, tiles converted to float32): 90-130 registers per thread with it, 190-250 without it.
"""

import triton
import triton.language as tl

# Initial value of a running maximum: finite instead of -inf, so that the difference of two is 0 instead of NaN.
LOWEST = tl.constexpr(-3.0e38)
# Smallest norm with a finite reciprocal in float32.
SMALLEST = tl.constexpr(1.2e-38)


@triton.jit
def norms(sigma):
    """``(n, n^2)`` with ``n = ||sigma||`` per row, ``(G, BLOCK_D) -> (G, 1)``.

    The sum of squares is scaled by 2^16: in float32 it keeps its precision down to norms of 4e-22 (square roots flush
    subnormal numbers), and overflows from 7e16 on.
    """
    scaled = sigma * 256
    total = tl.sum(scaled * scaled, 1, keep_dims=True)
    return tl.sqrt(total) * 0.00390625, total * 1.52587890625e-05


@triton.jit
def squash_factor(sigma):
    """``n / (1 + n^2)`` with ``n = ||sigma||`` per row, ``(G, BLOCK_D) -> (G, 1)``: s = factor * sigma (Eq. 3)."""
    n, n_squared = norms(sigma)
    return n / (1 + n_squared)


@triton.jit
def squash_backward(sigma, grad):
    """Product of the squash's transposed Jacobian and ``grad``, both (G, BLOCK_D).

    ``c grad + (c' / n) (sigma . grad) sigma`` with ``c = n / (1 + n^2)`` and ``c' = (1 - n^2) / (1 + n^2)^2``; 0 for
    subnormal n.
    """
    n, n_squared = norms(sigma)
    dot = tl.sum(sigma * grad, 1, keep_dims=True)
    one_plus = 1 + n_squared
    # No higher power of n than its square is formed: it would overflow, and the terms along sigma would not cancel.
    radial = (1 - n_squared) / one_plus / one_plus * (dot / tl.where(n > SMALLEST, n, 1))
    return tl.where(n > SMALLEST, (n / one_plus) * grad + radial * sigma, 0)


@triton.jit
def vector_norm(sigma):
    """:func:`norms` of one vector ``(BLOCK_D,)``: scalars."""
    scaled = sigma * 256
    total = tl.sum(scaled * scaled, 0)
    return tl.sqrt(total) * 0.00390625, total * 1.52587890625e-05


@triton.jit
def vector_squash(sigma):
    """``s = sigma n / (1 + n^2)`` with ``n = ||sigma||`` of one vector ``(BLOCK_D,)`` in float32 (Eq. 3)."""
    n, n_squared = vector_norm(sigma)
    return sigma * (n / (1 + n_squared))


@triton.jit
def vector_squash_backward(sigma, grad):
    """``(s, J' grad)`` of one vector ``(BLOCK_D,)`` in float32: the squash, and its transposed Jacobian times grad."""
    n, n_squared = vector_norm(sigma)
    dot = tl.sum(sigma * grad, 0)
    inverse = 1 / (1 + n_squared)
    factor = n * inverse
    radial = (1 - n_squared) * inverse * inverse * (dot / tl.where(n > SMALLEST, n, 1))
    return factor * sigma, tl.where(n > SMALLEST, factor * grad + radial * sigma, 0)


@triton.jit
def routing_sum(sigma_ptrs, mask_d, count, D: tl.constexpr):
    """``s^1 + ... + s^count`` from the saved sigma; ``sigma_ptrs (G, BLOCK_D)`` point to the first row of each bag.

    Sums in the order of the forward pass, so that both passes compute bit-identical logits.
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
def on_chip_rows(
    mask_ptr, lengths_ptr, cu_seqlens_ptr, b, B, N, BAGS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Rows of the bags ``b (BAGS,)`` that the on-chip kernels serve; packed bags longer than BLOCK_N are excluded.

    Returns the first row of each bag in the flattened instances (BAGS,), int64; the mask of the bags served (BAGS,);
    and, each (BAGS, BLOCK_N): the row indices, the mask of valid rows, and the mask of rows that exist in memory (valid
    rows, masked rows and padding).
    """
    mask_b = b < B
    n = tl.arange(0, BLOCK_N)
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + b, mask=mask_b, other=0).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + b + 1, mask=mask_b, other=0).to(tl.int64) - start).to(tl.int32)
        mask_b = mask_b & (length <= BLOCK_N)
    else:
        start = b.to(tl.int64) * N
        length = tl.zeros([BAGS], tl.int32) + N
        if lengths_ptr is not None:
            length = tl.load(lengths_ptr + b, mask=mask_b, other=0).to(tl.int32)
    valid = (n[None, :] < length[:, None]) & mask_b[:, None]
    stored = valid
    if cu_seqlens_ptr is None:
        stored = (n < N)[None, :] & mask_b[:, None]
    rows = start[:, None] + n[None, :]
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + rows, mask=valid, other=0) != 0)
    return start, mask_b, rows, valid, stored


@triton.jit
def bag_pointer(instances_ptr, cu_seqlens_ptr, b, start, stride_b, stride_n, UNIT: tl.constexpr):
    """Pointer to the first instance of bag b; ``start`` is the first row of a packed bag."""
    if cu_seqlens_ptr is not None:
        offset = start * (stride_n.to(tl.int64) * UNIT)
    else:
        offset = b.to(tl.int64) * (stride_b.to(tl.int64) * UNIT)
    return instances_ptr + offset


@triton.jit
def row_mask(mask_ptr, n, high):
    """Mask of the valid rows among rows ``n`` of a bag, with ``high`` as the exclusive upper bound."""
    valid = n < high
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + n, mask=valid, other=0) != 0)
    return valid


@triton.jit
def fill(ptr, low, high, value, BLOCK: tl.constexpr):
    """Stores ``value`` to elements low..high (int64)."""
    for i in tl.range(low, high, BLOCK):
        offsets = i + tl.arange(0, BLOCK)
        tl.store(ptr + offsets, tl.full([BLOCK], value, tl.float32).to(ptr.dtype.element_ty), mask=offsets < high)


@triton.jit
def zero_rest(ptr, cu_seqlens_ptr, B, N, D: tl.constexpr):
    """Zeros this program's share of the rows of D elements after the last packed bag: a buffer may be longer."""
    end = tl.load(cu_seqlens_ptr + B).to(tl.int64)
    if end < N:
        share = (N - end + tl.num_programs(0) - 1) // tl.num_programs(0)
        low = tl.minimum(end + tl.program_id(0) * share, N)
        fill(ptr, low * D, tl.minimum(low + share, N) * D, 0, 1024)
