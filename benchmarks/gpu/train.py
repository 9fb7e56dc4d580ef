"""Trains the pose model on a crop archive with ``amil train`` within a time limit, and collects the results.

    python benchmarks/gpu/train.py --archive lspet.pack --out DIR --minutes 9 [--epochs 100] [--resume] [-- OPTIONS]

Arguments after ``--`` are passed to ``amil train`` (see its ``--help``). The run folder (``--run``) is outside DIR and
may be large; DIR receives the best generator in half precision, the history, the summary, curves and overlays, a few
MB. At the time limit the run saves a checkpoint and stops; ``--resume`` continues it from the same folder.

The learning rate is scheduled over --epochs, which should therefore fit the time limit: a first run with ``--epochs 2``
reports how many do.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from harness import ROOT, Budget, Results, machine, open_device, parse, print_table
from matplotlib.figure import Figure

from amil_fast.cli import main as amil
from amil_fast.pose import PoseGenerator
from amil_fast.pose.data.loader import PoseLoader
from amil_fast.utils.files import read_json, write_json

SAVING = 60.0  # seconds reserved for the last checkpoint and for copying
LIMIT = 48 << 20  # maximum bytes written to DIR


def drive(facts_file, arguments):
    """Runs ``amil train`` in this process and measures the time spent waiting for batches."""
    iterate, facts = PoseLoader.__iter__, {"waited_s": 0.0, "batches": 0}

    def timed(loader):
        iterator = iter(iterate(loader))
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                if loader.drop_last:  # the training loader, not the validation loader
                    facts["waited_s"] += time.perf_counter() - start
                    facts["batches"] += 1
            yield batch

    PoseLoader.__iter__ = timed
    sys.argv = ["amil", "train", *arguments]
    try:
        return amil()
    finally:
        if torch.cuda.is_available():
            facts["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            facts["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        write_json(facts_file, facts)


def train_arguments(options, more):
    """The command line of ``amil train``."""
    arguments = ["--out", str(options.run), "--epochs", str(options.epochs)]
    if options.dry_run:
        arguments += ["--preset", "demo", "--batch-size", "8", "--input-size", "64", "--checkpoint-minutes", "1"]
        arguments += [
            "--set",
            "data.synthetic=32",
            "--set",
            "data.synthetic_validation=16",
            "--set",
            "run.evaluate_every=1",
        ]
    else:
        if options.archive is None:
            raise SystemExit("--archive: expected a crop archive (`amil pack`), got none")
        arguments += ["--preset", options.preset, "--archive", str(options.archive), "--precision", "bf16"]
        arguments += ["--input-size", "256", "--checkpoint-minutes", "2"]
        arguments += ["--set", f"data.holdout={options.holdout}", "--set", "run.evaluate_every=5"]
    return arguments + (["--resume"] if options.resume else []) + more


def run(options, budget, more):
    """Runs the training; returns (exit status, whether the time limit stopped it, seconds, facts of :func:`drive`)."""
    facts_file = options.out / "facts.json"
    facts_file.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "drive", str(facts_file), *train_arguments(options, more)]
    start, stopped = time.monotonic(), False
    with open(options.out / "train.log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(max(1.0, budget.left() - SAVING))
        except subprocess.TimeoutExpired:
            stopped = True
            process.send_signal(signal.SIGINT)  # saves and stops
            try:
                status = process.wait(SAVING * 2 / 3)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # including the data loader workers
                process.wait()
                status = "killed, did not stop within the time limit"
    facts = read_json(facts_file) if facts_file.is_file() else {}
    return status, stopped, time.monotonic() - start, facts


def read_history(folder):
    path = folder / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def draw_curves(history, path):
    """Plots loss and scores over the epochs."""
    figure = Figure(figsize=(10, 4), layout="tight")
    left, right = figure.subplots(1, 2)
    left.plot([row["epoch"] for row in history], [row["heatmap"] for row in history])
    left.set(xlabel="epoch", ylabel="heatmap loss", yscale="log")
    for name in ("PCK@0.2", "PCKh@0.5"):
        rows = [row for row in history if row.get(name) is not None]
        if rows:
            right.plot([row["epoch"] for row in rows], [row[name] for row in rows], marker="o", label=name)
            right.legend()
    right.set(xlabel="epoch", ylabel="%")
    figure.savefig(path, dpi=100)


def collect(options, history):
    """Copies the results to --out; returns the names of files omitted because of their size."""
    if (options.run / "best").is_dir():
        PoseGenerator.from_pretrained(options.run / "best").save_pretrained(options.out / "best", dtype=torch.float16)
    if history:
        draw_curves(history, options.out / "curves.png")
    omitted = []
    for name in ("history.jsonl", "summary.json", "overlays.jpg"):
        source = options.run / name
        if source.is_file():
            used = sum(f.stat().st_size for f in options.out.rglob("*") if f.is_file())
            if used + source.stat().st_size > LIMIT:
                omitted.append(name)
            else:
                shutil.copyfile(source, options.out / name)
    return omitted


def main():
    if sys.argv[1:2] == ["drive"]:
        return drive(sys.argv[2], sys.argv[3:])
    arguments = sys.argv[1:]
    more = []
    if "--" in arguments:
        more = arguments[arguments.index("--") + 1 :]
        arguments = arguments[: arguments.index("--")]

    def extend(parser):
        parser.add_argument("--archive", type=Path, help="crop archive (`amil pack`)")
        parser.add_argument("--preset", default="lspet")
        parser.add_argument("--holdout", type=int, default=500, help="number of last people held out for validation")
        parser.add_argument("--epochs", type=int, default=100)
        parser.add_argument("--run", type=Path, default=ROOT / "runs" / "gpu", help="run folder (large)")
        parser.add_argument("--resume", action="store_true")

    options = parse(__doc__.splitlines()[0], arguments, minutes=9.0, extend=extend)
    budget = Budget(options.minutes)
    if options.dry_run:
        options.epochs, options.run = 2, options.out / "run"
        if not options.resume:
            shutil.rmtree(options.run, ignore_errors=True)
    # Relative to the working directory of this process; the training runs in the root of the project.
    options.run, options.out = options.run.resolve(), options.out.resolve()
    options.archive = options.archive and options.archive.resolve()
    results = Results(options, "train", {"machine": machine(open_device(options)), "minutes": options.minutes})
    status, stopped, seconds, facts = run(options, budget, more)
    history = read_history(options.run)
    omitted = collect(options, history)
    rates = [row["images/s"] for row in history[1:] or history]  # the first epoch is a warm-up
    rate = sum(rates) / len(rates) if rates else None
    trained = history[-1]["seconds"] if history else None
    epoch_seconds = seconds / len(history) if history else None
    results.data |= {
        "arguments": train_arguments(options, more),
        "status": status,
        "stopped_for_time": stopped,
        "seconds": seconds,
        "epochs": len(history),
        "images_per_s": rate,
        "waiting_for_data": facts.get("waited_s", 0.0) / trained if trained and facts else None,
        "epochs_that_fit": int((60 * options.minutes - SAVING) / epoch_seconds) if epoch_seconds else None,
        "omitted": omitted,
        **facts,
        "history": history,
    }
    results.write()

    if status not in (0, 130):
        print((options.out / "train.log").read_text()[-2000:])
    scored = [row for row in history if row.get("PCK@0.2") is not None or row.get("PCKh@0.5") is not None]
    columns = {
        "epoch": lambda r: r["epoch"],
        "heatmap loss": lambda r: f"{r['heatmap']:.3g}",
        "images/s": lambda r: f"{r['images/s']:.0f}",
        "PCK@0.2": lambda r: "-" if r.get("PCK@0.2") is None else f"{r['PCK@0.2']:.1f}",
        "PCKh@0.5": lambda r: "-" if r.get("PCKh@0.5") is None else f"{r['PCKh@0.5']:.1f}",
    }
    print_table(scored[-25:], columns, "training" + (" (dry run)" if options.dry_run else ""))
    data = results.data
    share = data["waiting_for_data"]
    print(f"status {status}{', time limit reached' if stopped else ''}; {len(history)} epochs in {seconds:.0f} s;"
          f" images/s: {'-' if rate is None else f'{rate:.0f}'};"
          f" waiting for data: {'not measured' if share is None else f'{share:.1%}'};"
          f" peak GPU memory: {data.get('peak_allocated_bytes', 0) / 2**30:.1f} GiB;"
          f" epochs that fit {options.minutes:g} minutes: {data['epochs_that_fit']}")  # fmt: skip
    return 0 if status in (0, 130) and history else 1


if __name__ == "__main__":
    sys.exit(main())
