"""The command's root: what is not about bags (``mil``) or poses (``pose``)."""

import typer

from amil_fast import environment

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
