"""Ablation study: trainings that differ in one setting each, over several seeds."""

import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from amil_fast.pose.data.loader import cores
from amil_fast.pose.evaluation import headline, scores_of_groups
from amil_fast.pose.training.config import TrainConfig, from_dict
from amil_fast.pose.training.meter import NotFinite
from amil_fast.pose.training.trainer import train
from amil_fast.utils.errors import Interrupted, RunFailed
from amil_fast.utils.files import atomic_path, parse_json, read_json
from amil_fast.utils.history import HISTORY
from amil_fast.utils.processes import end_with_parent
from amil_fast.utils.signals import StopRequest
from amil_fast.utils.training_state import STATE, load_config

OUTPUT = "output.txt"  # in a run's folder: what its process printed
_POLL = 0.2  # seconds between checks for a requested stop
_GRACE = 10.0  # seconds that a stopped process has for saving its state

_PLAIN = {"generator.blocks": 0, "discriminator": None, "loss.mil": 0.0}
_REGIONS = {"discriminator": None}
# Group -> row -> settings that override the base configuration's. A row in several groups is trained once.
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "ideas": {  # Fig. 6 and 8
        "backbone + L2": _PLAIN,
        "+ MI-RNet": _REGIONS,
        "+ adversarial": {"generator.blocks": 0, "loss.mil": 0.0},
        "+ both": {},
    },
    "pooling": {
        "adjust": _REGIONS,
        # Means and maxima are not squashed, so that bag_scale has nothing to compensate.
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
    # Our losses are means over pixels, about 0.01: with the constants of Chou et al., k stays at 0 for thousands of
    # steps and the adversarial term at 1e-4 of the loss. A larger step corresponds to sums over a map.
    "adversary": {
        "constants of Chou et al.": {},
        "k by sums": {"balance.step": 0.5},
        "k by sums, weight 0.05": {"balance.step": 0.5, "loss.adversarial": 0.05},
    },
    "schedule": {"with decay": {}, "without decay": {"schedule.kind": "constant"}},  # Fig. 8
}


# (group, row) -> for each seed the name of the run's folder and its configuration
Plan = dict[tuple[str, str], list[tuple[str, TrainConfig]]]


def plan(base: TrainConfig, groups: Iterable[str], seeds: Sequence[int]) -> Plan:
    """Returns the runs of a study.

    Args:
        base: configuration with all of the paper's ideas.
        groups: names in :data:`GROUPS`.
        seeds: seeds of weights, order and augmentation; the same for every row.

    Raises:
        ValueError: unknown group, no seeds, or a base without what a group removes.
    """
    if not seeds:
        raise ValueError("seeds: expected at least one")
    rows: Plan = {}
    names: dict[str, str] = {}
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
    rows: Plan,
    out: str | Path,
    *,
    jobs: int = 1,
    on_run: Callable[[int, int], object] | None = None,
) -> None:
    """Trains the runs that ``out`` does not contain yet, each in ``out/NAME`` and in a process of its own.

    Unfinished runs are resumed; ``out/NAME/output.txt`` receives their console output. A run that fails does not stop
    the others.

    Args:
        rows: result of :func:`plan`.
        out: folder of the study.
        jobs: number of concurrent runs; the cores are divided equally among them.
        on_run: called with the number of finished runs and of all runs, at the start and after each.

    Raises:
        RunFailed: runs failed; the message contains their errors.
        Interrupted: SIGINT or SIGTERM was received; the running trainings are saved.
    """
    out = Path(out)
    waiting = list({name: config for runs in rows.values() for name, config in runs}.items())
    total, done, failures = len(waiting), 0, []
    threads = max(1, cores() // jobs)
    running: list[_Run] = []

    def report():
        if on_run is not None:
            on_run(done, total)

    report()
    with StopRequest() as stop:
        try:
            while (waiting or running) and not stop:
                while waiting and len(running) < jobs:
                    name, config = waiting.pop(0)
                    if (out / name / "summary.json").is_file():
                        done += 1
                        report()
                    else:
                        running.append(_start(out / name, config, threads))
                ended = connection.wait([each.process.sentinel for each in running], _POLL) if running else []
                for each in [each for each in running if each.process.sentinel in ended]:
                    running.remove(each)
                    error = _error(each)
                    if error is None:
                        done += 1
                        report()
                    else:
                        failures.append(error)
        finally:
            _end(running)
        if stop:
            raise Interrupted(
                f"{stop.reason}: stopped after {done} of {total} runs; the same command resumes the others"
            )
    if failures:
        raise RunFailed("\n".join(failures))


@dataclass
class _Run:
    """A training in another process; ``error`` receives the text of an exception."""

    folder: Path
    process: BaseProcess
    error: connection.Connection


def _start(folder, config, threads):
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(folder, config.to_dict(), threads, sender))
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when the new process loads its numerical libraries
    try:
        process.start()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    sender.close()
    return _Run(folder, process, receiver)


def _train(folder, content, threads, error):
    """Target of the process: trains with ``threads`` threads, prints to ``output.txt``, sends an exception's text."""
    output = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(output, stream)
    end_with_parent(_GRACE)
    torch.set_num_threads(threads)
    try:
        if (folder / "last" / STATE).is_file():  # like amil train --resume: the settings that the run was started with
            content = load_config(folder / "last")
        train(from_dict(content), folder, Console(), resume=True)
    except (ValueError, OSError, NotFinite, Interrupted) as expected:
        error.send(str(expected))
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        error.send(traceback.format_exc()[-2000:])
        sys.exit(1)


def _error(ended):
    """The message about a process that has ended, or None if it succeeded."""
    ended.process.join()
    if ended.process.exitcode == 0:
        return None
    try:
        text = ended.error.recv()
    except EOFError:  # killed, or crashed in native code
        output = ended.folder / OUTPUT
        text = output.read_text(errors="replace").strip()[-2000:] if output.is_file() else ""
        text = f"exit code {ended.process.exitcode}{': ' if text else ''}{text}"
    return f"{ended.folder}: training failed: {text}"


def _end(running):
    """Stops processes: SIGTERM, on which a training saves its state, and SIGKILL after a time that all share."""
    for each in running:
        each.process.terminate()
    deadline = time.monotonic() + _GRACE
    try:
        for each in running:
            each.process.join(max(0.0, deadline - time.monotonic()))
    finally:  # also after a second Ctrl-C
        for each in running:
            each.process.kill()
        for each in running:
            each.process.join()


def results(rows: Plan, out: str | Path) -> list[dict[str, Any]]:
    """Collects the scores of the finished runs.

    Returns:
        A dict for each row all of whose runs are finished: ``group``, ``row``, ``metric``, ``seeds``, ``scores`` (joint
        group -> percent for each seed), ``seconds`` and ``images_per_second`` (for each seed).
    """
    table = []
    for (group, row), runs in rows.items():
        summaries = []
        for name, _ in runs:
            path = Path(out) / name / "summary.json"
            if path.is_file():
                history = path.parent / HISTORY
                lines = history.read_text(encoding="utf-8").splitlines()
                summaries.append((read_json(path, dict), [parse_json(line, history, dict) for line in lines]))
        if len(summaries) < len(runs):
            continue
        validations = [summary["validation"] for summary, _ in summaries]
        metric = headline(validations[0]["metric"])
        names = list(scores_of_groups(validations[0][metric]))
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


def to_markdown(table: list[dict[str, Any]]) -> str:
    """Formats one table per group: mean ± half the range over the seeds, for each joint group."""
    lines: list[str] = []
    group = None
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


def draw(path: str | Path, table: list[dict[str, Any]]) -> None:
    """Writes a plot of the mean over joints of each row: a dot per seed, a line at their mean."""
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
    axes.set_xlabel(f"{table[0]['metric']} in percent, one dot per seed" if table else "")
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=110)


def _spread(values):
    if any(value is None for value in values):
        return "-"
    mean = statistics.mean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {(max(values) - min(values)) / 2:.1f}"


def _slug(text):
    return "-".join("".join(c if c.isalnum() else " " for c in text).split()).lower()
