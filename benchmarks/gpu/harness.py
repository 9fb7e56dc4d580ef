"""What the GPU scripts share: the clock, the flush of the L2 cache, the machine, the time budget, tables, results.

How a call is timed. Several copies of it, each on inputs of its own, are captured in one CUDA graph, ours and the
rivals' alike: what is measured is the device's time and not the host's (host overhead is measured apart). What can't
be captured is timed as it is, and the row says so. CUDA events stand around a replay, and the time is divided by the
number of copies. So many copies are made that their inputs are 16 times the L2 cache: by the time an input comes round
again nothing of it is left there, and what one call leaves to be written back is paid for by the next, as it is in a
steady state. (Flushing the cache before every call instead would either leave it full of somebody else's dirty lines or
make a gift of the last L2-full of writes, and a single short call drowns in the launch of its graph.)

Rivals take turns in one process; a figure is the median over turns of the medians of a turn's repetitions, its spread
the extremes over turns, and a ratio the median of the turns' ratios.

On a machine without a GPU, ``--dry-run`` runs the same scripts on tiny CPU tensors, Triton kernels in the interpreter.
Its figures mean nothing; its results say ``"dry_run": true``.
"""

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TURNS = 5


def parse(description, arguments=None, minutes=8.0, extend=None):
    """The options that all scripts have; sets up the interpreter before anything imports Triton."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON and logs")
    parser.add_argument("--minutes", type=float, default=minutes, help="stop in time for this (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; the figures mean nothing")
    if extend is not None:
        extend(parser)
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    options.out.mkdir(parents=True, exist_ok=True)
    return options


class Budget:
    """Minutes of wall-clock time, from now on."""

    def __init__(self, minutes):
        self.end = time.monotonic() + 60 * minutes

    def left(self):
        """Seconds."""
        return self.end - time.monotonic()

    def over(self):
        return self.left() <= 0


class Work:
    """Something to time: ``run`` does ``count`` calls; ``how`` it was prepared."""

    def __init__(self, run, count, how):
        self.run, self.count, self.how = run, count, how


class Cuda:
    """The GPU: capturing, timing, memory. All work is on one side stream, as capturing wants it."""

    name = "cuda"

    def __init__(self):
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device: run with --dry-run to see that the script works")
        self.torch = torch
        self.device = torch.device("cuda")
        properties = torch.cuda.get_device_properties(0)
        self.multiprocessors = properties.multi_processor_count
        self.l2_bytes = properties.L2_cache_size
        # A backward pass runs on the stream of its forward pass: a stream of our own, so that either can be captured.
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        gc.freeze()  # every capture collects garbage; what was imported is none

    def synchronize(self):
        self.torch.cuda.synchronize()

    def free_bytes(self):
        gc.collect()
        self.torch.cuda.empty_cache()
        return self.torch.cuda.mem_get_info()[0]

    def copies(self, size, most=64):
        """How many inputs of ``size`` bytes make 16 times the L2 cache."""
        return max(1, min(most, -(-16 * self.l2_bytes // size)))

    def prepare(self, calls):
        """The calls, one after the other, as one CUDA graph; where they can't be captured, as they are."""
        for call in calls:  # compiles, loads modules, tunes
            call()
            call()
        self.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        try:
            with self.torch.cuda.graph(graph, stream=self.stream):
                for call in calls:
                    call()
        except self.torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a rival does that can't be captured
            self.synchronize()
            return Work(lambda: [call() for call in calls], len(calls), f"not captured: {short(error)}")
        return Work(graph.replay, len(calls), "graph")

    def block(self, work, repetitions):
        """Seconds per call of each of ``repetitions`` runs of ``work``."""
        events = [self.torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
        events[0].record()
        for event in events[1:]:
            work.run()
            event.record()
        self.synchronize()
        pairs = itertools.pairwise(events)
        return [start.elapsed_time(end) * 1e-3 / work.count for start, end in pairs]

    def peak(self, call):
        """Bytes that a call needs at its peak, less what it returns."""
        call()
        self.free_bytes()
        self.synchronize()
        self.torch.cuda.reset_peak_memory_stats()
        before = self.torch.cuda.memory_allocated()
        outputs = call()
        self.synchronize()
        peak = self.torch.cuda.max_memory_allocated() - before
        return peak - sum(t.nbytes for t in outputs)


class Cpu:
    """Stands for the GPU in a dry run."""

    name = "cpu"
    multiprocessors = 2
    l2_bytes = 1 << 10

    def __init__(self):
        import torch

        self.torch = torch
        self.device = torch.device("cpu")

    def synchronize(self):
        pass

    def free_bytes(self):
        return 1 << 33

    def copies(self, size, most=64):
        return 2

    def prepare(self, calls):
        return Work(lambda: [call() for call in calls], len(calls), "cpu")

    def block(self, work, repetitions):
        start = time.perf_counter()
        work.run()
        return [(time.perf_counter() - start) / work.count]

    def peak(self, call):
        return 0 * sum(t.nbytes for t in call())


def open_device(options):
    return Cpu() if options.dry_run else Cuda()


def in_turns(device, works, turns=TURNS, seconds=0.05):
    """Times :class:`Work` in turns: name -> one median per turn, in seconds per call."""
    if device.name == "cpu":
        turns = 2
    once = {name: min(device.block(work, 3)) * work.count for name, work in works.items()}
    medians = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            # the first run of a block pays for what the one before left in the cache
            block = device.block(work, 1 + int(min(30, max(3, seconds / once[name]))))
            medians[name].append(statistics.median(block[1:] or block))
    return medians


def ratio(medians, a, b):
    """How many times the time of b that of a is: median over the turns."""
    return statistics.median(x / y for x, y in zip(medians[a], medians[b], strict=True))


def machine(device):
    """What a reader needs to judge the figures; no names of hosts."""
    import torch
    import triton

    import amil_fast

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
    """A JSON file that is complete after every row: a script that is cut off leaves what it has measured."""

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
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1))
        temporary.replace(self.path)


def print_table(rows, columns, title):
    """``rows`` of dicts; ``columns`` name -> function of a row that gives text."""
    print(f"\n{title}")
    cells = [list(columns), *([str(show(row)) for show in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) if i else cell.ljust(width)
                        for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip())  # fmt: skip
    sys.stdout.flush()


def short(error):
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
