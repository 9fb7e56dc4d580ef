"""Tests of encode_heatmaps, soft_argmax and flip_back."""

import math

import pytest
import torch

from amil_fast import decode_heatmaps, soft_argmax
from amil_fast.ops import encode_heatmaps, flip_back
from tests.ops.helpers import make_maps

# ---- encode_heatmaps ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("heatmap_std", [1.0, 2.0, 3.5])
def test_unbiased_gaussian_matches_formula(dtype, heatmap_std):
    coords = torch.tensor([[[4.25, 7.5], [0.0, 10.0]]], dtype=dtype)
    maps, weights = encode_heatmaps(coords, 11, 9, heatmap_std=heatmap_std)
    assert maps.shape == (1, 2, 11, 9) and weights.shape == (1, 2) and maps.dtype == weights.dtype == dtype
    for k in range(2):
        c_x, c_y = coords[0, k].tolist()
        for y in range(11):
            for x in range(9):
                expected = math.exp(-((x - c_x) ** 2 + (y - c_y) ** 2) / (2 * heatmap_std**2))
                assert maps[0, k, y, x].item() == pytest.approx(expected, abs=2e-3 if dtype == torch.float16 else 1e-6)
    assert weights.tolist() == [[1, 1]]


def test_biased_gaussian_matches_hrnet():
    """The center is rounded to the nearest pixel, half up; values beyond 3 standard deviations along x or y are 0."""
    maps, _ = encode_heatmaps(torch.tensor([[[20.5, 30.49]]]), 64, 48, unbiased=False)
    assert maps[0, 0, 30, 21] == 1 and maps.max() == 1
    y, x = torch.nonzero(maps[0, 0], as_tuple=True)
    assert (x.min(), x.max(), y.min(), y.max()) == (15, 27, 24, 36)
    assert maps[0, 0, 33, 25].item() == pytest.approx(math.exp(-(3**2 + 4**2) / 8))
    assert maps[0, 0, 36, 27].item() == pytest.approx(math.exp(-(36 + 36) / 8))


def test_joints_outside_the_map_or_invisible_are_not_encoded():
    nan, inf = math.nan, math.inf
    coords = torch.tensor(
        [[5.0, 5.0], [-7.0, 5.0], [-6.0, 5.0], [15.5, 5.0], [14.0, 5.0], [5.0, nan], [inf, 5.0], [5, 5]]
    )
    visible = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0])
    for unbiased in (False, True):
        maps, weights = encode_heatmaps(coords, 10, 9, unbiased=unbiased, visible=visible)
        assert weights.tolist() == [1, 0, 1, 0, 1, 0, 0, 0]
        assert torch.equal(maps.amax((-1, -2)) > 0, weights > 0)
        assert not maps.isnan().any()


@pytest.mark.parametrize("refine", ["none", "quarter", "dark", "dark_udp"])
def test_decoding_inverts_encoding(refine):
    coords = torch.rand(2, 17, 2) * 30 + 9
    maps, _ = encode_heatmaps(coords, 48, 48)
    error = (decode_heatmaps(maps, refine=refine)[0] - coords).abs().max()
    assert error < {"none": 0.5001, "quarter": 0.2501, "dark": 1e-3, "dark_udp": 1e-3}[refine]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "coords: expected a torch.Tensor", ([[1, 2]], 4, 4)),
        (TypeError, "coords: expected a floating dtype, got torch.int64", (torch.zeros(3, 2).long(), 4, 4)),
        (ValueError, r"coords: expected shape \(..., K, 2\), got \(2,\)", (torch.zeros(2), 4, 4)),
        (ValueError, r"coords: expected shape \(..., K, 2\), got \(5, 3\)", (torch.zeros(5, 3), 4, 4)),
        (ValueError, "height, width: expected at least 1, got 4, 0", (torch.zeros(3, 2), 4, 0)),
        (ValueError, "heatmap_std: expected a positive", (torch.zeros(3, 2), 4, 4, {"heatmap_std": 0})),
        (TypeError, "dtype: expected a floating", (torch.zeros(3, 2), 4, 4, {"dtype": torch.int32})),
        (TypeError, "visible: expected a torch.Tensor", (torch.zeros(3, 2), 4, 4, {"visible": [1, 1, 1]})),
        (ValueError, r"visible: expected shape \(3,\)", (torch.zeros(3, 2), 4, 4, {"visible": torch.ones(3, 1)})),
    ],
)
def test_encode_heatmaps_error_messages(error, message, arguments):
    *positional, keywords = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error, match=message):
        encode_heatmaps(*positional, **keywords)


# ---- soft_argmax ----


@pytest.mark.parametrize("window", [None, 1, 5])
def test_soft_argmax_hand_computed(window):
    h = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]], dtype=torch.float64)
    weights = torch.exp(3 * h)
    if window == 1:
        weights = (h == 2).double()
    weights = weights / weights.sum()
    expected = [(weights.sum(0) * torch.arange(3)).sum().item(), (weights.sum(1) * torch.arange(2)).sum().item()]
    assert soft_argmax(h, beta=3.0, window=window).tolist() == pytest.approx(expected)


def test_soft_argmax_window_excludes_distant_pixels():
    maps, _ = encode_heatmaps(torch.tensor([[[10.3, 20.6]]]), 48, 40)
    second, _ = encode_heatmaps(torch.tensor([[[33.0, 40.0]]]), 48, 40)
    both = maps + 0.9 * second
    local = soft_argmax(both, beta=20.0, window=9)
    assert torch.allclose(local, soft_argmax(maps, beta=20.0, window=9), atol=1e-3)
    assert (local - torch.tensor([10.3, 20.6])).abs().max() < 0.05
    assert (soft_argmax(both, beta=20.0) - local).abs().max() > 1
    corner = torch.zeros(6, 7)
    corner[0, 6] = 50.0
    assert soft_argmax(corner, beta=1.0, window=3).tolist() == pytest.approx([6, 0], abs=1e-4)


@pytest.mark.parametrize("window", [None, 3])
def test_soft_argmax_is_differentiable(window):
    maps = make_maps("noisy", (2, 2, 5, 4)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: soft_argmax(m, beta=2.0, window=window), maps)
    coords = torch.tensor([[4.2, 3.6]], dtype=torch.float64)
    start = torch.zeros(1, 9, 10, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([start], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (soft_argmax(start) - coords).square().sum()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_soft_argmax_accumulates_in_float32(dtype):
    maps = make_maps("noisy", (2, 3, 64, 48), dtype=dtype)
    coords = soft_argmax(maps, beta=30.0)
    assert coords.dtype == dtype and coords.shape == (2, 3, 2)
    truth = soft_argmax(maps.double(), beta=30.0)
    assert ((coords.double() - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + 1e-4).all()


def test_soft_argmax_propagates_nan():
    maps = make_maps("noisy", (1, 2, 9, 9))
    maps[0, 1, 8, 8] = math.nan
    for window in (None, 3):
        assert soft_argmax(maps, window=window).isnan().any(-1).tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "heatmaps: expected a torch.Tensor", ([1.0],)),
        (TypeError, "heatmaps: expected dtype float16, .* got torch.int64", (torch.zeros(3, 3).long(),)),
        (ValueError, r"heatmaps: expected shape \(..., H, W\), got \(3,\)", (torch.zeros(3),)),
        (ValueError, "heatmaps: expected maps of at least one pixel", (torch.zeros(2, 0, 3),)),
        (ValueError, "beta: expected a positive number, got 0", (torch.zeros(3, 3), {"beta": 0})),
        (ValueError, "window: expected None or an odd number of pixels, got 4", (torch.zeros(3, 3), {"window": 4})),
        (ValueError, "window: expected None or an odd number of pixels, got 3.0", (torch.zeros(3, 3), {"window": 3.0})),
    ],
)
def test_soft_argmax_error_messages(error, message, arguments):
    *positional, keywords = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error, match=message):
        soft_argmax(*positional, **keywords)


# ---- flip_back ----


def test_flip_back_flips_and_swaps():
    maps = torch.arange(24.0).reshape(1, 3, 2, 4)
    assert flip_back(maps, [(0, 2)])[0, 0].tolist() == [[19, 18, 17, 16], [23, 22, 21, 20]]
    assert flip_back(maps, [(0, 2)])[0, 1].tolist() == [[11, 10, 9, 8], [15, 14, 13, 12]]
    assert flip_back(maps, [(0, 2)], shift=True)[0, 1].tolist() == [[11, 11, 10, 9], [15, 15, 14, 13]]
    assert flip_back(maps[:, :, :, :1], (), shift=True).shape == (1, 3, 2, 1)
    assert torch.equal(flip_back(flip_back(maps, [(0, 1)]), [(0, 1)]), maps)
    assert flip_back(torch.zeros(2, 0, 4, 4), ()).shape == (2, 0, 4, 4)
    assert torch.equal(flip_back(maps[0], [(0, 2)]), flip_back(maps, [(0, 2)])[0])


def test_flip_back_is_differentiable():
    maps = make_maps("noisy", (1, 3, 4, 5)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: flip_back(m, [(0, 2)], shift=True), maps)


def test_flip_back_error_messages():
    with pytest.raises(ValueError, match=r"heatmaps: expected shape \(..., K, H, W\), got \(4, 5\)"):
        flip_back(torch.zeros(4, 5), ())
    with pytest.raises(ValueError, match=r"flip_pairs: expected joints in 0\.\.2"):
        flip_back(torch.zeros(3, 4, 5), [(0, 3)])
