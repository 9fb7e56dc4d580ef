"""Heatmap decoding against stored outputs of HRNet, DarkPose and mmpose (../shared/vectors, see its README)."""

import numpy as np
import pytest
import torch

import amil_fast
from amil_fast.ops.decode_heatmaps_reference import blur
from tests.helpers import SHARED

VECTORS = SHARED / "vectors" / "decode_public.npz"
pytestmark = pytest.mark.skipif(not VECTORS.exists(), reason="../shared/vectors/decode_public.npz not found")

ARGMAX, QUARTER, DARK, UDP = 0.0, 1e-5, 1e-3, 2e-3  # tolerances in heatmap pixels
# Stored array -> (coordinate space, tolerance, arguments of decode_heatmaps).
COORDINATES = {
    "hrnet_max_coords": ("heatmap", ARGMAX, {}),
    "darkpose_max_coords": ("heatmap", ARGMAX, {"convention": "darkpose"}),
    "mmpose_max_locs": ("heatmap", ARGMAX, {"convention": "mmpose"}),
    "hrnet_quarter_coords": ("heatmap", QUARTER, {"refine": "quarter"}),
    "mmpose_quarter_coords": ("heatmap", QUARTER, {"refine": "quarter", "convention": "mmpose"}),
    "darkpose_dark_coords": ("heatmap", DARK, {"refine": "dark", "convention": "darkpose"}),
    "mmpose_dark_k11_coords": ("heatmap", DARK, {"refine": "dark", "convention": "mmpose"}),
    "mmpose_dark_k17_coords": ("heatmap", DARK, {"refine": "dark", "convention": "mmpose", "blur_kernel": 17}),
    "mmpose_dark_udp_k11_coords": ("heatmap", UDP, {"refine": "dark_udp", "convention": "mmpose"}),
    "mmpose_dark_udp_k17_coords": ("heatmap", UDP, {"refine": "dark_udp", "convention": "mmpose", "blur_kernel": 17}),
    "mmpose_msra_input": ("input", QUARTER, {"refine": "quarter", "convention": "mmpose"}),
    "mmpose_msra_unbiased_input": ("input", DARK, {"refine": "dark", "convention": "mmpose"}),
    "mmpose_udp_input": ("udp_input", UDP, {"refine": "dark_udp", "convention": "mmpose"}),
    "hrnet_argmax_image": ("image", ARGMAX, {}),
    "hrnet_quarter_image": ("image", QUARTER, {"refine": "quarter"}),
    "darkpose_dark_image": ("image", DARK, {"refine": "dark", "convention": "darkpose"}),
    "mmpose_msra_image": ("image", QUARTER, {"refine": "quarter", "convention": "mmpose"}),
    "mmpose_msra_unbiased_image": ("image", DARK, {"refine": "dark", "convention": "mmpose"}),
    "mmpose_udp_image": ("image", UDP, {"refine": "dark_udp", "convention": "mmpose"}),
}
SCORES = ("hrnet_max_vals", "darkpose_max_vals", "mmpose_max_vals")
BLURRED = ("darkpose_blur11_first4", "mmpose_blur11_first4")
INPUTS = ("heatmaps", "kind", "true_xy", "center", "scale")


@pytest.fixture(scope="module")
def vectors():
    with np.load(VECTORS) as file:
        return dict(file)


def test_every_array_is_compared(vectors):
    covered = {f"{p}_{n}" for p in "ab" for n in (*COORDINATES, *SCORES, *BLURRED, *INPUTS)}
    assert covered | {"kind_names"} == set(vectors)


def batch(vectors, prefix):
    return {name: vectors[f"{prefix}_{name}"] for name in (*COORDINATES, *SCORES, *BLURRED, *INPUTS)}


def to_space(space, data):
    """Returns the transform from heatmap pixels to ``space`` as arguments, and its scale factors ``(B,)``."""
    B, _, H, W = data["heatmaps"].shape
    if space == "image":
        scale = torch.from_numpy(data["scale"])
        return {"center": torch.from_numpy(data["center"]), "scale": scale}, (200 * scale / torch.tensor([W, H])).amax(
            1
        )
    if space == "heatmap":
        return {}, torch.ones(B)
    x, y = (4.0, 4.0) if space == "input" else (4 * W / (W - 1), 4 * H / (H - 1))
    return {"affine": torch.tensor([[x, 0, 0], [0, y, 0]]).expand(B, 2, 3)}, torch.full((B,), max(x, y))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", COORDINATES)
@pytest.mark.parametrize("prefix", ["a", "b"])
def test_coordinates(vectors, prefix, name, backend):
    data = batch(vectors, prefix)
    space, tolerance, arguments = COORDINATES[name]
    transform, pixels = to_space(space, data)
    coords, scores = amil_fast.decode_heatmaps(
        torch.from_numpy(data["heatmaps"]), **arguments, **transform, backend=backend
    )
    assert np.array_equal(scores.numpy(), data["mmpose_max_vals"])

    expected = torch.from_numpy(data[name])
    compared = torch.ones(expected.shape[:2], dtype=torch.bool)
    if "udp" in name:  # mmpose reads out of bounds for maps without a positive maximum
        compared &= torch.from_numpy(data["mmpose_max_vals"] > 0)
    if "k17" in name:  # a wide blur of pure noise leaves nearly flat peaks: offsets of up to 256 px are rounding error
        offset = (expected - torch.from_numpy(data["mmpose_max_locs"])).abs().amax(-1)
        compared &= (torch.from_numpy(data["kind"]) != 14) | (offset <= 2)
    difference = (coords.double() - expected.double()).abs().amax(-1)
    allowed = (tolerance * pixels)[:, None].expand_as(difference)
    if space != "heatmap":  # two float32 roundings of coordinates below 1024, by different formulas
        allowed = allowed + 1.3e-4
    assert (difference <= allowed)[compared].all(), f"off by up to {difference[compared].max():.2e}"
    assert compared.float().mean() > 0.9


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("prefix", ["a", "b"])
def test_scores(vectors, prefix, name):
    data = batch(vectors, prefix)
    for backend in ("reference", "cpp"):
        _, scores = amil_fast.decode_heatmaps(torch.from_numpy(data["heatmaps"]), backend=backend)
        assert np.array_equal(scores.numpy(), data[name].reshape(scores.shape))


@pytest.mark.parametrize("name", BLURRED)
@pytest.mark.parametrize("prefix", ["a", "b"])
def test_reference_blur(vectors, prefix, name):
    data = batch(vectors, prefix)
    h = torch.from_numpy(data["heatmaps"][:4]).double()
    blurred = blur(h, 11)
    rescaled = blurred * (h.amax((2, 3), keepdim=True) / blurred.amax((2, 3), keepdim=True))
    expected = torch.from_numpy(data[name]).double()
    compared = torch.from_numpy(data["kind"][:4] != 6)  # the stored arrays are NaN for all-zero maps
    size = expected.abs().amax((2, 3), keepdim=True)
    assert ((rescaled - expected).abs() <= 2e-6 * size)[compared].all()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_flip_test(vectors, backend):
    """Averaging with the exact flip changes nothing; ``shift_flipped`` shifts the flipped maps by one pixel."""
    data = batch(vectors, "a")
    h = torch.from_numpy(data["heatmaps"])
    pairs = [(1, 2), (3, 4), (5, 6), (15, 16)]
    order = [0, 2, 1, 4, 3, 6, 5, *range(7, 15), 16, 15]
    flipped = h[:, order].flip(-1)
    arguments = {"refine": "dark", "convention": "darkpose", "backend": backend}
    expected = amil_fast.decode_heatmaps(h, **arguments)
    actual = amil_fast.decode_heatmaps(h, flipped=flipped, flip_pairs=pairs, **arguments)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])

    shifted = h.clone()  # HRNet: output_flipped[:, :, :, 1:] = output_flipped.clone()[:, :, :, 0:-1]
    shifted[..., 1:] = h[..., :-1]
    expected = amil_fast.decode_heatmaps((h + shifted) * 0.5, **arguments)
    actual = amil_fast.decode_heatmaps(h, flipped=flipped, flip_pairs=pairs, shift_flipped=True, **arguments)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
