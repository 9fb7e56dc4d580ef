"""Shared by the GPU scripts: device timing, machine information, time budget, tables and result files.

Timing. Several copies of a call, each with its own inputs, are captured in one CUDA graph, for our kernels and for the
rivals alike, so that device time is measured without host time (launch overhead is measured separately). Calls that
cannot be captured are timed as they are, and the row says so. CUDA events surround a replay; the time is divided by the
number of copies. The inputs of all copies add up to 16 times the L2 cache: when an input is reused nothing of it is
left in L2, and the write-back of one call is paid for by the next, as in a steady state. (Flushing the cache before
every call would leave it full of dirty lines or hide the write-back of the last L2-sized output, and the graph launch
would dominate a single short call.)

Rivals are timed in turns in one process. A figure is the median over the turns of the medians of a turn's repetitions,
its spread the extremes over the turns, and a ratio the median of the ratios of the turns.

Without a GPU, ``--dry-run`` runs the same scripts on tiny CPU tensors with the Triton kernels in the interpreter. The
figures of a dry run are meaningless; its results contain ``"dry_run": true``.

Import this module before anything that imports Triton: it sets up the interpreter for dry runs.
"""

import argparse
import gc
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import amil_fast
from amil_fast.utils.files import write_json

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for `benchmarks` and `tests`
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
TURNS = 5


def parse(description, arguments=None, minutes=8.0, extend=None):
    """Parses the options common to all scripts and those added by ``extend(parser)``; creates the output folder."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON and logs")
    parser.add_argument("--minutes", type=float, default=minutes, help="time limit (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to test the script")
    if extend is not None:
        extend(parser)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


class Budget:
    """A limit on wall-clock time, in minutes from construction."""

    def __init__(self, minutes):
        self.end = time.monotonic() + 60 * minutes

    def left(self):
        """Seconds left."""
        return self.end - time.monotonic()

    def over(self):
        return self.left() <= 0


class PreparedCalls:
    """Calls ready to be timed: ``run`` executes ``count`` calls; ``how``: graph, cpu, or why they were not captured."""

    def __init__(self, run, count, how):
        self.run, self.count, self.how = run, count, how


class CudaDevice:
    """Capture, timing and memory on a GPU. All work runs on one side stream, as required by graph capture."""

    name = "cuda"

    def __init__(self):
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device; use --dry-run to test the script")
        self.device = torch.device("cuda")
        properties = torch.cuda.get_device_properties(0)
        self.multiprocessors = properties.multi_processor_count
        self.l2_bytes = properties.L2_cache_size
        # A backward pass runs on the stream of its forward pass; on a side stream, either can be captured.
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        gc.freeze()  # every capture runs the garbage collector; exempt the imported modules

    def synchronize(self):
        torch.cuda.synchronize()

    def free_bytes(self):
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def copies(self, size, most=64):
        """Number of inputs of ``size`` bytes that add up to 16 times the L2 cache."""
        return max(1, min(most, -(-16 * self.l2_bytes // size)))

    def prepare(self, calls):
        """Captures the calls in one CUDA graph; calls that cannot be captured run eagerly."""
        for call in calls:  # compilation, module loading, autotuning
            call()
            call()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                for call in calls:
                    call()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a rival that cannot be captured
            self.synchronize()
            return PreparedCalls(lambda: [call() for call in calls], len(calls), f"not captured: {short(error)}")
        return PreparedCalls(graph.replay, len(calls), "graph")

    def block(self, work, repetitions):
        """Seconds per call of each of ``repetitions`` runs of ``work``."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
        events[0].record()
        for event in events[1:]:
            work.run()
            event.record()
        self.synchronize()
        pairs = itertools.pairwise(events)
        return [start.elapsed_time(end) * 1e-3 / work.count for start, end in pairs]

    def peak(self, call):
        """Peak bytes allocated by a call, excluding its outputs."""
        call()
        self.free_bytes()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = call()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return peak - sum(t.nbytes for t in outputs)


class CpuDevice:
    """Stands in for the GPU in a dry run."""

    name = "cpu"
    multiprocessors = 2
    l2_bytes = 1 << 10

    def __init__(self):
        self.device = torch.device("cpu")

    def synchronize(self):
        pass

    def free_bytes(self):
        return 1 << 33

    def copies(self, size, most=64):
        return 2

    def prepare(self, calls):
        return PreparedCalls(lambda: [call() for call in calls], len(calls), "cpu")

    def block(self, work, repetitions):
        start = time.perf_counter()
        work.run()
        return [(time.perf_counter() - start) / work.count]

    def peak(self, call):
        return 0 * sum(t.nbytes for t in call())


def open_device(options):
    return CpuDevice() if options.dry_run else CudaDevice()


def in_turns(device, works, turns=TURNS, seconds=0.05):
    """Times :class:`PreparedCalls` in turns: name -> one median per turn, in seconds per call."""
    if device.name == "cpu":
        turns = 2
    once = {name: min(device.block(work, 3)) * work.count for name, work in works.items()}
    medians = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            # The first run of a block pays for the write-back of the previous one.
            block = device.block(work, 1 + int(min(30, max(3, seconds / once[name]))))
            medians[name].append(statistics.median(block[1:] or block))
    return medians


def machine(device):
    """Hardware and versions; no host names."""
    import triton

    info = {
        "gpu": None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "amil_fast": amil_fast.__version__,
        "build": amil_fast.info()["build"],
        "commit": _git("rev-parse", "--short=10", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }
    if device.name == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return info


def _git(*arguments):
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Results:
    """A JSON file rewritten after every row, so that an interrupted script leaves its results so far."""

    def __init__(self, options, name, head):
        self.path = options.out / f"{name}.json"
        self.data = {
            "format": f"amil_fast gpu {name}",
            "dry_run": options.dry_run,
            "command": f"python benchmarks/gpu/{name}.py",
            **head,
        }

    def add(self, key, row):
        self.data.setdefault(key, []).append(row)
        self.write()

    def write(self):
        write_json(self.path, self.data, indent=1)


def print_table(rows, columns, title):
    """Prints ``rows`` (dicts) as a table; ``columns``: name -> function from a row to its cell."""
    print(f"\n{title}")
    cells = [list(columns), *([str(show(row)) for show in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) if i else cell.ljust(width)
                        for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip())  # fmt: skip
    sys.stdout.flush()


def short(error):
    """One-line description of an exception."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def reason(error):
    """The reason recorded for a failed measurement."""
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else short(error)


def dtype_name(dtype):
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
