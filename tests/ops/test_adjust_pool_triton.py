"""Triton kernels of adjust pooling against the reference: values, gradients, dtypes, strides."""

import pytest
import torch

pytest.importorskip("triton")

from amil_fast.kernels.adjust_pool_config import TritonPlan

from amil_fast import adjust_pool
from amil_fast.kernels import adjust_pool_launch
from tests.helpers import assert_as_accurate, relative_error
from tests.ops.triton_cases import (
    DEVICE,
    PACKED_PLANS,
    PADDED_PLANS,
    bags,
    make_plan,
    on_chip,
    poisoned_memory,  # noqa: F401 (a fixture)
    reference,
    run,
    upstream,
)

ALL_PLANS = [
    *((form, name) for form in ("full", "mask", "lengths") for name in PADDED_PLANS),
    *(("packed", name) for name in PACKED_PLANS),
]


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


@pytest.mark.parametrize(
    ("form", "name", "dtype"),
    [
        ("mask", "tiny bags", torch.float32),
        ("mask", "tiny bags", torch.float16),
        ("lengths", "split", torch.bfloat16),
        ("full", "stream", torch.float32),
        ("packed", "mixed", torch.float16),
        ("packed", "mixed", torch.bfloat16),
    ],
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


@pytest.mark.parametrize(
    ("name", "D"),
    [("one bag", 1), ("one bag", 8), ("one bag", 130), ("split", 1), ("split", 2), ("split", 16), ("split", 130)],
)
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
    elif how == "odd bag stride":
        rows = f.new_zeros(f.shape[0], 24 * f.shape[1] + 1)[:, :-1]
        other = rows.unflatten(1, (f.shape[1], 24))[..., : f.shape[2]]
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
        ("full", "one bag", "odd bag stride"),
        ("full", "split", "odd bag stride"),
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
    other = strided(f, how)
    assert other.stride() != f.stride() or other.data_ptr() % 16
    actual = run(other, where, 3, False, g.expand(2, *g.shape)[1], v, plan)
    for a, b in zip(actual, reference(f, where, 3, False, g, v), strict=True):
        assert relative_error(a, b) < 1e-13


def test_expanded_instances():
    """One bag expanded over the batch: stride 0."""
    f = torch.randn(1, 5, 7, dtype=torch.float64, device=DEVICE).expand(3, 5, 7)
    where = dict.fromkeys(("mask", "lengths", "cu_seqlens"))
    g, v = upstream(f, where)
    actual = run(f, where, 3, False, g, v, TritonPlan(on_chip(5, 7), None))
    for a, b in zip(actual, reference(f.contiguous(), where, 3, False, g, v), strict=True):
        assert relative_error(a, b) < 1e-13


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


def test_public_operator():
    """Public function: registration, autograd and dtypes."""
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
