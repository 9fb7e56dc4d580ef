"""``amil mil``: bag classifiers on bag files."""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from amil_fast.cli.common import fail, print_plain, progress_bar, write_result
from amil_fast.mil import study as mil_study
from amil_fast.mil.bag_files import load_bags
from amil_fast.mil.cross_validation import cross_validate, format_accuracy
from amil_fast.mil.settings import PAPER_SETTINGS, MilSettings
from amil_fast.ops import adjust_pool
from amil_fast.utils.files import write_text

app = typer.Typer(no_args_is_help=True, help="Multiple-instance learning: bag classifiers.")
_DEFAULT = MilSettings()


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
    residual: Annotated[bool, typer.Option(help="Sum the bag vectors over the levels.")] = _DEFAULT.residual,
    deep_supervision: Annotated[bool, typer.Option(help="Score every level.")] = _DEFAULT.deep_supervision,
    instance_norm: Annotated[
        float, typer.Option(help="Length to which embeddings are scaled before pooling; 0: off.")
    ] = _DEFAULT.instance_norm,
    instance_scale: Annotated[
        float, typer.Option(help="Factor on the embeddings before pooling.")
    ] = _DEFAULT.instance_scale,
    bag_scale: Annotated[float, typer.Option(help="Factor on the pooled vectors.")] = _DEFAULT.bag_scale,
    input_dropout: Annotated[float, typer.Option(help="Dropout probability of features.")] = _DEFAULT.input_dropout,
    dropout: Annotated[float, typer.Option(help="Dropout probability of hidden units.")] = _DEFAULT.dropout,
    soft_clip: Annotated[
        float, typer.Option(help="Bound of the smooth clipping of standardized features; 0: off.")
    ] = _DEFAULT.soft_clip,
    kernel_weight: Annotated[
        float, typer.Option(help="Weight of a set kernel's probability beside the network's; 0: off.")
    ] = _DEFAULT.kernel_weight,
    loss: Annotated[str, typer.Option(help="bce, margin, bce+margin or mil.")] = _DEFAULT.loss,
    epochs: Annotated[
        int, typer.Option(help="Passes over the training part; the last epoch's model is used.")
    ] = _DEFAULT.epochs,
    batch_size: Annotated[int, typer.Option(help="Bags per step.")] = _DEFAULT.batch_size,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = _DEFAULT.lr,
    schedule: Annotated[str, typer.Option(help="Learning rate schedule: constant or cosine.")] = _DEFAULT.schedule,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of Adam.")] = _DEFAULT.weight_decay,
    ensemble: Annotated[
        int, typer.Option(help="Networks per fold whose probabilities are averaged.")
    ] = _DEFAULT.ensemble,
    seed: Annotated[int, typer.Option(help="Random seed.")] = _DEFAULT.seed,
    backend: Annotated[str, typer.Option(help="Backend of adjust pooling.")] = _DEFAULT.backend,
    paper: Annotated[
        bool, typer.Option("--paper", help="Use the paper's settings; other options override them.")
    ] = False,
    at_once: Annotated[int, typer.Option(min=1, help="Number of networks trained side by side.")] = 50,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
):
    """Repeated k-fold cross-validation of a bag classifier (MI-RNet) on the folds of a bag file.

    Features are standardized by the training part of each fold; the last epoch's model is evaluated with threshold
    0.5. Accuracy is the mean over folds, reported as mean and standard deviation over repetitions.

    Example: `amil mil cv musk1.npz --pooling adjust --json musk1.json`
    """
    sources = {name: context.get_parameter_source(name) for name in MilSettings.__dataclass_fields__}
    given = {name: context.params[name] for name, source in sources.items() if source and source.name != "DEFAULT"}
    console = Console(quiet=quiet)
    try:
        settings = dataclasses.replace(PAPER_SETTINGS if paper else _DEFAULT, **given)
        adjust_pool(torch.zeros(1, 1, 1), backend=backend)  # an unusable backend fails before anything is trained
        bag_data = load_bags(data)
    except (ValueError, RuntimeError) as error:
        fail(error)
    repetitions, folds, num_bags = bag_data.folds.shape
    sizes, (num_instances, num_features) = bag_data.sizes, bag_data.features.shape
    console.print(
        f"{data}: {num_bags} bags ({int(bag_data.labels.sum())} positive) of {sizes.min()} to {sizes.max()} "
        f"instances, {num_instances} x {num_features} features; {repetitions} x {folds} folds",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    with progress_bar(console, quiet) as progress:
        task = progress.add_task("epochs", total=None)
        result = cross_validate(
            bag_data,
            settings,
            at_once=at_once,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(_cv_table(result))
    write_result(console, json_file, {"file": data.name, **result})


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
    table.add_row("mean", format_accuracy(result), "-" if auc is None else f"{auc:.3f}")
    return table


@app.command()
def study(
    data: Annotated[list[Path], typer.Argument(help="Bag files.")],
    out: Annotated[Path, typer.Option(help="Folder for study.json, study.md and study.png.")] = Path("runs/mil_study"),
    group: Annotated[
        list[str] | None, typer.Option(help="pooling, network, ingredients or all; can be repeated.")
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option(min=1, help="Number of repetitions to use, from the first.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Number of epochs, overriding that of every row.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = _DEFAULT.seed,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
):
    """Ablation study: cross-validations over poolings, network variants and parts of the recipe.

    Every row is a cross-validation with one network per fold. An interrupted study is resumed by the same command.

    Example: `amil mil study musk1.npz tiger.npz --group pooling --out runs/study`
    """
    changes = {"seed": seed} | ({} if epochs is None else {"epochs": epochs})
    console = Console(quiet=quiet)
    rows = mil_study.study_rows(group or ("pooling", "network", "ingredients"), **changes)
    files = {path.stem: load_bags(path) for path in data}
    if len(files) < len(data):
        raise ValueError("data: expected files with different names")
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar(console, quiet) as progress:
        task = progress.add_task("", total=None)
        content = mil_study.run_study(
            files,
            rows,
            out / "study.json",
            repetitions=repetitions,
            on_row=lambda done, total, label: progress.update(
                task,
                completed=done,
                total=total,
                description=label.replace("[", r"\["),  # not Rich markup
            ),
        )
    table = mil_study.complete_rows(files, rows, content, repetitions)
    write_text(out / "study.md", mil_study.to_markdown(table))
    mil_study.draw(out / "study.png", table)
    print_plain(console, mil_study.to_markdown(table))
    print_plain(console, f"written: {out / 'study.json'}, study.md, study.png")
