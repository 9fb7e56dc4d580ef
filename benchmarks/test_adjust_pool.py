"""adjust_pool against reference autograd, torch.compile of it, and T calls of scaled_dot_product_attention.

All rivals of a case are timed in turns in one process after their results are verified; ratios are medians over the
turns. Minimum bytes moved (one bag on chip or in a cache): forward, the instances once; backward, the instances once
and their gradient once. Baselines: ``x.amax()``, one pass over the input, and ``y.copy_(x)``, one read and one write.
``pytest benchmarks/test_adjust_pool.py --benchmark-only``
"""

import functools
import statistics

import pytest
import torch

import amil_fast
from benchmarks.rivals import NUM_ITERS, attention_pool, eager_pool
from benchmarks.timing import in_turns, ratio, timed

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
# Padded bags without padding, (bags, instances, features) and dtype; packed bags of very different sizes.
PADDED = {
    "(256, 64, 128)": ((256, 64, 128), torch.float32),
    "(32, 1024, 128)": ((32, 1024, 128), torch.float32),
    "(8, 4096, 128)": ((8, 4096, 128), torch.float32),
    "(2, 20000, 512)": ((2, 20000, 512), torch.float32),
    "(32, 1024, 128) bfloat16": ((32, 1024, 128), torch.bfloat16),
}
RAGGED = {"ragged 200-20000 x 256": ([200, 20000, 350, 1500, 700, 6000, 240, 3000, 900, 12000, 480, 260], 256)}
# One function is compiled for every case; beyond the default limit torch.compile falls back to eager execution.
torch._dynamo.config.recompile_limit = 256


def functions_of(cu_seqlens):
    """Rivals: name -> function of the instances."""
    reference = functools.partial(eager_pool, cu_seqlens=cu_seqlens)
    functions = {
        "amil_fast": lambda x: amil_fast.adjust_pool(x, cu_seqlens=cu_seqlens, num_iters=NUM_ITERS),
        "eager": reference,
        "compile": torch.compile(reference, dynamic=False),
    }
    return functions if cu_seqlens is not None else {**functions, "attention": attention_pool}


@functools.cache
def make_case(name, device):
    """``(x, upstream gradient, rivals)`` of one case."""
    generator = torch.Generator().manual_seed(0)
    if name in RAGGED:
        lengths, D = RAGGED[name]
        x = torch.randn(sum(lengths), D, generator=generator)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device)
        bags, dtype = len(lengths), torch.float32
    else:
        shape, dtype = PADDED[name]
        x, cu_seqlens, bags, D = torch.randn(shape, generator=generator), None, shape[0], shape[-1]
    upstream = torch.randn(bags, D, generator=generator)
    x, upstream = (x * 2 / D**0.5).to(device, dtype), upstream.to(device, dtype)
    return x, upstream, functions_of(cu_seqlens)


def passes_of(function, x, upstream):
    """name -> call: the forward pass without autograd, and forward + backward."""
    leaf = x.clone().requires_grad_()

    def forward():
        with torch.no_grad():
            return function(x)

    def both():
        return torch.autograd.grad(function(leaf), leaf, upstream)[0]

    return {"forward": forward, "forward+backward": both}


def saved_activation_bytes(function, x):
    """Bytes of the activations that autograd saves for the backward pass, without the input."""
    storages = {}
    leaf = x.clone().requires_grad_()

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(leaf)
    storages.pop(leaf.untyped_storage().data_ptr(), None)
    del output
    return sum(storages.values())


@functools.cache
def measured(name, device):
    """Verifies and times all rivals of one case.

    Returns the medians of the turns, pass -> rival or baseline -> seconds; rival -> bytes of saved activations; and the
    bytes of the instances.
    """
    x, upstream, functions = make_case(name, device)
    passes = {rival: passes_of(function, x, upstream) for rival, function in functions.items()}
    truth = functions["eager"](x.double())
    truth_grad = passes_of(functions["eager"], x.double(), upstream.double())["forward+backward"]()
    tolerance = 4 * torch.finfo(x.dtype).eps ** 0.5
    for rival in functions:
        for what, actual, expected in (
            ("bag", passes[rival]["forward"](), truth),
            ("gradient", passes[rival]["forward+backward"](), truth_grad),
        ):
            error = ((actual.double() - expected).norm() / expected.norm()).item()
            assert error < tolerance, f"{rival}, {what}: relative error {error:.1e}"
    y = torch.empty_like(x)
    baselines = {"amax": lambda: x.amax(), "copy": lambda: y.copy_(x)}
    turns = {
        which: in_turns({**{rival: passes[rival][which] for rival in functions}, **baselines}, device)
        for which in ("forward", "forward+backward")
    }
    return turns, {rival: saved_activation_bytes(function, x) for rival, function in functions.items()}, x.nbytes


RIVALS = ["amil_fast", "eager", "compile", "attention"]
CASES = [*PADDED, *RAGGED]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rival", RIVALS)
def test_adjust_pool(benchmark, name, which, rival, device):
    if rival == "attention" and name in RAGGED:
        pytest.skip("scaled_dot_product_attention has no packed form on the CPU")
    turns, saved, size = measured(name, device)
    turns = turns[which]
    x, upstream, functions = make_case(name, device)
    call = passes_of(functions[rival], x, upstream)[which]
    benchmark.group = f"adjust_pool {which} {name} {device}"
    benchmark.pedantic(lambda: timed(call, device), rounds=3, warmup_rounds=2)
    seconds = statistics.median(turns[rival])
    bytes_moved = size if which == "forward" else 3 * size
    copy_bandwidth = 2 * size / statistics.median(turns["copy"])
    benchmark.extra_info.update(
        operator="adjust_pool",
        which=which,
        case=name,
        device=device,
        rival=rival,
        median_ms=round(seconds * 1e3, 4),
        spread_ms=[round(min(turns[rival]) * 1e3, 4), round(max(turns[rival]) * 1e3, 4)],
        times_of_ours=round(ratio(turns, rival, "amil_fast"), 3),
        times_of_amax=round(ratio(turns, rival, "amax"), 3),
        bytes=bytes_moved,
        bytes_formula="forward: instances; forward+backward: instances twice, gradient once",
        gb_per_s=round(bytes_moved / seconds / 1e9, 2),
        share_of_copy_bandwidth=round(bytes_moved / seconds / copy_bandwidth, 3),
        saved_activation_bytes=saved[rival],
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", ["forward", "forward+backward"])
@pytest.mark.parametrize("rival", ["amil_fast", "softmax+bmm"])
def test_host_overhead(benchmark, which, rival, device):
    """Launch overhead: tiny bags (16, 8, 32), compared with one softmax and one bmm."""
    x = torch.randn(16, 8, 32, device=device)
    weights = torch.randn(16, 1, 8, device=device)
    function = {
        "amil_fast": lambda x: amil_fast.adjust_pool(x),
        "softmax+bmm": lambda x: torch.bmm(torch.softmax(weights, -1), x),
    }
    upstream = {"amil_fast": torch.randn(16, 32, device=device), "softmax+bmm": torch.randn(16, 1, 32, device=device)}
    calls = {}
    for name in function:
        call = passes_of(function[name], x, upstream[name])[which]
        calls[name] = functools.partial(_repeat, call)
    turns = in_turns(calls, device)
    benchmark.group = f"host overhead {which} {device}"
    benchmark.pedantic(calls[rival], rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(
        operator="adjust_pool",
        case="(16, 8, 32) tiny",
        which=which,
        device=device,
        rival=rival,
        median_us=round(statistics.median(turns[rival]) * 1e6 / REPEATS, 2),
        times_of_softmax_bmm=round(ratio(turns, rival, "softmax+bmm"), 2),
    )


REPEATS = 200


def _repeat(call):
    for _ in range(REPEATS):
        call()
