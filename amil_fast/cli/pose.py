"""Commands about poses: ``amil evaluate``, ``predict``, ``pack`` and ``show``."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from amil_fast.cli.common import fail, progress_bar

# Exit codes: 0 all done, 1 done but something was unreadable, 2 not done, 130 interrupted.
_PARTLY, _INTERRUPTED = 1, 130
_LISTED = 12  # problems shown on the terminal; --json holds them all

_Dataset = Annotated[
    str | None, typer.Option(help="lsp, lspet, mpii (HRNet's JSON), mpii-mat (official file) or coco.")
]
_Root = Annotated[Path | None, typer.Option(help="The data set's folder, in the layout it was published in.")]
_Split = Annotated[str | None, typer.Option(help="Part of it, such as train, val, test, valid, val2017.")]
_SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out and list bad entries instead of stopping.")]
_Crop = Annotated[
    str | None,
    typer.Option(help="LSP and LSPET: image (whole image, the default) or joints (around the annotated joints)."),
]
_Json = Annotated[Path | None, typer.Option("--json", help="Write the result here.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
_Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Trained network, by default the shipped one; with --model a .safetensors file of its weights."),
]
_Model = Annotated[
    str | None, typer.Option(help="package.module:function returning any torch.nn.Module from crops to heatmaps.")
]
_Skeleton = Annotated[str | None, typer.Option(help="lsp14, mpii16 or coco17, where the network doesn't say.")]
_Size = Annotated[int | None, typer.Option(min=16, help="Side of its crops in pixels, where it doesn't say.")]
_Batch = Annotated[int, typer.Option(min=1, help="Crops the network sees at once.")]
_FlipTest = Annotated[
    bool,
    typer.Option(
        "--flip-test/--no-flip-test", "--mirror/--no-mirror", help="Average with the heatmaps of the flipped crop."
    ),
]
_Refine = Annotated[str, typer.Option(help="Sub-pixel refinement: none, quarter, dark or dark_udp.")]
_Passes = Annotated[
    int,
    typer.Option(min=1, help="Looks at a whole image; from the second on at a crop around the joints found before."),
]
_Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default cuda where there is one.")]


def register(app):
    """Adds the commands to the root of the command line."""
    for command in (evaluate, predict, pack, show):
        app.command()(command)


def evaluate(
    predictions: Annotated[
        Path | None, typer.Option(help="Score this file: COCO results .json, .npy, .npz or MPII .mat.")
    ] = None,
    checkpoint: _Checkpoint = None,
    model: _Model = None,
    dataset: _Dataset = None,
    root: _Root = None,
    split: _Split = None,
    ground_truth: Annotated[
        Path | None, typer.Option(help="Ground truth as .mat (MPII's) or .npz, instead of a data set.")
    ] = None,
    metric: Annotated[str, typer.Option(help="pck, pckh, or auto: PCKh for MPII's joints, else PCK.")] = "auto",
    pair: Annotated[
        str,
        typer.Option(
            help="What PCK divides by: paper (left hip, right shoulder), lsp (left shoulder, right hip), "
            "or two joints with a comma between."
        ),
    ] = "paper",
    either: Annotated[
        bool, typer.Option("--either", help="Where the pair isn't annotated, take its mirror image.")
    ] = False,
    skip_bad: _SkipBad = False,
    crop: _Crop = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for curves, confusion matrix, histograms and samples as pictures.")
    ] = None,
    skeleton: _Skeleton = None,
    size: _Size = None,
    batch_size: _Batch = 32,
    flip_test: _FlipTest = True,
    refine: _Refine = "dark",
    passes: _Passes = 1,
    device: _Device = None,
    json_file: _Json = None,
    quiet: _Quiet = False,
):
    """PCK or PCKh of a network, or of a file of predictions that any program wrote.

    Predictions are scored against a data set (`--dataset` and `--root`), a file (`--ground-truth`), or the ground truth
    in the same file.

    Example: `amil evaluate --predictions detections_our_format.mat --json scores.json`

    Example: `amil evaluate --predictions results.json --dataset coco --root coco --pictures scores`

    Example: `amil evaluate --checkpoint runs/lspet/best --dataset lspet --root lspet`
    """
    from amil_fast.pose.evaluation.scoring import GroundTruth, read_ground_truth, read_predictions, score

    console = Console(quiet=quiet)
    if predictions is not None and (checkpoint is not None or model is not None):
        fail("expected either --predictions or a network, got both")
    if predictions is None and dataset is None:
        fail("a network needs --dataset and --root to be evaluated on")
    if dataset is not None and ground_truth is not None:
        fail("expected either --dataset or --ground-truth, got both")
    people, left_out, extra = None, [], {}
    with _errors():
        _check_pair(pair)
        if dataset is not None:
            options = _crop_option(dataset, crop) | {"check_images": predictions is None or pictures is not None}
            people = _people(dataset, root, split, skip_bad, **options)
            left_out = people.left_out
            truth = GroundTruth.of(people)
        else:
            source = ground_truth or predictions
            truth = read_ground_truth(source, skeleton) if source.suffix in (".mat", ".npz") or ground_truth else None
            if truth is None:
                fail(f"{source}: it holds no ground truth; name some with --dataset and --root or --ground-truth")
        if predictions is not None:
            found = read_predictions(predictions, truth)
        else:
            predictor = _predictor(checkpoint, model, skeleton, size, flip_test, refine, device)
            found, extra = _run(predictor, people, batch_size, passes, console, quiet)
        two = pair if "," not in pair else tuple(joint.strip() for joint in pair.split(",", 1))
        result = score(found, truth, metric=metric, pair=two, either=either)
    if not result.summary["samples"]:
        fail("nobody could be measured: nothing is annotated that this metric divides by (try --either)")
    console.print(_score_table(result.summary))
    _print_left_out(console, left_out)
    if pictures is not None:
        with _errors():
            for path in _score_pictures(pictures, result, truth, found):
                _written(console, path)
    if json_file is not None:
        content = {**result.summary, **extra, "left_out": [str(problem) for problem in left_out]}
        _write_json(json_file, content)
        _written(console, json_file)


def predict(
    inputs: Annotated[list[Path], typer.Argument(help="Images, videos, and folders of them.")],
    checkpoint: _Checkpoint = None,
    model: _Model = None,
    out: Annotated[Path, typer.Option(help="Folder for predictions.json and the overlays.")] = Path("predictions"),
    boxes: Annotated[
        Path | None, typer.Option(help="JSON file of people's boxes; without, one person in each whole image.")
    ] = None,
    skeleton: _Skeleton = None,
    size: _Size = None,
    batch_size: _Batch = 16,
    flip_test: _FlipTest = True,
    refine: _Refine = "dark",
    passes: _Passes = 2,
    overlays: Annotated[bool, typer.Option(help="Write pictures and videos with the poses over them.")] = True,
    min_score: Annotated[float, typer.Option(help="Joints below this score are not drawn.")] = 0.1,
    device: _Device = None,
    json_file: _Json = None,
    quiet: _Quiet = False,
):
    """Find the joints of people in images and videos.

    Writes `predictions.json` (COCO results, with box and file name) and overlays. What can't be read is reported and
    the rest goes on. Exit codes: 0 all done, 1 something was unreadable, 2 nothing done, 130 interrupted (whole files
    only are left).

    `--boxes`: an object `{"photo.jpg": [[x, y, width, height], ...]}`, or a list of rows with `bbox` and `file_name`
    or `image_id`, and `frame` for videos.

    Example: `amil predict photo.jpg`

    Example: `amil predict photo.jpg clips/ --checkpoint runs/lspet/best --out found`

    Example: `amil predict team.jpg --boxes boxes.json --model my_package.nets:build --checkpoint weights.safetensors`
    """
    from amil_fast.pose.inference.predict import predict as run

    console, errors = Console(quiet=quiet), Console(stderr=True, soft_wrap=True)
    with _errors(), progress_bar(console, quiet) as progress:
        predictor = _predictor(checkpoint, model, skeleton, size, flip_test, refine, device)
        task = progress.add_task("images", total=None)
        report = run(
            predictor,
            inputs,
            out,
            boxes=boxes,
            batch_size=batch_size,
            overlays=overlays,
            min_score=min_score,
            passes=passes,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            on_problem=lambda text: errors.print(f"unreadable: {text}", markup=False, highlight=False),
        )
    for path in report.written[:_LISTED]:
        _written(console, path)
    if len(report.written) > _LISTED:
        console.print(f"... and {len(report.written) - _LISTED} more files in {out}", markup=False, highlight=False)
    share = report.network_seconds / report.seconds if report.seconds else 0.0
    console.print(
        f"{report.pictures} images, {report.people} people in {report.seconds:.1f} s: {report.images_per_second:.1f} "
        f"images/s ({share:.0%} of the time in the network and the decoder); {len(report.unreadable)} unreadable",
        markup=False,
        highlight=False,
    )
    if json_file is not None:
        content = {
            "images": report.pictures,
            "people": report.people,
            "seconds": report.seconds,
            "images_per_second": report.images_per_second,
            "network_seconds": report.network_seconds,
            "unreadable": report.unreadable,
            "written": [str(path) for path in report.written],
            "interrupted": report.interrupted,
        }
        _write_json(json_file, content)
    if report.interrupted:
        errors.print("interrupted: predictions.json holds what was done so far", markup=False)
        raise typer.Exit(_INTERRUPTED)
    if report.unreadable:
        raise typer.Exit(_PARTLY)


def pack(
    out: Annotated[Path, typer.Argument(help="File to write; its index gets the same name and .index.")],
    dataset: _Dataset = None,
    root: _Root = None,
    split: _Split = None,
    size: Annotated[int, typer.Option(min=16, help="Side of the crops in pixels.")] = 192,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of the JPEGs.")] = 76,
    room: Annotated[
        float | None,
        typer.Option(help="Store so much more than the crop (1.3; whole images 1)."),
    ] = None,
    crop: _Crop = None,
    skip_bad: _SkipBad = False,
    json_file: _Json = None,
    quiet: _Quiet = False,
):
    """Pack a data set's crops into one file, for fast and portable training.

    Example: `amil pack lspet.pack --dataset lspet --root data/lspet --split all --size 192 --skip-bad`
    """
    from amil_fast.pose.data.crop_archive import pack as write

    console = Console(quiet=quiet)
    if dataset is None:
        fail("expected --dataset and --root")
    with _errors(), progress_bar(console, quiet) as progress:
        people = _people(dataset, root, split, skip_bad, training=True, **_crop_option(dataset, crop))
        task = progress.add_task("crops", total=len(people))
        out.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        written = write(
            people, out, size, quality=quality, room=room, progress=lambda n: progress.update(task, completed=n)
        )
        seconds = time.perf_counter() - began
    _print_left_out(console, people.left_out)
    rate = len(people) / seconds
    console.print(
        f"{out}: {len(people)} crops of {size} px, {written / 1e6:.1f} MB with its index, {rate:.0f} crops/s",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if json_file is not None:
        content = {"crops": len(people), "bytes": written, "crops_per_second": rate}
        _write_json(json_file, {**content, "left_out": [str(problem) for problem in people.left_out]})


def show(
    out: Annotated[Path, typer.Argument(help="Picture to write (.jpg or .png).")],
    dataset: _Dataset = None,
    root: _Root = None,
    split: _Split = None,
    archive: Annotated[
        Path | None,
        typer.Option("--archive", "--packed", help="A crop archive written by `amil pack`, instead of a data set."),
    ] = None,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", "--drawn", help="Synthetic figures, instead of a data set.")
    ] = False,
    augment: Annotated[bool, typer.Option("--augment", help="Several augmented crops of each sample.")] = False,
    count: Annotated[int, typer.Option(min=1, help="Number of crops.")] = 32,
    size: Annotated[int, typer.Option(min=16, help="Side of the crops in pixels.")] = 192,
    seed: Annotated[int, typer.Option(help="Which samples, and how they are augmented.")] = 0,
    skip_bad: _SkipBad = False,
    quiet: _Quiet = False,
):
    """Draw a contact sheet of training crops with their joints, in the paper's colors.

    Example: `amil show crops.jpg --dataset lspet --root data/lspet --augment --skip-bad`

    Example: `amil show figures.png --synthetic`
    """
    import cv2
    import numpy as np

    from amil_fast.pose.data import SPORTS, CropArchive, PoseDataset, SyntheticFigures
    from amil_fast.pose.inference.predict import write_whole
    from amil_fast.pose.visualization.drawing import sample_sheet

    console = Console(quiet=quiet)
    if sum((dataset is not None, archive is not None, synthetic)) != 1:
        fail("expected one of --dataset, --archive and --synthetic")
    augmentation = SPORTS if augment else None
    with _errors():
        if synthetic:
            samples = SyntheticFigures(100_000, size, seed=seed, augmentation=augmentation)
        elif archive is not None:
            samples = CropArchive(archive, size, augmentation=augmentation, seed=seed)
        else:
            people = _people(dataset, root, split, skip_bad, training=True)
            _print_left_out(console, people.left_out)
            samples = PoseDataset(people, size, augmentation=augmentation, seed=seed)
        epochs = 8 if augment else 1
        chosen = np.random.default_rng(seed).permutation(len(samples))[: -(-count // epochs)]
        keys = [(epoch, int(index)) for index in chosen for epoch in range(epochs)][:count]
        if out.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            fail(f"{out}: expected a .jpg or .png file")
        sheet = sample_sheet(samples, keys)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, cv2.imencode(out.suffix, sheet)[1].tobytes())
    _written(console, out)


class _errors:
    """What is wrong with data, files or settings becomes one message; programming errors keep their traceback."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if isinstance(error, ValueError | OSError):
            fail(error)


def _written(console, path):
    console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)


def _write_json(path, content):
    from amil_fast.pose.inference.predict import write_whole

    with _errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def _print_left_out(console, left_out):
    if not left_out:
        return
    console.print(f"left out: {len(left_out)}", highlight=False)
    for problem in left_out[:_LISTED]:
        console.print(f"  {problem}", markup=False, highlight=False, soft_wrap=True)
    if len(left_out) > _LISTED:
        console.print(f"  ... and {len(left_out) - _LISTED} more (--json lists all)", markup=False, highlight=False)


def _people(dataset, root, split, skip_bad, training=False, **options):
    from amil_fast.pose.data.registry import load

    if root is None:
        fail("--dataset needs --root, the data set's folder")
    return load(dataset, root, split, training=training, skip_bad=skip_bad, **options)


def _crop_option(dataset, crop):
    if crop is not None and dataset not in ("lsp", "lspet"):
        fail("--crop is for lsp and lspet: the other data sets have boxes")
    return {} if crop is None else {"crop": crop}


def _check_pair(pair):
    if "," in pair and len(pair.split(",")) != 2:
        raise ValueError(f"pair: expected paper, lsp, or two joints with a comma between, got {pair!r}")


def _predictor(checkpoint, model, skeleton, size, flip_test, refine, device):
    import torch

    from amil_fast.ops.decode_heatmaps import REFINEMENTS
    from amil_fast.pose.inference.predictor import Predictor, load_model

    if refine not in REFINEMENTS:
        raise ValueError(f"refine: expected one of {', '.join(REFINEMENTS)}, got {refine!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} can't be used: {str(error).splitlines()[0]}") from None
    if model is not None and "" not in sys.path:
        sys.path.insert(0, "")  # a module of the user's in the current folder, as `python -m` would find it
    network = load_model(checkpoint, model)
    return Predictor(network, skeleton=skeleton, size=size, flip_test=flip_test, refine=refine, device=device)


def _run(predictor, people, batch_size, passes, console, quiet):
    """Predictions of a network for all people of a data set, and how fast they came."""
    import dataclasses

    import numpy as np

    from amil_fast.pose.data.dataset import PoseDataset
    from amil_fast.pose.data.loader import PoseLoader
    from amil_fast.pose.evaluation.evaluate import predict_batches
    from amil_fast.pose.inference.predict import boxes_of

    if predictor.skeleton is not people.skeleton:
        raise ValueError(f"the network finds {predictor.skeleton.name}, the data set has {people.skeleton.name}")
    if passes > 1 and not np.isnan(people.boxes).all():
        raise ValueError("passes: more than one is for whole images (--crop image), these people have boxes")
    began = time.perf_counter()
    with progress_bar(console, quiet) as progress:
        task = progress.add_task("crops", total=passes * len(people))
        for _ in range(passes):
            found = predict_batches(
                predictor,
                PoseLoader(PoseDataset(people, predictor.size), batch_size, shuffle=False),
                fields=(),
                on_batch=lambda batch, _: progress.advance(task, len(batch["index"])),
            )
            coords = found["coords"]
            people = dataclasses.replace(people, boxes=boxes_of(coords, found["scores"]))
    rate = len(people) / (time.perf_counter() - began)
    console.print(f"{rate:.1f} images/s", highlight=False)
    return coords, {"images_per_second": rate}


def _score_table(summary):
    name = summary["metric"]
    rows = [key for key in summary if key.startswith(f"{name}@")]
    groups = [key for key in summary[rows[0]] if key not in ("mean", "mean_of_joints", "joints")]
    counted = f"{summary['samples']} people"
    if summary["unmeasured"]:
        counted += f"; {summary['unmeasured']} more can't be measured"
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
    usual = "0.5" if name == "PCKh" else "0.2"
    for row in rows:
        r = row.partition("@")[2]
        cells = [_cell(summary[row][group]) for group in groups]
        cells += [_cell(summary[row]["mean"]), _cell(summary[row]["mean_of_joints"])]
        table.add_row(f"{float(r):.2f}", *cells, style="cyan" if r == usual else None)
    return table


def _cell(value):
    return "-" if value is None else f"{value:.2f}"


def _score_pictures(folder, result, truth, found):
    import cv2

    from amil_fast.pose.data.dataset import PoseDataset
    from amil_fast.pose.inference.predict import write_whole
    from amil_fast.pose.visualization.drawing import comparison_sheet
    from amil_fast.pose.visualization.plots import plot_confusion, plot_curves, plot_errors

    folder.mkdir(parents=True, exist_ok=True)
    name = result.summary["metric"]
    marked = 0.5 if name == "PCKh" else 0.2
    unit = "head size" if name == "PCKh" else "the person's size"
    plot_curves({name: result.pck}, folder / "curves.png", metric=name, marked=marked)
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
            heading=f"Mean joint error in units of {unit}; each pair: ground truth, prediction",
        )
        write_whole(folder / "samples.jpg", cv2.imencode(".jpg", sheet, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes())
        written.append(folder / "samples.jpg")
    return written
