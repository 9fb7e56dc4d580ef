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
    # Programs per multiprocessor that fit with the registers above.
    chunk_programs: int = 2
    # Products on tensor cores (16-bit instances). On chip: at least as many elements per bag, below which several bags
    # per program are better, and at most as many: 64 KB of shared memory. Iterations that the unrolled kernels serve.
    dot_least: int = 4096
    dot_most: int = 32768
    dot_features: int = 256
    dot_iterations: int = 5
    # Tiles of the chunk kernels: (features at most, elements, warps, programs per multiprocessor); of those for as many
    # features the first that fits in shared memory. Many rows per warp, since warps repeat the product with fewer than
    # 16 rows each. Forward 62-100 bytes per cycle and multiprocessor (kernels/budget.json), 64-128 KB of loads in
    # flight; the backward kernels spill with larger tiles.
    dot_tiles: tuple = (
        (128, 8192, 4, 3),
        (256, 16384, 4, 2),
        (1024, 32768, 4, 2),
        (2048, 65536, 8, 1),
        (2048, 32768, 8, 1),
    )
    dot_tiles_backward: tuple = ((128, 8192, 4, 3), (512, 16384, 4, 2), (2048, 32768, 8, 1))
    # Rows per chunk at least, so that its partial result is below 4 % of its bytes in 16 bits, and bytes at most, so
    # that the last chunks of a large input do not determine the run time.
    chunk_rows: int = 64
    chunk_bytes: int = 1 << 19
    # Chunks merged by one program: two levels of 32 reach 1024 chunks per bag.
    group: int = 32
    # One program per bag from this number of bags per multiprocessor on: a split takes T launches instead of one, while
    # streaming reads the instances again from memory instead of L2.
    stream_bags_per_multiprocessor: int = 4


DEFAULT_LIMITS = PlanLimits()


@dataclass(frozen=True)
class OnChipConfig:
    """Configuration of the on-chip kernels: ``bags`` bags per program, of at most ``block_n`` rows each.

    ``dot``: products on tensor cores, one bag per program.
    """

    bags: int
    block_n: int
    block_d: int
    num_warps: int
    dot: bool = False


@dataclass(frozen=True)
class ChunkConfig:
    """Configuration of the chunk kernels, which stream bags in chunks of ``chunk_rows`` rows.

    ``split``: bags may have several chunks; otherwise one program streams each bag. ``min_rows``: packed bags of at
    most this many rows are served on chip (-1: none). ``dot``: products on tensor cores.
    """

    block_n: int
    block_d: int
    chunk_rows: int
    min_rows: int
    split: bool
    group: int
    num_warps: int
    num_stages: int
    registers: int  # maximum per thread
    dot: bool = False

    @property
    def merge_n(self) -> int:
        """Partial results that a program merges at a time: 8 elements per thread."""
        return _clamp(8 * WARP * self.num_warps // self.block_d, 1, self.block_n)


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


def _dot_shared_memory(block_n, block_d):
    """Bytes of shared memory for a tile of 16-bit instances and the parts of the vectors that it is multiplied by."""
    return 2 * block_n * block_d + 16 * (block_n + block_d)


def _on_chip_dot(rows, block_d, backward, shared_memory, limits):
    """On-chip configuration with products on tensor cores, or None if a bag does not fit or is too small."""
    block_n = max(next_power_of_2(rows), 16)
    bag = block_n * block_d
    if not limits.dot_least <= bag <= limits.dot_most or not 16 <= block_d <= limits.dot_features:
        return None
    if _dot_shared_memory(2 * block_n, block_d) > shared_memory:  # the tile in both orientations
        return None
    # Forward: fewer warps, whose reductions are cheaper. Backward: as few as fit in registers.
    return OnChipConfig(1, block_n, block_d, _clamp(bag // (2048 if backward else 4096), 1, 8), dot=True)


def _dot_tile(block_d, backward, shared_memory, limits):
    """``(rows, warps, programs per multiprocessor)`` of the chunk kernels on tensor cores, or None if no tile fits."""
    for features, elements, num_warps, programs in limits.dot_tiles_backward if backward else limits.dot_tiles:
        block_n = _clamp(elements // block_d, 16, limits.chunk_block_n)
        if 16 <= block_d <= features and _dot_shared_memory(block_n, block_d) <= shared_memory:
            return block_n, num_warps, programs
    return None


def _chunks(packed, B, N, D, itemsize, words, min_rows, longest, dot_tile, multiprocessors, limits):
    """Chunk configuration. ``N``: rows per padded bag, or total rows of packed bags; ``longest``: of a bag."""
    block_d = next_power_of_2(D)
    if dot_tile:
        block_n, num_warps, programs = dot_tile
        num_stages, registers = 1, MAX_REGISTERS
    else:
        # float64: half as many warps and a quarter of the elements per thread
        elements = limits.chunk_elements * limits.chunk_warps * WARP // (1 if words == 1 else 2 * words)
        num_warps = next_power_of_2(max(elements, block_d) * words // (WARP * limits.chunk_elements))
        wide = block_d > limits.chunk_wide_features
        num_warps = min(num_warps, 2 * limits.chunk_warps if wide else limits.chunk_warps)
        block_n = _clamp(elements // block_d, 1, limits.chunk_block_n)
        num_stages = max(limits.chunk_stages - itemsize // 4, 1) if itemsize < 8 else 1
        programs = limits.chunk_programs
        # float64, rows that do not fill their tile, very wide rows: need more registers than two programs allow
        narrow = words == 1 and D == block_d < limits.chunk_wide_features
        registers = limits.chunk_registers if narrow else MAX_REGISTERS
    rows = N if packed else B * N
    resident = programs * multiprocessors
    waves = -(-rows * D * itemsize // (resident * limits.chunk_bytes))
    chunk_rows = max(-(-rows // (waves * resident)), limits.chunk_rows)
    chunk_rows = -(-chunk_rows // block_n) * block_n
    if not packed and (N <= chunk_rows or B >= limits.stream_bags_per_multiprocessor * multiprocessors):
        chunk_rows = N
    return ChunkConfig(
        block_n=block_n,
        block_d=block_d,
        chunk_rows=chunk_rows,
        min_rows=min_rows,
        split=longest > chunk_rows,
        group=limits.group,
        num_warps=num_warps,
        num_stages=num_stages,
        registers=min(registers, REGISTERS // (WARP * num_warps)),
        dot=dot_tile is not None,
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
    num_iters: int = 3,
    routing: bool = True,
    max_seqlen: int | None = None,
    shared_memory: int = 227 << 10,
    capability: int = 90,
) -> TritonPlan:
    """Plan for B bags of N rows each (``packed``: N rows in total) and D features of ``itemsize`` bytes.

    On chip if every bag fits. Packed bags can have any lengths that add up to N, unless ``max_seqlen`` bounds them: if
    bags of twice the mean length fit, those are served on chip and longer ones in chunks, otherwise all in chunks.
    ``routing``: the backward pass differentiates through the weights. ``shared_memory``: bytes per program.
    ``capability``: compute capability, such as 90.
    """
    limits = limits or DEFAULT_LIMITS
    block_d = next_power_of_2(D)
    words = 4 if itemsize == 8 else 1
    longest = N if not packed or max_seqlen is None else max(min(N, max_seqlen), 1)
    dot = itemsize == 2 and (routing or not backward)
    # Before Hopper, the product that writes the gradient of a bag spills registers.
    unserved = backward and capability < 90
    on_chip_dot = dot and not unserved and num_iters <= limits.dot_iterations

    def on_chip(rows):
        config = _on_chip_dot(rows, block_d, backward, shared_memory, limits) if on_chip_dot else None
        return config or _on_chip(rows, B, block_d, words, backward, multiprocessors, limits)

    config = on_chip(longest)
    if config is not None:
        return TritonPlan(config, None)
    min_rows = -1
    if packed:
        config = on_chip(max(2 * N // B, 16))
        if config is not None:
            min_rows = config.block_n
    dot_tile = _dot_tile(block_d, backward, shared_memory, limits) if dot else None
    chunks = _chunks(packed, B, N, D, itemsize, words, min_rows, longest, dot_tile, multiprocessors, limits)
    return TritonPlan(config, chunks)
