"""``amil pack``: the crops of a data set in one file."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from amil_fast.cli import options
from amil_fast.cli.common import (
    fail,
    load_people,
    print_left_out,
    print_plain,
    progress_bar,
    write_result,
)
from amil_fast.utils.limits import MAX_CROP


def pack(
    out: Annotated[Path, typer.Argument(help="Crop archive to write; its index has the same name and .index.")],
    dataset: options.Dataset = None,
    root: options.Root = None,
    split: options.Split = None,
    size: Annotated[
        int,
        typer.Option(min=16, max=MAX_CROP, help="Side of the crops in pixels, at least --input-size of the training."),
    ] = 192,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality.")] = 76,
    room: Annotated[
        float | None,
        typer.Option(
            min=1, max=16, help="Side of the stored image in units of the crop; by default 1.3, and 1 for whole images."
        ),
    ] = None,
    crop: options.Crop = None,
    skip_bad: options.SkipBad = False,
    json_file: options.Json = None,
    quiet: options.Quiet = False,
):
    """Write the crops of a data set to a crop archive, for fast and portable training.

    Example: `amil pack lspet.pack --dataset lspet --root data/lspet --split all --size 192 --skip-bad`
    """
    from amil_fast.pose.data.crop_archive import pack as write

    console = Console(quiet=quiet)
    if dataset is None:
        fail("expected --dataset and --root")
    with progress_bar(console, quiet) as progress:
        people = load_people(dataset, root, split, skip_bad, crop, training=True)
        task = progress.add_task("crops", total=len(people))
        out.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        written = write(
            people, out, size, quality=quality, room=room, progress=lambda n: progress.update(task, completed=n)
        )
        seconds = time.perf_counter() - began
    print_left_out(console, people.left_out)
    rate = len(people) / seconds
    print_plain(
        console,
        f"{out}: {len(people)} crops of {size} px, {written / 1e6:.1f} MB with its index, {rate:.0f} crops/s",
    )
    content = {"crops": len(people), "bytes": written, "crops_per_second": rate}
    write_result(console, json_file, {**content, "left_out": [str(problem) for problem in people.left_out]})
