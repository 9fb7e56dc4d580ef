"""Triton kernels of adjust pooling with products on tensor cores, for 16-bit instances."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from amil_fast.kernels.adjust_pool_config import OnChipConfig, TritonPlan

from amil_fast.kernels import adjust_pool_launch
from tests.helpers import assert_as_accurate, relative_error
from tests.ops.triton_cases import (
    DEVICE,
    DOT_PLANS,
    bags,
    chunks,
    poisoned_memory,  # noqa: F401 (a fixture)
    reference,
    run,
    upstream,
)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        *((form, name) for form in ("full", "mask", "lengths") for name in ("one bag", "stream", "split")),
        *(("packed", name) for name in DOT_PLANS),
    ],
)
@pytest.mark.parametrize(
    ("T", "detach", "dtype"),
    [(1, False, torch.float16), (3, False, torch.float16), (3, False, torch.bfloat16), (2, True, torch.float16)],
)
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


@pytest.mark.parametrize("form", ["full", "mask", "lengths", "row stride 96"])
def test_dot_of_bags_that_fill_their_tile(form):
    """32 instances of 64 features: loads without a mask if no bag has padding; a length is exactly half the tile."""
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(3, 32, 64, generator=generator)
    where = dict.fromkeys(("mask", "lengths", "cu_seqlens"))
    real = torch.ones(3, 32, dtype=torch.bool)
    if form == "mask":
        where["mask"] = real = torch.rand(3, 32, generator=generator) < 0.6
    elif form == "lengths":
        where["lengths"] = torch.tensor([32, 0, 16])
        real = torch.arange(32) < where["lengths"][:, None]
    f = f.masked_fill(~real[..., None], torch.nan).half().to(DEVICE)
    where = {name: None if value is None else value.to(DEVICE) for name, value in where.items()}
    if form == "row stride 96":
        f = f.new_zeros(3, 32, 96)[..., :64].copy_(f)
    g, v = upstream(f, where)
    actual = run(f, where, 3, False, g, v, TritonPlan(OnChipConfig(1, 32, 64, 2, dot=True), None))
    plain, truth = (reference(f, where, 3, False, g, v, dtype) for dtype in (torch.float16, torch.float64))
    for what, a, b, c in zip(("bag", "weights", "gradient"), actual, plain, truth, strict=True):
        assert_as_accurate(a, b, c, what=what)
    assert not actual[1][~real].any()
    assert not actual[2][~real].any()


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
