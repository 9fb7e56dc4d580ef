"""Processes that end with their parent."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT

PARENT = """
import multiprocessing, pathlib, signal, sys, time
from amil_fast.utils.processes import end_with_parent

def work(path, ignores):
    def terminate(*_):
        pathlib.Path("terminated").touch()
        sys.exit()

    signal.signal(signal.SIGTERM, signal.SIG_IGN if ignores else terminate)
    end_with_parent(grace=2)
    pathlib.Path(path).write_text(str(multiprocessing.current_process().pid))
    time.sleep(600)

if __name__ == "__main__":
    for number in (0, 1):
        multiprocessing.get_context("spawn").Process(target=work, args=(f"child-{number}", number)).start()
    time.sleep(600)
"""


def alive(pid):
    """True while the process runs; a zombie, which waits for its new parent, does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
def test_children_end_with_a_killed_parent(tmp_path):
    """Also one that ignores SIGTERM."""
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path, env=environment)
    files = [tmp_path / f"child-{number}" for number in (0, 1)]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not all(file.is_file() and file.read_text() for file in files):
        time.sleep(0.05)
    children = [int(file.read_text()) for file in files]
    assert all(alive(child) for child in children)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(alive(child) for child in children):
        time.sleep(0.05)
    left = [child for child in children if alive(child)]
    for child in left:
        os.kill(child, signal.SIGKILL)
    assert not left and (tmp_path / "terminated").exists()
