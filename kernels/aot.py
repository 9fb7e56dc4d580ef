"""Ahead-of-time compilation of all kernels, without a GPU; reports resources and instruction counts.

``python -m amil_fast.kernels.aot`` (``make kernels``) compiles the Triton kernels in the configurations chosen for the
calls in :data:`CALLS`, and the CUDA sources in ``csrc/``, for every architecture in :data:`ARCHS`. It prints a table
and exits with status 1 if a kernel spills registers, fails to compile, or exceeds ``budget.json`` (aot_count.py).
``--triton FOLDER`` compiles with another version, installed by ``pip install --no-deps --target FOLDER triton==...``.
"""

import argparse
import concurrent.futures
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from amil_fast.kernels import adjust_pool_launch, aot_count

ARCHS = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
CSRC = Path(__file__).resolve().parents[1] / "csrc"
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class PoolCall:
    """A call of adjust_pool: bags (B, N, D), or packed (N, D) for B bags, with its options and dtypes."""

    B: int
    N: int
    D: int
    form: str = "full"  # "full", "mask", "lengths" or "packed"
    weights: bool = False
    detach: bool = False
    T: int = 3
    dtypes: tuple = ("bf16", "fp32")


ALL = tuple(DTYPES)
WIDTHS = (64, 96, 128, 160, 192, 200, 256, 384, 512, 768, 1024, 2048)
CALLS = (
    # tiny bags, several per program
    PoolCall(4096, 8, 32, "mask", weights=True, dtypes=ALL),
    PoolCall(100_000, 6, 16, "lengths"),
    PoolCall(16, 8, 32),
    PoolCall(4096, 16, 1, "lengths"),
    # on chip
    PoolCall(4096, 64, 128, dtypes=ALL),
    PoolCall(4096, 64, 128, "mask", weights=True, dtypes=ALL),
    PoolCall(4096, 64, 128, "lengths", weights=True),
    PoolCall(4096, 64, 128, detach=True),
    PoolCall(4096, 64, 128, T=1),
    PoolCall(4096, 100, 96, "mask", dtypes=ALL),
    PoolCall(4096, 128, 128, dtypes=ALL),
    PoolCall(4096, 256, 128, dtypes=ALL),
    PoolCall(512, 32, 512, dtypes=ALL),
    PoolCall(512, 8, 4096, dtypes=ALL),
    PoolCall(512, 1000, 8),
    # streamed by one program per bag
    PoolCall(1024, 1000, 128, "mask", weights=True, dtypes=ALL),
    PoolCall(1024, 1000, 200, "lengths"),
    # split over programs
    PoolCall(32, 4096, 128, dtypes=ALL),
    PoolCall(256, 1024, 512),
    PoolCall(1, 100_000, 512, weights=True, dtypes=ALL),
    PoolCall(1, 100_000, 512, "mask", weights=True),
    PoolCall(1, 100_000, 1024, detach=True, dtypes=ALL),
    PoolCall(1, 100_000, 1024, T=1),
    PoolCall(1, 100_000, 4096, dtypes=ALL),
    PoolCall(1, 100_000, 1000),
    PoolCall(1, 100_000, 2048, "mask", weights=True, dtypes=("bf16", "fp16")),
    PoolCall(8, 1_000_000, 64, "lengths"),
    PoolCall(2, 100_000, 3, "mask", weights=True),
    # packed: short bags with room for long ones, then long ones
    PoolCall(4096, 4096 * 64, 128, "packed", weights=True, dtypes=ALL),
    PoolCall(64, 3_000_000, 1024, "packed", dtypes=ALL),
    PoolCall(64, 3_000_000, 1024, "packed", weights=True),
    PoolCall(64, 3_000_000, 1024, "packed", detach=True),
    # widths: no layout may be much slower than that of the next widths (aot_count.py)
    *(PoolCall(64, 20_000, D, dtypes=("bf16",)) for D in WIDTHS),
)
# Subset for tests: each kernel and strategy at least once.
SOME_CALLS = (
    PoolCall(4096, 8, 32, "mask", weights=True, dtypes=("bf16",)),
    PoolCall(4096, 64, 128, dtypes=("bf16",)),
    PoolCall(1024, 1000, 128, dtypes=("bf16",)),
    PoolCall(1, 100_000, 512, weights=True, dtypes=("bf16",)),
    PoolCall(64, 3_000_000, 1024, "packed", detach=True, dtypes=("bf16",)),
)


@dataclass
class Compilation:
    """One compilation for one architecture: a Triton kernel in one configuration, or a CUDA source file."""

    name: str
    config: str
    arch: int
    module: str = ""  # Triton kernel: its module, and the launch as the just-in-time compiler sees it
    signature: tuple = ()
    options: dict = field(default_factory=dict)
    on_chip: bool = False
    trips: int = 1  # iterations of its outer loop, if it is on chip
    unit_bytes: int = 0  # read or written per program, if it is on chip, else per tile
    load_bytes: int = 0  # of instances in flight per program
    source: Path | None = None  # CUDA source file


@dataclass
class KernelUsage:
    """Resources of a compiled kernel: registers, spilled bytes and stack bytes per thread; shared bytes per program.

    Triton kernels also: warp instructions per program (on chip) or tile, bytes per cycle and multiprocessor that these
    allow, programs per multiprocessor, and bytes of their loads in flight there.
    """

    name: str
    config: str
    arch: int
    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    instructions: int = 0
    rate: float = 0.0
    programs: int = 0
    in_flight: int = 0
    error: str = ""


def launches(call, dtype):
    """Launches of the forward and the backward pass of a call, on meta tensors."""
    rows = (call.N,) if call.form == "packed" else (call.B, call.N)
    f = torch.empty(*rows, call.D, dtype=dtype, device="meta")
    mask = torch.empty(rows, dtype=torch.bool, device="meta") if call.form == "mask" else None
    lengths = torch.empty(call.B, dtype=torch.int64, device="meta") if call.form == "lengths" else None
    cu_seqlens = torch.empty(call.B + 1, dtype=torch.int32, device="meta") if call.form == "packed" else None
    bags = (f, mask, lengths, cu_seqlens)
    (bag, w, sigma, stats), forward = adjust_pool_launch.forward_launches(*bags, call.T, call.weights)
    grad_weights = w if call.weights and not call.detach and call.T > 1 else None
    _, backward = adjust_pool_launch.backward_launches(bag, grad_weights, *bags, sigma, stats, call.detach)
    return forward + backward


def signature(launch):
    """``(signature, constexprs, attributes)`` of a launch as the just-in-time compiler sees it."""
    types, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            types[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = _POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    return types, constants, attributes


def triton_compilations(calls, archs):
    """Triton compilations required by ``calls``, without duplicates, for each architecture."""
    found = {}
    for call in calls:
        for dtype in call.dtypes:
            for launch in launches(call, DTYPES[dtype]):
                function = launch.kernel.fn
                types = signature(launch)
                key = (function.__name__, str(types), str(launch.options))
                if key not in found:
                    config = f"{dtype} {_describe(launch)}"
                    work = _work(call, launch)
                    found[key] = [
                        Compilation(function.__name__, config, arch, function.__module__, types, launch.options, **work)
                        for arch in archs
                        # not launched there, see pick_plan
                        if arch >= 90 or function.__name__ != "adjust_pool_backward_on_chip_dot_kernel"
                    ]
    return [job for per_arch in found.values() for job in per_arch]


def _work(call, launch):
    """Fields of :class:`Compilation` from which rates are computed."""
    name, arguments = launch.kernel.fn.__name__, launch.arguments
    if "weights" in name:
        return {}
    backward, on_chip = "backward" in name, "on_chip" in name
    pointer = arguments["grad_ptr"] if "grad_ptr" in arguments else arguments["instances_ptr"]
    rows = min(call.N, arguments["BLOCK_N"]) * arguments.get("BAGS", 1) if on_chip else arguments["BLOCK_N"]
    tile = rows * call.D * pointer.element_size()
    reads = arguments.get("READ", not name.endswith("write_kernel"))
    writes = "grad_ptr" in arguments
    stages = arguments.get("NUM_STAGES", 1)
    return {
        "on_chip": on_chip,
        "trips": max(call.T - backward, 1),
        "unit_bytes": tile * (reads + writes),
        "load_bytes": tile * max(stages - 1, 1) * reads,
    }


def _describe(launch):
    """One line with the constants and the optional pointers of a launch."""
    words = [f"warps={launch.num_warps} stages={launch.num_stages}"]
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr and parameter.name not in ("GROUP", "MERGE_N", "NUM_STAGES"):
            words.append(f"{parameter.name}={value}")
        elif parameter.name in ("mask_ptr", "lengths_ptr", "cu_seqlens_ptr", "weights_ptr", "grad_weights_ptr"):
            words += [parameter.name.removesuffix("_ptr")] if value is not None else []
    return " ".join(words)


def cuda_compilations(archs):
    """Compilations of the CUDA sources of a checkout, and, where there are none, the reason."""
    sources = sorted(CSRC.rglob("*.cu"))
    if not sources:
        return [], f"no CUDA sources in {CSRC}"
    if shutil.which("nvcc") is None:
        return [], "no nvcc on PATH: the CUDA sources were not compiled"
    return [Compilation(source.name, "", arch, source=source) for source in sources for arch in archs], ""


def compile_kernels(job):
    """Runs one compilation; returns a list of :class:`KernelUsage`, one per kernel in it."""
    try:
        if job.source is not None:
            return _compile_cuda(job)
        kernel = getattr(importlib.import_module(job.module), job.name)
        compiled = triton.compile(
            ASTSource(kernel, *job.signature), target=GPUTarget("cuda", job.arch, 32), options=job.options
        )
        # Triton does not expose the report of ptxas, so assemble again.
        ptx = compiled.asm["ptx"]
        target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(ptx)
            command = [
                _ptxas(job.arch),
                "-v",
                f"--gpu-name={target}",
                source,
                "-o",
                Path(folder) / "kernel.cubin",
            ]
            report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        (usage,) = (KernelUsage(job.name, job.config, job.arch, **fields) for _, fields in _read_report(report))
        usage.shared = compiled.metadata.shared  # allocated at launch, hence not in the report
        num_warps = compiled.metadata.num_warps
        usage.instructions = aot_count.warp_instructions(compiled.asm["cubin"], num_warps, job.on_chip, job.trips)
        usage.rate = aot_count.ISSUE_SLOTS * job.unit_bytes / max(usage.instructions, 1)
        usage.programs = aot_count.programs_per_multiprocessor(job.arch, usage.registers, usage.shared, num_warps)
        usage.in_flight = usage.programs * job.load_bytes
        return [usage]
    except subprocess.CalledProcessError as error:
        return [KernelUsage(job.name, job.config, job.arch, error=error.stderr.strip())]
    except Exception as error:  # any compiler error is a row of the table
        return [KernelUsage(job.name, job.config, job.arch, error=f"{type(error).__name__}: {error}")]


def _ptxas(arch):
    """Path of ptxas for an architecture; Triton 3.5 has one for all."""
    takes_arch = bool(inspect.signature(get_ptxas).parameters)
    return (get_ptxas(arch) if takes_arch else get_ptxas()).path


def _compile_cuda(job):
    """Compiles one CUDA source; returns a :class:`KernelUsage` per kernel, demangled if c++filt is installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-cubin", f"-arch=sm_{job.arch}", "-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v"]
        command += [f"-I{CSRC}", "-o", Path(folder) / "kernel.cubin", job.source]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    usages = []
    for mangled, fields in _read_report(report):
        function = mangled
        if shutil.which("c++filt"):
            function = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout.strip()
        usages.append(KernelUsage(job.name, function, job.arch, **fields))
    return usages


def _read_report(text):
    """Yields the function name and the resources of every kernel in the output of ``ptxas -v``."""
    pattern = (
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    for match in re.finditer(pattern, text, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", match[6])
        yield (
            match[1],
            {
                "registers": int(match[5]),
                "spills": int(match[3]) + int(match[4]),
                "stack": int(match[2]),
                "shared": int(shared[1]) if shared else 0,
            },
        )


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m amil_fast.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--some", action="store_true", help="a few configurations, each kernel at least once")
    parser.add_argument("--arch", type=int, action="append", help=f"compute capability, e.g. 90 (default: {ARCHS})")
    parser.add_argument("--match", default="", help="regular expression on kernels and configurations to compile")
    parser.add_argument("--registers", type=int, help="maximum registers per thread for all kernels")
    parser.add_argument("--triton", type=Path, metavar="FOLDER", help="folder with another version of Triton")
    parser.add_argument("--update-budget", action="store_true", help="write the counts to budget.json")
    parser.add_argument("--no-cuda", action="store_true", help="skip the CUDA sources")
    parser.add_argument("--json", type=Path, help="also write the table to this JSON file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="concurrent compilations")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter does not compile kernels; unset it")

    if options.triton is not None and not Path(triton.__file__).is_relative_to(options.triton.resolve()):
        # In a new process, which finds that folder first.
        paths = [str(options.triton.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-m", "amil_fast.kernels.aot", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}).returncode

    archs = options.arch or ARCHS
    work = triton_compilations(SOME_CALLS if options.some else CALLS, archs)
    skipped = ""
    if not options.no_cuda:
        cuda, skipped = cuda_compilations(archs)
        work += cuda
    work = [job for job in work if re.search(options.match, f"{job.name} {job.config}")]
    if not work:
        parser.error("--match: no kernel matches")
    if options.registers is not None:
        for job in work:
            job.options["maxnreg"] = options.registers
    usages, bad = run(work, options.jobs, options.json)
    if skipped:
        print(skipped)
    if options.update_budget:
        aot_count.update_budget(usages)
    above = aot_count.check_budget(usages) if options.registers is None else []
    for line in above:
        print(f"above budget: {line}")
    return 1 if bad or above else 0


def run(work, workers, json_file=None):
    """Runs all compilations, prints the table; returns the usages and the number of kernels with spills or errors."""
    print(
        f"{'kernel':<40} {'sm':>4} {'regs':>5} {'spills':>7} {'stack':>6} {'shared':>7} {'instr.':>7} {'B/clk':>6} "
        f"{'progr.':>6} {'in flight':>9}  configuration"
    )
    usages = []
    bad = 0
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        for result in pool.map(compile_kernels, work):
            for usage in result:
                usages.append(usage)
                bad += bool(usage.error or usage.spills)
                numbers = f"{usage.arch:>4} {usage.registers:>5} {usage.spills:>7} {usage.stack:>6} {usage.shared:>7}"
                numbers += f" {usage.instructions:>7} {usage.rate:>6.1f} {usage.programs:>6} {usage.in_flight:>9}"
                remark = "  <-- SPILLS" if usage.spills else ""
                print(f"{usage.name:<40} {numbers}  {usage.config}{remark}", flush=True)
                if usage.error:
                    print(f"  failed: {usage.error}")
    print(f"{len(usages)} kernels compiled with Triton {triton.__version__}, {bad} with spills or errors")
    if json_file is not None:
        json_file.write_text(json.dumps([vars(usage) for usage in usages], indent=1))
    return usages, bad


if __name__ == "__main__":
    sys.exit(main())
