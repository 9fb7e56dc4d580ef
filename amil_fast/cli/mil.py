"""``amil mil``: bag classifiers on bag files."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from amil_fast.cli.common import fail, progress_bar
from amil_fast.mil import study as mil_study
from amil_fast.mil.bag_files import load_bags
from amil_fast.mil.training import PAPER_SETTINGS, MilSettings, cross_validate
from amil_fast.ops import adjust_pool

app = typer.Typer(no_args_is_help=True, help="Multiple-instance learning: classify bags of instances.")
_DEFAULT = MilSettings()


def write_json(path, content):
    """Writes JSON, making the folder; a place that can't be written ends the command."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        fail(f"{path}: can't be written: {error.strerror}")


@app.command()
def cv(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(help="Bag file (.npz with features, offsets, labels, folds).")],
    pooling: Annotated[
        str, typer.Option(help="adjust, mean, max, lse, attention or gated_attention.")
    ] = _DEFAULT.pooling,
    num_iters: Annotated[int, typer.Option(help="Iterations of adjust pooling.")] = _DEFAULT.num_iters,
    hidden: Annotated[int, typer.Option(help="Width of every layer.")] = _DEFAULT.hidden,
    depth: Annotated[int, typer.Option(help="Number of layers.")] = _DEFAULT.depth,
    residual: Annotated[bool, typer.Option(help="Add up the levels' bag vectors.")] = _DEFAULT.residual,
    deep_supervision: Annotated[bool, typer.Option(help="Score every level.")] = _DEFAULT.deep_supervision,
    instance_norm: Annotated[
        float, typer.Option(help="Length that instances are scaled to before pooling; 0: leave them.")
    ] = _DEFAULT.instance_norm,
    instance_scale: Annotated[
        float, typer.Option(help="Factor on the embeddings before pooling.")
    ] = _DEFAULT.instance_scale,
    bag_scale: Annotated[float, typer.Option(help="Factor on the pooled vectors.")] = _DEFAULT.bag_scale,
    input_dropout: Annotated[float, typer.Option(help="Share of features dropped.")] = _DEFAULT.input_dropout,
    dropout: Annotated[float, typer.Option(help="Share of hidden units dropped.")] = _DEFAULT.dropout,
    soft_clip: Annotated[
        float, typer.Option(help="Bend standardized features toward this bound; 0: leave them.")
    ] = _DEFAULT.soft_clip,
    kernel_weight: Annotated[
        float, typer.Option(help="Share of a set kernel in the probability; 0: the network alone.")
    ] = _DEFAULT.kernel_weight,
    loss: Annotated[str, typer.Option(help="bce, margin, bce+margin or mil.")] = _DEFAULT.loss,
    epochs: Annotated[int, typer.Option(help="Passes over the training part; the last one counts.")] = _DEFAULT.epochs,
    batch_size: Annotated[int, typer.Option(help="Bags per step.")] = _DEFAULT.batch_size,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = _DEFAULT.lr,
    schedule: Annotated[str, typer.Option(help="Of the learning rate: constant or cosine.")] = _DEFAULT.schedule,
    weight_decay: Annotated[float, typer.Option(help="Adam's weight decay.")] = _DEFAULT.weight_decay,
    ensemble: Annotated[int, typer.Option(help="Networks per fold, their probabilities averaged.")] = _DEFAULT.ensemble,
    seed: Annotated[int, typer.Option(help="Start of the random numbers.")] = _DEFAULT.seed,
    backend: Annotated[str, typer.Option(help="Backend of adjust pooling.")] = _DEFAULT.backend,
    paper: Annotated[
        bool, typer.Option("--paper", help="Start from the paper's settings; what you name still counts.")
    ] = False,
    at_once: Annotated[int, typer.Option(min=1, help="Networks trained side by side.")] = 50,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
):
    """Repeated k-fold cross-validation of a bag classifier (MI-RNet) on the folds of a bag file.

    Every feature is standardized by the training part of each fold, the model of the last epoch counts, the threshold
    is 0.5; accuracy is the mean over folds, given as mean and standard deviation over repetitions.

    Example: `amil mil cv musk1.npz --pooling adjust --json musk1.json`
    """
    given = {
        name: value
        for name, value in context.params.items()
        if name in MilSettings.__dataclass_fields__ and context.get_parameter_source(name).name != "DEFAULT"
    }
    console = Console(quiet=quiet)
    try:
        settings = dataclasses.replace(PAPER_SETTINGS if paper else _DEFAULT, **given)
        adjust_pool(torch.zeros(1, 1, 1), backend=backend)  # whether it can serve at all, before anything is trained
        bags = load_bags(data)
    except (ValueError, RuntimeError) as error:
        fail(error)
    repetitions, folds, count = bags.folds.shape
    sizes = bags.sizes
    console.print(
        f"{data}: {count} bags ({int(bags.labels.sum())} positive) of {sizes.min()} to {sizes.max()} "
        f"instances, {bags.features.shape[0]} x {bags.features.shape[1]} features; {repetitions} x {folds} folds",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    with progress_bar(console, quiet) as progress:
        task = progress.add_task("epochs", total=None)
        result = cross_validate(
            bags,
            settings,
            at_once=at_once,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(_cv_table(result))
    if json_file is not None:
        write_json(json_file, {"file": data.name, **result})
        console.print(f"written: {json_file}", markup=False, highlight=False, soft_wrap=True)


def _cv_table(result):
    table = Table(title=f"pooling: {result['settings']['pooling']}", caption=f"{result['seconds']:.1f} s")
    table.add_column("repetition")
    table.add_column("accuracy", justify="right")
    table.add_column("AUC", justify="right")
    for repetition, accuracy in enumerate(result["per_repetition"]):
        aucs = [f["auc"] for f in result["per_fold"] if f["repetition"] == repetition and f["auc"] is not None]
        table.add_row(str(repetition + 1), f"{accuracy:.3f}", f"{sum(aucs) / len(aucs):.3f}" if aucs else "-")
    table.add_section()
    auc = result["auc_mean"]
    table.add_row(
        "mean", f"{result['accuracy_mean']:.3f} ± {result['accuracy_std']:.3f}", "-" if auc is None else f"{auc:.3f}"
    )
    return table


@app.command()
def study(
    data: Annotated[list[Path], typer.Argument(help="Bag files.")],
    out: Annotated[Path, typer.Option(help="Folder for study.json, study.md and study.png.")] = Path("runs/mil_study"),
    group: Annotated[
        list[str] | None, typer.Option(help="pooling, network, ingredients or all; may be given more than once.")
    ] = None,
    repetitions: Annotated[int | None, typer.Option(min=1, help="Use the first repetitions only.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of every row, instead of its own.")] = None,
    seed: Annotated[int, typer.Option(help="Start of the random numbers.")] = _DEFAULT.seed,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
):
    """Which ingredient makes the difference: cross-validations over poolings, network options and parts of the recipe.

    Every row is one cross-validation of one network per fold. Stopped and started again it goes on where it was.

    Example: `amil mil study musk1.npz tiger.npz --group pooling --out runs/study`
    """
    changes = {"seed": seed} | ({} if epochs is None else {"epochs": epochs})
    console = Console(quiet=quiet)
    try:
        cells = mil_study.study_cells(group or ("pooling", "network", "ingredients"), **changes)
        files = {path.stem: load_bags(path) for path in data}
        if len(files) < len(data):
            raise ValueError("data: expected files with different names")
        out.mkdir(parents=True, exist_ok=True)
        with progress_bar(console, quiet) as progress:
            task = progress.add_task("", total=None)
            content = mil_study.run_study(
                files,
                cells,
                out / "study.json",
                repetitions=repetitions,
                on_cell=lambda done, total, label: progress.update(
                    task,
                    completed=done,
                    total=total,
                    description=label.replace("[", r"\["),  # no Rich markup
                ),
            )
        table = mil_study.rows(files, cells, content, repetitions)
        (out / "study.md").write_text(mil_study.to_markdown(table))
        mil_study.draw(out / "study.png", table)
    except ValueError as error:
        fail(error)
    except OSError as error:
        fail(f"{out}: {error}")
    console.print(mil_study.to_markdown(table), markup=False, highlight=False, soft_wrap=True)
    console.print(f"written: {out / 'study.json'}, study.md, study.png", markup=False, highlight=False, soft_wrap=True)
