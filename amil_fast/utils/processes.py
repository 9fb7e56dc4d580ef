"""Processes that end with their parent."""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import connection


def end_with_parent(grace: float) -> None:
    """Makes this process, started by :mod:`multiprocessing`, end when its parent does, also after a SIGKILL.

    A thread waits for the parent's end; then the process receives SIGTERM, on which a training saves its state, and
    ``grace`` seconds later SIGKILL.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel, own = parent.sentinel, os.getpid()

    def wait():
        connection.wait([sentinel])
        os.kill(own, signal.SIGTERM)
        time.sleep(grace)
        os.kill(own, getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=wait, daemon=True).start()
