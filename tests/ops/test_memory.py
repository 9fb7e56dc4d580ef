"""Memory of the C++ backends: behavior without memory, and the cache of pages for large gradients."""

import io
import itertools
import os
import subprocess
import sys
from random import Random

import numpy as np
import pytest
import torch

from amil_fast import adjust_pool
from amil_fast.ops import backends
from tests.helpers import ROOT
from tests.ops.helpers import random_bags
from tests.ops.limited_memory import CASES


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space through RLIMIT_AS, which is Linux's")
def test_memory_error_in_threads_reaches_the_caller():
    """An exception that leaves an OpenMP thread ends the process; the caller must get it, and later calls must work."""
    # With a fixed threshold the C library returns large freed blocks to the system instead of reusing them.
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    command = [sys.executable, "-m", "tests.ops.limited_memory"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    expected = []
    for name, (_, _, limits) in CASES.items():
        expected += [f"{name} {limit} MemoryError" for limit in limits] + [f"{name} correct True"]
    assert done.stdout.splitlines() == expected, done.stderr
    assert done.returncode == 0, done.stderr


# ---- pages of large gradients (csrc/runtime/page_cache.h) ----


def gradients(x, seeds):
    """Returns the gradient of ``x`` for each random upstream gradient, all alive at once."""
    upstream = [torch.randn(x.shape[0], x.shape[2], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    bag = adjust_pool(x)
    return [torch.autograd.grad(bag, x, g, retain_graph=True)[0] for g in upstream]


def test_live_gradients_do_not_share_recycled_pages():
    """Gradients above 4 MiB come from recycled pages: several live ones must keep their values, as all were correct."""
    x = random_bags(2, 9000, 64, dtype=torch.float32).requires_grad_()
    expected = [grad.clone() for grad in gradients(x, range(3))]
    alive = gradients(x, range(3))  # from pages that the three before have freed
    assert len({grad.data_ptr() for grad in alive}) == 3
    assert all(grad.data_ptr() % 64 == 0 for grad in alive)
    later = gradients(x, range(10, 13))
    for grad, value in zip(alive, expected, strict=True):
        assert torch.equal(grad, value)
    del alive[1]
    again = gradients(x, [1, 1])  # one recycled, one new
    for grad, value in zip([*again, alive[0], alive[1]], [expected[i] for i in (1, 1, 0, 2)], strict=True):
        assert torch.equal(grad, value)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([*later, *alive], 2))


def test_recycled_gradient_is_an_ordinary_tensor():
    x = random_bags(2, 9000, 64, dtype=torch.float32).requires_grad_()
    for _ in range(2):
        (grad,) = gradients(x, [0])
    grad.requires_grad_().add(1).sum().backward()
    torch.save(grad, io.BytesIO())


def test_page_blocks_are_disjoint_and_recycled():
    """Random allocations and deallocations of blocks of 1 byte to 12 MiB, each marked at both ends."""
    native = backends.native()
    random = Random(0)
    alive, addresses = [], set()
    for step in range(400):
        if alive and random.random() < 0.5:
            block, mark = alive.pop(random.randrange(len(alive)))
            view = np.asarray(block)
            assert view[0] == view[-1] == mark
            del block, view
        else:
            block = native.PageBlock(random.choice([1, 2**21, 2**21 + 1, random.randrange(1, 12 << 20)]))
            view = np.asarray(block)
            view[0] = view[-1] = step % 251
            addresses.add(view.ctypes.data)
            alive.append((block, step % 251))
    for block, mark in alive:
        assert np.asarray(block)[0] == np.asarray(block)[-1] == mark
    ranges = sorted((np.asarray(block).ctypes.data, np.asarray(block).nbytes) for block, _ in alive)
    assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(ranges))
    assert len(addresses) < 100, "expected most of about 200 blocks to be recycled"


def test_page_block_that_cannot_be_mapped():
    for size in (2**47, 2**63, 2**64 - 1):
        with pytest.raises(MemoryError):
            backends.native().PageBlock(size)
