"""adjust_pool: hand-computed bags, and properties of the reference and the C++ backend."""

import math

import pytest
import torch

from amil_fast import adjust_pool
from tests.ops.helpers import pool_and_grad, random_bags

# ---- the reference ----


def test_reference_one_iteration_hand_computed():
    """T = 1 is the squashed mean: the mean (3, 4) has norm 5, the bag vector 25/26; an empty bag gives 0."""
    x = torch.tensor([[[0.0, 0.0], [6.0, 8.0]], [[9.0, 9.0], [9.0, 9.0]]])
    bag, weights = adjust_pool(x, lengths=torch.tensor([2, 0]), num_iters=1, return_weights=True, backend="reference")
    torch.testing.assert_close(bag, torch.tensor([[3 / 5 * 25 / 26, 4 / 5 * 25 / 26], [0.0, 0.0]]))
    assert weights.tolist() == [[0.5, 0.5], [0.0, 0.0]]


def test_reference_two_iterations_hand_computed():
    """One feature, instances 0 and 2: sigma^1 = 1, s^1 = 1/2, logits (0, 1), softmax weights (1, e) / (1 + e)."""
    x = torch.tensor([[[0.0], [2.0]]], dtype=torch.float64)
    bag, weights = adjust_pool(x, num_iters=2, return_weights=True, backend="reference")
    w = math.e / (1 + math.e)
    sigma = 2 * w
    torch.testing.assert_close(weights, torch.tensor([[1 - w, w]], dtype=torch.float64))
    assert bag.item() == pytest.approx(sigma**2 / (1 + sigma**2))


def test_reference_norm_is_independent_of_padding():
    """Padding a bag of 8 instances to 16 or 64 does not change the norm of the bag vector."""
    x = random_bags(1, 8, 12)
    norm = adjust_pool(x, backend="reference").norm()
    for padded in (16, 64):
        x_padded = torch.cat([x, torch.zeros(1, padded - 8, 12, dtype=x.dtype)], 1)
        padded_norm = adjust_pool(x_padded, lengths=torch.tensor([8]), backend="reference").norm()
        assert padded_norm.item() == pytest.approx(norm.item(), rel=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("detach_routing", [False, True])
def test_gradcheck(backend, detach_routing):
    x = random_bags(3, 5, 4).requires_grad_()
    mask = torch.tensor([[1, 0, 1, 1, 0], [0] * 5, [1] * 5])
    if detach_routing:  # finite differences include the routing: compare with autograd through constant weights
        w = adjust_pool(x, mask, return_weights=True, backend=backend)[1].detach()
        expected = torch.autograd.grad(_squash(torch.einsum("bn,bnd->bd", w, x)).sin().sum(), x)[0]
        got = torch.autograd.grad(adjust_pool(x, mask, detach_routing=True, backend=backend).sin().sum(), x)[0]
        torch.testing.assert_close(got, expected)
    else:
        function = lambda x: adjust_pool(x, mask, return_weights=True, backend=backend)  # noqa: E731
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def _squash(sigma):
    n = sigma.norm(dim=-1, keepdim=True)
    return sigma * torch.where(n > 0, n / (1 + n * n), 0)


# ---- properties, on both backends ----

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp"])


@BACKENDS
def test_permutation_equivariance(backend):
    x = random_bags(1, 37, 20)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(3))
    bag, weights = adjust_pool(x, return_weights=True, backend=backend)
    bag2, weights2 = adjust_pool(x[:, order], return_weights=True, backend=backend)
    torch.testing.assert_close(bag2, bag)
    torch.testing.assert_close(weights2, weights[:, order])


@BACKENDS
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_masked_values_have_no_effect(backend, garbage):
    x = random_bags(4, 50, 24, dtype=torch.float32)
    mask = torch.rand(4, 50, generator=torch.Generator().manual_seed(4)) < 0.5
    mask[2] = False
    spoiled = torch.where(mask[:, :, None], x, garbage)
    clean = pool_and_grad(torch.where(mask[:, :, None], x, 0.0), mask=mask, backend=backend)
    dirty = pool_and_grad(spoiled, mask=mask, backend=backend)
    for c, d in zip(clean, dirty, strict=True):
        assert torch.equal(c, d)
    _, weights, grad = dirty
    assert (weights[~mask] == 0).all() and (grad[~mask] == 0).all()
    assert (weights[mask] > 0).all()
    torch.testing.assert_close(weights.sum(1), mask.any(1).float())


@BACKENDS
def test_bags_are_independent(backend):
    x = random_bags(3, 30, 10)
    alone = pool_and_grad(x[1:2], backend=backend)
    spoiled = x.clone()
    spoiled[0, 3] = math.nan
    spoiled[2, 29] = math.inf
    bag, weights = adjust_pool(spoiled, return_weights=True, backend=backend)
    torch.testing.assert_close(bag[1:2], alone[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(weights[1:2], alone[1], rtol=1e-12, atol=0)
    assert torch.isnan(bag[0]).any(), "expected NaN instances to propagate"


@BACKENDS
def test_mask_lengths_packed_and_nested_forms_agree(backend):
    x = random_bags(4, 21, 18)
    lengths = torch.tensor([21, 0, 1, 13])
    mask = torch.arange(21) < lengths[:, None]
    packed = x[mask]
    cu_seqlens = torch.tensor([0, 21, 21, 22, 35])
    nested = torch.nested.nested_tensor_from_jagged(packed, cu_seqlens)
    expected, expected_weights = adjust_pool(x, mask, return_weights=True, backend=backend)
    for given in ((x, None, {"lengths": lengths}), (x, mask.float(), {}), (x, mask.to(torch.uint8) * 7, {})):
        bag, weights = adjust_pool(given[0], given[1], return_weights=True, backend=backend, **given[2])
        torch.testing.assert_close(bag, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-12, atol=0)
    for instances, kwargs in ((packed, {"cu_seqlens": cu_seqlens}), (nested, {})):
        bag, weights = adjust_pool(instances, return_weights=True, backend=backend, **kwargs)
        torch.testing.assert_close(bag, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(weights, expected_weights[mask], rtol=1e-12, atol=0)


@BACKENDS
@pytest.mark.parametrize("detach_routing", [False, True])
def test_packed_rows_after_the_last_bag(backend, detach_routing):
    """A buffer longer than its bags: the rest has no effect, weight 0 and gradient 0."""
    x = random_bags(1, 41, 18)[0]
    x[35:] = math.nan
    generator = torch.Generator().manual_seed(8)
    g, v = (torch.randn(shape, generator=generator, dtype=x.dtype) for shape in ((5, 18), (41,)))

    def pooled(rows):
        leaf = x[:rows].clone().requires_grad_()
        bag, weights = adjust_pool(
            leaf, cu_seqlens=torch.tensor([0, 21, 21, 22, 35, 35]), return_weights=True, backend=backend,
            detach_routing=detach_routing,
        )  # fmt: skip
        pairs = ((bag, g), (weights, v[:rows])) if weights.requires_grad else ((bag, g),)
        outputs, grads = zip(*pairs, strict=True)
        return bag.detach(), weights.detach(), torch.autograd.grad(outputs, leaf, grads)[0]

    (bag, weights, grad), expected = pooled(41), pooled(35)
    for a, e in zip((bag, weights[:35], grad[:35]), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-15)
    assert weights.shape == (41,) and (weights[35:] == 0).all() and (grad[35:] == 0).all()


@BACKENDS
def test_max_seqlen_is_checked_and_changes_nothing(backend):
    x, cu_seqlens = random_bags(1, 12, 6)[0], torch.tensor([0, 5, 5, 12])
    options = {"cu_seqlens": cu_seqlens, "backend": backend}
    assert torch.equal(adjust_pool(x, max_seqlen=7, **options), adjust_pool(x, **options))
    with pytest.raises(ValueError, match="max_seqlen: expected at least 7, the length of bag 2, got 6"):
        adjust_pool(x, max_seqlen=6, **options)


@BACKENDS
def test_nested_gradient(backend):
    x, cu_seqlens = random_bags(1, 12, 6)[0], torch.tensor([0, 5, 5, 12])
    leaf = torch.nested.nested_tensor_from_jagged(x, cu_seqlens).requires_grad_()
    adjust_pool(leaf, backend=backend).sin().sum().backward()
    rows = x.clone().requires_grad_()
    adjust_pool(rows, cu_seqlens=cu_seqlens, backend=backend).sin().sum().backward()
    torch.testing.assert_close(leaf.grad.values(), rows.grad)


@BACKENDS
def test_strides(backend):
    """Transposed, sliced, strided and expanded inputs give the results of contiguous inputs."""
    x = random_bags(3, 20, 16)
    wide = random_bags(3, 20, 40)
    wide[:, :, 4:20] = x
    long = random_bags(3, 60, 16)
    long[:, ::3] = x
    views = {
        "features not innermost": x.transpose(1, 2).contiguous().transpose(1, 2),
        "bags not outermost": x.transpose(0, 1).contiguous().transpose(0, 1),
        "a slice of features": wide[:, :, 4:20],
        "every third row": long[:, ::3],
    }
    expected = pool_and_grad(x, backend=backend)
    for name, view in views.items():
        assert not view.is_contiguous() and torch.equal(view, x)
        leaf = view.detach().requires_grad_()
        bag, weights = adjust_pool(leaf, return_weights=True, backend=backend)
        for a, e in zip((bag, weights), expected, strict=False):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=0, msg=name)
        upstream = torch.randn(16, 3, dtype=x.dtype).T  # not contiguous either
        (grad,) = torch.autograd.grad(bag, leaf, upstream)
        plain = x.clone().requires_grad_()
        (grad2,) = torch.autograd.grad(adjust_pool(plain, backend=backend), plain, upstream.contiguous())
        torch.testing.assert_close(grad, grad2, rtol=1e-12, atol=0, msg=name)
    one = random_bags(1, 20, 16)
    torch.testing.assert_close(
        adjust_pool(one.expand(4, -1, -1), backend=backend)[3:], adjust_pool(one, backend=backend)
    )


@BACKENDS
@pytest.mark.parametrize("form", ["mask", "lengths", "cu_seqlens"])
def test_strides_of_bag_sizes_and_upstream_gradients(backend, form):
    """Mask, lengths, offsets and the gradients of both outputs may have any strides."""
    x = random_bags(4, 6, 5)
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    where = {
        "mask": mask.T,
        "lengths": torch.tensor([6, 99, 0, 99, 4, 99, 1, 99])[::2],
        "cu_seqlens": torch.tensor([0, 99, 7, 99, 7, 99, 20, 99, 24, 99])[::2],
    }[form]
    assert not where.is_contiguous()
    x = x.flatten(0, 1) if form == "cu_seqlens" else x
    results = []
    for sizes, spread in ((where, 2), (where.contiguous(), 1)):
        leaf = x.clone().requires_grad_()
        outputs = adjust_pool(leaf, return_weights=True, backend=backend, **{form: sizes})
        generator = torch.Generator().manual_seed(2)
        upstream = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
        upstream = [u.repeat_interleave(spread, -1)[..., ::spread] for u in upstream]
        assert all(u.is_contiguous() == (spread == 1) for u in upstream)
        results.append([*outputs, *torch.autograd.grad(outputs, leaf, upstream)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@BACKENDS
def test_every_nonzero_mask_value_is_an_instance(backend):
    x = random_bags(2, 4, 3)
    expected = adjust_pool(x, torch.tensor([[True, True, False, True], [False, True, True, False]]), backend=backend)
    for mask in (
        torch.tensor([[1.0, -1.0, 0.0, 0.5], [-0.0, -3.0, 1e-30, 0.0]]),
        torch.tensor([[1, -1, 0, 7], [0, -128, 127, 0]], dtype=torch.int8),
        torch.tensor([[1.0, -1.0, 0.0, torch.inf], [0.0, torch.nan, 2.0, 0.0]], dtype=torch.float16),
    ):
        assert torch.equal(adjust_pool(x, mask, backend=backend), expected), mask.dtype


@BACKENDS
def test_empty_inputs(backend):
    for shape in ((0, 5, 3), (2, 0, 3), (0, 0, 3)):
        x = torch.zeros(shape, requires_grad=True)
        bag, weights = adjust_pool(x, return_weights=True, backend=backend)
        assert bag.shape == (shape[0], 3) and (bag == 0).all() and weights.shape == shape[:2]
        bag.sum().backward()
        assert x.grad.shape == shape
    bag = adjust_pool(torch.zeros(0, 3), cu_seqlens=torch.tensor([0, 0, 0]), backend=backend)
    assert bag.tolist() == [[0, 0, 0]] * 2
    assert adjust_pool(torch.zeros(0, 3), cu_seqlens=torch.tensor([0]), backend=backend).shape == (0, 3)


@BACKENDS
def test_zero_instances_have_zero_gradient(backend):
    """The gradient of the squash at 0 is 0, not NaN."""
    x = torch.zeros(1, 4, 5, requires_grad=True)
    adjust_pool(x, backend=backend).sum().backward()
    assert (x.grad == 0).all()


@BACKENDS
def test_large_logits_do_not_overflow(backend):
    x = random_bags(2, 30, 8, dtype=torch.float32) * 200
    for value in pool_and_grad(x, backend=backend):
        assert torch.isfinite(value).all()


@BACKENDS
@pytest.mark.parametrize("num_iters", [1, 4])
def test_gradient_of_weights_only(backend, num_iters):
    """For one iteration the weights are the constant 1/m; for more they depend on the instances."""
    x = random_bags(2, 6, 5).requires_grad_()
    _, weights = adjust_pool(x, num_iters=num_iters, return_weights=True, backend=backend)
    if num_iters == 1:
        assert not weights.requires_grad
        return
    upstream = torch.randn(2, 6, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    (grad,) = torch.autograd.grad(weights, x, upstream)
    y = x.detach().clone().requires_grad_()
    _, weights = adjust_pool(y, num_iters=num_iters, return_weights=True, backend="reference")
    torch.testing.assert_close(grad, torch.autograd.grad(weights, y, upstream)[0])


@BACKENDS
def test_detached_weights_are_constants(backend):
    x = random_bags(2, 6, 5).requires_grad_()
    bag, weights = adjust_pool(x, return_weights=True, detach_routing=True, backend=backend)
    assert bag.requires_grad and not weights.requires_grad
