"""Runs the command in this process."""

from typer.testing import CliRunner

from amil_fast.cli.app import app


def amil(*arguments):
    """The result of ``amil ARGUMENTS...``: ``exit_code``, ``output``, ``exception``."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
