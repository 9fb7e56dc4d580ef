"""Plans of the Triton kernels of adjust pooling: selection, launches, limits."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from amil_fast.kernels.adjust_pool_config import PlanLimits, pick_plan

from amil_fast.kernels import adjust_pool_launch
from tests.helpers import relative_error
from tests.ops.triton_cases import (
    DEVICE,
    bags,
    make_plan,
    poisoned_memory,  # noqa: F401 (a fixture)
    reference,
    upstream,
)


def kernels(launches):
    short = {"adjust_pool_forward_": "", "adjust_pool_backward_": "", "_kernel": ""}
    names = []
    for launch in launches:
        name = launch.kernel.fn.__name__
        for old, new in short.items():
            name = name.replace(old, new)
        names.append(name)
    return names


@pytest.mark.parametrize(
    ("form", "name", "T", "detach", "forward", "backward"),
    [
        ("full", "one bag", 3, False, ["on_chip"], ["on_chip"]),
        ("full", "one bag", 1, False, ["on_chip"], ["on_chip"]),
        ("full", "stream", 3, False, ["chunks", "weights"], ["chunks", "write"]),
        ("full", "stream", 3, True, ["chunks", "weights"], ["detached"]),
        ("full", "split", 3, False, ["chunks"] * 3 + ["weights"], ["chunks", "chunks", "write"]),
        ("full", "split", 1, False, ["chunks", "weights"], ["detached"]),
        (
            "packed",
            "mixed",
            3,
            False,
            ["on_chip"] + ["chunks"] * 3 + ["weights"],
            ["on_chip", "chunks", "chunks", "write"],
        ),
        ("packed", "mixed", 3, True, ["on_chip"] + ["chunks"] * 3 + ["weights"], ["on_chip", "detached"]),
    ],
)
def test_launches(form, name, T, detach, forward, backward):
    """Kernels launched by each plan: a split pass takes T launches, every other one a single launch per kernel."""
    f, where = bags(form)
    g, v = upstream(f, where)
    plan = make_plan(form, name, f)
    (_, _, sigma, softmax_stats), launches = adjust_pool_launch.forward_launches(f, *where.values(), T, True, plan=plan)
    assert kernels(launches) == forward
    _, launches = adjust_pool_launch.backward_launches(
        g, v, f, *where.values(), sigma, softmax_stats, detach, plan=plan
    )
    assert kernels(launches) == backward


SMALL = PlanLimits(
    on_chip_warps=1, on_chip_forward=4, on_chip_backward=2, on_chip_typical=2, tiny_elements=64, chunk_elements=1,
    chunk_warps=1, chunk_block_n=4, chunk_programs=2, chunk_rows=5, group=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("packed", "B", "N", "strategy"),
    [
        (False, 4, 5, "on chip"),
        (False, 40, 2, "tiny"),
        (False, 3, 17, "split"),
        (False, 20, 17, "stream"),
        (True, 3, 9, "on chip"),
        (True, 7, 40, "mixed"),
        (True, 2, 40, "chunks"),
    ],
)
def test_pick_plan_takes_every_branch(packed, B, N, strategy):
    """Each branch selects the expected strategy, and its kernels match the reference."""
    limits = dataclasses.replace(SMALL, stream_bags_per_multiprocessor=10)
    plans = [pick_plan(packed, B, N, 7, 4, backward, multiprocessors=2, limits=limits) for backward in (False, True)]
    plan = plans[0]
    taken = {
        "on chip": plan.chunks is None and plan.on_chip.bags == 1,
        "tiny": plan.chunks is None and plan.on_chip.bags > 1,
        "split": plan.on_chip is None and plan.chunks.split and not packed,
        "stream": plan.on_chip is None and not plan.chunks.split,
        "mixed": packed and plan.on_chip is not None and plan.chunks is not None,
        "chunks": packed and plan.on_chip is None and plan.chunks.split,
    }
    assert [name for name, was in taken.items() if was] == [strategy]
    generator = torch.Generator().manual_seed(5)
    where = dict.fromkeys(("mask", "lengths", "cu_seqlens"))
    f = torch.randn(*((N,) if packed else (B, N)), 7, generator=generator, dtype=torch.float64).to(DEVICE)
    if packed:
        cuts = torch.randint(0, N + 1, (B - 1,), generator=generator).sort().values
        where["cu_seqlens"] = torch.cat([torch.tensor([0]), cuts, torch.tensor([N])]).to(DEVICE)
    g, v = upstream(f, where)
    bag, w, sigma, softmax_stats = adjust_pool_launch.forward(f, *where.values(), 3, True, plan=plans[0])
    grad = adjust_pool_launch.backward(g, v, f, *where.values(), sigma, softmax_stats, False, plan=plans[1])
    for a, b in zip((bag, w, grad), reference(f, where, 3, False, g, v), strict=True):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("D", [1, 7, 128, 1000, 4096])
@pytest.mark.parametrize(
    ("packed", "B", "N"), [(False, 1, 1), (False, 4096, 64), (False, 1, 10**6), (True, 64, 3 * 10**6)]
)
def test_plans_fit(packed, B, N, D, itemsize, backward):
    """Tiles cover the features and rows, and fit in registers."""
    plan = pick_plan(packed, B, N, D, itemsize, backward)
    words = 2 if itemsize == 8 else 1
    if plan.on_chip is not None:
        config = plan.on_chip
        assert config.block_d >= D
        assert packed or config.block_n >= N
        elements = config.bags * config.block_n * config.block_d
        # With products on tensor cores, the tile is in shared memory.
        assert elements * words <= config.num_warps * 32 * (128 if config.dot else 16 if backward else 64)
    if plan.chunks is not None:
        config = plan.chunks
        assert config.block_d >= D
        assert config.split == (config.chunk_rows < N)
        assert config.block_n * config.block_d * words <= config.num_warps * 32 * (256 if config.dot else 32)
        assert config.dot == (itemsize == 2 and 16 <= config.block_d <= 2048)
    assert plan.on_chip is not None or plan.chunks is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_plan_takes_tensor_cores(dtype):
    """The default plans of 16-bit instances use them in every strategy, forward and backward, up to their limits."""
    itemsize = dtype.itemsize
    for backward in (False, True):
        assert pick_plan(False, 4096, 64, 128, itemsize, backward).on_chip.dot
        assert pick_plan(False, 4096, 256, 128, itemsize, backward).on_chip.dot
        assert pick_plan(False, 32, 4096, 128, itemsize, backward).chunks.dot
        assert not pick_plan(False, 4096, 64, 128, 4, backward).on_chip.dot
        mixed = pick_plan(True, 4096, 4096 * 64, 128, itemsize, backward)
        assert mixed.on_chip.dot and mixed.chunks.dot
        alone = pick_plan(True, 4096, 4096 * 64, 128, itemsize, backward, max_seqlen=100)
        assert alone.on_chip.dot and alone.on_chip.block_n == 128 and alone.chunks is None
    assert not pick_plan(False, 4096, 64, 128, itemsize, True, num_iters=6).on_chip.dot  # more than are unrolled
    assert pick_plan(False, 4096, 64, 128, itemsize, False, shared_memory=48 << 10).on_chip.dot
    assert not pick_plan(False, 4096, 256, 128, itemsize, False, shared_memory=99 << 10).on_chip.dot
    assert pick_plan(False, 4096, 64, 128, itemsize, False, capability=80).on_chip.dot
    assert not pick_plan(False, 4096, 64, 128, itemsize, True, capability=80).on_chip.dot


def test_too_many_features():
    f = torch.empty(1, 1, 16385, device="meta")
    with pytest.raises(ValueError, match="serves up to 16384 features, got 16385"):
        adjust_pool_launch.forward_launches(f, None, None, None, 3, False)
