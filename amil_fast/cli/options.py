"""Command-line options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from amil_fast.utils.limits import MAX_CROP, MAX_SEED

Dataset = Annotated[str | None, typer.Option(help="lsp, lspet, mpii (HRNet's JSON), mpii-mat (official file) or coco.")]
Root = Annotated[Path | None, typer.Option(help="Folder of the data set, in its published layout.")]
Split = Annotated[str | None, typer.Option(help="Split of the data set, such as train, val, test, valid, val2017.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip and list invalid entries instead of stopping.")]
Crop = Annotated[
    str | None,
    typer.Option(help="LSP and LSPET: image (the whole image, default) or joints (around the annotated joints)."),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Trained network, by default the shipped one; with --model a .safetensors file of weights."),
]
Model = Annotated[
    str | None, typer.Option(help="package.module:function that returns a torch.nn.Module from crops to heatmaps.")
]
SkeletonName = Annotated[
    str | None, typer.Option("--skeleton", help="lsp14, mpii16 or coco17, for networks without this attribute.")
]
Size = Annotated[
    int | None,
    typer.Option(min=16, max=MAX_CROP, help="Side of the crops in pixels, for networks without this attribute."),
]
Batch = Annotated[int, typer.Option(min=1, max=4096, help="Crops per call of the network.")]
FlipTest = Annotated[
    bool | None,
    typer.Option(
        "--flip-test/--no-flip-test",
        "--mirror/--no-mirror",
        help="Average with the heatmaps of the flipped crop, in twice the time; by default unless the network was "
        "validated without it, like the shipped one.",
    ),
]
Refine = Annotated[str, typer.Option(help="Sub-pixel refinement: none, quarter, dark or dark_udp.")]
SeparateSides = Annotated[
    bool | None,
    typer.Option(
        "--separate-sides/--no-separate-sides",
        help="Decode left and right joints together, so that they are rarely at the same place; by default for "
        "networks whose heatmaps are probabilities, such as the shipped one.",
    ),
]
Precision = Annotated[
    str,
    typer.Option(help="fp32, bf16, fp16, or auto: bf16 where the device multiplies it in hardware, otherwise fp32."),
]
Passes = Annotated[
    int,
    typer.Option(
        min=1, max=10, help="2: two-stage prediction on whole images, at several scales and then around the joints."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default cuda if available.")]
Archive = Annotated[
    Path | None, typer.Option("--archive", "--packed", help="Crop archive written by `amil pack`, instead of --root.")
]
