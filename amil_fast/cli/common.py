"""Shared parts of the commands: errors, output lines, progress bars, data sets, networks, configurations."""

import sys
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from amil_fast.utils.files import DataError, read_json, write_json

LISTED = 12  # problems and files listed on the terminal; --json contains all


def fail(message: object) -> NoReturn:
    """Ends the command with exit code 2 and a message (:mod:`amil_fast.cli.errors`)."""
    raise ValueError(str(message))


def print_plain(console: Console, text: str) -> None:
    """Prints a line without markup, highlighting and wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_written(console: Console, path: Path) -> None:
    """Prints the line that names a file written."""
    print_plain(console, f"written: {path}")


def write_result(console: Console, path: Path | None, content: dict) -> None:
    """Writes the result of a command to ``--json``, if given."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    print_written(console, path)


def print_left_out(console: Console, left_out: list) -> None:
    """Lists the entries that ``--skip-bad`` left out."""
    if not left_out:
        return
    print_plain(console, f"left out: {len(left_out)}")
    for problem in left_out[:LISTED]:
        print_plain(console, f"  {problem}")
    if len(left_out) > LISTED:
        print_plain(console, f"  ... and {len(left_out) - LISTED} more (--json lists all)")


def load_people(
    dataset: str, root: Path | None, split: str | None, skip_bad: bool, crop: str | None = None, **options: Any
):
    """People of the data set that the options name (:func:`amil_fast.pose.data.load`)."""
    from amil_fast.pose.data.registry import load

    if root is None:
        fail("--dataset needs --root, the folder of the data set")
    if crop is not None and dataset not in ("lsp", "lspet"):
        fail("--crop is for lsp and lspet: the other data sets have bounding boxes")
    if crop is not None:
        options["crop"] = crop
    return load(dataset, root, split, skip_bad=skip_bad, **options)


def make_predictor(
    checkpoint: Path | None,
    model: str | None,
    skeleton: str | None,
    size: int | None,
    flip_test: bool | None,
    refine: str,
    separate_sides: bool | None,
    device: str | None,
    precision: str,
):
    """:class:`~amil_fast.pose.inference.Predictor` of the network that the options name."""
    import torch

    from amil_fast.ops.decode_heatmaps import REFINEMENTS
    from amil_fast.pose.inference.predictor import Predictor, load_model
    from amil_fast.utils.accelerator import fastest_precision

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision != "auto" and precision not in dtypes:
        raise ValueError(f"precision: expected one of auto, {', '.join(dtypes)}, got {precision!r}")
    if refine not in REFINEMENTS:
        raise ValueError(f"refine: expected one of {', '.join(REFINEMENTS)}, got {refine!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros((), device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, ImportError, ValueError, TypeError) as error:
        raise ValueError(f"device: {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    if model is not None and "" not in sys.path:
        sys.path.insert(0, "")  # modules in the current folder, as for `python -m`
    network = load_model(checkpoint, model)
    if precision == "auto":
        precision = fastest_precision(torch.device(device).type == "cpu")
    return Predictor(
        network,
        skeleton=skeleton,
        size=size,
        flip_test=flip_test,
        refine=refine,
        separate_sides=separate_sides,
        device=device,
        dtype=dtypes[precision],
    )


def progress_bar(console, quiet):
    """Progress bar that is silent if the output is piped or ``quiet``."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=quiet or not console.is_terminal
    )


def read_config(path):
    """The :class:`~amil_fast.pose.training.config.TrainConfig` in a ``train.json``."""
    from amil_fast.pose.training.config import from_dict

    content = read_json(path, dict, "a training configuration")
    try:
        return from_dict(content)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def change_config(config, options, settings):
    """Returns a configuration with changes applied.

    Args:
        config: a :class:`~amil_fast.pose.training.config.TrainConfig`.
        options: ``"section.key"`` -> value of a command-line option, None if it was not given.
        settings: texts of ``--set``, or None; they override ``options``.
    """
    from amil_fast.pose.training.overrides import parse_override

    changes = {name: str(v) if isinstance(v, Path) else v for name, v in options.items() if v is not None}
    return config.override(changes | dict(parse_override(text) for text in settings or ()))
