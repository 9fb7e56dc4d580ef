"""Ablation study: the same training with and without each component of the method, over several seeds."""

import json
import multiprocessing
import multiprocessing.connection
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from amil_fast.pose.data.loader import cores
from amil_fast.pose.evaluation.scoring import headline
from amil_fast.pose.training.checkpoints import STATE, load_state
from amil_fast.pose.training.config import TrainConfig, from_dict
from amil_fast.pose.training.trainer import Interrupted, NotFinite, train
from amil_fast.utils.files import atomic_path, write_json

OUTPUT = "output.txt"  # console output of a run, in its folder
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
Rows = dict[tuple[str, str], list[tuple[str, TrainConfig]]]

_PLAIN = {"generator.blocks": 0, "discriminator": None, "loss.mil": 0.0}
_REGIONS = {"discriminator": None}
# Group -> name of a row -> settings that replace the base configuration's. A row in several groups is trained once.
GROUPS = {
    "ideas": {  # Fig. 6 and 8
        "backbone + L2": _PLAIN,
        "+ MI-RNet": _REGIONS,
        "+ adversarial": {"generator.blocks": 0, "loss.mil": 0.0},
        "+ both": {},
    },
    "pooling": {
        "adjust": _REGIONS,
        # Mean and max pooling do not squash the bag vector, so that no scale is needed.
        "mean": {**_REGIONS, "generator.pooling": "mean", "generator.bag_scale": 1.0},
        "max": {**_REGIONS, "generator.pooling": "max", "generator.bag_scale": 1.0},
        "none": {**_REGIONS, "generator.pooling": "none"},
    },
    "levels": {  # Table 5
        "1 FC": {**_REGIONS, "generator.depth": 1},
        "2 FC": {**_REGIONS, "generator.depth": 2},
        "3 FC": {**_REGIONS, "generator.depth": 3},
    },
    "routing": {f"T = {T}": {**_REGIONS, "generator.num_iters": T} for T in (1, 2, 3, 5)},
    # With losses that are means over pixels, about 0.01, Chou et al.'s constants leave k at 0 for thousands of steps
    # and the adversarial term at 1e-4 of the loss. Remedies: k by sums over a map, and a larger weight of the term.
    "adversary": {
        "constants of Chou et al.": {},
        "k by sums": {"balance.step": 0.5},
        "k by sums, weight 0.05": {"balance.step": 0.5, "loss.adversarial": 0.05},
    },
    "schedule": {"with decay": {}, "without decay": {"schedule.kind": "constant"}},  # Fig. 8
}


def plan(base: TrainConfig, groups: Iterable[str], seeds: Iterable[int]) -> Rows:
    """Plans the runs of a study: ``{(group, row): [(folder name, TrainConfig) per seed]}``.

    Args:
        base: the :class:`~amil_fast.pose.training.config.TrainConfig` with all components enabled.
        groups: some of :data:`GROUPS`.
        seeds: seeds of weights, sample order and augmentation, the same for every row.

    Raises:
        ValueError: an unknown group, no seeds, or a base without the components that a group removes.
    """
    if not seeds:
        raise ValueError("seeds: expected at least one")
    rows, names = {}, {}
    for group in groups:
        if group not in GROUPS:
            raise ValueError(f"groups: expected some of {', '.join(GROUPS)}, got {group!r}")
        for row, changes in GROUPS[group].items():
            runs = []
            for seed in seeds:
                config = base.override({**changes, "run.seed": seed})
                content = json.dumps(config.to_dict(), sort_keys=True)
                name = names.setdefault(content, f"{group}-{_slug(row)}-seed{seed}")
                runs.append((name, config))
            rows[group, row] = runs
    if ("ideas", "+ both") in rows and not (base.adversarial and base.generator.blocks):
        raise ValueError("base: expected MI-RNet blocks and a discriminator, got a configuration without")
    return rows


def run(
    rows: Rows, out: str | os.PathLike, *, jobs: int = 1, on_run: Callable[[int, int], object] | None = None
) -> None:
    """Trains the runs that are not complete in ``out``, ``jobs`` at a time, each with an equal share of the cores.

    Every run is a process of its own that writes to ``out/NAME``, its console output to ``out/NAME/output.txt``. An
    interrupted run resumes from its last checkpoint. After a failure the other runs are completed; an exception in this
    process (such as KeyboardInterrupt) ends all of them.

    Args:
        on_run: called with (completed runs, total runs) at the start and after every completed run.

    Raises:
        RuntimeError: runs failed; the message contains the end of their output.
    """
    unique = {name: config for runs in rows.values() for name, config in runs}
    waiting = [(Path(out) / name, config) for name, config in unique.items()]
    waiting = [(folder, config) for folder, config in waiting if not (folder / "summary.json").is_file()]
    done = len(unique) - len(waiting)
    if on_run is not None:
        on_run(done, len(unique))
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads' locks of PyTorch
    threads = max(1, cores() // jobs)
    running, failures = {}, []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder, config = waiting.pop(0)
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / "wanted.json", config.to_dict())
                process = context.Process(target=_train, args=(folder, config, threads))
                process.start()
                running[process.sentinel] = process, folder
            for sentinel in multiprocessing.connection.wait(list(running)):
                process, folder = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    failures.append(f"{folder}: training exited with code {process.exitcode}: {_output(folder)}")
                    continue
                done += 1
                if on_run is not None:
                    on_run(done, len(unique))
    finally:
        _end([process for process, _ in running.values()])
    if failures:
        raise RuntimeError("\n".join(failures))


def _train(folder, config, threads):
    """Main function of a child process."""
    output = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):  # file descriptors, so that output of C++ code and loader processes is redirected as well
        os.dup2(output, stream)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for loader processes
    torch.set_num_threads(threads)
    try:
        if (folder / "last" / STATE).is_file():
            config = from_dict(load_state(folder / "last")[1]["config"])
        train(config, folder, Console(quiet=True), resume=True)
    except (ValueError, OSError, NotFinite, Interrupted) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


def _output(folder):
    path = folder / OUTPUT
    return path.read_text(encoding="utf-8", errors="replace").strip()[-2000:] if path.is_file() else "no output"


def _end(processes):
    """Ends processes: SIGTERM, on which a run saves its state, and SIGKILL after GRACE seconds."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def results(rows: Rows, out: str | os.PathLike) -> list[dict]:
    """Scores of the completed runs: ``[{"group", "row", "metric", "seeds", "scores": {joint group: [percent per
    seed]}, "seconds", "images_per_second"}]``; rows with incomplete runs are omitted."""
    table = []
    for (group, row), runs in rows.items():
        summaries = []
        for name, _ in runs:
            path = Path(out) / name / "summary.json"
            if path.is_file():
                history = (path.parent / "history.jsonl").read_text().splitlines()
                summaries.append((json.loads(path.read_text()), [json.loads(line) for line in history]))
        if len(summaries) < len(runs):
            continue
        validations = [summary["validation"] for summary, _ in summaries]
        metric = headline(validations[0]["metric"])
        names = [name for name in validations[0][metric] if name not in ("joints", "mean_of_joints")]
        table.append(
            {
                "group": group,
                "row": row,
                "metric": metric,
                "seeds": [config.run.seed for _, config in runs],
                "scores": {name: [validation[metric][name] for validation in validations] for name in names},
                "seconds": [summary["seconds"] for summary, _ in summaries],
                "images_per_second": [statistics.median(row["images/s"] for row in rows) for _, rows in summaries],
            }
        )
    return table


def to_markdown(table: list[dict]) -> str:
    """Mean ± half the range over seeds, per joint group, one table per group of rows."""
    lines, group = [], None
    for entry in table:
        names = list(entry["scores"])
        if entry["group"] != group:
            group = entry["group"]
            head = [f"**{group}**, {entry['metric']}", *names, "images/s"]
            lines += ["", f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
        cells = [_spread(entry["scores"][name]) for name in names]
        rate = statistics.mean(entry["images_per_second"])
        lines.append(f"| {' | '.join([entry['row'], *cells, f'{rate:.0f}'])} |")
    return "\n".join(lines[1:]) + "\n" if lines else ""


def draw(path: str | os.PathLike, table: list[dict]) -> None:
    """Writes a plot of the mean over joints of every row, one dot per seed."""
    figure = Figure(figsize=(7, 1.2 + 0.32 * len(table)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    groups = list(dict.fromkeys(entry["group"] for entry in table))
    for y, entry in enumerate(table):
        scores = entry["scores"]["mean"]
        color = f"C{groups.index(entry['group'])}"
        axes.plot(scores, [y] * len(scores), "o", color=color, ms=5, alpha=0.8)
        axes.plot(statistics.mean(scores), y, "|", color=color, ms=16, mew=2)
    axes.set_yticks(range(len(table)), [f"{entry['group']}: {entry['row']}" for entry in table])
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.set_xlabel(f"{table[0]['metric']} in percent, a dot per seed" if table else "")
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=110)


def _spread(values):
    if any(value is None for value in values):
        return "-"
    middle = statistics.mean(values)
    return f"{middle:.1f}" if len(values) == 1 else f"{middle:.1f} ± {(max(values) - min(values)) / 2:.1f}"


def _slug(text):
    return "-".join("".join(c if c.isalnum() else " " for c in text).split()).lower()
