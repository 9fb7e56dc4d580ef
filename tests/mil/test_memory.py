"""Memory of bags that are read from disk."""

import numpy as np
import psutil

from amil_fast.mil import open_bags
from amil_fast.mil.packing import PackedLoader

SIZE, WIDTH = 8000, 1024
BAG = 2 * SIZE * WIDTH  # bytes


def test_a_worker_holds_few_bags(tmp_path):
    for bag in range(60):
        np.lib.format.open_memmap(tmp_path / f"{bag}.npy", "w+", np.float16, (SIZE, WIDTH))  # sparse on disk
    source = open_bags(tmp_path)
    before = psutil.Process().children()  # of other tests
    loader = PackedLoader(source, workers=1)
    sizes = []
    for number, batch in enumerate(loader.read([[bag] for bag in range(60)])):
        assert batch.features.shape == (SIZE, WIDTH)
        if number % 5 == 0:
            workers = [child for child in psutil.Process().children() if child not in before]
            sizes.append(max(worker.memory_info().rss for worker in workers))
    # Two batches are read ahead; each may exist in private and in shared memory.
    assert max(sizes) - sizes[0] < 8 * BAG
