"""``amil mil train``, ``predict`` and ``evaluate``: bag classifiers on one's own bags."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from amil_fast.cli import mil_options as options
from amil_fast.cli.common import print_plain, print_written
from amil_fast.cli.options import Json, Quiet
from amil_fast.mil import reports
from amil_fast.mil.labels import LabeledBags, Targets, load_labeled_bags, make_targets
from amil_fast.mil.metrics import predicted_classes
from amil_fast.mil.prediction import MAX_INSTANCES, collapse_warning, predict_bags
from amil_fast.mil.settings import TrainSettings
from amil_fast.mil.training import BagTraining
from amil_fast.nn import MIRNet

_DEFAULT = TrainSettings()


def register(app):
    """Adds the commands to ``app``."""
    for command in (train, predict, evaluate):
        app.command()(command)


def train(
    context: typer.Context,
    bags: options.Bags,
    out: Annotated[Path, typer.Option(help="Folder of the run: model, predictions, scores, history, checkpoint.")],
    labels: options.Labels = None,
    task: options.Task = _DEFAULT.task,
    positive: options.Positive = None,
    class_weights: options.ClassWeights = _DEFAULT.class_weights,
    normalization: options.Normalization = _DEFAULT.normalization,
    soft_clip: options.SoftClip = _DEFAULT.soft_clip,
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
    epochs: options.Epochs = _DEFAULT.epochs,
    patience: options.Patience = _DEFAULT.patience,
    validation: options.Validation = _DEFAULT.validation,
    batch_size: options.BatchSize = _DEFAULT.batch_size,
    max_instances: options.MaxInstances = _DEFAULT.max_instances,
    lr: options.Lr = _DEFAULT.lr,
    schedule: options.Schedule = _DEFAULT.schedule,
    weight_decay: options.WeightDecay = _DEFAULT.weight_decay,
    seed: options.Seed = _DEFAULT.seed,
    workers: options.Workers = None,
    precision: options.Precision = _DEFAULT.precision,
    device: options.TrainDevice = None,
    backend: options.Backend = _DEFAULT.backend,
    tensorboard: options.Tensorboard = _DEFAULT.tensorboard,
    resamples: options.Resamples = 1000,
    resume: options.Resume = False,
    quiet: Quiet = False,
):
    """Train a bag classifier (MI-RNet) on one's own bags.

    Bags of split `train` (without the column: all) are the training part. Features are normalized by it, within the
    model. Early stopping and the threshold for two classes use the bags of split `val`, or an inner part that is held
    out of the training part, groups whole; bags of split `test` are only predicted and scored, at the end. A bag is in
    memory only while it is used. Ctrl-C saves the state; `--resume` continues.

    Example: `amil mil train features/ --labels labels.csv --out runs/mine`

    Example: `torchrun --nproc-per-node 2 -m amil_fast.cli mil train features/ --labels labels.csv --out runs/two`
    """
    console = options.main_console(quiet)
    settings = TrainSettings(**options.given_settings(context, TrainSettings))
    labeled = load_labeled_bags(bags, labels)
    targets = make_targets(labeled.labels, settings.task, positive=settings.positive)
    print_plain(console, describe(bags, labeled, targets))
    given = labeled.in_split("val")
    with options.shown_progress(console, quiet) as show:
        run = BagTraining(
            labeled,
            targets,
            labeled.in_split("train"),
            out,
            settings,
            validation=given if len(given) else None,
            resume=resume,
            on_progress=show,
            on_message=lambda text: print_plain(console, text),
        )
        summary = run.run()
        found = predict_bags(
            run.net,
            labeled.source,
            max_instances=max_instances,
            workers=workers,
            accelerator=run.accelerator,
            on_batch=lambda done, total: show("prediction", done, total),
        )
    if not run.main:
        return
    parts = np.full(len(labeled.labels), "", dtype=object)
    for name, part in (("train", run.train), ("validation", run.validation), ("test", labeled.in_split("test"))):
        parts[part] = name
    reports.write_predictions(
        out / reports.PREDICTIONS,
        found,
        targets.task,
        targets.names,
        threshold=run.net.threshold,
        labels=labeled.labels,
        columns={"part": parts.tolist()},
    )
    best = summary["best"]
    print_plain(
        console,
        f"{summary['epochs']} epochs in {summary['seconds']:.0f} s"
        + (f", best epoch {best['epoch']}" if best else "")
        + (f"; threshold {summary['threshold']:.3f}" if targets.names and len(targets.names) == 2 else ""),
    )
    scored = "test" if "test" in parts else "validation"
    chosen = np.flatnonzero(parts == scored)
    if len(chosen):
        note = "" if scored == "test" else ", which chose the epoch and the threshold: optimistic"
        print_plain(console, f"{scored} part of {len(chosen)} bags{note}")
        _score(console, out, run.net, labeled, targets, found.scores, chosen, resamples, f"{scored} part")
    _warn(console, found, run.net, targets, run)
    print_written(console, out)


def predict(
    model: options.Model,
    bags: options.Bags,
    out: Annotated[Path, typer.Option(help="CSV file with a row per bag.")] = Path("predictions.csv"),
    labels: Annotated[
        Path | None, typer.Option(help="CSV file with a column bag_id: the bags to predict, by default all.")
    ] = None,
    max_instances: options.MaxInstances = MAX_INSTANCES,
    workers: options.Workers = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda if available.")] = None,
    quiet: Quiet = False,
):
    """Predict bags with a trained model: a CSV file with probabilities and effective numbers of instances.

    Example: `amil mil predict runs/mine new_features/ --out new.csv`
    """
    console = options.main_console(quiet)
    labeled = load_labeled_bags(bags, labels, need_labels=False)
    net = load_model(model, device, labeled.source.num_features)
    found = _predicted(console, quiet, net, labeled, None, max_instances, workers)
    given = labeled.labels if any(label is not None for label in labeled.labels) else None
    out.parent.mkdir(parents=True, exist_ok=True)
    reports.write_predictions(out, found, net.task, net.label_names, threshold=net.threshold, labels=given)
    _warn(console, found, net)
    print_written(console, out)


def evaluate(
    model: options.Model,
    bags: options.Bags,
    out: Annotated[Path, typer.Option(help="Folder for predictions.csv, evaluation.json and evaluation.png.")],
    labels: options.Labels = None,
    split: Annotated[
        str | None, typer.Option(help="train, val or test: the bags of this split; by default all in the CSV file.")
    ] = None,
    max_instances: options.MaxInstances = MAX_INSTANCES,
    workers: options.Workers = None,
    resamples: options.Resamples = 1000,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda if available.")] = None,
    json_file: Json = None,
    quiet: Quiet = False,
):
    """Score a trained model on labeled bags, with 95 % intervals (bootstrap over bags, or groups if there are any).

    For two classes, accuracy is reported at the threshold that was chosen on training data, and at 0.5.

    Example: `amil mil evaluate runs/mine features/ --labels labels.csv --split test --out runs/mine/test`
    """
    from amil_fast.cli.common import write_result

    console = options.main_console(quiet)
    labeled = load_labeled_bags(bags, labels)
    net = load_model(model, device, labeled.source.num_features)
    task = "classification" if net.task == "one_vs_rest" else net.task
    targets = make_targets(labeled.labels, task, names=None if task == "regression" else class_names(net))
    chosen = np.arange(len(labeled.labels)) if split is None else labeled.in_split(split)
    if not len(chosen):
        raise ValueError(f"split: expected bags in {split!r}, found none")
    found = _predicted(console, quiet, net, labeled, chosen, max_instances, workers)
    out.mkdir(parents=True, exist_ok=True)
    reports.write_predictions(
        out / reports.PREDICTIONS,
        found,
        net.task,
        net.label_names,
        threshold=net.threshold,
        labels=[labeled.labels[i] for i in chosen],
    )
    scores = np.zeros((len(labeled.labels), *found.scores.shape[1:]), dtype=np.float32)
    scores[chosen] = found.scores
    result = _score(console, out, net, labeled, targets, scores, chosen, resamples, split or "all bags")
    _warn(console, found, net)
    write_result(console, json_file, result)
    print_written(console, out)


def describe(path: Path, labeled: LabeledBags, targets: Targets) -> str:
    """Line about a set: number of bags, sizes, classes, groups."""
    sizes = labeled.source.sizes
    text = (
        f"{path}: {len(sizes)} bags of {sizes.min()} to {sizes.max()} instances, {labeled.source.num_features} features"
    )
    if targets.task != "regression":
        counts = [f"{name}: {int((targets.values == c).sum())}" for c, name in enumerate(targets.names)]
        text += f"; {', '.join(counts)}"
    if labeled.groups is not None:
        text += f"; {len(set(labeled.groups))} groups"
    return text


def class_names(net: MIRNet) -> tuple[str, ...]:
    """Names of a network's classes; numbers if it has no names."""
    return net.label_names or tuple(str(c) for c in range(max(net.num_classes, 2)))


def load_model(model: str, device: str | None, num_features: int) -> MIRNet:
    """The network of a folder or of the Hugging Face hub, for bags with ``num_features`` features."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    net = MIRNet.from_pretrained(model)
    if num_features != net.in_features:
        raise ValueError(f"bags: expected {net.in_features} features as in the model, got {num_features}")
    try:
        return net.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def _predicted(console, quiet, net, labeled, chosen, max_instances, workers):
    with options.shown_progress(console, quiet) as show:
        return predict_bags(
            net,
            labeled.source,
            chosen,
            max_instances=max_instances,
            workers=workers,
            on_batch=lambda done, total: show("prediction", done, total),
        )


def _score(console, out, net, labeled, targets, scores, chosen, resamples, title):
    """Writes and prints the scores of some bags; ``scores`` of all bags."""
    result = reports.write_evaluation(
        out,
        net.task,
        class_names(net) if net.task != "regression" else (),
        scores[chosen],
        targets.values[chosen],
        threshold=net.threshold,
        groups=None if labeled.groups is None else [labeled.groups[i] for i in chosen],
        resamples=resamples,
        title=title,
    )
    for line in reports.summary_lines(result):
        print_plain(console, f"  {line}")
    return result


def _warn(console, found, net, targets=None, run=None):
    """Prints the effective number of instances, a collapse of the weights, and a bad threshold of 0.5."""
    if found.effective is not None and len(found.sizes):
        print_plain(
            console,
            f"effective number of instances: {np.median(found.effective):.1f} of {np.median(found.sizes):.0f} "
            "(medians over bags)",
        )
        pooling = net.config["pooling"]
        warning = collapse_warning(found.effective, found.sizes, pooling)
        if warning:
            print_plain(console, f"warning: {warning}")
    if targets is not None and targets.task == "classification" and len(targets.names) == 2:
        part = np.concatenate([run.train, run.validation])
        values, scores = targets.values[part], found.scores[part]
        accuracy = [float((predicted_classes(scores, t) == values).mean()) for t in (0.5, net.threshold)]
        if accuracy[1] > accuracy[0] + 0.02:
            print_plain(
                console,
                f"warning: 0.5 is a bad threshold for this model: accuracy {accuracy[0]:.3f} on the training data, "
                f"{accuracy[1]:.3f} at {net.threshold:.3f}",
            )
