"""``amil predict``: joints of people in images and videos."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from amil_fast.cli import options
from amil_fast.cli.common import (
    LISTED,
    make_predictor,
    print_plain,
    print_written,
    progress_bar,
    write_result,
)
from amil_fast.cli.errors import INTERRUPTED, PARTLY


def predict(
    inputs: Annotated[list[Path], typer.Argument(help="Images, videos, and folders of them.")],
    checkpoint: options.Checkpoint = None,
    model: options.Model = None,
    out: Annotated[Path, typer.Option(help="Folder for predictions.json and the overlays.")] = Path("predictions"),
    boxes: Annotated[
        Path | None, typer.Option(help="JSON file of bounding boxes; by default one person per image.")
    ] = None,
    skeleton: options.SkeletonName = None,
    size: options.Size = None,
    batch_size: options.Batch = 16,
    flip_test: options.FlipTest = None,
    refine: options.Refine = "dark",
    separate_sides: options.SeparateSides = None,
    precision: options.Precision = "fp32",
    passes: options.Passes = 2,
    overlays: Annotated[bool, typer.Option(help="Write images and videos with the poses drawn over them.")] = True,
    min_score: Annotated[float, typer.Option(help="Joints with lower scores are not drawn.")] = 0.1,
    device: options.Device = None,
    json_file: options.Json = None,
    quiet: options.Quiet = False,
):
    """Predict the joints of people in images and videos.

    Writes `predictions.json` (COCO results, with bounding box and file name) and overlays. Unreadable inputs, and those
    with more than 2^27 pixels (11,585 x 11,585), are reported, the others processed. Exit codes: 0 done, 1 done except
    for unreadable inputs and overlays that could not be written, 2 not done, 130 interrupted (complete files are kept).

    `--boxes`: an object `{"photo.jpg": [[x, y, width, height], ...]}`, or a list of rows with `bbox` and `file_name`
    or `image_id`, and `frame` for videos.

    Example: `amil predict photo.jpg`

    Example: `amil predict photo.jpg clips/ --checkpoint runs/lspet/best --out found`

    Example: `amil predict team.jpg --boxes boxes.json --model my_package.nets:build --checkpoint weights.safetensors`
    """
    from amil_fast.pose.inference.predict import predict as run

    console, errors = Console(quiet=quiet), Console(stderr=True, soft_wrap=True)
    with progress_bar(console, quiet) as progress:
        predictor = make_predictor(
            checkpoint, model, skeleton, size, flip_test, refine, separate_sides, device, precision
        )
        task = progress.add_task("images", total=None)
        summary = run(
            predictor,
            inputs,
            out,
            boxes=boxes,
            batch_size=batch_size,
            overlays=overlays,
            min_score=min_score,
            passes=passes,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            on_problem=lambda text: print_plain(errors, f"failed: {text}"),
        )
    for path in summary.written[:LISTED]:
        print_written(console, path)
    if len(summary.written) > LISTED:
        print_plain(console, f"... and {len(summary.written) - LISTED} more files in {out}")
    share = summary.network_seconds / summary.seconds if summary.seconds else 0.0
    print_plain(
        console,
        f"{summary.images} images, {summary.people} people in {summary.seconds:.1f} s: "
        f"{summary.images_per_second:.1f} images/s ({share:.0%} of the time in network and decoder); "
        f"{len(summary.unreadable)} unreadable, {len(summary.not_written)} overlays not written",
    )
    content = {
        "images": summary.images,
        "people": summary.people,
        "seconds": summary.seconds,
        "images_per_second": summary.images_per_second,
        "network_seconds": summary.network_seconds,
        "unreadable": summary.unreadable,
        "not_written": summary.not_written,
        "written": [str(path) for path in summary.written],
        "interrupted": summary.interrupted,
    }
    write_result(console, json_file, content)
    if summary.interrupted:
        print_plain(errors, "interrupted: predictions.json holds the images processed before")
        raise typer.Exit(INTERRUPTED)
    if summary.unreadable or summary.not_written:
        raise typer.Exit(PARTLY)
