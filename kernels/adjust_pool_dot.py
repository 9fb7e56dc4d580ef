"""Device functions for products with 16-bit instances on tensor cores.

Instances are exact in 16 bits, the vectors that they meet are not. A vector is split into high, middle and low parts of
16 bits, which become adjacent columns of the narrow side of the product; the sum of these columns is the product with
the vector. Three parts carry the 24 bits of a float32. The range of float16 is too small for the lower parts, so that
vectors are multiplied by a power of two there, an exact operation, and the products divided by it.

The narrow side has WIDTH = 8 columns, the width of ``mma.sync.m16n8k16``: a wider one makes Triton choose the
instructions of warp groups on sm_90 and sm_100, which take more instructions for columns that are mostly empty (64 x
128, sm_90: 3,744 instead of 3,488 in the forward pass), and which Triton 3.7 fails to compile for sm_100.
"""

import os

import triton
import triton.language as tl

WIDTH = tl.constexpr(8)
# Columns of an outer product that writes a gradient tile, and the terms that they hold: three columns each.
OUTER = tl.constexpr(16)
OUTER_TERMS = tl.constexpr(5)
# Triton's interpreter stores bfloat16 as integers and multiplies these (triton/runtime/interpreter.py, create_dot).
# Products of 16-bit numbers are exact in float32, hence so is the conversion.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def in_shared_memory(f):
    """``f``, unchanged, as an operand of products in both orientations that is to be read from shared memory.

    The assembler removes the move; what counts is that the compiler takes it for an operation with effects. It would
    otherwise convert the operand to its layout in registers where it is loaded, in slices, each between two barriers
    (forward on chip, 256 x 128: 32 barriers and 7,312 instead of 7,040 warp instructions; streamed, 512 features: 2,040
    instead of 1,708 per tile).
    """
    if not INTERPRETED:
        f = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [f], f.dtype, is_pure=False, pack=2)
    return f


@triton.jit
def product(a, b):
    """Matrix product of 16-bit matrices, accumulated in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, out_dtype=tl.float32)


@triton.jit
def add_product(acc, a, b):
    """``acc`` plus the product of 16-bit matrices."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def exp(x):
    """``exp(x)`` in float32, 0 instead of subnormal results, for which ``tl.exp`` takes three more instructions."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def split_unit(bound, dtype: tl.constexpr):
    """``(unit, 1 / unit)``: a vector whose elements are at most ``bound`` is divided by unit, a power of two.

    1 for bfloat16; for float16, the quotient is below 2^15, and its lower parts are not subnormal unless the element is
    smaller than ``bound`` by a factor of 2^17.
    """
    if dtype == tl.float16:
        bits = tl.maximum(bound, 7.9e-31).to(tl.int32, bitcast=True) & 0x7F800000  # 2^-100: the reciprocal is finite
        unit = (bits - 0x07000000).to(tl.float32, bitcast=True)
        inverse = (0x7F000000 - bits + 0x07000000).to(tl.float32, bitcast=True)
    else:
        unit = 1.0
        inverse = 1.0
    return unit, inverse


@triton.jit
def magnitude(x, dtype: tl.constexpr):
    """Bound for :func:`split_unit`, the largest absolute value of ``x``; computed for float16 only."""
    bound = 1.0
    if dtype == tl.float16:
        bound = tl.max(tl.abs(x), 0)
    return bound


@triton.jit
def split(x, dtype: tl.constexpr):
    """High, middle and low parts of ``x``, of which each is rounded to ``dtype``."""
    high = x.to(dtype)
    rest = x - high.to(tl.float32)
    middle = rest.to(dtype)
    low = (rest - middle.to(tl.float32)).to(dtype)
    return high, middle, low


@triton.jit
def columns_8(a, b, c, d, e, f, g, h):
    """Matrix (K, 8) with the given columns (K,)."""
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.reshape(tl.join(even, odd), [a.shape[0], 8])


@triton.jit
def split_columns(x, dtype: tl.constexpr):
    """Parts of ``x (K,)`` as columns of a (K, WIDTH) matrix, the others 0: the row sums of the product are wanted."""
    high, middle, low = split(x, dtype)
    c = tl.arange(0, WIDTH)[None, :]
    zero = tl.zeros([x.shape[0], WIDTH], dtype)
    columns = tl.where(c == 2, low[:, None], zero)
    columns = tl.where(c == 1, middle[:, None], columns)
    return tl.where(c == 0, high[:, None], columns)


@triton.jit
def column(x, dtype: tl.constexpr):
    """``x (K,)``, exact in ``dtype``, as the first column of a (K, WIDTH) matrix, the others 0."""
    c = tl.arange(0, WIDTH)[None, :]
    return tl.where(c == 0, x[:, None], 0).to(dtype)


@triton.jit
def split_two(x, y, dtype: tl.constexpr):
    """Parts of ``x`` and ``y (K,)`` as columns 0-2 and 4-6 of a (K, WIDTH) matrix; see :func:`column_sums`."""
    c = tl.arange(0, WIDTH)[None, :]
    z = tl.where(c < 4, x[:, None], y[:, None])
    high = z.to(dtype)
    rest = z - high.to(tl.float32)
    middle = rest.to(dtype)
    low = (rest - middle.to(tl.float32)).to(dtype)
    part = c % 4
    columns = tl.where(part == 2, low, tl.zeros_like(low))
    columns = tl.where(part == 1, middle, columns)
    return tl.where(part == 0, high, columns)


@triton.jit
def column_sums(acc):
    """``(sum of columns 0-3, sum of columns 4-7)`` of ``acc (N, WIDTH)``, each (N,)."""
    c = tl.arange(0, WIDTH)[None, :]
    return tl.sum(tl.where(c < 4, acc, 0), 1), tl.sum(tl.where(c < 4, 0, acc), 1)


@triton.jit
def columns_16(a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q):
    """Matrix (K, 16) with the given columns (K,), in an order that is the same for all matrices."""
    left = columns_8(a, b, c, d, e, f, g, h)
    right = columns_8(i, j, k, m, n, o, p, q)
    return tl.reshape(tl.join(left, right), [a.shape[0], 16])


@triton.jit
def halves(x):
    """High and low bfloat16 parts of ``x``; their sum has a relative error of 2^-17, below the rounding of 16 bits."""
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit
def outer_product(rows, vectors):
    """``sum_k rows[k] vectors[k]'`` of tuples of ``(N,)`` and ``(BLOCK_D,)``: a (N, BLOCK_D) tile.

    Each term takes three columns, (high, high, low) times (high, low, high). bfloat16 for float16 gradients too: the
    product contains no instances, and its range is that of float32.
    """
    zero = tl.zeros_like(rows[0])
    zero_v = tl.zeros_like(vectors[0])
    grad = tl.zeros([rows[0].shape[0], vectors[0].shape[0]], tl.float32)
    for k in tl.static_range(0, len(rows), OUTER_TERMS):
        a0, b0 = halves(rows[k])
        a1, b1 = halves(rows[k + 1]) if k + 1 < len(rows) else halves(zero)
        a2, b2 = halves(rows[k + 2]) if k + 2 < len(rows) else halves(zero)
        a3, b3 = halves(rows[k + 3]) if k + 3 < len(rows) else halves(zero)
        a4, b4 = halves(rows[k + 4]) if k + 4 < len(rows) else halves(zero)
        z = zero.to(tl.bfloat16)
        left = columns_16(a0, a0, b0, a1, a1, b1, a2, a2, b2, a3, a3, b3, a4, a4, b4, z)
        a0, b0 = halves(vectors[k])
        a1, b1 = halves(vectors[k + 1]) if k + 1 < len(rows) else halves(zero_v)
        a2, b2 = halves(vectors[k + 2]) if k + 2 < len(rows) else halves(zero_v)
        a3, b3 = halves(vectors[k + 3]) if k + 3 < len(rows) else halves(zero_v)
        a4, b4 = halves(vectors[k + 4]) if k + 4 < len(rows) else halves(zero_v)
        z = zero_v.to(tl.bfloat16)
        right = columns_16(a0, b0, a0, a1, b1, a1, a2, b2, a2, a3, b3, a3, a4, b4, a4, z)
        grad += product(left, tl.trans(right))
    return grad
