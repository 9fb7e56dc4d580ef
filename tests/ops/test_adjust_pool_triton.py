"""Triton kernels of adjust pooling against the reference, on a CUDA device if available, else in the interpreter.

The interpreter is slow, so sizes are small and odd, and plans are passed explicitly, so that every strategy is taken at
these sizes. Large sizes, streams and CUDA graphs are covered by test_adjust_pool_gpu.py.
"""

import dataclasses
import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from amil_fast.kernels.adjust_pool_config import (
    ChunkConfig,
    OnChipConfig,
    PlanLimits,
    TritonPlan,
    next_power_of_2,
    pick_plan,
)

from amil_fast.kernels import adjust_pool_launch
from amil_fast.ops.adjust_pool_reference import adjust_pool_reference
from tests.helpers import assert_as_accurate, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_N = 4  # rows of a tile: a bag of 17 takes five tiles, the last one with a single row
GROUP = 2  # chunks merged by one program: 5 chunks take two levels


def on_chip(rows, D, bags=1):
    return OnChipConfig(bags, next_power_of_2(rows), next_power_of_2(D), 2)


def chunks(D, chunk_rows, split, min_rows=-1):
    return ChunkConfig(BLOCK_N, next_power_of_2(D), chunk_rows, min_rows, split, GROUP, 2, 2, 128)


# name -> plan for N rows of D features
PADDED_PLANS = {
    "one bag": lambda N, D: TritonPlan(on_chip(N, D), None),
    "tiny bags": lambda N, D: TritonPlan(on_chip(N, D, bags=2), None),
    "stream": lambda N, D: TritonPlan(None, chunks(D, N, split=False)),
    "split": lambda N, D: TritonPlan(None, chunks(D, 4, split=True)),
}
PACKED_PLANS = {
    "on chip": lambda N, D: TritonPlan(on_chip(N, D), None),
    "chunks": lambda N, D: TritonPlan(None, chunks(D, 3, split=True)),
    "short chunks": lambda N, D: TritonPlan(None, chunks(D, 2, split=True)),
    "long chunks": lambda N, D: TritonPlan(None, chunks(D, N, split=False)),
    "mixed": lambda N, D: TritonPlan(on_chip(4, D, bags=2), chunks(D, 7, split=True, min_rows=4)),
}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fills uninitialized memory with NaN (integers: -1), which exposes elements that a kernel does not write."""
    empty, empty_like = torch.empty, torch.empty_like
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: _poison(new_empty(self, *a, **k)))


def _poison(tensor):
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(-1)


def bags(form, dtype=torch.float64, D=7, seed=0):
    """Instances ``(3, 17, D)`` or ``(43, D)`` and the mask, lengths or cu_seqlens; padding contains NaN."""
    generator = torch.Generator().manual_seed(seed)
    where = dict.fromkeys(("mask", "lengths", "cu_seqlens"))
    if form == "packed":
        f = torch.randn(43, D, generator=generator, dtype=torch.float64)
        where["cu_seqlens"] = torch.tensor([0, 0, 1, 4, 4, 21, 22, 27, 43, 43], dtype=torch.int32)
    else:
        f = torch.randn(3, 17, D, generator=generator, dtype=torch.float64)
        real = torch.ones(3, 17, dtype=torch.bool)
        if form == "mask":
            real = torch.rand(3, 17, generator=generator) < 0.6
            real[1] = False
            where["mask"] = real
        elif form == "lengths":
            where["lengths"] = torch.tensor([5, 0, 17])
            real = torch.arange(17) < where["lengths"][:, None]
        f[~real] = torch.nan
    f = (f * 1.5).to(dtype).to(DEVICE)
    return f, {k: None if v is None else v.to(DEVICE) for k, v in where.items()}


def reference(f, where, T, detach, g, v, dtype=torch.float64):
    """``(bag, weights, gradient)`` by autograd through the reference, in ``dtype``."""
    f = f.detach().to(dtype).requires_grad_()
    bag, w = adjust_pool_reference(f, **where, num_iters=T, detach_routing=detach)
    outputs, grads = [bag], [g.to(bag.dtype)]
    if v is not None and w.requires_grad:
        outputs, grads = [*outputs, w], [*grads, v.to(w.dtype)]
    (grad,) = torch.autograd.grad(outputs, f, grads)
    return bag.detach(), w.detach(), grad


def run(f, where, T, detach, g, v, plan):
    bag, w, sigma, softmax_stats = adjust_pool_launch.forward(f, *where.values(), T, True, plan=plan)
    if T == 1 or detach:
        v = None
    grad = adjust_pool_launch.backward(g, v, f, *where.values(), sigma, softmax_stats, detach, plan=plan)
    return bag, w, grad


def upstream(f, where, seed=1):
    generator = torch.Generator().manual_seed(seed)
    B = f.shape[0] if where["cu_seqlens"] is None else where["cu_seqlens"].shape[0] - 1
    g = torch.randn(B, f.shape[-1], generator=generator, dtype=torch.float64).to(f.dtype)
    accumulation = torch.float64 if f.dtype == torch.float64 else torch.float32
    v = torch.randn(f.shape[:-1], generator=generator, dtype=torch.float64).to(accumulation)
    return g.to(DEVICE), v.to(DEVICE)


ALL_PLANS = [
    *((form, name) for form in ("full", "mask", "lengths") for name in PADDED_PLANS),
    *(("packed", name) for name in PACKED_PLANS),
]


def make_plan(form, name, f):
    return (PACKED_PLANS if form == "packed" else PADDED_PLANS)[name](f.shape[-2], f.shape[-1])


@pytest.mark.parametrize(("T", "detach"), [(1, False), (3, False), (2, True)])
@pytest.mark.parametrize(("form", "name"), ALL_PLANS)
def test_matches_reference(form, name, T, detach):
    f, where = bags(form)
    g, v = upstream(f, where)
    bag, w, grad = run(f, where, T, detach, g, v, make_plan(form, name, f))
    expected = reference(f, where, T, detach, g, v)
    for what, a, b in zip(("bag", "weights", "gradient"), (bag, w, grad), expected, strict=True):
        assert relative_error(a, b) < 1e-13, what
    masked = torch.isnan(f).any(-1)
    assert torch.all(w[masked] == 0)
    assert torch.all(grad[masked] == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("form", "name"), [("mask", "tiny bags"), ("lengths", "split"), ("full", "stream"), ("packed", "mixed")]
)
def test_low_precision(form, name, dtype):
    f, where = bags(form, dtype, D=33)
    g, v = upstream(f, where)
    actual = run(f, where, 3, False, g, v, make_plan(form, name, f))
    truth = reference(f, where, 3, False, g, v)
    plain = reference(f, where, 3, False, g, v, dtype)
    for what, a, b, c in zip(("bag", "weights", "gradient"), actual, plain, truth, strict=True):
        assert a.dtype == b.dtype
        assert_as_accurate(a, b, c, what=what)


@pytest.mark.parametrize("D", [1, 2, 3, 8, 16, 130])
@pytest.mark.parametrize("name", ["one bag", "split"])
def test_features(name, D):
    f, where = bags("mask", D=D)
    g, v = upstream(f, where)
    actual = run(f, where, 3, False, g, v, make_plan("mask", name, f))
    for a, b in zip(actual, reference(f, where, 3, False, g, v), strict=True):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("which", ["bag", "weights"])
@pytest.mark.parametrize(
    ("form", "name"), [("full", "one bag"), ("full", "stream"), ("lengths", "split"), ("packed", "mixed")]
)
def test_single_upstream_gradient(form, name, which):
    f, where = bags(form)
    g, v = upstream(f, where)
    plan = make_plan(form, name, f)
    _, _, sigma, softmax_stats = adjust_pool_launch.forward(f, *where.values(), 3, False, plan=plan)
    arguments = (g, None) if which == "bag" else (None, v)
    actual = adjust_pool_launch.backward(*arguments, f, *where.values(), sigma, softmax_stats, False, plan=plan)
    expected = reference(f, where, 3, False, g if which == "bag" else g * 0, v if which == "weights" else None)[2]
    assert relative_error(actual, expected) < 1e-13


def strided(f, how):
    """Copy of ``f`` with other strides."""
    if how == "row stride 24":
        other = f.new_zeros(*f.shape[:-1], 24)[..., : f.shape[-1]]
    elif how == "features not contiguous":
        other = f.new_zeros(*f.shape[:-1], 2 * f.shape[-1])[..., ::2]
    elif how == "rows before bags":
        other = f.new_zeros(f.shape[1], f.shape[0], f.shape[2]).transpose(0, 1)
    elif how == "start not aligned":
        other = f.new_zeros(f.numel() + 1)[1:].view(f.shape)
    elif how == "every other row":
        other = f.new_zeros(*f.shape[:-2], 2 * f.shape[-2], f.shape[-1])[..., ::2, :]
    return other.copy_(f)


@pytest.mark.parametrize(
    ("form", "name", "how"),
    [
        ("mask", "one bag", "row stride 24"),
        ("lengths", "split", "features not contiguous"),
        ("full", "stream", "rows before bags"),
        ("full", "tiny bags", "start not aligned"),
        ("packed", "mixed", "every other row"),
        ("packed", "chunks", "row stride 24"),
    ],
)
def test_strides(form, name, how):
    f, where = bags(form)
    g, v = upstream(f, where)
    plan = make_plan(form, name, f)
    expected = run(f, where, 3, False, g, v, plan)
    other = strided(f, how)
    assert other.stride() != f.stride() or other.data_ptr() % 16
    actual = run(other, where, 3, False, g.expand(2, *g.shape)[1], v, plan)
    for a, b in zip(actual, expected, strict=True):  # the layout of a tile, hence the order of sums, may differ
        assert relative_error(a, b) < 1e-14


def test_expanded_instances():
    """One bag expanded over the batch: stride 0."""
    f = torch.randn(1, 5, 7, dtype=torch.float64, device=DEVICE).expand(3, 5, 7)
    where = dict.fromkeys(("mask", "lengths", "cu_seqlens"))
    g, v = upstream(f, where)
    actual = run(f, where, 3, False, g, v, TritonPlan(on_chip(5, 7), None))
    for a, b in zip(actual, reference(f.contiguous(), where, 3, False, g, v), strict=True):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize(
    ("form", "name"), [("mask", "tiny bags"), ("full", "split"), ("packed", "mixed"), ("packed", "chunks")]
)
def test_bit_equal_repeats(form, name):
    f, where = bags(form, torch.float32)
    g, v = upstream(f, where)
    plan = make_plan(form, name, f)
    first, second = run(f, where, 3, False, g, v, plan), run(f, where, 3, False, g, v, plan)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["tiny bags", "stream", "split"])
def test_bags_are_independent(name):
    f, where = bags("lengths")
    g, v = upstream(f, where)
    plan = make_plan("lengths", name, f)
    expected = run(f, where, 3, False, g, v, plan)
    spoiled = f.clone()
    spoiled[2, 4] = torch.nan
    spoiled[0, 5:] = torch.inf  # padding
    actual = run(spoiled, where, 3, False, g, v, plan)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a[:2], b[:2])
        assert torch.isnan(a[2]).any()


@pytest.mark.parametrize("name", ["one bag", "split"])
def test_permuting_a_bag(name):
    f, where = bags("full")
    g, v = upstream(f, where)
    plan = make_plan("full", name, f)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    bag, w, grad = run(f, where, 3, False, g, v, plan)
    bag_p, w_p, grad_p = run(f[:, order], where, 3, False, g, v[:, order], plan)
    assert relative_error(bag_p, bag) < 1e-14
    assert relative_error(w_p, w[:, order]) < 1e-13
    assert relative_error(grad_p, grad[:, order]) < 1e-13


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (0, 3)])
def test_empty_inputs(shape):
    f = torch.randn(shape, device=DEVICE)
    where = dict.fromkeys(("mask", "lengths", "cu_seqlens"))
    if len(shape) == 2:
        where["cu_seqlens"] = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    bag, w, sigma, softmax_stats = adjust_pool_launch.forward(f, *where.values(), 3, True)
    B = shape[0] if len(shape) == 3 else 5
    assert bag.shape == (B, 3)
    assert sigma.shape == (B, 3, 3)
    assert w.shape == f.shape[:-1]
    assert not bag.any()
    grad = adjust_pool_launch.backward(torch.randn_like(bag), None, f, *where.values(), sigma, softmax_stats, False)
    assert grad.shape == f.shape


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
        assert config.dot == (itemsize == 2 and 16 <= config.block_d <= (2048))
    assert plan.on_chip is not None or plan.chunks is not None


def test_public_operator():
    """Public function: registration, autograd and dtypes."""
    from amil_fast import adjust_pool

    f, where = bags("lengths", torch.float32)
    expected = f.detach().clone().requires_grad_()
    f.requires_grad_()
    bag, w = adjust_pool(f, lengths=where["lengths"], return_weights=True, backend="triton")
    bag_r, w_r = adjust_pool(expected, lengths=where["lengths"], return_weights=True, backend="reference")
    g, v = torch.randn_like(bag), torch.randn_like(w)
    torch.autograd.backward([bag, w], [g, v])
    torch.autograd.backward([bag_r, w_r], [g, v])
    assert relative_error(bag, bag_r) < 1e-6
    assert relative_error(w, w_r) < 1e-6
    assert relative_error(f.grad, expected.grad) < 1e-6


def test_too_many_features():
    f = torch.empty(1, 1, 16385, device="meta")
    with pytest.raises(ValueError, match="serves up to 16384 features, got 16385"):
        adjust_pool_launch.forward_launches(f, None, None, None, 3, False)


# ---- products on tensor cores, for 16-bit instances ----


def dot_chunks(D, chunk_rows, split, min_rows=-1):
    return ChunkConfig(16, next_power_of_2(D), chunk_rows, min_rows, split, GROUP, 2, 1, 255, dot=True)


# form -> name -> plan for bags of at most 17 rows, or 43 packed rows
DOT_PLANS = {
    "one bag": lambda D: TritonPlan(OnChipConfig(1, 32, next_power_of_2(D), 2, dot=True), None),
    "stream": lambda D: TritonPlan(None, dot_chunks(D, 17, split=False)),
    "split": lambda D: TritonPlan(None, dot_chunks(D, 16, split=True)),
    "mixed": lambda D: TritonPlan(
        OnChipConfig(1, 16, next_power_of_2(D), 2, dot=True), dot_chunks(D, 16, split=True, min_rows=16)
    ),
}
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@HALF
@pytest.mark.parametrize(
    ("form", "name"),
    [
        *((form, name) for form in ("full", "mask", "lengths") for name in ("one bag", "stream", "split")),
        *(("packed", name) for name in DOT_PLANS),
    ],
)
@pytest.mark.parametrize(("T", "detach"), [(1, False), (3, False), (2, True)])
def test_dot_matches_reference(form, name, T, detach, dtype):
    f, where = bags(form, dtype, D=33)
    g, v = upstream(f, where)
    plan = DOT_PLANS[name](33)
    if T == 1 or detach:  # on chip, the backward kernel with products on tensor cores is for gradients of the weights
        on_chip_plan = plan.on_chip and dataclasses.replace(plan.on_chip, dot=False)
        backward_plan = TritonPlan(on_chip_plan, plan.chunks)
    else:
        backward_plan = plan
    bag, w, sigma, softmax_stats = adjust_pool_launch.forward(f, *where.values(), T, True, plan=plan)
    v_used = None if T == 1 or detach else v
    grad = adjust_pool_launch.backward(g, v_used, f, *where.values(), sigma, softmax_stats, detach, plan=backward_plan)
    truth = reference(f, where, T, detach, g, v)
    plain = reference(f, where, T, detach, g, v, dtype)
    for what, a, b, c in zip(("bag", "weights", "gradient"), (bag, w, grad), plain, truth, strict=True):
        assert a.dtype == b.dtype
        assert_as_accurate(a, b, c, what=what)
    masked = torch.isnan(f).any(-1)
    assert torch.all(w[masked] == 0)
    assert torch.all(grad[masked] == 0)


@pytest.mark.parametrize("name", ["one bag", "stream"])
@pytest.mark.parametrize(
    ("norm", "T", "dtype"),
    [
        (1e-3, 3, torch.bfloat16),
        (0.3, 8, torch.float16),
        (3, 5, torch.bfloat16),
        (9, 3, torch.float16),
        (30, 3, torch.float16),
        (1e3, 2, torch.float16),
        (1e3, 2, torch.bfloat16),
    ],
)
def test_dot_is_as_accurate_as_float32_products(name, norm, T, dtype):
    """At most 1.5 times the error of the same kernels with products in float32, or 1e-6.

    Instances share a direction, so that the logits reach about 80 at norm 9 and the weights are one-hot above.
    """
    generator = torch.Generator().manual_seed(7)
    f = torch.randn(2, 17, 40, generator=generator, dtype=torch.float64)
    f = f / torch.linalg.vector_norm(f, dim=-1, keepdim=True) + torch.randn(2, 1, 40, generator=generator) / 40**0.5
    f = (f * norm).to(dtype).to(DEVICE)
    where = dict.fromkeys(("mask", "lengths", "cu_seqlens"))
    g, v = upstream(f, where)
    plans = (
        DOT_PLANS[name](40),
        {
            "one bag": TritonPlan(OnChipConfig(1, 32, 64, 2), None),
            "stream": TritonPlan(None, chunks(40, 17, split=False)),
            "split": TritonPlan(None, chunks(40, 16, split=True)),
        }[name],
    )
    dot, plain = (run(f, where, T, False, g, v, plan) for plan in plans)
    truth = reference(f, where, T, False, g, v)
    for what, a, b, c in zip(("bag", "weights", "gradient"), dot, plain, truth, strict=True):
        error, allowed = relative_error(a, c), 1.5 * relative_error(b, c) + 8 * torch.finfo(torch.float32).eps
        assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"


@HALF
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


# ---- packed buffers longer than their bags, and max_seqlen ----

REST_PLANS = {**PACKED_PLANS, **{f"dot {name}": lambda N, D, make=make: make(D) for name, make in DOT_PLANS.items()}}


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("name", REST_PLANS)
def test_rows_after_the_last_bag(name, detach):
    """A static buffer, longer than its bags: the rest, NaN here, has no effect, weight 0 and gradient 0."""
    dot = name.startswith("dot")
    f, where = bags("packed", torch.float16 if dot else torch.float64, D=33)
    longer = torch.cat([f, f.new_full((30, 33), torch.nan)])
    g, v = upstream(longer, where)
    plan = REST_PLANS[name](len(longer), 33)
    forward_plan = plan
    if detach and dot and plan.on_chip:
        plan = TritonPlan(dataclasses.replace(plan.on_chip, dot=False), plan.chunks)
    bag, w, sigma, softmax_stats = adjust_pool_launch.forward(longer, *where.values(), 3, True, plan=forward_plan)
    v_used = None if detach else v
    grad = adjust_pool_launch.backward(g, v_used, longer, *where.values(), sigma, softmax_stats, detach, plan=plan)
    expected = reference(f, where, 3, detach, g, v[:43])
    bound = 2e-3 if dot else 1e-13
    for a, b in zip((bag, w[:43], grad[:43]), expected, strict=True):
        assert relative_error(a, b) < bound
    assert (w[43:] == 0).all()
    assert (grad[43:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_max_seqlen(dtype):
    """With a bound that fits on chip there is a single launch per pass; a bag that exceeds it gives NaN."""
    f, where = bags("packed", dtype, D=33)
    g, v = upstream(f, where)
    arguments = (f, *where.values(), 3, True)
    (bag, w, sigma, softmax_stats), launches = adjust_pool_launch.forward_launches(*arguments, max_seqlen=17)
    assert len(launches) == 1
    for launch in launches:
        launch()
    backward = (g, v, f, *where.values(), sigma, softmax_stats, False)
    grad, launches = adjust_pool_launch.backward_launches(*backward, max_seqlen=17)
    assert len(launches) == 1
    for launch in launches:
        launch()
    for a, b, c in zip(
        (bag, w, grad), reference(f, where, 3, False, g, v, dtype), reference(f, where, 3, False, g, v), strict=True
    ):
        assert_as_accurate(a, b, c)

    plan = TritonPlan(OnChipConfig(1, 16, 64, 2, dot=dtype == torch.float16), None)
    bag_short, _, sigma, softmax_stats = adjust_pool_launch.forward(*arguments, plan=plan)
    grad_short = adjust_pool_launch.backward(*backward[:6], sigma, softmax_stats, False, plan=plan)
    assert torch.isnan(bag_short[4]).all() and torch.isnan(grad_short[4:21]).all()  # 17 rows
    short = torch.arange(9) != 4
    assert relative_error(bag_short[short], bag[short]) < (1e-3 if dtype == torch.float16 else 1e-6)
    assert torch.isfinite(grad_short[21:]).all() and torch.isfinite(grad_short[:4]).all()


@pytest.mark.parametrize("name", PADDED_PLANS)
def test_gradient_of_nearly_one_hot_weights(name):
    """See the test of this name in test_adjust_pool_numerics.py; with every kernel."""
    generator = torch.Generator().manual_seed(0)
    f = (torch.randn(2, 24, 512, generator=generator) * 0.7).to(DEVICE)
    where = dict.fromkeys(("mask", "lengths", "cu_seqlens"))
    g, v = upstream(f, where)
    v = v * 1e-3
    actual = run(f, where, 5, False, g, v, make_plan("full", name, f))
    truth, plain = reference(f, where, 5, False, g, v), reference(f, where, 5, False, g, v, torch.float32)
    assert_as_accurate(actual[2], plain[2], truth[2], factor=3)
