"""Pooling layers: agreement of the four input forms, gradients, edge cases and errors."""

import math

import pytest
import torch

from amil_fast import adjust_pool
from amil_fast.nn import (
    POOLINGS,
    AdjustPool,
    AttentionPool,
    GatedAttentionPool,
    LogSumExpPool,
    MaxPool,
    MeanPool,
    make_pooling,
)
from tests.helpers import relative_error

SIZES = [3, 0, 1, 7, 5]
D = 6
WITH_WEIGHTS = ("adjust", "mean", "attention", "gated_attention")


def make(name):
    torch.manual_seed(7)
    return make_pooling(name, D, backend="reference").double()


def packed(dtype=torch.float64):
    torch.manual_seed(1)
    x = torch.randn(sum(SIZES), D, dtype=dtype)
    return x, torch.tensor([0, 3, 3, 4, 11, 16])


def padded(x, filler=math.nan):
    """``(B, 7, D)`` with ``filler`` as padding, and lengths."""
    out = torch.full((len(SIZES), max(SIZES), D), filler, dtype=x.dtype)
    for b, rows in enumerate(x.split(SIZES)):
        out[b, : len(rows)] = rows
    return out, torch.tensor(SIZES)


@pytest.mark.parametrize("name", POOLINGS)
def test_four_forms_agree_in_values_and_gradients(name):
    pool = make(name)
    x, cu_seqlens = packed()
    upstream = torch.randn(len(SIZES), D, dtype=torch.float64)
    grid, lengths = padded(x)
    mask = torch.arange(max(SIZES)) < lengths[:, None]
    shuffle = torch.tensor([4, 0, 6, 2, 5, 1, 3])  # the real instances anywhere, not only in front
    forms = {
        "packed": (x, {"cu_seqlens": cu_seqlens}, lambda g: g),
        "packed int32": (x, {"cu_seqlens": cu_seqlens.int()}, lambda g: g),
        "lengths": (grid, {"lengths": lengths}, lambda g: g[mask]),
        "mask": (grid, {"mask": mask}, lambda g: g[mask]),
        "mask 0/1": (grid, {"mask": mask.float()}, lambda g: g[mask]),
        "any mask": (grid[:, shuffle], {"mask": mask[:, shuffle]}, lambda g: g[:, shuffle.argsort()][mask]),
    }
    answers = {}
    for form, (instances, kwargs, unpad) in forms.items():
        instances = instances.clone().requires_grad_()
        bag = pool(instances, **kwargs)
        (grad,) = torch.autograd.grad(bag, instances, upstream)
        assert torch.isfinite(grad).all(), form
        if "mask" in kwargs or "lengths" in kwargs:
            real = kwargs["mask"].bool() if "mask" in kwargs else mask
            assert (grad[~real] == 0).all(), form
        answers[form] = (bag.detach(), unpad(grad))
    nested = torch.nested.nested_tensor(list(x.split(SIZES)), layout=torch.jagged, requires_grad=True)
    bag = pool(nested)
    (grad,) = torch.autograd.grad(bag, nested, upstream)
    answers["jagged"] = (bag.detach(), grad.values())
    bag0, grad0 = answers["packed"]
    assert (bag0[1] == 0).all(), "an empty bag pools to 0"
    for form, (bag, grad) in answers.items():
        assert relative_error(bag, bag0) < 1e-14, form
        assert relative_error(grad, grad0) < 1e-13, form


@pytest.mark.parametrize("name", POOLINGS)
def test_packed_rows_after_the_last_bag(name):
    """A buffer longer than its bags: the rest, NaN here, has no effect and gets zero weight and gradient."""
    pool = make(name)
    x, cu_seqlens = packed()
    upstream = torch.randn(len(SIZES), D, dtype=torch.float64)
    longer = torch.cat([x, x.new_full((3, D), math.nan)]).requires_grad_()
    bag = pool(longer, cu_seqlens=cu_seqlens)
    (grad,) = torch.autograd.grad(bag, longer, upstream)
    exact = x.requires_grad_()
    expected = pool(exact, cu_seqlens=cu_seqlens)
    assert relative_error(bag, expected) < 1e-14
    assert relative_error(grad[:16], torch.autograd.grad(expected, exact, upstream)[0]) < 1e-14
    assert (grad[16:] == 0).all()
    if name in WITH_WEIGHTS:
        weights = pool(longer, cu_seqlens=cu_seqlens, return_weights=True)[1]
        assert (weights[16:] == 0).all() and relative_error(
            weights[:16], pool(x, cu_seqlens=cu_seqlens, return_weights=True)[1]
        ) < 1e-14


@pytest.mark.parametrize("name", POOLINGS)
def test_gradients_numerically(name):
    pool = make(name)
    torch.manual_seed(1)
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pool(x, cu_seqlens=torch.tensor([0, 2, 2, 5])), x)
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pool(x, lengths=torch.tensor([2, 3])), x)


@pytest.mark.parametrize("name", POOLINGS)
def test_permutation_and_bag_independence(name):
    pool = make(name)
    x, cu_seqlens = packed()
    bag = pool(x, cu_seqlens=cu_seqlens)
    order = torch.cat([torch.arange(4), 4 + torch.randperm(7), torch.arange(11, 16)])
    assert relative_error(pool(x[order], cu_seqlens=cu_seqlens), bag) < 1e-14
    broken = x.clone()
    broken[5] = math.nan  # in bag 3
    bag_broken = pool(broken, cu_seqlens=cu_seqlens)
    others = torch.tensor([0, 1, 2, 4])
    assert torch.equal(bag_broken[others], bag[others])
    assert torch.isnan(bag_broken[3]).any()


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_weights(name):
    pool = make(name)
    x, cu_seqlens = packed()
    bag, weights = pool(x, cu_seqlens=cu_seqlens, return_weights=True)
    assert weights.shape == (16,)
    total = torch.zeros(5, dtype=torch.float64).index_add(0, torch.repeat_interleave(cu_seqlens.diff()), weights)
    assert torch.allclose(total, torch.tensor([1.0, 0, 1, 1, 1], dtype=torch.float64))
    grid, lengths = padded(x)
    pool.return_weights = True
    bag2, weights2 = pool(grid, lengths=lengths)
    mask = torch.arange(max(SIZES)) < lengths[:, None]
    assert (weights2[~mask] == 0).all()
    assert relative_error(weights2[mask], weights) < 1e-14
    assert relative_error(bag2, bag) < 1e-14
    assert isinstance(pool(grid, lengths=lengths, return_weights=False), torch.Tensor)


@pytest.mark.parametrize("name", [n for n in POOLINGS if n not in WITH_WEIGHTS])
def test_no_weights(name):
    x, cu_seqlens = packed()
    with pytest.raises(ValueError, match="return_weights"):
        make(name)(x, cu_seqlens=cu_seqlens, return_weights=True)


def test_hand_computed():
    x = torch.tensor([[1.0, 4.0], [3.0, 0.0], [5.0, 5.0]])
    cu_seqlens = torch.tensor([0, 2, 3])
    assert torch.equal(MeanPool()(x, cu_seqlens=cu_seqlens), torch.tensor([[2.0, 2.0], [5.0, 5.0]]))
    assert torch.equal(MaxPool()(x, cu_seqlens=cu_seqlens), torch.tensor([[3.0, 4.0], [5.0, 5.0]]))
    r = 2.0
    expected = [math.log((math.exp(r * a) + math.exp(r * b)) / 2) / r for a, b in ((1, 3), (4, 0))]
    got = LogSumExpPool(r)(x, cu_seqlens=cu_seqlens)
    assert torch.allclose(got, torch.tensor([expected, [5.0, 5.0]]))


def test_log_sum_exp_lies_between_mean_and_max_and_does_not_overflow():
    x, cu_seqlens = packed()
    mean, largest = MeanPool()(x, cu_seqlens=cu_seqlens), MaxPool()(x, cu_seqlens=cu_seqlens)
    assert torch.allclose(LogSumExpPool(1e-4)(x, cu_seqlens=cu_seqlens), mean, atol=1e-3)
    assert torch.allclose(LogSumExpPool(1e4)(x, cu_seqlens=cu_seqlens), largest, atol=1e-3)
    assert torch.isfinite(LogSumExpPool(1.0)(x.float() * 1e4, cu_seqlens=cu_seqlens)).all()
    with pytest.raises(ValueError, match="r: expected a positive number"):
        LogSumExpPool(0)


def test_max_shares_the_gradient_between_ties():
    x = torch.tensor([[2.0], [1.0], [2.0]], requires_grad=True)
    for kwargs, instances in (({"cu_seqlens": torch.tensor([0, 3])}, x), ({}, x[None])):
        (grad,) = torch.autograd.grad(MaxPool()(instances, **kwargs).sum(), x)
        assert torch.equal(grad, torch.tensor([[0.5], [0.0], [0.5]]))


def test_attention_is_the_published_formula():
    torch.manual_seed(0)
    x = torch.randn(4, D)
    for gated in (False, True):
        pool = (GatedAttentionPool if gated else AttentionPool)(D, hidden=9)
        inner = torch.tanh(x @ pool.v.weight.T + pool.v.bias)
        if gated:
            inner = inner * torch.sigmoid(x @ pool.u.weight.T + pool.u.bias)
        a = torch.softmax(inner @ pool.w.weight[0] + pool.w.bias, 0)
        bag, weights = pool(x[None], return_weights=True)
        assert torch.allclose(weights[0], a, atol=1e-6)
        assert torch.allclose(bag[0], a @ x, atol=1e-6)


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(name, dtype):
    torch.manual_seed(0)
    x = torch.randn(1, 3000, D).to(dtype)
    pool = make_pooling(name, D, backend="reference")
    reference = pool(x.float())
    bag = pool.to(dtype)(x)
    assert bag.dtype == dtype
    assert relative_error(bag, reference) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", POOLINGS)
def test_nothing_to_pool(name):
    pool = make(name)
    for instances, kwargs, bags in (
        (torch.zeros(0, 4, D), {}, 0),
        (torch.zeros(2, 0, D), {"lengths": torch.zeros(2, dtype=torch.long)}, 2),
        (torch.zeros(0, D), {"cu_seqlens": torch.zeros(3, dtype=torch.long)}, 2),
    ):
        assert torch.equal(pool(instances.double(), **kwargs), torch.zeros(bags, D, dtype=torch.float64))


def test_adjust_pool_layer_is_the_function():
    x, cu_seqlens = packed()
    pool = AdjustPool(num_iters=4, return_weights=True, detach_routing=True, backend="reference")
    got = pool(x, cu_seqlens=cu_seqlens)
    expected = adjust_pool(
        x, cu_seqlens=cu_seqlens, num_iters=4, return_weights=True, detach_routing=True, backend="reference"
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert "num_iters=4" in repr(pool)
    assert list(pool.parameters()) == []


def test_errors():
    with pytest.raises(ValueError, match="pooling: expected one of 'adjust', 'mean'"):
        make_pooling("median", D)
    with pytest.raises(TypeError, match="callable"):
        make_pooling(MeanPool(), D)
    with pytest.raises(ValueError, match="mask or lengths, got both"):
        MeanPool()(torch.zeros(1, 2, 3), torch.ones(1, 2), lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"lengths: expected values in 0\.\.2"):
        MeanPool()(torch.zeros(1, 2, 3), lengths=torch.tensor([3]))
    assert isinstance(make_pooling(lambda features: LogSumExpPool(features), 5), LogSumExpPool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_iters": -1}, ValueError, "num_iters: expected an int from 1 to 10000, got -1"),
        ({"num_iters": 0}, ValueError, "num_iters: expected an int from 1 to 10000, got 0"),
        ({"num_iters": 2.0}, TypeError, "num_iters: expected an int, got float"),
        ({"num_iters": True}, TypeError, "num_iters: expected an int, got bool"),
        ({"return_weights": "no"}, TypeError, "return_weights: expected a bool, got 'no'"),
        ({"detach_routing": None}, TypeError, "detach_routing: expected a bool, got None"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', 'reference', 'cpp', 'triton', got 'cuda'"),
    ],
)
def test_adjust_pool_is_validated_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        AdjustPool(**arguments)
