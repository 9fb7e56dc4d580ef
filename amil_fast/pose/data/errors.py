"""Reporting of invalid entries in a data set."""

import os
from dataclasses import dataclass

from amil_fast.utils.files import DataError

# What reading an entry of a data set, with values of any type and size, can raise.
BAD_ENTRY = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


def reason(error: BaseException) -> str:
    """Text for one of :data:`BAD_ENTRY`."""
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)


@dataclass(frozen=True)
class LeftOut:
    """An entry, or one joint of it, that ``skip_bad`` excluded."""

    file: str
    entry: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.entry}: {self.reason}" if self.entry else f"{self.file}: {self.reason}"


class Problems:
    """Raises at the first invalid entry, or collects all of them.

    Args:
        skip: collect the entries in ``left_out`` instead of raising.
    """

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.left_out: list[LeftOut] = []

    def report(self, file: str | os.PathLike, entry: str, reason: str) -> None:
        """Reports one invalid entry; raises DataError unless ``skip`` is set."""
        problem = LeftOut(str(file), entry, reason)
        if not self.skip:
            raise DataError(f"{problem} (skip_bad / --skip-bad excludes such entries and lists them)")
        self.left_out.append(problem)
