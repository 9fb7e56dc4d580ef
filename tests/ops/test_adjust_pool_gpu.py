"""adjust_pool on a CUDA device: sizes, streams, graphs and compilation, which the interpreter does not cover."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

from amil_fast import AdjustPool, adjust_pool
from amil_fast.kernels import adjust_pool_launch
from tests.helpers import assert_as_accurate, relative_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Padded bags (B, N, D), named after the strategy that they take on a large GPU.
SHAPES = {
    "tiny bags": (5000, 6, 16),
    "one element": (3, 1, 1),
    "on chip": (700, 64, 128),
    "on chip, odd": (300, 100, 96),
    "on chip, wide": (20, 7, 4096),
    "stream": (600, 500, 200),
    "split": (3, 20_001, 130),
    "split, long": (1, 100_000, 512),
    "split, wide": (2, 3001, 4096),
}
# Lengths of packed bags.
LENGTHS = {
    "short, few long": [64] * 500 + [0, 1, 5000] + [30] * 500 + [200_000],
    "1 to 200,000": [1, 0, 3, 200, 777, 20_000, 64, 0, 0, 1500, 200_000, 257, 256, 255],
    "all equal": [64] * 1000,
}

# Strategies (forward, backward) on a GPU with 100 to 150 multiprocessors, for elements of 4 bytes.
STRATEGIES = {
    "tiny bags": ("tiny", "tiny"),
    "one element": ("on chip", "on chip"),
    "on chip": ("on chip", "on chip"),
    "on chip, odd": ("on chip", "stream"),
    "on chip, wide": ("on chip", "stream"),
    "stream": ("stream", "stream"),
    "split": ("split", "split"),
    "split, long": ("split", "split"),
    "split, wide": ("split", "split"),
    "short, few long": ("mixed", "split"),
    "1 to 200,000": ("split", "split"),
    "all equal": ("mixed", "mixed"),
}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fills uninitialized memory with NaN, which exposes elements that a kernel does not write."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def padded(shape, dtype, how, seed=0):
    torch.manual_seed(seed)
    B, N, D = shape
    f = torch.randn(B, N, D, dtype=torch.float64).mul(1.5 / D**0.25).to(dtype)
    where = {}
    if how == "mask":
        where["mask"] = torch.rand(B, N) < 0.7
        f[~where["mask"]] = torch.nan
    elif how == "lengths":
        where["lengths"] = torch.randint(0, N + 1, (B,))
        f[torch.arange(N) >= where["lengths"][:, None]] = torch.nan
    return f, where


def packed(lengths, D, dtype, seed=0):
    torch.manual_seed(seed)
    f = torch.randn(sum(lengths), D, dtype=torch.float64).mul(1.5 / D**0.25).to(dtype)
    return f, {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)}


def both_passes(f, where, backend, g, v, **options):
    """``(bag, weights, gradient)``; all tensors on the device of ``f``."""
    f = f.detach().requires_grad_()
    bag, w = adjust_pool(f, **where, return_weights=True, backend=backend, **options)
    outputs, grads = [bag], [g]
    if w.requires_grad:
        outputs, grads = [*outputs, w], [*grads, v]
    (grad,) = torch.autograd.grad(outputs, f, grads)
    return bag.detach(), w.detach(), grad


def check(f, where, **options):
    """Compares Triton on the GPU with float64 on the CPU, relative to the error of the reference in the same dtype."""
    B = where["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in where else f.shape[0]
    accumulation = torch.float64 if f.dtype == torch.float64 else torch.float32
    g = torch.randn(B, f.shape[-1], dtype=torch.float64).to(f.dtype)
    v = torch.randn(f.shape[:-1], dtype=torch.float64).to(accumulation)
    truth = both_passes(f.double(), where, "reference", g.double(), v.double(), **options)
    plain = both_passes(f, where, "reference", g, v, **options)
    on_gpu = {k: x.cuda() for k, x in where.items()}
    actual = both_passes(f.cuda(), on_gpu, "triton", g.cuda(), v.cuda(), **options)
    for what, a, b, c in zip(("bag", "weights", "gradient"), actual, plain, truth, strict=True):
        assert_as_accurate(a.cpu(), b, c, factor=3, what=what)
    again = both_passes(f.cuda(), on_gpu, "triton", g.cuda(), v.cuda(), **options)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True)), "differs from run to run"


def strategy(plan):
    if plan.chunks is None:
        return "tiny" if plan.on_chip.bags > 1 else "on chip"
    if plan.on_chip is not None:
        return "mixed"
    return "split" if plan.chunks.split else "stream"


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_taken(name):
    """The cases of this file take the strategies listed in STRATEGIES."""
    if not 100 <= torch.cuda.get_device_properties(0).multi_processor_count <= 150:
        pytest.skip("the strategies are listed for a GPU with 100 to 150 multiprocessors")
    f, where = (
        padded(SHAPES[name], torch.float32, "full") if name in SHAPES else packed(LENGTHS[name], 64, torch.float32)
    )
    bags = adjust_pool_launch.KernelBags(f.cuda(), None, None, where["cu_seqlens"].cuda() if where else None)
    assert tuple(strategy(bags.plan(backward)) for backward in (False, True)) == STRATEGIES[name]


def test_reference_on_the_gpu():
    """backend="reference" on CUDA tensors, padded and packed, against float64 on the CPU."""
    for f, where in (padded((7, 50, 24), torch.float32, "mask"), packed([3, 0, 90, 1], 24, torch.float32)):
        B = where["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in where else f.shape[0]
        g, v = torch.randn(B, 24), torch.randn(f.shape[:-1])
        truth = both_passes(f.double(), where, "reference", g.double(), v.double())
        there = {k: x.cuda() for k, x in where.items()}
        actual = both_passes(f.cuda(), there, "reference", g.cuda(), v.cuda())
        for a, b in zip(actual, truth, strict=True):
            assert relative_error(a.cpu(), b) < 1e-5


@pytest.mark.parametrize("how", ["full", "mask", "lengths"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_padded(shape, dtype, how):
    check(*padded(shape, dtype, how))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 130])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed(lengths, D, dtype):
    check(*packed(lengths, D, dtype))


@pytest.mark.parametrize(("num_iters", "detach_routing"), [(1, False), (2, False), (7, False), (3, True)])
@pytest.mark.parametrize("shape", ["on chip", "stream", "split"])
def test_iterations(shape, num_iters, detach_routing):
    f, where = padded(SHAPES[shape], torch.float32, "mask")
    check(f, where, num_iters=num_iters, detach_routing=detach_routing)


def test_offsets_beyond_32_bits():
    """2.3e9 elements in bfloat16: the last bag equals the same bag pooled alone."""
    B, N, D = 1100, 1000, 2100
    free, _ = torch.cuda.mem_get_info()
    if free < 16e9:
        pytest.skip(f"needs 16 GB of free GPU memory, has {free / 1e9:.0f} GB")
    f = torch.empty(B, N, D, dtype=torch.bfloat16, device="cuda").normal_()
    assert f.numel() > 2**31
    g = torch.randn(B, D, dtype=f.dtype, device="cuda")

    def passes(f, g, **where):
        f = f.detach().requires_grad_()
        bag = adjust_pool(f, backend="triton", **where)
        return bag.detach(), torch.autograd.grad(bag, f, g)[0]

    bag, grad = passes(f, g)
    alone = passes(f[-1:].clone(), g[-1:])
    assert relative_error(bag[-1:], alone[0]) < 1e-2
    assert relative_error(grad[-1:], alone[1]) < 1e-2
    cu_seqlens = torch.arange(0, B * N + 1, N, device="cuda")
    bag_packed, grad_packed = passes(f.view(-1, D), g, cu_seqlens=cu_seqlens)
    assert relative_error(bag_packed, bag) < 1e-2
    assert relative_error(grad_packed[-N:], alone[1][0]) < 1e-2


def test_one_bag_beyond_32_bits():
    """One bag of 2.3e9 elements: 9 copies of a smaller bag pool to the same vector, with 1/9 of its gradient."""
    rows, D, times = 250_000, 1024, 9
    free, _ = torch.cuda.mem_get_info()
    if free < 16e9:
        pytest.skip(f"needs 16 GB of free GPU memory, has {free / 1e9:.0f} GB")
    small = torch.randn(1, rows, D, dtype=torch.bfloat16, device="cuda").mul_(2 / D**0.5)
    g = torch.randn(1, D, dtype=torch.bfloat16, device="cuda")
    f = small.repeat(1, times, 1)
    assert f.numel() > 2**31
    (bag, w, grad), (bag_small, w_small, grad_small) = (
        both_passes(x, {}, "triton", g, torch.zeros(x.shape[:-1], device="cuda")) for x in (f, small)
    )
    assert relative_error(bag, bag_small) < 1e-2
    for k in (0, times - 1):
        part = slice(k * rows, (k + 1) * rows)
        assert relative_error(w[:, part] * times, w_small) < 1e-4
        assert relative_error(grad[:, part].float() * times, grad_small) < 2e-2


@pytest.mark.parametrize("name", ["split", "1 to 200,000"])
def test_partial_results_under_contention(name):
    """100 runs concurrent with work on another stream are bit-identical: the exchange of partial results through global
    memory does not depend on the order in which the programs of a split bag run.
    """
    f, where = (
        padded(SHAPES[name], torch.float32, "full") if name in SHAPES else packed(LENGTHS[name], 64, torch.float32)
    )
    f, where = f.cuda(), {k: x.cuda() for k, x in where.items()}
    B = where["cu_seqlens"].shape[0] - 1 if where else f.shape[0]
    g, v = torch.randn(B, f.shape[-1], device="cuda"), torch.randn(f.shape[:-1], device="cuda")
    expected = both_passes(f, where, "triton", g, v)
    noise = torch.cuda.Stream()
    a = torch.randn(2048, 2048, device="cuda")
    noise.wait_stream(torch.cuda.current_stream())
    for _ in range(100):
        with torch.cuda.stream(noise):
            torch.mm(a, a)
        actual = both_passes(f, where, "triton", g, v)
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    torch.cuda.synchronize()


def test_runs_on_the_current_stream():
    """Kernels run on the current stream, after pending work; on any other stream the instances would still be zero."""
    f, _ = padded(SHAPES["split"], torch.float32, "full")
    f = f.cuda()
    g, v = torch.randn(f.shape[0], f.shape[-1], device="cuda"), torch.randn(f.shape[:-1], device="cuda")
    expected = both_passes(f, {}, "triton", g, v)
    late = torch.zeros_like(f)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(f)
        actual = both_passes(late, {}, "triton", g, v)
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


CAPTURED = [
    (lambda: padded(SHAPES["on chip"], torch.float32, "mask")),
    (lambda: padded(SHAPES["split"], torch.float32, "lengths")),
    (lambda: packed(LENGTHS["short, few long"], 64, torch.float32)),
]


@pytest.mark.parametrize("make", CAPTURED, ids=["on chip", "split", "packed"])
def test_no_synchronization_graph_and_stream(make):
    """No host synchronization; bit-identical results on a side stream and in a CUDA graph."""
    f, where = make()
    f, where = f.cuda(), {k: x.cuda() for k, x in where.items()}
    B = where["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in where else f.shape[0]
    g, v = torch.randn(B, f.shape[-1], device="cuda"), torch.randn(f.shape[:-1], device="cuda")

    def passes():
        return both_passes(f, where, "triton", g, v)

    expected = passes()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        passes()
    finally:
        torch.cuda.set_sync_debug_mode("default")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = passes()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(on_stream, expected, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = passes()
    for _ in range(3):
        for out in captured:
            out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    f.mul_(0.5)  # a replay reads the current content
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, passes(), strict=True))
    assert not torch.equal(captured[0], expected[0])


def test_autocast():
    """The operator computes in the dtype of its input under autocast too."""
    f, where = padded(SHAPES["on chip"], torch.float32, "mask")
    f, where = f.cuda(), {k: x.cuda() for k, x in where.items()}
    expected = adjust_pool(f, **where, backend="triton")
    with torch.autocast("cuda", torch.bfloat16):
        actual = adjust_pool(f, **where, backend="triton")
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch.manual_seed(0)
    f = torch.randn(40, 300, 64, device="cuda", requires_grad=True)
    mask = torch.rand(40, 300, device="cuda") < 0.5
    g = torch.randn(40, 64, device="cuda")
    compiled = torch.compile(lambda f, mask: adjust_pool(f.sin(), mask).cos(), fullgraph=True, dynamic=dynamic)
    expected = torch.autograd.grad(adjust_pool(f.sin(), mask).cos(), f, g)[0]
    actual = torch.autograd.grad(compiled(f, mask), f, g)[0]
    assert relative_error(actual, expected) < 1e-5


def test_compile_packed():
    torch.manual_seed(0)
    f = torch.randn(500, 64, device="cuda", requires_grad=True)
    cu_seqlens = torch.tensor([0, 3, 3, 400, 500], device="cuda")
    g = torch.randn(4, 64, device="cuda")

    def function(f, cu_seqlens):
        return adjust_pool(f.sin(), cu_seqlens=cu_seqlens).cos()

    compiled = torch.compile(function, fullgraph=True)
    expected = torch.autograd.grad(function(f, cu_seqlens), f, g)[0]
    actual = torch.autograd.grad(compiled(f, cu_seqlens), f, g)[0]
    assert relative_error(actual, expected) < 1e-5


def test_opcheck():
    """Schema, fake and autograd registration on CUDA tensors."""
    f = torch.randn(3, 40, 16, device="cuda", requires_grad=True)
    mask = torch.rand(3, 40, device="cuda") < 0.5
    operator = torch.ops.amil_fast.adjust_pool.default
    torch.library.opcheck(operator, (f, mask, None, None, 3, True, False, "triton"))


def test_distributed_data_parallel(tmp_path):
    """One rank: DistributedDataParallel leaves the gradients unchanged."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), AdjustPool(), torch.nn.Linear(32, 2)).cuda()
    x = torch.randn(4, 50, 16, device="cuda")
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    backend = "nccl" if torch.distributed.is_nccl_available() and x.is_cuda else "gloo"
    store = tmp_path / "store"
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        wrapped(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for p, e in zip(model.parameters(), expected, strict=True):
        assert relative_error(p.grad, e) < 1e-5


def test_auto_is_triton():
    f = torch.randn(4, 5, 8, device="cuda")
    assert torch.equal(adjust_pool(f), adjust_pool(f, backend="triton"))
