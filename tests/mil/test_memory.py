"""Memory of bags that are read from disk."""

import subprocess
import sys

import numpy as np

from tests.helpers import ROOT

SIZE, WIDTH = 8000, 1024
BAG = 2 * SIZE * WIDTH  # bytes
PROGRAM = """
import sys, psutil
from amil_fast.mil import open_bags
from amil_fast.mil.packing import PackedLoader

loader = PackedLoader(open_bags(sys.argv[1]), workers=1)
sizes = []
for batch in loader.read([[bag] for bag in range(60)]):
    sizes.append(max(child.memory_info().rss for child in psutil.Process().children()))
print(max(sizes) - sizes[0])
"""


def test_a_worker_holds_few_bags(tmp_path):
    """In a process of its own: the worker inherits the heap of the process that starts it."""
    for bag in range(60):
        np.lib.format.open_memmap(tmp_path / f"{bag}.npy", "w+", np.float16, (SIZE, WIDTH))  # sparse on disk
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    # Two batches are read ahead, each in private or in shared memory; a third is read and packed.
    assert int(result.stdout) < 6 * BAG
