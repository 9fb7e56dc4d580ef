"""Calls of the operators from several Python threads, which run the kernels concurrently: the GIL is released."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from amil_fast import adjust_pool, decode_heatmaps
from tests.ops.helpers import make_maps, random_bags

THREADS, ROUNDS = 8, 25  # of 5 calls each


def calls(number):
    """Calls of one thread, with shapes of its own; they return tuples of tensors."""
    B, N, D = 2 + number % 3, 5 + 7 * number, 8 + 5 * number
    x = random_bags(B, N, D, number, (torch.float32, torch.float64, torch.bfloat16)[number % 3])
    offsets = torch.tensor([0, N // 2, N, B * N - 1])
    mask = torch.rand(B, N, generator=torch.Generator().manual_seed(number)) < 0.7
    large = random_bags(2, 5000, 128, number, torch.float32)  # a gradient of 5 MB, whose pages are reused
    maps = make_maps("noisy", (2, 3 + number, 16 + 5 * number, 12 + 7 * number), number)

    def pool(instances, **bags):
        leaf = instances.clone().requires_grad_()
        bag, weights = adjust_pool(leaf, return_weights=True, num_iters=2 + number % 3, **bags)
        upstream = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out) for out in (bag, weights)]
        return bag, weights, *torch.autograd.grad((bag, weights), leaf, upstream)

    return (
        lambda: pool(x, mask=mask),
        lambda: pool(x.flatten(0, 1), cu_seqlens=offsets),
        lambda: pool(large[:, : 4200 + number], lengths=torch.tensor([3, 4200])),
        lambda: decode_heatmaps(maps, refine="dark", flipped=maps, flip_pairs=[(0, 2)]),
        lambda: decode_heatmaps(maps.half(), refine="dark_udp", convention="mmpose"),
    )


@pytest.fixture
def frequent_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_results_equal_those_of_one_thread(frequent_switches):
    """1,000 calls, forward and backward, bit for bit."""
    of_threads = [calls(number) for number in range(THREADS)]
    expected = [[call() for call in of_thread] for of_thread in of_threads]
    together = threading.Barrier(THREADS)

    def work(number):
        together.wait(60)
        different = []
        for i in range(ROUNDS * 5):
            results = of_threads[number][i % 5]()
            if not all(map(torch.equal, results, expected[number][i % 5])):
                different.append(i)
        return different

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(THREADS))) == [[]] * THREADS
