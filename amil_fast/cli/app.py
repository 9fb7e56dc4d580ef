"""The command's root: what is not about bags (``mil``) or poses (``pose``)."""

from pathlib import Path
from typing import Annotated

import typer

from amil_fast import environment
from amil_fast.cli import ablate, mil, pose, train

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")


@app.callback()
def _root():
    """Multiple-instance pooling, heatmap decoding and the AMIL pose model."""


@app.command()
def info():
    """Print versions, devices, and which backends are usable here, with the reason where one is not.

    Example: `amil info`
    """
    print(environment.format_info(environment.info()))


app.add_typer(mil.app, name="mil")
pose.register(app)
train.register(app)
ablate.register(app)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures and scores.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Start of the random numbers.")] = 0,
    image: Annotated[
        Path | None, typer.Option(help="Photo of one person for the shipped weights; by default Matplotlib's portrait.")
    ] = None,
):
    """Train on made-up bags and on drawn figures, no data needed, and draw what was learned. Minutes on a CPU.

    Example: `amil demo`
    """
    from amil_fast.cli.demo import show_demo

    show_demo(out, seed, image)
