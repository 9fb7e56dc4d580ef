"""The first run on a GPU, in one command of at most 9.5 minutes: what is right, then how fast, then why.

    python benchmarks/gpu/first.py --out DIR [--dry-run]

Steps, each of which is written to ``DIR/first.json`` before the next begins: build; every kernel once (exercise.py);
three runs of compute-sanitizer side by side; a subset of the tests; bandwidth, main sizes, overhead and decoding
(operators.py); ``ncu`` over six kernels (profiled.py). Nothing is downloaded. A step that fails or is not installed is
recorded and the next one begins; the exit status is 1 then.
"""

import concurrent.futures
import csv
import json
import shutil
import statistics
import sys
from pathlib import Path

from check import build, find_sanitizer, pytest_command, record, run
from harness import Budget, Results, parse, print_table

HERE = Path(__file__).resolve().parent
# Tool, kernels, seconds at most. racecheck where programs share results; memcheck elsewhere.
SANITIZER_RUNS = (
    ("racecheck", "split,mixed", 110),
    ("memcheck", "split,mixed,stream,on_chip,tiny", 110),
    ("memcheck", "decode", 110),
)
TEST_FILES = ("tests/ops/test_adjust_pool_gpu.py", "tests/ops/test_decode_gpu.py")
TEST_SECONDS, TEST_WORKERS = 150, 12
# Sections of operators.py and their minutes.
MEASUREMENTS = (("ceilings,main", 1.6), ("ceilings,overhead", 0.4), ("ceilings,decode", 0.6))
METRICS = {
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue %",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "barrier",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "long scoreboard",
    "gpu__time_duration.sum": "ns",
}


def smoke(options, budget, results):
    """Runs every kernel once, without tools, and compares with the reference."""
    what = "tiny,decode" if options.dry_run else "split,mixed,stream,on_chip,tiny,decode"
    command = [sys.executable, HERE / "exercise.py", what, *options.tail]
    status, seconds, output = run(command, options.out / "smoke.log", min(budget.left(), 60))
    passed = sum(line.endswith(": ok") for line in output.splitlines())
    summary = f"{passed} configurations passed" if status == 0 else output.strip()[-1500:]
    record(results, "smoke", "exercise.py", status, seconds, summary)


def sanitize(options, budget, results):
    """Three runs of compute-sanitizer side by side: they are bound by the host."""
    tool = find_sanitizer()
    if tool is None and not options.dry_run:
        record(results, "sanitizer", "all tools", "not installed", 0.0, "compute-sanitizer not found")
        return

    def watch(job):
        name, what, limit = job
        watched = [tool, "--tool", name, "--error-exitcode", "3", "--print-limit", "20"]
        watched += ["--target-processes", "application-only"]
        program = [sys.executable, HERE / "exercise.py", "tiny" if options.dry_run else what, *options.tail]
        log = options.out / f"{name}_{what.replace(',', '_')}.log"
        seconds = min(budget.left(), limit)
        command = program if options.dry_run else [*watched, *program]
        status, seconds, output = run(command, log, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        summary = [line for line in output.splitlines() if "SUMMARY" in line or line.endswith(": ok")][-1:]
        if status == 0 and not summary:
            status = "no summary"  # the tool did not run as expected
        return name + ": " + what, status, seconds, "".join(summary) or output.strip()[-300:]

    with concurrent.futures.ThreadPoolExecutor(len(SANITIZER_RUNS)) as pool:
        for outcome in pool.map(watch, SANITIZER_RUNS):
            record(results, "sanitizer", *outcome)


def tests(options, budget, results):
    """The GPU tests of both operators, stopped after TEST_SECONDS; what passed until then counts."""
    command = [*pytest_command(2 if options.dry_run else TEST_WORKERS), *TEST_FILES]
    log = options.out / "tests.log"
    status, seconds, output = run(command, log, min(budget.left(), TEST_SECONDS), OMP_NUM_THREADS="1")
    lines = output.strip().splitlines() or ["no output"]
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print(f"  {line[:200]}")
    if status == 0 and " passed" not in lines[-1] and not options.dry_run:
        status = "no test ran"
    record(results, "tests", ", ".join(TEST_FILES), status, seconds, lines[-1])


def measure(options, budget, results):
    """operators.py by sections, each in its own process and folder."""
    for sections, minutes in MEASUREMENTS:
        name = sections.split(",")[-1]
        minutes = min(minutes, budget.left() / 60)
        out = options.out / name
        command = [sys.executable, HERE / "operators.py", "--out", out, "--only", sections, "--dtypes", "bf16"]
        command += ["--minutes", f"{minutes:.2f}", *options.tail]
        log = options.out / f"{name}.log"
        status, seconds, output = run(command, log, min(budget.left(), 60 * minutes + 10))
        record(results, "operators", name, status, seconds, "" if status == 0 else output.strip()[-1500:])
        if (out / "operators.json").exists():
            results.data.setdefault("operators", {})[name] = json.loads((out / "operators.json").read_text())
            results.write()


def profile(options, budget, results):
    """Memory and issue utilization and stalls of six kernels: medians over their launches."""
    tool = shutil.which("ncu")
    if tool is None and not options.dry_run:
        record(results, "ncu", "six kernels", "not installed", 0.0, "ncu not found")
        return
    program = [sys.executable, HERE / "profiled.py", *options.tail]
    watched = [tool, "--kernel-name", "regex:adjust_pool|decode", "--metrics", ",".join(METRICS), "--csv"]
    log = options.out / "ncu.log"
    command = program if options.dry_run else [*watched, *program]
    status, seconds, output = run(command, log, min(budget.left(), 45))
    profiled = read_profile(output)
    if profiled:
        results.data["ncu"] = profiled
    elif status == 0 and not options.dry_run:
        status = "no metrics"  # such as without permission to read performance counters
    lines = [f"{k}: " + ", ".join(f"{n} {v:.1f}" for n, v in row.items()) for k, row in profiled.items()]
    record(results, "ncu", "six kernels", status, seconds, "; ".join(lines) or output.strip()[-300:])


def read_profile(text):
    """``{kernel: {metric: median}}`` from the output of ``ncu --csv``, which follows that of the program."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    values = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        if row["Metric Name"] in METRICS:
            name = row["Kernel Name"].split("(")[0]
            value = float(row["Metric Value"].replace(",", ""))
            values.setdefault(name, {}).setdefault(METRICS[row["Metric Name"]], []).append(value)
    return {name: {k: statistics.median(v) for k, v in row.items()} for name, row in values.items()}


STEPS = {"build": build, "smoke": smoke, "sanitizer": sanitize, "tests": tests, "operators": measure, "ncu": profile}


def main():
    options = parse(
        __doc__.splitlines()[0],
        minutes=9.4,
        extend=lambda parser: parser.add_argument("--only", default=",".join(STEPS), help="steps, comma-separated"),
    )
    options.tail = ["--dry-run"] if options.dry_run else []
    options.out = options.out.resolve()  # the steps run in the root of the project
    steps = options.only.split(",")
    if not set(steps) <= set(STEPS):
        raise SystemExit(f"--only: expected a subset of {', '.join(STEPS)}, got {options.only!r}")
    budget = Budget(options.minutes)
    results = Results(options, "first", {})
    for step in steps:
        if budget.over():
            results.add("not_reached", step)
            continue
        try:
            STEPS[step](options, budget, results)
        except Exception as error:  # recorded; the next steps still run
            record(results, step, "script", f"{type(error).__name__}: {error}", 0.0, "")
    rows = results.data.get("steps", [])
    columns = {
        "step": lambda r: r["step"],
        "what": lambda r: r["what"],
        "ok": lambda r: "ok" if r["ok"] else r["status"],
        "s": lambda r: r["seconds"],
    }
    print_table(rows, columns, "first" + (" (dry run)" if options.dry_run else ""))
    return 0 if all(row["ok"] for row in rows) and "not_reached" not in results.data else 1


if __name__ == "__main__":
    sys.exit(main())
