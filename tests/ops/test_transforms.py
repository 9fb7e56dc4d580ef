"""The operators under forward-mode AD and torch.func transforms."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from amil_fast import adjust_pool, decode_heatmaps
from tests.ops.helpers import make_maps, random_bags

BACKENDS = pytest.mark.parametrize("backend", ["cpp", "triton"])
FORMS = pytest.mark.parametrize("form", ["dense", "mask", "lengths", "packed", "rows after the last bag"])


def bags(form):
    """Instances and the arguments that describe the bags; padding holds NaN."""
    x = random_bags(3, 5, 4)
    if form == "mask":
        mask = torch.tensor([[1, 0, 1, 1, 0], [0] * 5, [1] * 5]) != 0
        return torch.where(mask[..., None], x, torch.nan), {"mask": mask}
    if form == "lengths":
        x[0, 2:] = torch.nan
        return x, {"lengths": torch.tensor([2, 5, 5])}
    if form == "packed":
        return x.flatten(0, 1), {"cu_seqlens": torch.tensor([0, 4, 4, 15])}
    if form == "rows after the last bag":
        x = x.flatten(0, 1)
        x[11:] = torch.nan
        return x, {"cu_seqlens": torch.tensor([0, 4, 11])}
    return x, {}


@FORMS
@BACKENDS
@pytest.mark.parametrize(("num_iters", "detach_routing"), [(1, False), (3, False), (3, True)])
def test_forward_mode_is_the_transpose_of_reverse_mode(form, backend, num_iters, detach_routing):
    """<u, J v> = <J' u, v> for random u and v; a dropped tangent gives 0."""
    x, where = bags(form)
    settings = {"num_iters": num_iters, "detach_routing": detach_routing, "return_weights": True, "backend": backend}

    def pool(x):
        return adjust_pool(x, **where, **settings)

    generator = torch.Generator().manual_seed(1)
    v = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    outputs, tangents = jvp(pool, (x,), (v,))
    u = [torch.randn(o.shape, generator=generator, dtype=x.dtype) for o in outputs]
    (gradient,) = vjp(pool, x)[1](tuple(u))
    forward = sum((a * b).sum() for a, b in zip(u, tangents, strict=True))
    torch.testing.assert_close(forward, (gradient * v).sum(), rtol=1e-10, atol=1e-12)
    assert abs(forward) > 1e-3
    for transformed, plain in zip(outputs, pool(x), strict=True):
        torch.testing.assert_close(transformed, plain, rtol=1e-12, atol=0)
    with forward_ad.dual_level():
        duals = [forward_ad.unpack_dual(out) for out in pool(forward_ad.make_dual(x, v))]
    for dual, tangent in zip(duals, tangents, strict=True):
        expected = torch.zeros_like(dual.primal) if dual.tangent is None else dual.tangent
        torch.testing.assert_close(expected, tangent)


@BACKENDS
def test_derivatives_agree_with_the_reference(backend):
    x, where = bags("mask")

    def bag(x, backend):
        return adjust_pool(x, **where, backend=backend)

    def scalar(x, backend):
        return bag(x, backend).sin().sum()

    for transform, function in ((grad, scalar), (hessian, scalar), (jacrev, bag), (jacfwd, bag)):
        found, expected = (transform(function)(x, name) for name in (backend, "reference"))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@BACKENDS
@pytest.mark.parametrize("form", ["dense", "mask", "lengths", "packed"])
def test_vmap(form, backend):
    """Over instances and, if there are any, over the arguments that describe the bags."""
    _, where = bags(form)
    x, _ = bags("packed" if form == "packed" else "dense")
    xs = torch.stack([x, 2 * x, x.flip(0)])

    def pool(x, where):
        return adjust_pool(x, **where, backend=backend, return_weights=True)

    found = vmap(pool, in_dims=(0, None))(xs, where)
    for out, expected in zip(found, zip(*(pool(x, where) for x in xs), strict=True), strict=True):
        torch.testing.assert_close(out, torch.stack(expected), rtol=1e-12, atol=0)
    if where:
        repeated = {name: value.expand(3, *value.shape) for name, value in where.items()}
        for out, expected in zip(vmap(pool)(xs, repeated), found, strict=True):
            torch.testing.assert_close(out, expected, rtol=0, atol=0)


@BACKENDS
def test_batched_gradients_and_per_sample_gradients(backend):
    x, where = bags("lengths")
    leaf = x.clone().requires_grad_()
    bag = adjust_pool(leaf, **where, backend=backend)
    upstream = torch.randn(6, *bag.shape, dtype=x.dtype)
    (batched,) = torch.autograd.grad(bag, leaf, upstream, is_grads_batched=True, retain_graph=True)
    for u, gradient in zip(upstream, batched, strict=True):
        torch.testing.assert_close(torch.autograd.grad(bag, leaf, u, retain_graph=True)[0], gradient)
    dense, _ = bags("dense")
    each = vmap(grad(lambda x: adjust_pool(x[None], backend=backend).sin().sum()))(dense)
    whole = grad(lambda x: adjust_pool(x, backend=backend).sin().sum())(dense)
    torch.testing.assert_close(each, whole)


def test_decoding_refuses_derivatives_and_is_mapped():
    maps = make_maps("gaussian", (2, 3, 8, 6))
    with pytest.raises(RuntimeError, match="decode_heatmaps is not differentiable"):
        jvp(lambda h: decode_heatmaps(h)[0], (maps,), (maps,))
    with pytest.raises(RuntimeError, match="decode_heatmaps is not differentiable"):
        grad(lambda h: decode_heatmaps(h)[0].sum())(maps)
    stacked = torch.stack([maps, maps.flip(-1)])
    coords, scores = vmap(lambda h: decode_heatmaps(h, refine="dark"))(stacked)
    for index in range(2):
        one = decode_heatmaps(stacked[index], refine="dark")
        assert torch.equal(coords[index], one[0]) and torch.equal(scores[index], one[1])
