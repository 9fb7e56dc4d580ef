"""Predictor: flip test, merged batch normalization, loading of networks."""

import numpy as np
import pytest
import torch
from torch import nn

from amil_fast.pose import PoseGenerator
from amil_fast.pose.codec import crop_matrix
from amil_fast.pose.data.augment import warp_crop
from amil_fast.pose.inference.predictor import Predictor, load_model
from amil_fast.pose.skeletons import LSP14
from tests.pose import color_finder
from tests.pose.color_finder import ColorFinder, ground, paint, person
from tests.pose.helpers import randomize


def test_flip_test():
    """The flip test averages each heatmap with that of the opposite joint in the flipped crop."""
    joints = person(np.random.default_rng(3), 128, 128)
    crop = torch.from_numpy(warp_crop(paint(ground(128, 128), joints, 4), crop_matrix((0, 0, 128, 128), 128), 128))[
        None
    ]
    to_image = torch.eye(2, 3)[None]
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
    joints = person(np.random.default_rng(3), 128, 128)
    crop = torch.from_numpy(warp_crop(paint(ground(128, 128), joints, 4), crop_matrix((0, 0, 128, 128), 128), 128))
    predictor = Predictor(ColorFinder(), dtype=dtype)
    assert {value.dtype for value in predictor.model.parameters()} == {dtype}
    coords, scores = predictor(crop[None], torch.eye(2, 3)[None])
    assert coords.dtype == scores.dtype == torch.float32
    assert np.abs(coords[0].numpy() - joints).max() < 4


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
