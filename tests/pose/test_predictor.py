"""Predictor: flip test, merged batch normalization, loading of networks."""

import numpy as np
import pytest
import torch
from torch import nn

from amil_fast.pose import PoseGenerator
from amil_fast.pose.codec import crop_matrix
from amil_fast.pose.data.augment import warp_crop
from amil_fast.pose.inference.predictor import Predictor, load_model
from amil_fast.pose.inference.sides import separate_sides
from amil_fast.pose.skeletons import LSP14
from tests.pose import color_finder
from tests.pose.color_finder import ColorFinder, ground, paint, person
from tests.pose.helpers import randomize


def painted_crop():
    """Returns the joints ``(14, 2)`` of a person, a crop ``(1, 3, 128, 128)`` with them, and its matrix."""
    joints = person(np.random.default_rng(3), 128, 128)
    crop = warp_crop(paint(ground(128, 128), joints, 4), crop_matrix((0, 0, 128, 128), 128), 128)
    return joints, torch.from_numpy(crop)[None], torch.eye(2, 3)[None]


def test_flip_test():
    """The flip test averages each heatmap with that of the opposite joint in the flipped crop."""
    joints, crop, to_image = painted_crop()
    coords, scores = Predictor(ColorFinder(), flip_test=True)(crop, to_image)
    assert np.abs(coords[0].numpy() - joints).max() < 1.5
    without, plain = Predictor(ColorFinder(), flip_test=False)(crop, to_image)
    assert np.abs(without[0].numpy() - joints).max() < 1.5
    torch.testing.assert_close(scores, plain, rtol=0.02, atol=1e-3)

    class Sided(ColorFinder):
        """Returns zeros unless the first row starts brighter than it ends, which distinguishes the two passes."""

        def forward(self, images):
            found = super().forward(images)[1]
            return found if (images[0, 0, 0, 0] - images[0, 0, 0, -1]) > 0 else found * 0

    crop[0, :, 0, 0] = 200
    _, half = Predictor(Sided(), flip_test=True)(crop, to_image)
    torch.testing.assert_close(half, plain / 2, rtol=0.05, atol=1e-3)  # the mean of the maps and zeros


def test_default_of_the_flip_test(tmp_path):
    """The network's attribute decides, through a saved generator as well; an argument overrides it."""
    options = {"backbone": "patchresnet4x1", "input_size": 32, "features": 4}
    PoseGenerator(**options, flip_test=False).save_pretrained(tmp_path)
    generator = load_model(tmp_path)
    assert not Predictor(generator).flip_test and Predictor(generator, flip_test=True).flip_test
    assert Predictor(PoseGenerator(**options)).flip_test and Predictor(ColorFinder()).flip_test


@pytest.mark.parametrize("backbone", ["resnet18s", "resnet50", "patchresnet16x1", "hourglass1"])
def test_batch_normalization_is_merged(backbone):
    torch.manual_seed(0)
    generator = randomize(PoseGenerator(backbone=backbone, input_size=64, features=16, blocks=1, softmax_std=1.5))
    state = {name: value.clone() for name, value in generator.state_dict().items()}
    predictor = Predictor(generator)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(predictor.model(images), generator(images), rtol=1e-3, atol=1e-5)
    left = [module for module in predictor.model.modules() if isinstance(module, nn.BatchNorm2d)]
    # An hourglass also normalizes sums, before the convolution.
    assert bool(left) == (backbone == "hourglass1")
    assert generator.state_dict().keys() == state.keys()  # the caller's network is unchanged
    for name, value in generator.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Coordinates within the size of a heatmap pixel, four pixels of the crop."""
    joints, crop, to_image = painted_crop()
    predictor = Predictor(ColorFinder(), dtype=dtype)
    assert {value.dtype for value in predictor.model.parameters()} == {dtype}
    coords, scores = predictor(crop, to_image)
    assert coords.dtype == scores.dtype == torch.float32
    assert np.abs(coords[0].numpy() - joints).max() < 4


def two_maxima(first, second, size=(24, 32)):
    """A map with maxima of these heights at (8, 6) and (20, 15)."""
    y, x = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    near, far = (torch.exp(-((x - a) ** 2 + (y - b) ** 2) / 4.5) for a, b in ((8, 6), (20, 15)))
    return first * near + second * far


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_separate_sides(dtype):
    maps = torch.zeros(4, 3, 24, 32)
    maps[:, 1] = two_maxima(0.9, 0.0)  # joint 1 has no counterpart
    maps[0, 0], maps[0, 2] = two_maxima(0.6, 0.35), two_maxima(0.5, 0.45)  # one of both moves
    maps[1, 0], maps[1, 2] = two_maxima(0.5, 0.45), two_maxima(0.6, 0.35)  # the other one
    maps[2, 0], maps[2, 2] = two_maxima(0.9, 0.02), two_maxima(0.9, 0.01)  # really at the same place
    maps[3, 0], maps[3, 2] = two_maxima(0.9, 0.3), two_maxima(0.3, 0.9)  # at different places
    maps = maps.to(dtype).to(memory_format=torch.channels_last)
    before = maps.clone()
    result = separate_sides(maps, [(0, 2)])
    assert torch.equal(maps, before) and result.dtype == dtype and result.shape == maps.shape
    index = result.flatten(2).argmax(2)
    x, y = (index % 32)[:, [0, 2]].tolist(), (index // 32)[:, [0, 2]].tolist()
    assert x == [[8, 20], [20, 8], [8, 8], [8, 20]] and y == [[6, 15], [15, 6], [6, 6], [6, 15]]
    for sample, joint in ((0, 0), (1, 2), (2, 0), (2, 2), (3, 0), (3, 2)):
        assert torch.equal(result[sample, joint], maps[sample, joint])
    assert torch.equal(result[:, 1], maps[:, 1])
    # Values around a selected maximum are kept for the refinement.
    assert torch.equal(result[0, 2, 13:18, 18:23], maps[0, 2, 13:18, 18:23])
    assert torch.equal(separate_sides(maps[3:], [(0, 2)]), maps[3:])  # no pair at the same place
    assert torch.equal(separate_sides(maps[:0], [(0, 2)]), maps[:0])
    assert torch.equal(separate_sides(maps, []), maps)


def test_separate_sides_is_not_autocast():
    """The values around a wide maximum differ by less than the precision of bfloat16."""
    y, x = torch.meshgrid(torch.arange(24), torch.arange(32), indexing="ij")
    wide = torch.exp(-((x - 8) ** 2 + (y - 6) ** 2) / 1000)
    maps = torch.stack([0.6 * wide + two_maxima(0, 0.3), 0.5 * wide + two_maxima(0, 0.4)])[None]
    expected = separate_sides(maps, [(0, 1)])
    assert not torch.equal(expected, maps)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(separate_sides(maps, [(0, 1)]), expected)


def test_separate_sides_with_flip_test():
    """Maps are averaged as by the decoder; on by default for maps that are probabilities."""

    left, right = LSP14.index("left knee"), LSP14.index("right knee")

    class Fixed(torch.nn.Module):
        skeleton, input_size, softmax_std = "lsp14", 128, 1.5

        def forward(self, images):
            maps = torch.zeros(len(images), 14, 32, 32)
            maps[:, left], maps[:, right] = two_maxima(0.6, 0.35, (32, 32)), two_maxima(0.5, 0.45, (32, 32))
            flipped = images[0, 0, 0, 0] < images[0, 0, 0, -1]
            return maps[:, list(LSP14.flip_index)].flip(-1) if flipped else maps

    crop, to_image = torch.zeros(1, 3, 128, 128), torch.eye(2, 3)[None]
    crop[..., 0] = 1
    for flip_test in (False, True):
        for separate, expected in ((None, [8, 20]), (False, [8, 8])):
            predictor = Predictor(Fixed(), flip_test=flip_test, refine="none", separate_sides=separate)
            coords, _ = predictor(crop, to_image)
            assert (coords[0, [left, right], 0] / 4).floor().tolist() == expected
    assert not Predictor(ColorFinder()).separate_sides


def test_incompatible_networks():
    class Plain(torch.nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.shape = shape

        def forward(self, images):
            return {"heatmaps": images.new_zeros(len(images), *self.shape)}

    with pytest.raises(ValueError, match=r"skeleton: expected a skeleton \(--skeleton\)"):
        Predictor(Plain((14, 8, 8)))
    with pytest.raises(ValueError, match="size: expected the side of the crops"):
        Predictor(Plain((14, 8, 8)), skeleton="lsp14")
    images, to_image = torch.zeros(2, 3, 32, 32), torch.eye(2, 3).expand(2, 2, 3)
    Predictor(Plain((14, 8, 8)), skeleton="lsp14", size=32)(images, to_image)
    for shape in ((16, 8, 8), (14, 8, 9), (14, 8)):
        with pytest.raises(ValueError, match=r"model: expected heatmaps \(2, 14, H, W\) for lsp14"):
            Predictor(Plain(shape), skeleton="lsp14", size=32)(images, to_image)


def test_load_model(tmp_path):
    from safetensors.torch import save_file

    model = load_model(factory="tests.pose.color_finder:build")
    assert isinstance(model, ColorFinder)
    weights = {**ColorFinder().state_dict(), "sharpness": torch.tensor(7.0)}
    save_file(weights, tmp_path / "w.safetensors")
    assert load_model(tmp_path / "w.safetensors", "tests.pose.color_finder:build").sharpness.item() == 7
    save_file({"other": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x.safetensors: the weights do not fit tests.pose.color_finder:build"):
        load_model(tmp_path / "x.safetensors", "tests.pose.color_finder:build")
    for factory in ("color_finder", "tests.pose.color_finder:nothing", "no_such_module:build", ":"):
        with pytest.raises(ValueError, match=r"model: expected package\.module:function"):
            load_model(factory=factory)
    with pytest.raises(ValueError, match=r"expected tests.pose.color_finder:not_a_network to return a torch.nn.Module"):
        load_model(factory="tests.pose.color_finder:not_a_network")
    shipped = load_model()
    assert shipped.skeleton is LSP14 and not shipped.training
    with pytest.raises(ValueError, match=r"none: no such checkpoint"):
        load_model(tmp_path / "none")
    assert color_finder.SIZE == 128


class Malicious:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pt2"])
def test_nothing_is_unpickled(tmp_path, suffix, capsys):
    torch.save({"a": Malicious()}, tmp_path / f"w{suffix}")
    for factory in (None, "tests.pose.color_finder:build"):
        with pytest.raises(ValueError, match="hold pickles, which run code when they are loaded"):
            load_model(tmp_path / f"w{suffix}", factory)
    # a pickle with the suffix of safetensors
    torch.save({"a": Malicious()}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        load_model(tmp_path / "w.safetensors", "tests.pose.color_finder:build")
    assert "unpickled" not in capsys.readouterr().out
