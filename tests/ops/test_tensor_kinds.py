"""Tensors whose values are not those in their memory, arguments changed after the checks, and misused operators."""

import numpy as np
import pytest
import torch

from amil_fast import adjust_pool, decode_heatmaps
from tests.ops.helpers import make_maps, random_bags


def negated(x):
    """A view with the negative bit set, whose memory holds ``-x``."""
    view = torch._neg_view(-x)
    assert view.is_neg() and torch.equal(view.resolve_neg(), x)
    return view


def imaginary(x):
    """The imaginary part of a conjugate, another view with the negative bit set."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("view", [negated, imaginary])
def test_negated_views(view):
    x = random_bags(3, 6, 5)
    torch.testing.assert_close(adjust_pool(view(x)), adjust_pool(x), rtol=1e-12, atol=0)
    leaf = x.clone().requires_grad_()
    bag, weights = adjust_pool(leaf, return_weights=True)
    upstream = [torch.randn_like(bag), torch.randn_like(weights)]
    (expected,) = torch.autograd.grad((bag, weights), leaf, upstream, retain_graph=True)
    (found,) = torch.autograd.grad((bag, weights), leaf, [view(u) for u in upstream])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    maps = make_maps("gaussian", (2, 3, 8, 6))
    transform = {"center": torch.rand(2, 2) * 100, "scale": torch.rand(2, 2) + 0.5}
    plain = decode_heatmaps(maps, flipped=maps, flip_pairs=[(0, 1)], **transform)
    shown = {name: view(value) for name, value in transform.items()}
    for a, b in zip(decode_heatmaps(view(maps), flipped=view(maps), flip_pairs=[(0, 1)], **shown), plain, strict=True):
        assert torch.equal(a, b)


def test_zero_tensors_without_memory():
    zeros = torch._efficientzerotensor((2, 3, 4))
    assert not adjust_pool(zeros).any()
    leaf = random_bags(2, 3, 4, dtype=torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad(adjust_pool(leaf), leaf, torch._efficientzerotensor((2, 4)))
    assert not grad.any()
    assert not decode_heatmaps(torch._efficientzerotensor((1, 2, 4, 4)))[1].any()


class Counting(torch.Tensor):
    """A subclass that counts the operators it takes part in."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("place", ["instances", "mask", "gradient"])
def test_subclasses_go_through_the_dispatcher(place):
    x, mask = random_bags(2, 4, 3), torch.tensor([[True] * 4, [True, False] * 2])
    expected = adjust_pool(x, mask)
    seen = []

    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    if place == "gradient":
        leaf = x.clone().requires_grad_()
        bag = adjust_pool(leaf, mask)
        upstream = torch.randn_like(bag)
        (plain,) = torch.autograd.grad(bag, leaf, upstream, retain_graph=True)
        (found,) = torch.autograd.grad(bag, leaf, upstream.as_subclass(Counting))
        assert torch.equal(found.as_subclass(torch.Tensor), plain)
        return
    before = Counting.calls
    arguments = [x.as_subclass(Counting), mask] if place == "instances" else [x, mask.as_subclass(Counting)]
    found = adjust_pool(*arguments)
    assert Counting.calls > before and torch.equal(found.as_subclass(torch.Tensor), expected)
    with Log():
        adjust_pool(x, mask)
    assert torch.ops.amil_fast.adjust_pool.default in seen


def test_sparse_and_quantized_tensors_are_rejected():
    x = random_bags(2, 4, 3, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"instances: expected a dense tensor, got layout torch\.sparse_csr"):
        adjust_pool(x[0].to_sparse_csr(), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(TypeError, match="instances: expected dtype"):
        adjust_pool(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8))
    leaf = x.clone().requires_grad_()
    bag = adjust_pool(leaf)
    upstream = torch.randn_like(bag)
    (expected,) = torch.autograd.grad(bag, leaf, upstream, retain_graph=True)
    (found,) = torch.autograd.grad(bag, leaf, upstream.to_sparse())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("form", ["lengths", "cu_seqlens", "mask"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sizes_changed_through_numpy_after_the_forward_pass(form, dtype):
    """The version counter of a tensor does not see writes through NumPy: the backward pass uses its own copy."""
    x = random_bags(3, 5, 4)
    x = x.flatten(0, 1) if form == "cu_seqlens" else x
    array = {
        "lengths": np.array([2, 5, 0]),
        "cu_seqlens": np.array([0, 2, 7, 15]),
        "mask": np.arange(15).reshape(3, 5) % 3 > 0,
    }[form]
    array = array if form == "mask" else array.astype(str(dtype).removeprefix("torch."))
    gradients = []
    for change in (False, True):
        values = array.copy()
        leaf = x.clone().requires_grad_()
        bag = adjust_pool(leaf, **{form: torch.from_numpy(values)})
        if change:
            values[:] = True if form == "mask" else 2**30
        gradients.append(torch.autograd.grad(bag.sin().sum(), leaf)[0])
    assert torch.equal(*gradients)


def test_instances_replaced_after_the_forward_pass():
    leaf = random_bags(3, 5, 4).requires_grad_()
    bag = adjust_pool(leaf)
    leaf.data = torch.zeros(1, 1, 4, dtype=leaf.dtype)
    with pytest.raises(RuntimeError, match=r"instances: expected shape \(3, 5, 4\)"):
        bag.sum().backward()


X = random_bags(2, 4, 3, dtype=torch.float32)
POOL, POOL_BACKWARD = torch.ops.amil_fast.adjust_pool, torch.ops.amil_fast.adjust_pool_backward
DECODE = torch.ops.amil_fast.decode_heatmaps
MAPS = make_maps("gaussian", (2, 3, 8, 6))


def saved(T=3):
    return torch.zeros(2, T, 3), torch.zeros(2, T, 2)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "num_iters: expected an int from 1 to 10000, got 0",
         lambda: POOL(X, None, None, None, 0, False, False, "cpp")),
        (ValueError, r"mask: expected shape \(2, 4\)",
         lambda: POOL(X, torch.ones(2, 3, dtype=torch.bool), None, None, 3, False, False, "cpp")),
        (TypeError, "mask: expected dtype torch.bool",
         lambda: POOL(X, torch.ones(2, 4, dtype=torch.int64), None, None, 3, False, False, "cpp")),
        (ValueError, r"lengths: expected values in 0..4, got lengths\[1\] = 9",
         lambda: POOL(X, None, torch.tensor([1, 9]), None, 3, False, False, "cpp")),
        (ValueError, "backend: expected one of 'cpp', 'triton', got 'auto'",
         lambda: POOL(X, None, None, None, 3, False, False, "auto")),
        (ValueError, r"sigma: expected shape \(2, 0, 3\)|num_iters",
         lambda: POOL_BACKWARD(X[:, 0], None, X, None, None, None, *saved(0), False, "cpp")),
        (ValueError, r"grad_bag: expected shape \(2, 3\)",
         lambda: POOL_BACKWARD(X[0, :1], None, X, None, None, None, *saved(), False, "cpp")),
        (ValueError, r"softmax_stats: expected shape \(2, 3, 2\)",
         lambda: POOL_BACKWARD(X[:, 0], None, X, None, None, None, saved()[0], saved(2)[1], False, "cpp")),
        (ValueError, r"lengths: expected values in 0..4",
         lambda: POOL_BACKWARD(X[:, 0], None, X, None, torch.tensor([0, 5]), None, *saved(), False, "cpp")),
        (ValueError, r"flipped: expected shape",
         lambda: DECODE(MAPS, MAPS[..., :-1], [0, 1, 2], False, None, None, None, "none", "hrnet", 11, "cpp")),
        (ValueError, r"swap: expected 3 joints in 0..2, got \[\]",
         lambda: DECODE(MAPS, MAPS, [], False, None, None, None, "none", "hrnet", 11, "cpp")),
        (ValueError, r"swap: expected 3 joints in 0..2, got \[0, 1, 99\]",
         lambda: DECODE(MAPS, MAPS, [0, 1, 99], False, None, None, None, "none", "hrnet", 11, "cpp")),
        (ValueError, "blur_kernel: expected an odd number from 1 to 255, got 9999999",
         lambda: DECODE(MAPS, None, [], False, None, None, None, "dark", "hrnet", 9999999, "cpp")),
    ],
)  # fmt: skip
def test_registered_operators_check_their_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("shape", [(1, 1, 1, 2**31 - 1), (1, 1, 2**31 - 1, 1), (1, 1, 2**15, 2**15 + 1)])
def test_maps_too_large_to_index(shape):
    maps = torch.zeros(1).expand(shape)
    with pytest.raises(ValueError, match=r"heatmaps: expected maps of 1 to 2\*\*30 pixels"):
        decode_heatmaps(maps)
