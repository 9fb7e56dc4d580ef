"""Resident memory over many calls of growing and shrinking sizes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from amil_fast import adjust_pool, decode_heatmaps

CALLS = 100_000
GROWTH_MIB = 48  # allowed between a fifth of the calls and their end


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def call(rng, largest):
    """Pools and decodes random tensors; one call in 100 is of the size that the page cache serves."""
    size = int(np.exp(rng.uniform(0, np.log(largest))))
    if rng.random() < 0.01:
        size = int(rng.integers(20_000, 60_000))
    D = int(rng.integers(1, 65))
    x = torch.randn(size, D, requires_grad=True)
    cuts = torch.from_numpy(np.sort(rng.integers(0, size + 1, int(rng.integers(0, 9)))))
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([size])])
    adjust_pool(x, cu_seqlens=cu_seqlens, num_iters=int(rng.integers(1, 5))).sum().backward()
    sides = rng.integers(1, 65, 2).tolist()
    decode_heatmaps(torch.rand(1, int(rng.integers(1, 18)), *sides), refine=str(rng.choice(["quarter", "dark"])))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_stays_flat():
    rng = np.random.default_rng(0)
    measured = []
    for number in range(CALLS):
        # The largest size grows and shrinks five times.
        call(rng, 100 + 2900 * (0.5 - 0.5 * np.cos(10 * np.pi * number / CALLS)))
        if number % (CALLS // 20) == 0:
            measured.append(resident_mib())
    measured.append(resident_mib())
    print(f"resident memory in MiB: {', '.join(f'{value:.0f}' for value in measured)}")
    assert max(measured[4:]) - measured[4] < GROWTH_MIB, measured
