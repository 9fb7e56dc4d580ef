"""Right before fast: builds the extension, runs the GPU tests, and compute-sanitizer's four tools on every kernel.

    python benchmarks/gpu/check.py --out DIR [--only build,tests,sanitizer] [--minutes 9]

Of the tools, racecheck sees hazards in *shared* memory only. The partial results of a split bag travel through global
memory, ordered by atomics (``arrive`` in kernels/adjust_pool_common.py), which no tool checks:
tests/ops/test_adjust_pool_gpu.py has a stress test for that. Torch's caching allocator is off under the tools, so that
every tensor is an allocation of its own, whose bounds and initialization they know. ``check.py drive WHAT`` is the
program that they watch.
"""

import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from harness import ROOT, Budget, Results, parse, print_table

# What to run under which tool, in this order: the split path is the one with a protocol between programs.
WATCHED = [
    ("racecheck", "split"),
    ("memcheck", "split,mixed,stream,on_chip,tiny"),
    ("racecheck", "decode"),
    ("memcheck", "decode"),
    ("racecheck", "mixed,stream,on_chip,tiny"),
    ("initcheck", "split,mixed,stream,on_chip,tiny"),
    ("initcheck", "decode"),
    ("synccheck", "split,mixed,stream,on_chip,tiny"),
    ("synccheck", "decode"),
]
AT_A_TIME = 4  # the tools are slow on the host side; the device has room
STEPS = ("build", "tests", "sanitizer")


# ---- the program under the tools ----


def drive(what, dry_run):
    """A small forward and backward pass of each named strategy, every kernel of it, held against the float64 reference.

    Data is made and compared on the CPU, so that hardly a kernel but ours runs.
    """
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    device = "cpu" if dry_run else "cuda"
    sys.path.insert(0, str(ROOT))
    for name in what.split(","):
        for line in drive_decode(device) if name == "decode" else drive_adjust_pool(name, device):
            print(line, flush=True)


def strategies():
    """name -> list of (lengths or (B, N), D, how, forward plan, backward plan): as they ship, for small data."""
    from amil_fast.kernels.adjust_pool_config import Chunks, OnChip, Plan

    def chunks(D, chunk_rows, split, min_rows=-1, own_bags=1, warps=8, stages=3, block_n=32):
        return Chunks(block_n, D, chunk_rows, min_rows, own_bags, split, 4, warps, stages, 128)

    def same(plan):
        return plan, plan

    split = same(Plan(None, chunks(128, 64, True)))  # 11 chunks in 3 groups of at most 4
    mixed = OnChip(2, 32, 64, 4), chunks(64, 128, True, min_rows=32, own_bags=3, block_n=64)
    lengths = [20, 0, 1, 300, 5, 32, 33, 17, 900, 2, 64]
    return {
        "tiny": [((21, 6), 16, "mask", *same(Plan(OnChip(4, 8, 16, 1), None)))],
        "on_chip": [
            ((5, 64), 128, "full", Plan(OnChip(1, 64, 128, 8), None), Plan(OnChip(1, 64, 128, 16), None)),
            ((5, 50), 96, "mask", Plan(OnChip(1, 64, 128, 8), None), Plan(OnChip(1, 64, 128, 16), None)),
        ],
        "stream": [((4, 300), 128, "lengths", *same(Plan(None, chunks(128, 300, False))))],
        "split": [
            ((2, 700), 128, "lengths", *split),
            ((2, 650), 100, "mask", *split),
            (lengths, 128, "packed", *split),
        ],
        "mixed": [(lengths, 64, "packed", *same(Plan(*mixed)))],
    }


def drive_adjust_pool(name, device):
    import torch

    from amil_fast.kernels import adjust_pool_launch
    from amil_fast.ops.adjust_pool_reference import adjust_pool_reference
    from tests.helpers import relative_error

    for i, (bags, D, how, plan, backward_plan) in enumerate(strategies()[name]):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
            for detach in (False, True):
                generator = torch.Generator().manual_seed(i)
                where = dict.fromkeys(("mask", "lengths", "cu_seqlens"))
                if how == "packed":
                    f = torch.randn(sum(bags), D, generator=generator)
                    where["cu_seqlens"] = torch.tensor([0, *bags]).cumsum(0)
                    B = len(bags)
                else:
                    (B, N), f = bags, torch.randn(*bags, D, generator=generator)
                    if how == "mask":
                        where["mask"] = torch.rand(B, N, generator=generator) < 0.7
                    elif how == "lengths":
                        where["lengths"] = torch.linspace(N, 0, B).long()
                f = (f / D**0.25).to(dtype)
                g = torch.randn(B, D, generator=generator).to(dtype)
                v = None if detach else torch.randn(f.shape[:-1], generator=generator)

                there = [None if x is None else x.to(device) for x in (f, *where.values(), g, v)]
                bag, w, sigma, lse = adjust_pool_launch.forward(*there[:4], 3, True, plan)
                bags_there = there[4:6]
                grad = adjust_pool_launch.backward(*bags_there, *there[:4], sigma, lse, detach, backward_plan)

                leaf = f.double().requires_grad_()
                truth = adjust_pool_reference(leaf, **where, detach_routing=detach)
                outputs, grads = (truth, (g.double(), v.double())) if v is not None else (truth[:1], (g.double(),))
                expected = (*truth, torch.autograd.grad(outputs, leaf, grads)[0])
                pairs = zip((bag, w, grad), expected, strict=True)
                errors = [relative_error(actual.cpu(), expected) for actual, expected in pairs]
                assert max(errors) < tolerance, f"{name} {how} {dtype}: relative errors {errors}"
                yield f"{name} {how} {tuple(f.shape)} {dtype} detach={detach}: right"


def drive_decode(device):
    import torch

    from amil_fast import decode_heatmaps
    from tests.ops.helpers import REFINEMENTS, make_maps

    backend = "cuda" if device == "cuda" else "cpp"
    # a warp, a block of 128 and one of 256 threads per map; "tiny" maps need the maximum of the whole blurred map
    for (H, W), kind in (((20, 24), "noisy"), ((64, 48), "tiny"), ((97, 101), "noisy"), ((5, 3), "noise")):
        for dtype in (torch.float32, torch.float16):
            for refine in REFINEMENTS:
                for mirror in (False, True):
                    maps = make_maps(kind, (2, 3, H, W), 1, dtype)
                    arguments = {"refine": refine}
                    there = {"refine": refine}
                    if mirror:
                        flipped = make_maps(kind, (2, 3, H, W), 2, dtype)
                        arguments |= {"flipped": flipped, "flip_pairs": [(0, 2)]}
                        there |= {"flipped": flipped.to(device), "flip_pairs": [(0, 2)]}
                    actual = decode_heatmaps(maps.to(device), **there, backend=backend)
                    expected = decode_heatmaps(maps, **arguments, backend="cpp")
                    assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True)), (H, W, refine)
        yield f"decode {H} x {W} {kind}: right"


# ---- the steps ----


def run(command, log, seconds, **environment):
    """Runs a command in the project's root, output to ``log``: ``(exit status or "timed out", seconds, output)``."""
    start = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, **environment})  # fmt: skip
        try:
            status = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own group, pytest's workers included
            process.wait()
            status = "timed out"
    return status, round(time.monotonic() - start, 1), Path(log).read_text(errors="replace")


def build(options, budget, results):
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", ".", "-v"]
    environment = {"AMIL_FAST_CUDA": "1"}
    if options.dry_run:
        command.append("--dry-run")
        environment = {}
    else:
        import torch

        major, minor = torch.cuda.get_device_capability()
        environment["AMIL_FAST_CUDA_ARCHS"] = f"{major}{minor}"
    status, seconds, output = run(command, options.out / "build.log", budget.left(), **environment)
    for line in output.splitlines():
        if "amil_fast._C built" in line or line.strip().startswith("CUDA:"):
            print(line.strip())
    record(results, "build", "extension", status, seconds, "" if status == 0 else output.strip()[-1500:])
    status, seconds, output = run(
        [sys.executable, "-c", "import amil_fast, json; print(json.dumps(amil_fast.info()))"],
        options.out / "info.json", 120,
    )  # fmt: skip
    backends = json.loads(output)["backends"] if status == 0 else output[-500:]
    summary = ", ".join(f"{k}: {v or 'usable'}" for k, v in backends.items()) if status == 0 else backends
    record(results, "build", "backends", status, seconds, summary)


def pytest_command(workers):
    command = [sys.executable, "-m", "pytest", "-q", "-rsfE", "--durations=10", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    else:
        print("pytest-xdist is not installed: the tests run one after the other")
    return command


def tests(options, budget, results):
    """The tests marked gpu, then the Triton tests of every strategy, which take the GPU where there is one."""
    workers = 2 if options.dry_run else 5
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    for name, arguments in (
        ("gpu tests", ["-m", "gpu"]),
        (
            "Triton tests",
            ["tests/ops/test_adjust_pool_triton.py", *(["-k", "test_launches"] if options.dry_run else [])],
        ),
    ):
        log = options.out / f"{name.replace(' ', '_')}.log"
        status, seconds, output = run([*pytest_command(workers), *arguments], log, budget.left(), **threads)
        lines = output.strip().splitlines()
        for line in lines:
            if line.startswith(("SKIPPED", "FAILED", "ERROR")):
                print(f"  {line[:200]}")
        if status == 0 and " passed" not in lines[-1] and not options.dry_run:
            status = "nothing ran"
        record(results, "tests", name, status, seconds, lines[-1] if lines else "no output")


def find_sanitizer():
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    candidates = [shutil.which("compute-sanitizer")]
    candidates += [Path(f) / part / "compute-sanitizer" for f in folders if f for part in ("bin", "compute-sanitizer")]
    return next((str(c) for c in candidates if c and Path(c).is_file()), None)


def sanitizer(options, budget, results):
    program = [sys.executable, str(Path(__file__).resolve()), "drive"]
    tail = ["--dry-run"] if options.dry_run else []
    everything = "split,mixed,stream,on_chip,tiny,decode"
    status, seconds, output = run([*program, everything, *tail], options.out / "drive.log", budget.left())
    right = sum(line.endswith(": right") for line in output.splitlines())
    summary = f"{right} runs right" if status == 0 else output.strip()[-1500:]
    record(results, "sanitizer", f"no tool: {everything}", status, seconds, summary)
    tool = find_sanitizer()
    if tool is None:
        print("compute-sanitizer is not installed (looked on PATH, in CUDA_HOME and in /usr/local/cuda): NOT checked")
        record(results, "sanitizer", "all tools", "not installed", 0.0, "compute-sanitizer not found")
        return

    def watch(job):
        name, what = job
        command = [tool, "--tool", name, "--error-exitcode", "3", "--print-limit", "20"]
        command += ["--target-processes", "application-only", *program, what, *tail]
        log = options.out / f"{name}_{what.replace(',', '_')}.log"
        status, seconds, output = run(command, log, budget.left(), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        summaries = re.findall(r"(?:ERROR|RACECHECK|LEAK) SUMMARY: .*", output)
        summary = "; ".join(summaries) or output.strip()[-300:]
        if status == 0 and not summaries:
            status = "no summary"  # the tool did not run as expected: that is no clean bill
        return f"{name}: {what}", status, seconds, summary

    with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
        for name, status, seconds, summary in pool.map(watch, WATCHED):
            record(results, "sanitizer", name, status, seconds, summary)


def record(results, step, name, status, seconds, summary):
    row = {"step": step, "what": name, "ok": status == 0, "status": status, "seconds": seconds, "summary": summary}
    print(f"{name}: {'ok' if status == 0 else status} ({seconds} s) {summary}", flush=True)
    results.add("steps", row)


def main():
    if sys.argv[1:2] == ["drive"]:
        drive(sys.argv[2], "--dry-run" in sys.argv)
        return 0
    options = parse(
        __doc__.splitlines()[0],
        minutes=9.0,
        extend=lambda parser: parser.add_argument("--only", default=",".join(STEPS), help="steps, comma between"),
    )
    budget = Budget(options.minutes)
    results = Results(options, "check", {})
    steps = options.only.split(",")
    if not set(steps) <= set(STEPS):
        raise SystemExit(f"--only: expected some of {', '.join(STEPS)}, got {options.only!r}")
    for step in steps:
        {"build": build, "tests": tests, "sanitizer": sanitizer}[step](options, budget, results)
    rows = results.data["steps"]
    columns = {
        "step": lambda r: r["step"],
        "what": lambda r: r["what"],
        "ok": lambda r: "ok" if r["ok"] else r["status"],
        "s": lambda r: r["seconds"],
    }
    print_table(rows, columns, "check" + (" (dry run)" if options.dry_run else ""))
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
