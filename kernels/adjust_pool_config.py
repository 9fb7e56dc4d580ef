"""Which kernels serve a call of adjust pooling and in which configuration: a pure function of sizes, dtype and pass.

Nothing is tuned at run time. The limits below are register, shared-memory and occupancy arithmetic for Ampere and newer
(65,536 registers and 164-228 KB of shared memory per multiprocessor, 255 registers per thread); none has been measured on a
GPU yet. ``python -m amil_fast.kernels.aot`` shows what the compiler makes of them.
"""

from dataclasses import dataclass

WARP = 32


@dataclass(frozen=True)
class Limits:
    """The constants behind :func:`pick_plan`, as a value that tests and sweeps can replace. To be measured on a GPU."""

    # A bag on chip lives in registers as float32: 64 of a thread's registers for the tile leave as many again for
    # addresses, vectors and reductions at 128 registers per thread, the most that 16 warps can have. The backward pass holds
    # the gradient beside it, so half the tile. float64 takes two registers for each number.
    on_chip_registers: int = 64
    on_chip_warps: int = 16
    # The fewer elements a thread holds, the more warps share the latency of reductions; below this, warps are mostly idle.
    on_chip_elements_per_thread: int = 32
    # Tiny bags: this many elements of several bags in one program, 4 warps of 32 elements per thread.
    tiny_elements: int = 4096
    # A tile of the chunk kernels: 32 float32 accumulators per thread beside 32 elements in flight. 8 warps x 32 x 32 elements are
    # 16 KB of float16: with 3 stages and 2 programs on a multiprocessor about 64 KB are on their way at any time, where
    # 25-40 KB hide the latency of HBM3 (4.8 TB/s / 132 multiprocessors x 0.7-1 us).
    chunk_registers: int = 32
    chunk_warps: int = 8
    chunk_stages: int = 3
    # Chunks per multiprocessor that the instances are split into: enough that ragged chunks even out.
    chunks_per_multiprocessor: int = 8
    # But no fewer rows than this in a chunk: its partial result, D float32, stays below 1 % of a chunk's bytes in float16.
    chunk_rows: int = 256
    # A chunk of a group is merged by one program: with 32 x 32 chunks two levels reach 1024 chunks.
    group: int = 32
    # One program per bag if there are at least this many bags per multiprocessor, or if the bag has at most `chunk_rows` rows.
    stream_bags_per_multiprocessor: int = 4
    # Packed bags of mixed plans: programs that look for bags too long for the chip and without a slot take this many each.
    own_bags: int = 8


@dataclass(frozen=True)
class OnChip:
    """Bags of at most ``block_n`` rows in registers, ``bags`` of them per program."""

    bags: int
    block_n: int
    block_d: int
    num_warps: int


@dataclass(frozen=True)
class Chunks:
    """Bags streamed in chunks of ``chunk_rows`` rows.

    ``split``: bags of several chunks are possible; otherwise one program streams each bag. ``min_rows``: packed bags of at most
    this many rows are served on chip (-1: none are). ``own_bags``: bags per program that looks for packed bags without a slot.
    """

    block_n: int
    block_d: int
    chunk_rows: int
    min_rows: int
    own_bags: int
    split: bool
    group: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """What a call launches: bags on chip, bags in chunks, or, for packed bags whose lengths the host can't see, both."""

    on_chip: OnChip | None
    chunks: Chunks | None


MAX_FEATURES = 16384  # 32 per thread in a tile of one row: twice the 16 of 4096, the most that is promised


def next_power_of_2(n):
    return 1 << max(n - 1, 0).bit_length()


def _previous_power_of_2(n):
    return 1 << (max(n, 1).bit_length() - 1)


def _clamp(value, low, high):
    return max(low, min(value, high))


def _on_chip(rows, B, block_d, words, backward, multiprocessors, limits):
    """The on-chip configuration for bags of up to ``rows`` rows, or None where a bag does not fit."""
    block_n = next_power_of_2(rows)
    bag = block_n * block_d
    tiles = 2 if backward else 1
    if bag * words * tiles > limits.on_chip_registers * limits.on_chip_warps * WARP:
        return None
    # Several bags per program only as far as every multiprocessor still gets a few programs.
    spare = _previous_power_of_2(B // (4 * multiprocessors))
    bags = _clamp(_previous_power_of_2(limits.tiny_elements // (words * tiles) // bag), 1, spare)
    elements = bags * bag
    per_thread = limits.on_chip_elements_per_thread // (words * tiles)
    num_warps = _clamp(next_power_of_2(elements // (WARP * per_thread)), 1, limits.on_chip_warps)
    return OnChip(bags, block_n, block_d, num_warps)


def _chunks(packed, B, N, block_d, words, min_rows, multiprocessors, limits):
    """The configuration in chunks. ``N``: rows per padded bag, or of all packed bags."""
    per_thread = limits.chunk_registers // words
    tile = per_thread * limits.chunk_warps * WARP
    num_warps = limits.chunk_warps
    if block_d > tile:
        num_warps = min(next_power_of_2(block_d // (per_thread * WARP)), 16)
    block_n = _clamp(tile // block_d, 1, 1024)
    rows = N if packed else B * N
    chunk_rows = max(limits.chunk_rows, next_power_of_2(rows // (limits.chunks_per_multiprocessor * multiprocessors)))
    if not packed and (N <= chunk_rows or B >= limits.stream_bags_per_multiprocessor * multiprocessors):
        chunk_rows = N
    return Chunks(
        block_n=block_n,
        block_d=block_d,
        chunk_rows=chunk_rows,
        min_rows=min_rows,
        own_bags=limits.own_bags if min_rows >= 0 else 1,
        split=N > chunk_rows,
        group=limits.group,
        num_warps=num_warps,
        num_stages=limits.chunk_stages,
    )


def pick_plan(packed, B, N, D, itemsize, backward, multiprocessors=132, limits=None):
    """The plan for ``B`` bags of ``N`` rows each, or, if ``packed``, of ``N`` rows in all; ``D`` features of ``itemsize`` bytes.

    On chip if every bag fits. Packed bags can have any lengths that add up to N: if bags of twice the mean length fit, those are served
    on chip and the longer ones in chunks, otherwise all in chunks.
    """
    limits = limits or Limits()
    block_d = next_power_of_2(D)
    words = 2 if itemsize == 8 else 1
    on_chip = _on_chip(N, B, block_d, words, backward, multiprocessors, limits)
    if on_chip is not None:
        return Plan(on_chip, None)
    min_rows = -1
    if packed:
        on_chip = _on_chip(max(2 * N // B, 16), B, block_d, words, backward, multiprocessors, limits)
        if on_chip is not None:
            min_rows = on_chip.block_n
    return Plan(on_chip, _chunks(packed, B, N, block_d, words, min_rows, multiprocessors, limits))
