"""Exceptions of runs, apart from invalid files (:class:`~amil_fast.utils.files.DataError`)."""


class Interrupted(Exception):
    """A run was stopped by a signal after its state had been saved."""


class RunFailed(RuntimeError):
    """A run ended without a result, for a reason that the message states."""
