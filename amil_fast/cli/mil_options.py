"""Options that the commands of ``amil mil`` share, and what they have in common."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from amil_fast.cli.common import progress_bar
from amil_fast.mil.settings import MilSettings

# Architecture and training: the fields of MilSettings.
Pooling = Annotated[str, typer.Option(help="adjust, mean, max, lse, attention or gated_attention.")]
NumIters = Annotated[int, typer.Option(help="Iterations of adjust pooling.")]
Hidden = Annotated[int, typer.Option(help="Width of every layer.")]
Depth = Annotated[int, typer.Option(help="Number of layers.")]
Residual = Annotated[bool, typer.Option(help="Sum the bag vectors over the levels.")]
DeepSupervision = Annotated[bool, typer.Option(help="Score every level.")]
InstanceNorm = Annotated[float, typer.Option(help="Length to which embeddings are scaled before pooling; 0: off.")]
InstanceScale = Annotated[float, typer.Option(help="Factor on the embeddings before pooling.")]
BagScale = Annotated[float, typer.Option(help="Factor on the pooled vectors.")]
InputDropout = Annotated[float, typer.Option(help="Dropout probability of features.")]
Dropout = Annotated[float, typer.Option(help="Dropout probability of hidden units.")]
SoftClip = Annotated[float, typer.Option(help="Bound of the smooth clipping of standardized features; 0: off.")]
Epochs = Annotated[int, typer.Option(help="Passes over the training part.")]
BatchSize = Annotated[int, typer.Option(help="Bags per step.")]
Lr = Annotated[float, typer.Option(help="Learning rate of Adam.")]
Schedule = Annotated[str, typer.Option(help="Learning rate schedule: constant or cosine.")]
WeightDecay = Annotated[float, typer.Option(help="Weight decay of Adam.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Backend = Annotated[str, typer.Option(help="Backend of adjust pooling.")]

# Bags on disk, and their training.
Bags = Annotated[
    Path, typer.Argument(help="Folder with a file per bag (.h5, .pt, .npy, .npz), torchmil's folders, or a bag file.")
]
Model = Annotated[str, typer.Argument(help="Folder written by `amil mil train`, or a name on the Hugging Face hub.")]
Labels = Annotated[
    Path | None, typer.Option(help="CSV file with the columns bag_id,label and optionally group,split,fold.")
]
Task = Annotated[str, typer.Option(help="auto, classification, one_vs_rest or regression.")]
Positive = Annotated[str | None, typer.Option(help="Positive class of two; by default the second in order.")]
ClassWeights = Annotated[str, typer.Option(help="none, or balanced: inverse to the classes' frequencies.")]
Normalization = Annotated[
    str,
    typer.Option(help="Of the features, fitted to the training part: standard, scale, none or auto (scale if sparse)."),
]
MaxInstances = Annotated[
    int, typer.Option(help="Instances of a packed batch, which bounds the memory; a larger bag is read alone.")
]
Patience = Annotated[
    int, typer.Option(help="Stop after this many epochs without an improvement of the inner validation part; 0: don't.")
]
Validation = Annotated[float, typer.Option(help="Fraction of the training part held out as inner validation part.")]
Workers = Annotated[int | None, typer.Option(help="Processes that read bags ahead; by default 0 to 4, by size.")]
Precision = Annotated[str, typer.Option(help="fp32 or bf16.")]
TrainDevice = Annotated[str | None, typer.Option("--device", help="cpu; by default a GPU if there is one.")]
Tensorboard = Annotated[bool, typer.Option(help="Write TensorBoard events.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue in the folder --out.")]
Resamples = Annotated[int, typer.Option(min=0, help="Bootstrap resamples for the intervals; 0: no intervals.")]


@contextmanager
def shown_progress(console: Console, quiet: bool) -> Iterator[Any]:
    """A progress bar as the callback ``(description, done, total)``."""
    with progress_bar(console, quiet) as progress:
        task = progress.add_task("", total=None)

        def show(description: str, done: int, total: int) -> None:
            progress.update(task, description=description.replace("[", r"\["), completed=done, total=total)

        yield show


def main_console(quiet: bool) -> Console:
    """Console that is silent in all processes but the first of a torchrun or accelerate launch."""
    return Console(quiet=quiet or os.environ.get("RANK", "0") != "0")


def given_settings(context: typer.Context, settings: type[MilSettings]) -> dict[str, Any]:
    """The fields of a settings class that were given as options, and not by default."""
    sources = {name: context.get_parameter_source(name) for name in settings.__dataclass_fields__}
    return {name: context.params[name] for name, source in sources.items() if source and source.name != "DEFAULT"}
