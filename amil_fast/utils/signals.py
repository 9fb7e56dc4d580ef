"""Graceful stop on SIGINT and SIGTERM."""

import os
import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """Context manager that records SIGINT and SIGTERM instead of ending the process.

    A second SIGINT raises KeyboardInterrupt. Outside the main thread, where Python can't install handlers, only
    :meth:`request` has an effect.

    Attributes:
        reason: name of the signal, such as ``"SIGTERM"``; None if no stop is requested.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._handlers: dict[signal.Signals, object] = {}
        self._process = -1

    def __bool__(self) -> bool:
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Requests a stop, like a signal of the name ``reason``."""
        self.reason = reason

    def __enter__(self) -> "StopRequest":
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._handlers = {which: signal.signal(which, self._record) for which in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for which, handler in self._handlers.items():
            signal.signal(which, handler)  # type: ignore[arg-type]
        self._handlers = {}

    def _record(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked worker that inherited this handler; the main process decides
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.request(signal.Signals(number).name)
