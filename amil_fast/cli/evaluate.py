"""``amil evaluate``: PCK / PCKh of a network or of a file of predictions."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from amil_fast.cli import options
from amil_fast.cli.common import (
    fail,
    load_people,
    make_predictor,
    print_left_out,
    print_written,
    progress_bar,
    write_result,
)


def evaluate(
    predictions: Annotated[
        Path | None, typer.Option(help="File of predictions: COCO results .json, .npy, .npz or MPII .mat.")
    ] = None,
    checkpoint: options.Checkpoint = None,
    model: options.Model = None,
    dataset: options.Dataset = None,
    root: options.Root = None,
    split: options.Split = None,
    ground_truth: Annotated[
        Path | None, typer.Option(help="Ground truth as .mat (MPII's) or .npz, instead of a data set.")
    ] = None,
    metric: Annotated[str, typer.Option(help="pck, pckh, or auto: PCKh for MPII's joints, otherwise PCK.")] = "auto",
    pair: Annotated[
        str,
        typer.Option(
            help="Joints whose distance normalizes PCK: paper (left hip, right shoulder), lsp (left shoulder, right "
            "hip), or two joint names separated by a comma."
        ),
    ] = "paper",
    either: Annotated[
        bool, typer.Option("--either", help="Use the flipped pair where the pair is not annotated.")
    ] = False,
    skip_bad: options.SkipBad = False,
    crop: options.Crop = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for curves, confusion matrix, histograms and samples as images.")
    ] = None,
    skeleton: options.SkeletonName = None,
    size: options.Size = None,
    batch_size: options.Batch = 32,
    flip_test: options.FlipTest = None,
    refine: options.Refine = "dark",
    separate_sides: options.SeparateSides = None,
    precision: options.Precision = "fp32",
    passes: options.Passes = 1,
    device: options.Device = None,
    json_file: options.Json = None,
    quiet: options.Quiet = False,
):
    """Compute PCK or PCKh of a network, or of a file of predictions.

    Predictions are compared with a data set (`--dataset` and `--root`), a file (`--ground-truth`), or the ground truth
    in the same file.

    Example: `amil evaluate --predictions detections_our_format.mat --json scores.json`

    Example: `amil evaluate --predictions results.json --dataset coco --root coco --pictures scores`

    Example: `amil evaluate --checkpoint runs/lspet/best --dataset lspet --root lspet`
    """
    from amil_fast.pose.evaluation.evaluate import predict_people
    from amil_fast.pose.evaluation.ground_truth import GroundTruth, read_predictions
    from amil_fast.pose.evaluation.scoring import score
    from amil_fast.pose.inference.two_stage import num_crops

    console = Console(quiet=quiet)
    if predictions is not None and (checkpoint is not None or model is not None):
        fail("expected either --predictions or a network, got both")
    if predictions is None and dataset is None:
        fail("a network needs --dataset and --root to be evaluated on")
    if dataset is not None and ground_truth is not None:
        fail("expected either --dataset or --ground-truth, got both")
    left_out: list = []
    extra: dict[str, float] = {}
    if pair.count(",") > 1:
        raise ValueError(f"pair: expected paper, lsp, or two joints separated by a comma, got {pair!r}")
    if dataset is not None:
        check_images = predictions is None or pictures is not None
        people = load_people(dataset, root, split, skip_bad, crop, check_images=check_images)
        left_out = people.left_out
        truth = GroundTruth.of(people)
    else:
        truth = _ground_truth(ground_truth or predictions, skeleton, required=ground_truth is not None)
    if predictions is not None:
        found = read_predictions(predictions, truth)
    elif truth.annotations is not None:
        people = truth.annotations
        predictor = make_predictor(
            checkpoint, model, skeleton, size, flip_test, refine, separate_sides, device, precision
        )
        began = time.perf_counter()
        with progress_bar(console, quiet) as progress:
            task = progress.add_task("crops", total=num_crops(passes) * len(people))
            found = predict_people(
                predictor,
                people,
                batch_size=batch_size,
                passes=passes,
                on_progress=lambda count: progress.advance(task, count),
            )
        extra = {"images_per_second": len(people) / (time.perf_counter() - began)}
        console.print(f"{extra['images_per_second']:.1f} images/s", highlight=False)
    first, comma, second = pair.partition(",")
    joints = (first.strip(), second.strip()) if comma else pair
    result = score(found, truth, metric=metric, pair=joints, either=either)
    if not result.summary["samples"]:
        fail("no sample has the keypoints that normalize this metric (try --either)")
    console.print(_table(result))
    print_left_out(console, left_out)
    if pictures is not None:
        for path in _write_pictures(pictures, result, truth, found):
            print_written(console, path)
    write_result(console, json_file, {**result.summary, **extra, "left_out": [str(problem) for problem in left_out]})


def _ground_truth(source, skeleton, required):
    from amil_fast.pose.evaluation.ground_truth import read_ground_truth

    truth = read_ground_truth(source, skeleton) if source.suffix in (".mat", ".npz") or required else None
    if truth is None:
        fail(f"{source}: no ground truth in this file; expected --dataset and --root, or --ground-truth")
    return truth


def _table(result):
    from amil_fast.pose.evaluation.scoring import scores_of_groups

    summary = result.summary
    name = summary["metric"]
    rows = [key for key in summary if key.startswith(f"{name}@")]
    groups = [group for group in scores_of_groups(summary[rows[0]]) if group != "mean"]
    counted = f"{summary['samples']} people"
    if summary["unmeasured"]:
        counted += f"; {summary['unmeasured']} without a normalizer left out"
    table = Table(
        title=f"{name} in percent ({summary['skeleton']})",
        caption=f"{counted}. AUC of the mean, 0 to 0.5: {_cell(summary['auc'])}\n"
        "mean: joints weighted by their number; plain: average of the joints",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("r", justify="right")
    for group in groups:
        table.add_column(group, justify="right")
    table.add_column("mean", justify="right", style="bold")
    table.add_column("plain", justify="right")
    for row in rows:
        cells = [_cell(summary[row][group]) for group in groups]
        cells += [_cell(summary[row]["mean"]), _cell(summary[row]["mean_of_joints"])]
        table.add_row(f"{float(row.partition('@')[2]):.2f}", *cells, style="cyan" if row == result.headline else None)
    return table


def _cell(value):
    return "-" if value is None else f"{value:.2f}"


def _write_pictures(folder, result, truth, found):
    """Writes curves, confusion matrix, histograms and samples; returns the files."""
    from amil_fast.metrics.modules import HEADLINE_THRESHOLDS
    from amil_fast.pose.data.dataset import PoseDataset
    from amil_fast.pose.data.files import encode_image
    from amil_fast.pose.visualization import comparison_sheet, plot_confusion, plot_curves, plot_errors
    from amil_fast.utils.files import write_bytes

    folder.mkdir(parents=True, exist_ok=True)
    name = result.summary["metric"]
    unit = "head size" if name == "PCKh" else "person size"
    plot_curves({name: result.pck}, folder / "curves.png", metric=name, marked=HEADLINE_THRESHOLDS[name])
    plot_confusion(result.confusion, truth.skeleton, folder / "confusion.png")
    plot_errors(result.errors, truth.skeleton, folder / "errors.png", unit=unit)
    written = [folder / "curves.png", folder / "confusion.png", folder / "errors.png"]
    if truth.annotations is not None:
        crops = PoseDataset(truth.annotations, 240)

        def crop(index):
            sample = crops[index]
            return sample["image"], sample["to_image"]

        sheet = comparison_sheet(
            crop,
            truth.joints,
            found,
            truth.valid,
            result.sample_errors,
            skeleton=truth.skeleton,
            side=240,
            number=5,
            heading=f"Mean joint error in units of the {unit}; each pair: ground truth, prediction",
        )
        write_bytes(folder / "samples.jpg", encode_image(sheet, ".jpg"))
        written.append(folder / "samples.jpg")
    return written
