"""The command ``amil``: its commands and the small ones among them, ``info`` and ``demo``."""

from pathlib import Path
from typing import Annotated

import typer

from amil_fast import environment
from amil_fast.cli import ablate, mil, options, train
from amil_fast.cli.errors import CommandGroup
from amil_fast.cli.evaluate import evaluate
from amil_fast.cli.pack import pack
from amil_fast.cli.predict import predict
from amil_fast.cli.show import show

app = typer.Typer(cls=CommandGroup, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. Valid for every command.")
    ] = False,
):
    """Multiple-instance pooling, heatmap decoding and the AMIL pose model."""


@app.command()
def info():
    """Print versions, devices and backends, with the reason for each unusable one.

    Example: `amil info`
    """
    print(environment.format_info(environment.info()))


app.add_typer(mil.app, name="mil")
for command in (evaluate, predict, pack, show):
    app.command()(command)
train.register(app)
ablate.register(app)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for images and scores.")] = Path("demo"),
    seed: options.Seed = 0,
    image: Annotated[
        Path | None, typer.Option(help="Photo of one person for the shipped weights; by default Matplotlib's portrait.")
    ] = None,
):
    """Train a bag classifier and the pose model on synthetic data; write images and scores. Minutes on a CPU.

    Example: `amil demo`
    """
    from amil_fast.cli.demo import show_demo

    show_demo(out, seed, image)
