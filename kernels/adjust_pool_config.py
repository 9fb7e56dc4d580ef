"""Kernel selection and launch configuration of adjust pooling: a pure function of sizes, dtype and pass.

Nothing is tuned at run time. The limits below follow from register, shared-memory and occupancy arithmetic for Ampere
and newer (65,536 registers and 164-228 KB of shared memory per multiprocessor, 255 registers per thread); none has been
measured on a GPU yet. ``python -m amil_fast.kernels.aot`` reports the resources of the compiled kernels.
"""

from dataclasses import dataclass

WARP = 32


@dataclass(frozen=True)
class PlanLimits:
    """Thresholds of :func:`pick_plan`, replaceable in tests and sweeps. To be measured on a GPU.

    Element counts are for elements of at most 4 bytes; a quarter of them for float64.
    """

    # On-chip bags stay in registers: at most 16 warps, hence 128 registers per thread. Forward: 64 elements per thread
    # leave the same number of registers for vectors, addresses and reductions; the compiler stays within 128. Backward:
    # the float32 gradient and three vectors are live beside the tile; spills from 32 elements per thread.
    on_chip_warps: int = 16
    on_chip_forward: int = 64
    on_chip_backward: int = 16
    # Elements per thread of bags below that limit: more warps share the reductions, and 32 elements take 64-80
    # registers, so that 3 or 4 programs of 8 warps fit on a multiprocessor and loads overlap with computation.
    on_chip_typical: int = 32
    # Tiny bags: elements of several bags in one program, 4 warps x 32.
    tiny_elements: int = 4096
    # Tile of the chunk kernels: 16 elements per thread, 8 warps. Accumulators, vectors and addresses then fit in the
    # 128 registers that allow two programs per multiprocessor; 32 elements spill. With 4 stages, 3 tiles of 8 KB are
    # in flight per program (float32: 3 stages, 2 tiles of 16 KB), 48-64 KB per multiprocessor; 25-40 KB hide the
    # latency of HBM3 (4.8 TB/s / 132 multiprocessors x 0.7-1 us).
    chunk_elements: int = 16
    chunk_warps: int = 8
    chunk_stages: int = 4
    chunk_registers: int = 128
    # Above this number of features twice the warps, so that a row fits in registers.
    chunk_wide_features: int = 4096
    # Maximum rows of a tile; more do not improve the loads, and each row has its own maximum and sums.
    chunk_block_n: int = 256
    # Chunks per multiprocessor: enough to balance ragged chunks.
    chunks_per_multiprocessor: int = 8
    # Minimum rows of a chunk: its partial result, D float32, then stays below 1 % of its bytes in float16.
    chunk_rows: int = 256
    # Chunks merged by one program: two levels of 32 reach 1024 chunks per bag.
    group: int = 32
    # One program per bag from this number of bags per multiprocessor on: a split takes T launches instead of one, while
    # streaming reads the instances again from memory instead of L2.
    stream_bags_per_multiprocessor: int = 4
    # Mixed plans: bags scanned per program for packed bags that are too long for the on-chip kernel and have no slot.
    own_bags: int = 8


@dataclass(frozen=True)
class OnChipConfig:
    """Configuration of the on-chip kernels: ``bags`` bags per program, of at most ``block_n`` rows each."""

    bags: int
    block_n: int
    block_d: int
    num_warps: int


@dataclass(frozen=True)
class ChunkConfig:
    """Configuration of the chunk kernels, which stream bags in chunks of ``chunk_rows`` rows.

    ``split``: bags may have several chunks; otherwise one program streams each bag. ``min_rows``: packed bags of at
    most this many rows are served on chip (-1: none). ``own_bags``: bags scanned per program for packed bags without a
    slot.
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
    registers: int  # maximum per thread


@dataclass(frozen=True)
class TritonPlan:
    """Kernels that a call launches: on-chip, chunks, or both (packed bags, whose lengths are unknown to the host)."""

    on_chip: OnChipConfig | None
    chunks: ChunkConfig | None


MAX_REGISTERS = 255  # per thread
REGISTERS = 65536  # per multiprocessor
# Largest tile of one row: 32 elements x 512 threads. Above 4096 features the backward kernels spill registers.
MAX_FEATURES = 16384


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def _previous_power_of_2(n):
    return 1 << (max(n, 1).bit_length() - 1)


def _clamp(value, low, high):
    return max(low, min(value, high))


def _on_chip(rows, B, block_d, words, backward, multiprocessors, limits):
    """On-chip configuration for bags of at most ``rows`` rows, or None if a bag does not fit."""
    block_n = next_power_of_2(rows)
    bag = block_n * block_d
    most = (limits.on_chip_backward if backward else limits.on_chip_forward) // words
    if bag > most * limits.on_chip_warps * WARP:
        return None
    # Several bags per program only while every multiprocessor still gets a few programs.
    spare = _previous_power_of_2(B // (4 * multiprocessors))
    bags = _clamp(_previous_power_of_2(limits.tiny_elements // (2 if backward else 1) // words // bag), 1, spare)
    per_thread = min(most, limits.on_chip_typical // words)
    num_warps = _clamp(next_power_of_2(bags * bag // (WARP * per_thread)), 1, limits.on_chip_warps)
    return OnChipConfig(bags, block_n, block_d, num_warps)


def _chunks(packed, B, N, longest, D, itemsize, words, min_rows, multiprocessors, limits):
    """Chunk configuration. ``N``: rows per padded bag, or total rows of packed bags; ``longest``: bound of a bag's."""
    block_d = next_power_of_2(D)
    # float64: half as many warps and a quarter of the elements per thread
    tile = limits.chunk_elements * limits.chunk_warps * WARP // (1 if words == 1 else 2 * words)
    num_warps = next_power_of_2(max(tile, block_d) * words // (WARP * limits.chunk_elements))
    num_warps = min(num_warps, limits.chunk_warps if block_d <= limits.chunk_wide_features else 2 * limits.chunk_warps)
    rows = N if packed else B * N
    chunk_rows = max(limits.chunk_rows, next_power_of_2(rows // (limits.chunks_per_multiprocessor * multiprocessors)))
    if not packed and (N <= chunk_rows or B >= limits.stream_bags_per_multiprocessor * multiprocessors):
        chunk_rows = N
    # float64, or rows that do not fill their tile: needs more registers than two programs per multiprocessor allow
    registers = limits.chunk_registers if words == 1 and D == block_d else MAX_REGISTERS
    return ChunkConfig(
        block_n=_clamp(tile // block_d, 1, limits.chunk_block_n),
        block_d=block_d,
        chunk_rows=chunk_rows,
        min_rows=min_rows,
        own_bags=limits.own_bags if min_rows >= 0 else 1,
        split=longest > chunk_rows,
        group=limits.group,
        num_warps=num_warps,
        num_stages=max(limits.chunk_stages - itemsize // 4, 1) if itemsize < 8 else 1,
        registers=min(registers, REGISTERS // (WARP * num_warps)),
    )


def pick_plan(
    packed: bool,
    B: int,
    N: int,
    D: int,
    itemsize: int,
    backward: bool,
    multiprocessors: int = 132,
    limits: PlanLimits | None = None,
    max_seqlen: int | None = None,
) -> TritonPlan:
    """Plan for B bags of N rows each (``packed``: N rows in total) and D features of ``itemsize`` bytes.

    On chip if every bag fits, according to ``max_seqlen`` for packed bags, otherwise to N. Packed bags of unknown
    lengths: if bags of twice the mean length fit, those are served on chip and longer ones in chunks, otherwise all in
    chunks.
    """
    limits = limits or PlanLimits()
    block_d = next_power_of_2(D)
    words = 4 if itemsize == 8 else 1
    longest = N if max_seqlen is None else min(max(max_seqlen, 1), N)
    on_chip = _on_chip(longest, B, block_d, words, backward, multiprocessors, limits)
    if on_chip is not None:
        return TritonPlan(on_chip, None)
    min_rows = -1
    if packed:
        typical = min(max(2 * N // B, 16), longest)
        on_chip = _on_chip(typical, B, block_d, words, backward, multiprocessors, limits)
        if on_chip is not None:
            min_rows = on_chip.block_n
    chunks = _chunks(packed, B, N, longest, D, itemsize, words, min_rows, multiprocessors, limits)
    return TritonPlan(on_chip, chunks)
