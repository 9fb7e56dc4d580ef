"""Invocation of the command in the test process."""

from typer.testing import CliRunner

from amil_fast.cli.app import app


def amil(*arguments):
    """Runs ``amil ARGUMENTS...``; the result has ``exit_code``, ``output`` and ``exception``."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
