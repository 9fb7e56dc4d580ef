"""Triton kernels of adjust pooling: independent bags, order of instances, packed buffers, max_seqlen."""

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
    PACKED_PLANS,
    bags,
    make_plan,
    poisoned_memory,  # noqa: F401 (a fixture)
    reference,
    run,
    upstream,
)


@pytest.mark.parametrize(("form", "name"), [("full", "split"), ("packed", "mixed")])
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


REST_PLANS = {**PACKED_PLANS, **{f"dot {name}": lambda N, D, make=make: make(D) for name, make in DOT_PLANS.items()}}


@pytest.mark.parametrize(
    ("name", "detach"),
    [*((name, False) for name in REST_PLANS), *((name, True) for name in ("on chip", "chunks", "mixed", "dot mixed"))],
)
def test_rows_after_the_last_bag(name, detach):
    """A static buffer, longer than its bags: the rest, NaN here, has no effect, weight 0 and gradient 0."""
    dot = name.startswith("dot")
    f, where = bags("packed", torch.float16 if dot else torch.float64, D=33 if dot else 7)
    longer = torch.cat([f, f.new_full((30, f.shape[1]), torch.nan)])
    g, v = upstream(longer, where)
    plan = REST_PLANS[name](*longer.shape)
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
