"""decode_heatmaps: hand-computed examples and properties."""

import math

import pytest
import torch

from amil_fast import decode_heatmaps
from amil_fast.ops.backends import native
from amil_fast.ops.decode_heatmaps_reference import blur_weights
from amil_fast.ops.heatmaps import encode_heatmaps
from tests.ops.helpers import (
    CONVENTIONS,
    DTYPES,
    LAYOUTS,
    REFINEMENTS,
    allowed_error,
    assert_same,
    averaged,
    lay_out,
    make_maps,
    make_transform,
)

BACKENDS = ("reference", "cpp")
on_both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def restore_instruction_set():
    before = native().instruction_set()
    yield
    native().set_instruction_set(before)


def one_map(rows):
    return torch.tensor(rows, dtype=torch.float32)[None, None]


def point(*arguments, **keywords):
    coords, scores = decode_heatmaps(*arguments, **keywords)
    assert coords.shape == (1, 1, 2) and scores.shape == (1, 1)
    return coords[0, 0].tolist(), scores[0, 0].item()


# ---- hand-computed examples ----


@on_both
def test_coordinates_are_x_y(backend):
    assert point(one_map([[0, 0, 0, 0], [0, 0, 0, 5], [0, 0, 0, 0]]), backend=backend) == ([3, 1], 5)


@on_both
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (33, 17), (40, 64)])
def test_ties_return_the_smallest_index(backend, shape):
    H, W = shape
    for first in range(0, H * W, 7):
        maps = torch.zeros(1, 1, H * W)
        maps[0, 0, first:] = 2.0
        assert point(maps.view(1, 1, H, W), backend=backend)[0] == [first % W, first // W]


@on_both
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("refine", REFINEMENTS)
@pytest.mark.parametrize("value", [0.0, -0.0, -3.0, -math.inf])
def test_maps_without_positive_maximum_return_the_marker(backend, convention, refine, value):
    maps = torch.full((1, 1, 12, 10), value)
    marker = [-1, -1] if convention == "mmpose" else [0, 0]
    assert point(maps, refine=refine, convention=convention, backend=backend) == (marker, value)


@on_both
@pytest.mark.parametrize("refine", REFINEMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("W", [1, 7, 48])
def test_nan_affects_its_own_map_only(backend, refine, dtype, W):
    maps = make_maps("noisy", (2, 3, 24, W), dtype=dtype)
    expected = decode_heatmaps(maps, refine=refine, backend=backend)
    for y, x in ((0, 0), (5, W // 2), (23, W - 1)):
        spoiled = maps.clone()
        spoiled[1, 2, y, x] = math.nan
        spoiled[1, 2, 0, -1] += 10  # also with an unambiguous maximum
        for kind, arguments in (("map", {}), ("flipped", {"flipped": spoiled, "flip_pairs": ()})):
            given = maps if kind == "flipped" else spoiled
            coords, scores = decode_heatmaps(given, refine=refine, backend=backend, **arguments)
            assert coords[1, 2].isnan().all() and scores[1, 2].isnan()
            assert not coords[:, :2].isnan().any() and not coords[0].isnan().any()
            if kind == "map":
                assert torch.equal(coords[0], expected[0][0]) and torch.equal(scores[0], expected[1][0])


@on_both
def test_infinite_values(backend):
    maps = make_maps("noisy", (1, 1, 20, 20))
    maps[0, 0, 8, 11] = math.inf
    maps[0, 0, 3, 4] = -math.inf
    for refine in ("none", "quarter", "dark", "dark_udp"):
        coords, score = point(maps, refine=refine, backend=backend)
        assert score == math.inf and abs(coords[0] - 11) <= 0.25 and abs(coords[1] - 8) <= 0.25
    maps[0, 0, 8, 11] = 2.0  # the remaining -inf next to the peak is clamped to the lower bound
    maps[0, 0, 8, 12] = -math.inf
    for refine in ("dark", "dark_udp"):
        coords, _ = point(maps, refine=refine, backend=backend)
        assert math.isfinite(coords[0]) and math.isfinite(coords[1])


@on_both
def test_quarter_offset_near_the_border(backend):
    """Border rules of each convention, for every peak position in a 7 x 8 map; right and lower neighbors are larger."""
    for y in range(7):
        for x in range(8):
            h = torch.zeros(1, 1, 7, 8)
            h[0, 0, y, x] = 1.0
            if x + 1 < 8:
                h[0, 0, y, x + 1] = 0.5
            if y + 1 < 7:
                h[0, 0, y + 1, x] = 0.5
            inner_x, inner_y = 1 < x < 7, 1 < y < 6
            both = [x + 0.25, y + 0.25] if inner_x and inner_y else [x, y]
            each = [x + 0.25 * (inner_x and y > 0), y + 0.25 * (inner_y and x > 0)]
            for convention, expected in (("hrnet", both), ("darkpose", both), ("mmpose", each)):
                assert point(h, refine="quarter", convention=convention, backend=backend)[0] == expected


@on_both
@pytest.mark.parametrize("refine", ["dark", "dark_udp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_centers_within_a_thousandth_of_a_pixel(backend, refine, dtype):
    """A blurred Gaussian is a Gaussian, whose logarithm is quadratic: one Newton step yields its center."""
    coords = torch.rand(4, 17, 2, dtype=dtype) * 20 + 14
    maps, _ = encode_heatmaps(coords, 48, 48)
    found, _ = decode_heatmaps(maps, refine=refine, backend=backend)
    assert (found - coords).abs().max() < 1e-3


# ---- clamping and the whole-map blur ----


@on_both
def test_udp_clamping(backend):
    """Scaling a map changes the result only if values are clamped.

    UDP clamps the rescaled map to [1e-3, 50]. Without clamped values, a power of two affects exponents only.
    """
    maps, _ = encode_heatmaps(torch.tensor([[[20.3, 17.6]]]), 40, 36)
    maps = maps * 0.5

    def step(scale):
        return decode_heatmaps(maps * scale, refine="dark_udp", backend=backend)[0]

    plain = step(1)
    for scale in (2.0**-7, 2.0**-3, 2.0, 64.0):
        assert (step(scale) - plain).abs().max() < (1e-12 if backend == "cpp" else 1e-5)
    low, high = step(2.0**-9), step(512.0)
    assert torch.equal(low, torch.tensor([[[20.0, 18.0]]])), "all values are at the lower clamp: no step"
    assert torch.equal(high, torch.tensor([[[20.0, 18.0]]])), "all values are at the upper clamp: no step"
    for scale in (2.2e-3, 105.0):  # some values are clamped
        assert 0.01 < (step(scale) - plain).abs().max() < 1


@pytest.mark.parametrize(("H", "W"), [(64, 48), (13, 7), (5, 70), (40, 33), (3, 3), (90, 131)])
@pytest.mark.parametrize("blur_kernel", [3, 11, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_map_blur(H, W, blur_kernel, dtype):
    """The maximum of the blurred map is correct for any position and any row remainder."""
    maps = make_maps("noise", (2, 40, H, W), 5).abs() * 4e-3
    maps[:, :20] *= 5e4  # the upper clamp
    maps = maps.to(dtype)
    arguments = {"refine": "dark_udp", "blur_kernel": blur_kernel}
    expected = decode_heatmaps(maps, **arguments, backend="reference")
    allowed = allowed_error(averaged(maps), **arguments)
    assert allowed.isfinite().double().mean() > 0.5
    for instruction_set in native().usable_instruction_sets():
        native().set_instruction_set(instruction_set)
        assert_same(decode_heatmaps(maps, **arguments), expected, allowed, instruction_set)
    if min(H, W) > 3:
        unclamped = decode_heatmaps(maps.float() / maps.float().amax((2, 3), keepdim=True), **arguments)
        assert not torch.allclose(unclamped[0], expected[0], atol=1e-2), "expected clamping to change the result"


@on_both
def test_dark_clamps_zeros_of_the_blurred_map(backend):
    """Two adjacent pixels and a blur kernel of 3: zeros of the rescaled blurred map are clamped to 1e-10."""
    h = torch.zeros(1, 1, 9, 9)
    h[0, 0, 4, 4] = 0.8
    h[0, 0, 4, 5] = 0.4
    coords, _ = point(h, refine="dark", blur_kernel=3, backend=backend)
    # Blurred along x: 0.2 0.5 0.4 0.1 at x = 3..6, 0 at x = 2, rescaled by 0.8 / (0.5 * 0.5); symmetric along y.
    log = [math.log(max(v * 0.5 * 0.8 / 0.25, 1e-10)) for v in (0.0, 0.2, 0.5, 0.4, 0.1)]
    expected = 4 - 0.5 * (log[3] - log[1]) / (0.25 * (log[4] - 2 * log[2] + log[0]))
    assert coords == pytest.approx([expected, 4], abs=1e-5)


# ---- properties ----


@on_both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_score_is_the_value_at_the_coordinates(backend, layout, dtype):
    maps = lay_out(make_maps("noise", (3, 5, 31, 29), dtype=dtype), layout)
    coords, scores = decode_heatmaps(maps, backend=backend)
    x, y = coords.long().unbind(-1)
    gathered = maps[torch.arange(3)[:, None], torch.arange(5), y, x]
    assert torch.equal(gathered.float(), scores)
    assert torch.equal(scores, maps.amax((2, 3)).float())


@on_both
@pytest.mark.parametrize("refine", REFINEMENTS)
def test_translation_equivariance(backend, refine):
    maps = torch.zeros(2, 3, 60, 60)
    maps[..., 20:40, 20:40] = make_maps("noisy", (2, 3, 20, 20))
    expected, _ = decode_heatmaps(maps, refine=refine, backend=backend)
    moved, _ = decode_heatmaps(maps.roll((7, -5), (2, 3)), refine=refine, backend=backend)
    assert torch.allclose(moved, expected + torch.tensor([-5.0, 7.0]), atol=1e-5)


@pytest.mark.parametrize("refine", REFINEMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_are_independent(refine, dtype):
    maps = make_maps("noisy", (3, 4, 24, 20), dtype=dtype)
    arguments = {"refine": refine, "flip_pairs": ()}
    expected, expected_scores = decode_heatmaps(maps, flipped=maps, **arguments)
    for b in range(3):
        for k in range(4):
            alone = maps[b : b + 1, k : k + 1]
            coords, scores = decode_heatmaps(alone, flipped=alone, **arguments)
            assert torch.equal(coords[0, 0], expected[b, k]) and torch.equal(scores[0, 0], expected_scores[b, k])


@pytest.mark.parametrize("refine", REFINEMENTS)
def test_bit_identical_for_any_number_of_threads(refine):
    maps = make_maps("noisy", (16, 17, 64, 48))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results += [decode_heatmaps(maps, refine=refine) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(c, results[0][0]) and torch.equal(s, results[0][1]) for c, s in results)


@on_both
def test_flip_test_equals_decoding_the_average(backend):
    maps, flipped = make_maps("noisy", (2, 5, 20, 14), 1), make_maps("noisy", (2, 5, 20, 14), 2)
    for shift in (False, True):
        mean = averaged(maps, flipped, [0, 3, 2, 1, 4], shift)
        expected = decode_heatmaps(mean, refine="quarter", backend=backend)
        arguments = {"flipped": flipped, "flip_pairs": [(1, 3)], "shift_flipped": shift}
        actual = decode_heatmaps(maps, refine="quarter", backend=backend, **arguments)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
        flipped_back = flipped[:, [0, 3, 2, 1, 4]].flip(-1)
        if shift:
            flipped_back = torch.cat([flipped_back[..., :1], flipped_back[..., :-1]], -1)
        assert torch.equal(mean, (maps + flipped_back) * 0.5)


@on_both
@pytest.mark.parametrize("shape", [(0, 17, 64, 48), (4, 0, 64, 48), (0, 0, 1, 1)])
def test_empty_inputs(backend, shape):
    coords, scores = decode_heatmaps(
        torch.empty(shape), refine="dark", flipped=torch.empty(shape), flip_pairs=(), backend=backend
    )
    assert coords.shape == (*shape[:2], 2) and scores.shape == shape[:2]
    assert coords.dtype == scores.dtype == torch.float32


# ---- image coordinates ----


@on_both
def test_image_transforms_hand_computed(backend):
    h = torch.zeros(1, 1, 64, 48)
    h[0, 0, 20, 30] = 1.0
    box = {
        "center": torch.tensor([[100.0, 200.0]]),
        "scale": torch.tensor([[1.2, 1.5]]),
        "backend": backend,
    }  # a bounding box of 240 x 300 px
    expected = {
        "hrnet": [(30 - 24) * 240 / 48 + 100, (20 - 32) * 240 / 48 + 200],
        "darkpose": [(30 - 23.5) * 239 / 47 + 100, (20 - 31.5) * 239 / 47 + 200],
        "mmpose": [30 / 48 * 240 + 100 - 120, 20 / 64 * 300 + 200 - 150],
    }
    for convention, values in expected.items():
        assert point(h, convention=convention, **box)[0] == pytest.approx(values, abs=1e-4)
    udp = [30 / 47 * 240 + 100 - 120, 20 / 63 * 300 + 200 - 150]
    assert point(h, convention="mmpose", refine="dark_udp", blur_kernel=1, **box)[0] == pytest.approx(udp, abs=1e-4)
    affine = torch.tensor([[[2.0, 0.5, 3.0], [-1.0, 4.0, 7.0]]])
    assert point(h, affine=affine, backend=backend)[0] == [2 * 30 + 0.5 * 20 + 3, -30 + 80 + 7]
    # A strided float16 transform gives the same result.
    wide = torch.zeros(1, 2, 6)
    wide[:, :, ::2] = affine
    assert point(h, affine=wide[:, :, ::2].half(), backend=backend)[0] == [2 * 30 + 0.5 * 20 + 3, -30 + 80 + 7]


@on_both
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("refine", ["none", "dark_udp"])
@pytest.mark.parametrize(("H", "W"), [(1, 1), (1, 5), (5, 1)])
def test_maps_of_one_row_or_column(backend, convention, refine, H, W):
    box = make_transform("box", 1)
    coords, _ = point(torch.ones(1, 1, H, W), convention=convention, refine=refine, backend=backend, **box)
    assert all(map(math.isfinite, coords))


def test_blur_weights_match_opencv():
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    for blur_kernel in (*range(1, 33, 2), 99, 255):
        expected = cv2.getGaussianKernel(blur_kernel, 0)[:, 0]
        assert blur_weights(blur_kernel) == pytest.approx(expected, abs=1e-15)
        half = native().blur_weights(blur_kernel)
        assert half[:0:-1] + half == pytest.approx(expected, abs=1e-15)


# ---- operator registration ----


@on_both
def test_backward_raises(backend):
    maps = make_maps("noisy", (1, 2, 9, 9)).requires_grad_()
    coords, scores = decode_heatmaps(maps, refine="dark", backend=backend)
    assert torch.equal(coords, decode_heatmaps(maps.detach(), refine="dark", backend=backend)[0])
    for output in (coords, scores):
        with pytest.raises(RuntimeError, match=r"decode_heatmaps is not differentiable.*soft_argmax"):
            output.sum().backward(retain_graph=True)
    with torch.no_grad():
        assert not decode_heatmaps(maps, backend=backend)[0].requires_grad
    assert not decode_heatmaps(maps.detach(), backend=backend)[0].requires_grad
