"""The C++ backend against the reference, on maps that hypothesis makes up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import amil_fast
from amil_fast.ops.backends import native
from amil_fast.ops.flip import check_pairs
from tests.ops.helpers import (
    CONVENTIONS,
    DTYPES,
    KINDS,
    LAYOUTS,
    REFINEMENTS,
    allowed_error,
    assert_same,
    averaged,
    lay_out,
    make_maps,
    make_transform,
)


@pytest.fixture(autouse=True)
def restore_instruction_set():
    before = native().instruction_set()
    yield
    native().set_instruction_set(before)


SIDES = st.one_of(st.integers(1, 8), st.integers(9, 70))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), SIDES, SIDES),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    flip=st.sampled_from(["no", "no", "plain", "shift"]),
    refine=st.sampled_from(REFINEMENTS),
    convention=st.sampled_from(CONVENTIONS),
    blur_kernel=st.sampled_from([1, 3, 5, 7, 9, 11, 11, 17, 31, 255]),
    transform=st.sampled_from(["none", "none", "box", "affine"]),
    seed=st.integers(0, 1000),
)
def test_backends_agree(shape, kind, dtype, layout, flip, refine, convention, blur_kernel, transform, seed):
    B, K = shape[:2]
    maps = lay_out(make_maps(kind, shape, seed, dtype), layout)
    arguments = {"refine": refine, "convention": convention, "blur_kernel": blur_kernel}
    arguments |= make_transform(transform, B, seed)
    seen = averaged(maps)
    if flip != "no":
        flipped = lay_out(make_maps(kind, shape, seed + 1, dtype).flip(-1), LAYOUTS[seed % len(LAYOUTS)])
        pairs = [(0, K - 1)] if K > 1 else []
        arguments |= {"flipped": flipped, "flip_pairs": pairs, "shift_flipped": flip == "shift"}
        seen = averaged(maps, flipped, check_pairs(pairs, K), flip == "shift")

    allowed = allowed_error(seen, refine, blur_kernel)
    if transform == "box":
        allowed = allowed * (200 * arguments["scale"] / (min(shape[2:]) - 1 or 1)).amax(1, keepdim=True) + 1e-3
    elif transform == "affine":
        allowed = allowed * 2 * arguments["affine"].abs().amax((1, 2))[:, None] + 1e-4
    expected = amil_fast.decode_heatmaps(maps, **arguments, backend="reference")
    results = []
    for instruction_set in native().usable_instruction_sets():
        native().set_instruction_set(instruction_set)
        results.append(amil_fast.decode_heatmaps(maps, **arguments, backend="cpp"))
        assert_same(results[-1], expected, allowed, instruction_set)
        assert torch.equal(results[-1][0], results[0][0]), "instruction sets differ"


@pytest.mark.parametrize("kind", ["gaussian", "noisy", "edge", "tiny", "large", "spike"])
@pytest.mark.parametrize("refine", ["dark", "dark_udp"])
def test_the_comparison_has_teeth(kind, refine):
    """Where peaks have a definite position, hardly any map is left out of the comparison: errors of 1e-3 px show."""
    allowed = allowed_error(make_maps(kind, (8, 16, 48, 36), 3), refine, 11)
    assert (allowed < 1e-3).double().mean() > 0.85
