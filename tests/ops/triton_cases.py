"""Plans, bags and references for the tests of the Triton kernels of adjust pooling.

The kernels run on a CUDA device if available, else in the interpreter. The interpreter is slow, so sizes are small and
odd, and plans are passed explicitly, so that every strategy is taken at these sizes. Large sizes, streams and CUDA
graphs are covered by test_adjust_pool_gpu.py.
"""

import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from amil_fast.kernels.adjust_pool_config import ChunkConfig, OnChipConfig, TritonPlan, next_power_of_2

from amil_fast.kernels import adjust_pool_launch
from amil_fast.ops.adjust_pool_reference import adjust_pool_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_N = 4  # rows of a tile: a bag of 17 takes five tiles, the last one with a single row
GROUP = 2  # chunks merged by one program: 5 chunks take two levels


def on_chip(rows, D, bags=1):
    return OnChipConfig(bags, next_power_of_2(rows), next_power_of_2(D), 2)


def chunks(D, chunk_rows, split, min_rows=-1):
    return ChunkConfig(BLOCK_N, next_power_of_2(D), chunk_rows, min_rows, split, GROUP, 2, 2, 128)


def dot_chunks(D, chunk_rows, split, min_rows=-1):
    return ChunkConfig(16, next_power_of_2(D), chunk_rows, min_rows, split, GROUP, 2, 1, 255, dot=True)


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
# form -> name -> plan for bags of at most 17 rows, or 43 packed rows
DOT_PLANS = {
    "one bag": lambda D: TritonPlan(OnChipConfig(1, 32, next_power_of_2(D), 2, dot=True), None),
    "stream": lambda D: TritonPlan(None, dot_chunks(D, 17, split=False)),
    "split": lambda D: TritonPlan(None, dot_chunks(D, 16, split=True)),
    "mixed": lambda D: TritonPlan(
        OnChipConfig(1, 16, next_power_of_2(D), 2, dot=True), dot_chunks(D, 16, split=True, min_rows=16)
    ),
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


def make_plan(form, name, f):
    return (PACKED_PLANS if form == "packed" else PADDED_PLANS)[name](f.shape[-2], f.shape[-1])
