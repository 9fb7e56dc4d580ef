"""``amil show``: contact sheets of training crops."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from amil_fast.cli import options
from amil_fast.cli.common import fail, load_people, print_left_out, print_written
from amil_fast.utils.limits import MAX_CROP


def show(
    out: Annotated[Path, typer.Argument(help="Image to write (.jpg or .png).")],
    dataset: options.Dataset = None,
    root: options.Root = None,
    split: options.Split = None,
    archive: options.Archive = None,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", "--drawn", help="Synthetic figures, instead of a data set.")
    ] = False,
    augment: Annotated[bool, typer.Option("--augment", help="Eight augmented crops of each sample.")] = False,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Number of crops.")] = 32,
    size: Annotated[int, typer.Option(min=16, max=MAX_CROP, help="Side of the crops in pixels.")] = 192,
    seed: options.Seed = 0,
    skip_bad: options.SkipBad = False,
    quiet: options.Quiet = False,
):
    """Draw a contact sheet of training crops with their joints, in the colors of the paper.

    Example: `amil show crops.jpg --dataset lspet --root data/lspet --augment --skip-bad`

    Example: `amil show figures.png --synthetic`
    """
    import numpy as np

    from amil_fast.pose.data import SPORTS, CropArchive, PoseDataset, SyntheticFigures
    from amil_fast.pose.data.files import encode_image
    from amil_fast.pose.visualization import sample_sheet
    from amil_fast.utils.files import write_bytes

    console = Console(quiet=quiet)
    if sum((dataset is not None, archive is not None, synthetic)) != 1:
        fail("expected one of --dataset, --archive and --synthetic")
    augmentation = SPORTS if augment else None
    samples: PoseDataset | SyntheticFigures
    if synthetic:
        samples = SyntheticFigures(100_000, size, seed=seed, augmentation=augmentation)
    elif archive is not None:
        samples = CropArchive(archive, size, augmentation=augmentation, seed=seed)
    elif dataset is not None:
        people = load_people(dataset, root, split, skip_bad, training=True)
        print_left_out(console, people.left_out)
        samples = PoseDataset(people, size, augmentation=augmentation, seed=seed)
    epochs = 8 if augment else 1
    chosen = np.random.default_rng(seed).permutation(len(samples))[: -(-count // epochs)]
    keys = [(epoch, int(index)) for index in chosen for epoch in range(epochs)][:count]
    if out.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        fail(f"{out}: expected a .jpg or .png file")
    sheet = sample_sheet(samples, keys)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, encode_image(sheet, out.suffix, 95))
    print_written(console, out)
