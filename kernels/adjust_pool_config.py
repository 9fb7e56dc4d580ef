"""Which kernels serve a call of adjust pooling and in which configuration: a pure function of sizes, dtype and pass.

Nothing is tuned at run time. The limits below are register, shared-memory and occupancy arithmetic for Ampere and newer
(65,536 registers and 164-228 KB of shared memory per multiprocessor, 255 registers per thread); none has been measured
on a GPU yet. ``python -m amil_fast.kernels.aot`` shows what the compiler makes of them.
"""

from dataclasses import dataclass

WARP = 32


@dataclass(frozen=True)
class Limits:
    """The constants behind :func:`pick_plan`, as a value that tests and sweeps can replace. To be measured on a GPU.

    Numbers of elements are of at most 4 bytes; of float64 a quarter as many.
    """

    # A bag on chip lives in registers, 16 warps at most, 128 registers per thread then. Forward: 64 elements per thread
    # leave as many registers for vectors, addresses and reductions, and the compiler keeps within 128. Backward, the
    # float32 gradient and three vectors stand beside the tile: it spills from 32 elements per thread on.
    on_chip_warps: int = 16
    on_chip_forward: int = 64
    on_chip_backward: int = 16
    # Fewer elements per thread if the bag is smaller than that: more warps share the reductions, and 32 elements take
    # 64-80 registers, so that 3 or 4 programs of 8 warps fit on a multiprocessor and one loads while others compute.
    on_chip_typical: int = 32
    # Tiny bags: this many elements of several bags in one program, 4 warps of 32.
    tiny_elements: int = 4096
    # A tile of the chunk kernels: 16 elements per thread, 8 warps. Accumulators, vectors and addresses then fit in the
    # 128 registers that let two programs share a multiprocessor; 32 elements spill. With 4 stages, 3 tiles of 8 KB are
    # under way per program (float32: 3 stages, 2 tiles of 16 KB), together 48-64 KB per multiprocessor, where 25-40 KB
    # hide the latency of HBM3 (4.8 TB/s over 132 multiprocessors times 0.7-1 us).
    chunk_elements: int = 16
    chunk_warps: int = 8
    chunk_stages: int = 4
    chunk_registers: int = 128
    # Above this many features twice the warps, so that a row fits in registers.
    chunk_wide_features: int = 4096
    # Rows of a tile at most; more are of no use to the loads, and every row has its own maximum and sums.
    chunk_block_n: int = 256
    # Chunks per multiprocessor that the instances are split into: enough that ragged chunks even out.
    chunks_per_multiprocessor: int = 8
    # But no fewer rows in a chunk than this: its partial result, D float32, is then below 1 % of its bytes in float16.
    chunk_rows: int = 256
    # Chunks whose results one program merges: two levels of 32 reach 1024 chunks per bag.
    group: int = 32
    # One program per bag from this many bags per multiprocessor on: with splitting, T launches instead of one, and the
    # instances are read again from memory instead of the L2 cache.
    stream_bags_per_multiprocessor: int = 4
    # Mixed plans: bags per program of those that look for packed bags too long for the chip and without a slot.
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

    ``split``: bags of several chunks are possible; otherwise one program streams each bag. ``min_rows``: packed bags of
    at most this many rows are served on chip (-1: none are). ``own_bags``: bags per program that looks for packed bags
    without a slot.
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
    registers: int  # per thread at most


@dataclass(frozen=True)
class Plan:
    """What a call launches: bags on chip, bags in chunks, or both: packed bags, whose lengths the host can't see."""

    on_chip: OnChip | None
    chunks: Chunks | None


MAX_REGISTERS = 255  # of a thread
REGISTERS = 65536  # of a multiprocessor
# The largest tile of one row, 32 elements for each of 512 threads. Above 4096 the backward kernels spill registers.
MAX_FEATURES = 16384


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
    most = (limits.on_chip_backward if backward else limits.on_chip_forward) // words
    if bag > most * limits.on_chip_warps * WARP:
        return None
    # Several bags per program only as far as every multiprocessor still gets a few programs.
    spare = _previous_power_of_2(B // (4 * multiprocessors))
    bags = _clamp(_previous_power_of_2(limits.tiny_elements // (2 if backward else 1) // words // bag), 1, spare)
    per_thread = min(most, limits.on_chip_typical // words)
    num_warps = _clamp(next_power_of_2(bags * bag // (WARP * per_thread)), 1, limits.on_chip_warps)
    return OnChip(bags, block_n, block_d, num_warps)


def _chunks(packed, B, N, D, itemsize, words, min_rows, multiprocessors, limits):
    """The configuration in chunks. ``N``: rows per padded bag, or of all packed bags."""
    block_d = next_power_of_2(D)
    # float64: half as many warps and a quarter of the elements per thread
    tile = limits.chunk_elements * limits.chunk_warps * WARP // (1 if words == 1 else 2 * words)
    num_warps = next_power_of_2(max(tile, block_d) * words // (WARP * limits.chunk_elements))
    num_warps = min(num_warps, limits.chunk_warps if block_d <= limits.chunk_wide_features else 2 * limits.chunk_warps)
    rows = N if packed else B * N
    chunk_rows = max(limits.chunk_rows, next_power_of_2(rows // (limits.chunks_per_multiprocessor * multiprocessors)))
    if not packed and (N <= chunk_rows or B >= limits.stream_bags_per_multiprocessor * multiprocessors):
        chunk_rows = N
    # float64, rows that don't fill their tile: the compiler needs more registers than fit twice
    registers = limits.chunk_registers if words == 1 and D == block_d else MAX_REGISTERS
    return Chunks(
        block_n=_clamp(tile // block_d, 1, limits.chunk_block_n),
        block_d=block_d,
        chunk_rows=chunk_rows,
        min_rows=min_rows,
        own_bags=limits.own_bags if min_rows >= 0 else 1,
        split=N > chunk_rows,
        group=limits.group,
        num_warps=num_warps,
        num_stages=max(limits.chunk_stages - itemsize // 4, 1) if itemsize < 8 else 1,
        registers=min(registers, REGISTERS // (WARP * num_warps)),
    )


def pick_plan(packed, B, N, D, itemsize, backward, multiprocessors=132, limits=None):
    """The plan for B bags of N rows each, or, if ``packed``, of N rows in all; D features of ``itemsize`` bytes.

    On chip if every bag fits. Packed bags can have any lengths that add up to N: if bags of twice the mean length fit,
    those are served on chip and the longer ones in chunks, otherwise all in chunks.
    """
    limits = limits or Limits()
    block_d = next_power_of_2(D)
    words = 4 if itemsize == 8 else 1
    on_chip = _on_chip(N, B, block_d, words, backward, multiprocessors, limits)
    if on_chip is not None:
        return Plan(on_chip, None)
    min_rows = -1
    if packed:
        on_chip = _on_chip(max(2 * N // B, 16), B, block_d, words, backward, multiprocessors, limits)
        if on_chip is not None:
            min_rows = on_chip.block_n
    return Plan(on_chip, _chunks(packed, B, N, D, itemsize, words, min_rows, multiprocessors, limits))
