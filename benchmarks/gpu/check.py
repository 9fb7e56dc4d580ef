"""Verification on a GPU: builds the extension, runs the GPU tests, and compute-sanitizer's four tools on every kernel.

    python benchmarks/gpu/check.py --out DIR [--only build,tests,sanitizer] [--minutes 9]

racecheck detects hazards in *shared* memory only. The partial results of a split bag are exchanged through global
memory, ordered by atomics (``arrive`` in kernels/adjust_pool_chunks.py), which no tool checks;
tests/ops/test_adjust_pool_gpu.py has a stress test for that exchange. The caching allocator of torch is disabled under
the tools, so that each tensor is a separate allocation with known bounds and initialization. The tools watch
exercise.py.
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

import torch
from harness import ROOT, Budget, Results, parse, print_table

# Tools and strategies, by priority: the split path has a protocol between programs.
SANITIZER_RUNS = [
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
CONCURRENT_TOOLS = 4  # the tools are bound by the host, not by the device
STEPS = ("build", "tests", "sanitizer")


def run(command, log, seconds, **environment):
    """Runs a command in the root of the project; returns ``(exit status or "timed out", seconds, output)``."""
    start = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, **environment})  # fmt: skip
        try:
            status = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the process group, including the workers of pytest
            process.wait()
            status = "timed out"
    return status, round(time.monotonic() - start, 1), Path(log).read_text(errors="replace")


def build(options, budget, results):
    """Builds the extension for the GPU of this machine."""
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", ".", "-v"]
    environment = {"AMIL_FAST_CUDA": "1"}
    if options.dry_run:
        command.append("--dry-run")
        environment = {}
    else:
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
        print("pytest-xdist is not installed: the tests run sequentially")
    return command


def tests(options, budget, results):
    """Runs the tests marked gpu, then the Triton tests of every strategy."""
    workers = 2 if options.dry_run else 5
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    for name, arguments in (
        ("gpu tests", ["-m", "gpu"]),
        (
            "Triton tests",
            ["tests/ops", "-k", "test_launches" if options.dry_run else "adjust_pool_triton"],
        ),
    ):
        log = options.out / f"{name.replace(' ', '_')}.log"
        status, seconds, output = run([*pytest_command(workers), *arguments], log, budget.left(), **threads)
        lines = output.strip().splitlines()
        for line in lines:
            if line.startswith(("SKIPPED", "FAILED", "ERROR")):
                print(f"  {line[:200]}")
        if status == 0 and " passed" not in lines[-1] and not options.dry_run:
            status = "no test ran"
        record(results, "tests", name, status, seconds, lines[-1] if lines else "no output")


def find_sanitizer():
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    candidates = [shutil.which("compute-sanitizer")]
    candidates += [Path(f) / part / "compute-sanitizer" for f in folders if f for part in ("bin", "compute-sanitizer")]
    return next((str(c) for c in candidates if c and Path(c).is_file()), None)


def sanitizer(options, budget, results):
    """Runs exercise.py without tools, then under each tool of compute-sanitizer."""
    program = [sys.executable, str(Path(__file__).resolve().with_name("exercise.py"))]
    tail = ["--dry-run"] if options.dry_run else []
    everything = "split,mixed,stream,on_chip,tiny,decode"
    status, seconds, output = run([*program, everything, *tail], options.out / "exercise.log", budget.left())
    passed = sum(line.endswith(": ok") for line in output.splitlines())
    summary = f"{passed} configurations passed" if status == 0 else output.strip()[-1500:]
    record(results, "sanitizer", f"without tools: {everything}", status, seconds, summary)
    tool = find_sanitizer()
    if tool is None:
        print("compute-sanitizer was not found on PATH, in CUDA_HOME or in /usr/local/cuda: NOT checked")
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
            status = "no summary"  # the tool did not run as expected
        return f"{name}: {what}", status, seconds, summary

    with concurrent.futures.ThreadPoolExecutor(CONCURRENT_TOOLS) as pool:
        for name, status, seconds, summary in pool.map(watch, SANITIZER_RUNS):
            record(results, "sanitizer", name, status, seconds, summary)


def record(results, step, name, status, seconds, summary):
    row = {"step": step, "what": name, "ok": status == 0, "status": status, "seconds": seconds, "summary": summary}
    print(f"{name}: {'ok' if status == 0 else status} ({seconds} s) {summary}", flush=True)
    results.add("steps", row)


def main():
    options = parse(
        __doc__.splitlines()[0],
        minutes=9.0,
        extend=lambda parser: parser.add_argument("--only", default=",".join(STEPS), help="steps, comma-separated"),
    )
    budget = Budget(options.minutes)
    results = Results(options, "check", {})
    steps = options.only.split(",")
    if not set(steps) <= set(STEPS):
        raise SystemExit(f"--only: expected a subset of {', '.join(STEPS)}, got {options.only!r}")
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
