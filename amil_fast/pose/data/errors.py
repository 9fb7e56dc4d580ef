"""Bad data: an error that names file and entry, or a list of what was left out."""

from dataclasses import dataclass


class DataError(ValueError):
    """A file that isn't what its format promises. The message starts with the file and names the entry."""


@dataclass(frozen=True)
class LeftOut:
    """Something that ``skip_bad`` left out: a whole entry, or one joint of it."""

    file: str
    entry: str
    reason: str

    def __str__(self):
        return f"{self.file}: {self.entry}: {self.reason}" if self.entry else f"{self.file}: {self.reason}"


class Problems:
    """Collects what is wrong with a data set: raises at the first problem, or lists them all if ``skip`` is set."""

    def __init__(self, skip=False):
        self.skip = skip
        self.left_out = []

    def report(self, file, entry, reason):
        """One bad entry. Returns only where bad entries are to be left out."""
        problem = LeftOut(str(file), entry, reason)
        if not self.skip:
            raise DataError(f"{problem} (skip_bad / --skip-bad leaves such entries out and lists them)")
        self.left_out.append(problem)
