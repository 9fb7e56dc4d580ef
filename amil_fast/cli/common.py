"""What all commands share: how they end on an error, progress bars, configurations of training."""

import json
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

FAILED = 2  # exit code of what was not done


def fail(message):
    """Ends the command with exit code 2 and one message instead of a traceback."""
    Console(stderr=True, soft_wrap=True).print(f"Error: {message}", markup=False, highlight=False, style="red")
    raise typer.Exit(FAILED)


def progress_bar(console, quiet):
    """A progress bar that stays silent where output is piped or ``quiet``."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=quiet or not console.is_terminal
    )


def read_config(path):
    """The :class:`~amil_fast.pose.training.config.TrainConfig` in a ``train.json``."""
    from amil_fast.pose.training.config import from_dict

    return from_dict(json.loads(path.read_text(encoding="utf-8")))


def change_config(config, options, settings):
    """A configuration with changes.

    Args:
        config: a :class:`~amil_fast.pose.training.config.TrainConfig`.
        options: ``"section.key"`` -> value of a command-line option, None where it wasn't given.
        settings: texts of ``--set``, or None; they have the last word.
    """
    from amil_fast.pose.training.parsing import parse_override

    changes = {name: str(v) if isinstance(v, Path) else v for name, v in options.items() if v is not None}
    return config.override(changes | dict(parse_override(text) for text in settings or ()))
