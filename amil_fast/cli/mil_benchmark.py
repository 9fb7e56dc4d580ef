"""``amil mil benchmark``: methods compared on the folds of bag files."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from amil_fast.cli import mil_options as options
from amil_fast.cli.common import print_plain
from amil_fast.cli.options import Quiet
from amil_fast.mil.bag_files import load_bags
from amil_fast.mil.benchmark import METHODS, draw, load_results, run_benchmark, summarize, to_markdown
from amil_fast.utils.files import write_json, write_text


def benchmark(
    data: Annotated[list[Path], typer.Argument(help="Bag files (.npz with features, offsets, labels, folds).")],
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"Can be repeated; by default all that are installed: {', '.join(METHODS)}."),
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option(min=1, help="Number of repetitions to run, from the first; by default all.")
    ] = None,
    reference: Annotated[str, typer.Option(help="Method of which the others' paired differences are given.")] = "max",
    out: Annotated[
        Path, typer.Option(help="Folder for results/, benchmark.json, benchmark.md and benchmark.png.")
    ] = Path("runs/mil_benchmark"),
    seed: options.Seed = 0,
    quiet: Quiet = False,
):
    """Compares methods of multiple-instance learning on the same folds.

    Features are standardized by the training part of each fold, the model of the last epoch is used, and the threshold
    is 0.5; what is chosen is chosen on inner splits of the training part. Standard errors are over bags. Two methods
    are also scored with the epoch and threshold of the highest accuracy on the test part, for comparison.

    Gaussian process, blend, extra trees, support vector machine and logistic regression do not respect the
    multiple-instance assumption: they can count an instance as evidence for a negative bag.

    Every result is written when it is known, and the same command continues an interrupted run. The table has all
    results in the folder.

    Example: `amil mil benchmark musk1.npz tiger.npz --method blend --method max --out runs/benchmark`
    """
    console = Console(quiet=quiet)
    for name in (reference, *(method or ())):
        if name not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    methods = [METHODS[name] for name in method or METHODS]
    if not method:
        absent = [m for m in methods if not m.installed()]
        if absent:
            print_plain(console, f"left out, not installed: {', '.join(m.label for m in absent)}")
        methods = [m for m in methods if m not in absent]
    files = {path.stem: load_bags(path) for path in data}
    if len(files) < len(data):
        raise ValueError("data: expected files with different names")
    with options.shown_progress(console, quiet) as show:
        run_benchmark(
            files,
            methods,
            out,
            repetitions=repetitions,
            seed=seed,
            on_result=lambda done, total, label: show(label, done, total),
        )
    everything = list(METHODS.values())
    summary = summarize(load_results(files, everything, out, seed=seed), files, everything, reference)
    write_json(out / "benchmark.json", summary)
    write_text(out / "benchmark.md", to_markdown(summary))
    draw(out / "benchmark.png", summary)
    print_plain(console, to_markdown(summary))
    print_plain(console, f"written: {out / 'benchmark.json'}, benchmark.md, benchmark.png")
