"""Which of the paper's ideas helps: the same training with and without each, over several seeds."""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from amil_fast.pose.data.loader import cores
from amil_fast.pose.evaluation.scoring import headline
from amil_fast.utils.files import publish

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
        # Means and maxima are not squashed: nothing to scale up.
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
    # and the adversarial term at 1e-4 of the loss. Remedies: k by sums over a map, and a term that can be felt.
    "adversary": {
        "constants of Chou et al.": {},
        "k by sums": {"balance.step": 0.5},
        "k by sums, weight 0.05": {"balance.step": 0.5, "loss.adversarial": 0.05},
    },
    "schedule": {"with decay": {}, "without decay": {"schedule.kind": "constant"}},  # Fig. 8
}


def plan(base, groups, seeds):
    """The runs of a study: ``{(group, row): [(folder name, TrainConfig) per seed]}``.

    Args:
        base: the :class:`~amil_fast.pose.training.config.TrainConfig` with all of the paper's ideas on.
        groups: some of :data:`GROUPS`.
        seeds: of weights, order and augmentation; the same for every row.

    Raises:
        ValueError: an unknown group, no seeds, or a base without what a group takes away.
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
        raise ValueError("base: expected MI-RNet blocks and a discriminator in it, to take them away by turns")
    return rows


def run(rows, out, *, jobs=1, on_run=None):
    """Trains what ``out`` doesn't hold yet, ``jobs`` runs at a time on equal shares of the cores.

    Every run is an ``amil train`` of its own in ``out/NAME``, which goes on where it was stopped.

    Args:
        on_run: called with (number done, number in all) at first and after every run.

    Raises:
        RuntimeError: a run failed; its output is in the message.
    """
    out = Path(out)
    unique = {name: config for runs in rows.values() for name, config in runs}
    done = 0
    if on_run is not None:
        on_run(done, len(unique))
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(lambda item: _train(out / item[0], item[1], environment), unique.items()):
            done += 1
            if on_run is not None:
                on_run(done, len(unique))


def _train(folder, config, environment):
    if (folder / "summary.json").is_file():
        return
    content = json.dumps(config.to_dict(), indent=2) + "\n"
    publish(folder, lambda partial: (partial / "wanted.json").write_text(content))
    command = [sys.executable, "-m", "amil_fast.cli", "train", "--config", str(folder / "wanted.json")]
    command += ["--out", str(folder), "--resume", "--quiet"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"{folder}: amil train ended with {found.returncode}: {found.stderr.strip()[-2000:]}")


def results(rows, out):
    """What the finished runs scored: ``[{"group", "row", "metric", "seeds", "scores": {joint group: [percent per
    seed]}, "seconds", "parameters", "images_per_second"}]``; rows with unfinished runs are left out."""
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


def to_markdown(table):
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


def draw(path, table):
    """Writes a picture: the mean over joints of every row, a dot per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.32 * len(table)), layout="constrained")
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
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _spread(values):
    if any(value is None for value in values):
        return "-"
    middle = statistics.mean(values)
    return f"{middle:.1f}" if len(values) == 1 else f"{middle:.1f} ± {(max(values) - min(values)) / 2:.1f}"


def _slug(text):
    return "-".join("".join(c if c.isalnum() else " " for c in text).split()).lower()
