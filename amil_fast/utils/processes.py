"""The end of processes: with their parent, and of groups of them."""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import connection

import torch


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


def end_process_group() -> None:
    """Ends the process group, if there is one.

    Required before the process exits: the threads of a gloo group that still exists abort about one process in three
    ("terminate called without an active exception", PyTorch 2.13).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
