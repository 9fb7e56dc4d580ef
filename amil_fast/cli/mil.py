"""``amil mil``: bag classifiers. Cross-validation and ablation study; see also the other ``mil_*.py``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from amil_fast.cli import mil_bags
from amil_fast.cli import mil_options as options
from amil_fast.cli.common import fail, print_plain, print_written, progress_bar, write_result
from amil_fast.cli.mil_benchmark import benchmark
from amil_fast.cli.mil_heatmap import heatmap
from amil_fast.cli.options import Json, Quiet
from amil_fast.mil import study as mil_study
from amil_fast.mil.bag_cross_validation import cross_validate_bags
from amil_fast.mil.bag_files import load_bags
from amil_fast.mil.cross_validation import cross_validate, format_accuracy
from amil_fast.mil.labels import load_labeled_bags, make_targets
from amil_fast.mil.reports import summary_lines
from amil_fast.mil.settings import METHODS, PAPER_SETTINGS, MilSettings, TrainSettings
from amil_fast.ops import adjust_pool
from amil_fast.utils.files import write_text

app = typer.Typer(no_args_is_help=True, help="Multiple-instance learning: bag classifiers.")
mil_bags.register(app)
app.command()(heatmap)
app.command()(benchmark)
_DEFAULT = MilSettings()
_TRAIN = TrainSettings()


@app.command()
def cv(
    context: typer.Context,
    data: Annotated[
        Path, typer.Argument(help="Bag file (.npz with features, offsets, labels, folds), or a folder of bags.")
    ],
    labels: options.Labels = None,
    out: Annotated[
        Path | None, typer.Option(help="Own bags: folder for models, predictions and scores of the folds.")
    ] = None,
    pooling: options.Pooling = _DEFAULT.pooling,
    num_iters: options.NumIters = _DEFAULT.num_iters,
    hidden: options.Hidden = _DEFAULT.hidden,
    depth: options.Depth = _DEFAULT.depth,
    residual: options.Residual = _DEFAULT.residual,
    deep_supervision: options.DeepSupervision = _DEFAULT.deep_supervision,
    instance_norm: options.InstanceNorm = _DEFAULT.instance_norm,
    instance_scale: options.InstanceScale = _DEFAULT.instance_scale,
    bag_scale: options.BagScale = _DEFAULT.bag_scale,
    input_dropout: options.InputDropout = _DEFAULT.input_dropout,
    dropout: options.Dropout = _DEFAULT.dropout,
    soft_clip: options.SoftClip = _DEFAULT.soft_clip,
    method: Annotated[
        str,
        typer.Option(
            help=f"Bag file: {', '.join(METHODS[:-1])} or {METHODS[-1]}. All but network break the multiple-instance "
            "assumption, and no option but --seed applies to them."
        ),
    ] = _DEFAULT.method,
    loss: Annotated[str, typer.Option(help="Bag file: bce, margin, bce+margin or mil.")] = _DEFAULT.loss,
    epochs: options.Epochs = _DEFAULT.epochs,
    batch_size: options.BatchSize = _DEFAULT.batch_size,
    lr: options.Lr = _DEFAULT.lr,
    schedule: options.Schedule = _DEFAULT.schedule,
    weight_decay: options.WeightDecay = _DEFAULT.weight_decay,
    ensemble: Annotated[
        int, typer.Option(help="Bag file: networks per fold whose probabilities are averaged.")
    ] = _DEFAULT.ensemble,
    seed: options.Seed = _DEFAULT.seed,
    backend: options.Backend = _DEFAULT.backend,
    paper: Annotated[
        bool, typer.Option("--paper", help="Use the paper's settings; other options override them.")
    ] = False,
    at_once: Annotated[int, typer.Option(min=1, help="Bag file: number of networks trained side by side.")] = 50,
    folds: Annotated[int, typer.Option(min=2, help="Own bags: number of folds, without a column fold.")] = 5,
    repetitions: Annotated[int, typer.Option(min=1, help="Own bags: number of partitions into folds.")] = 1,
    task: options.Task = _TRAIN.task,
    positive: options.Positive = None,
    class_weights: options.ClassWeights = _TRAIN.class_weights,
    normalization: options.Normalization = _TRAIN.normalization,
    patience: options.Patience = _TRAIN.patience,
    validation: options.Validation = _TRAIN.validation,
    max_instances: options.MaxInstances = _TRAIN.max_instances,
    workers: options.Workers = None,
    precision: options.Precision = _TRAIN.precision,
    device: options.TrainDevice = None,
    tensorboard: options.Tensorboard = False,
    resamples: options.Resamples = 1000,
    resume: options.Resume = False,
    json_file: Json = None,
    quiet: Quiet = False,
):
    """Repeated k-fold cross-validation of a bag classifier: MI-RNet, or another --method.

    On a bag file, the folds are those of the file: features are normalized by the training part of each fold; the
    last epoch's model is evaluated with threshold 0.5. Accuracy is the mean over folds, reported as mean and standard
    deviation over repetitions. The most accurate method on the benchmark sets is `blend`; like all methods but the
    network it can count an instance as evidence for a negative bag, which breaks the multiple-instance assumption.

    On a folder of bags (or a bag file with --labels), every fold is trained as by `amil mil train`: epoch and threshold
    are chosen on an inner part of its training part, groups are never split, and the folds are those of the column
    `fold`, or stratified ones.

    Example: `amil mil cv musk1.npz --pooling adjust --json musk1.json`

    Example: `amil mil cv musk1.npz --method blend`

    Example: `amil mil cv features/ --labels labels.csv --folds 5 --out runs/cv`
    """
    base = PAPER_SETTINGS if paper else _DEFAULT
    if labels is not None or data.is_dir():
        given = options.given_settings(context, TrainSettings)
        if out is None:
            raise ValueError("out: expected a folder for the results (--out)")
        train_settings = TrainSettings(**{**dataclasses.asdict(base), "tensorboard": False, **given})
        console = options.main_console(quiet)
        _cv_of_own_bags(
            console, quiet, data, labels, out, train_settings, folds, repetitions, resamples, resume, json_file
        )
        return
    console = Console(quiet=quiet)
    try:
        settings = dataclasses.replace(base, **options.given_settings(context, MilSettings))
        adjust_pool(torch.zeros(1, 1, 1), backend=backend)  # an unusable backend fails before anything is trained
        bag_data = load_bags(data)
    except (ValueError, RuntimeError) as error:
        fail(error)
    repetitions, folds, num_bags = bag_data.folds.shape
    sizes, (num_instances, num_features) = bag_data.sizes, bag_data.features.shape
    print_plain(
        console,
        f"{data}: {num_bags} bags ({int(bag_data.labels.sum())} positive) of {sizes.min()} to {sizes.max()} "
        f"instances, {num_instances} x {num_features} features; {repetitions} x {folds} folds",
    )
    with progress_bar(console, quiet) as progress:
        bar = progress.add_task("epochs" if settings.method == "network" else "folds", total=None)
        result = cross_validate(
            bag_data,
            settings,
            at_once=at_once,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    console.print(_cv_table(result))
    write_result(console, json_file, {"file": data.name, **result})


def _cv_of_own_bags(console, quiet, data, labels, out, settings, folds, repetitions, resamples, resume, json_file):
    labeled = load_labeled_bags(data, labels)
    targets = make_targets(labeled.labels, settings.task, positive=settings.positive)
    print_plain(console, mil_bags.describe(data, labeled, targets))
    with options.shown_progress(console, quiet) as show:
        result = cross_validate_bags(
            labeled,
            targets,
            settings,
            out,
            folds=folds,
            repetitions=repetitions,
            resamples=resamples,
            resume=resume,
            on_progress=show,
            on_message=lambda text: print_plain(console, text),
        )
    for line in summary_lines(result):
        print_plain(console, line)
    write_result(console, json_file, result)
    print_written(console, out)


def _cv_table(result):
    settings = result["settings"]
    title = f"pooling: {settings['pooling']}" if settings["method"] == "network" else settings["method"]
    table = Table(title=title, caption=f"{result['seconds']:.1f} s")
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
