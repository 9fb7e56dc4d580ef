"""Errors of commands: the one place that turns exceptions into a message and an exit code."""

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from amil_fast.utils.errors import Interrupted, RunFailed
from amil_fast.utils.optional import MissingDependency

# Exit codes: 0 done, 1 done except for unreadable inputs, 2 not done, 70 a defect of the program, 130 interrupted.
PARTLY, FAILED, DEFECT, INTERRUPTED = 1, 2, 70, 130
# Newer versions of Typer contain a copy of click, whose exceptions have no public name there.
_UsageError: Any = typer.BadParameter.__mro__[2]


class CommandGroup(TyperGroup):
    """Group of commands that end with one line instead of a traceback.

    Invalid files, settings and arguments, errors of the operating system, too little memory, missing optional packages
    and failed runs are expected: exit code 2. Anything else is a defect: exit code 70, and the line says how to report
    it. ``--debug``, anywhere on the command line, prints the traceback too.
    """

    def main(self, args: Sequence[str] | None = None, *positional: Any, **options: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if "--debug" in words:
            words.remove("--debug")
            words.insert(0, "--debug")
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # names of files may not be representable
                stream.reconfigure(errors="backslashreplace")
        return super().main(words, *positional, **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, _UsageError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            raise typer.Exit(_report(error)) from None
        finally:
            if "torch" in sys.modules:
                from amil_fast.utils.processes import end_process_group

                end_process_group()  # of torchrun or accelerate; otherwise gloo can abort at exit


def _report(error: BaseException) -> int:
    """Prints the line about an exception and returns the exit code."""
    if isinstance(error, Interrupted):
        print_error(str(error))
        return INTERRUPTED
    if isinstance(error, KeyboardInterrupt):
        print_error("interrupted")
        return INTERRUPTED
    if is_out_of_memory(error):
        print_error(f"Error: not enough memory: {_first_line(error)}", style="red")
        return FAILED
    if isinstance(error, OSError):
        print_error(f"Error: {describe(error)}", style="red")
        return FAILED
    if isinstance(error, (ValueError, RunFailed, MissingDependency)):
        print_error(f"Error: {error}", style="red")
        return FAILED
    print_error(
        f"Error: unexpected {type(error).__name__}: {_first_line(error)} (a defect of amil_fast: please report it to "
        "its authors with the output of the same command with --debug, which shows the traceback, and of `amil info`)",
        style="red",
    )
    return DEFECT


def print_error(text: str, style: str | None = None) -> None:
    """Prints a message to stderr without markup and wrapping."""
    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False, style=style)


def describe(error: OSError) -> str:
    """``file: reason`` of an error of the operating system."""
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{os.fspath(error.filename)}: {reason}"


def is_out_of_memory(error: BaseException) -> bool:
    """True for exceptions of Python, NumPy, PyTorch and OpenCV about memory that cannot be had."""
    texts = ("can't allocate memory", "out of memory", "Insufficient memory", "Failed to allocate")
    known = isinstance(error, RuntimeError) or type(error).__module__ == "cv2"
    return isinstance(error, MemoryError) or (known and any(text in str(error) for text in texts))


def _first_line(error):
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
