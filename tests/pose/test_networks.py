"""Generator and discriminator: what they compute, how they are stored, and that they compile and export."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from amil_fast import PoseDiscriminator, PoseGenerator, adjust_pool
from amil_fast.nn import POOLINGS
from amil_fast.pose import PoseOutput, error_map
from amil_fast.pose.models.backbones import Hourglass, make_backbone
from amil_fast.pose.models.regions import RegionBlock, as_maps, probability, regions
from amil_fast.pose.skeletons import COCO17, LSP14

SMALL = {"input_size": 64, "features": 16}


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return PoseGenerator(**SMALL).eval()


def randomize(module, seed=0):
    """Scores start near a constant; give every parameter and statistic a value that matters."""
    rng = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=rng)
        elif value.is_floating_point() and value.dim() <= 1:
            value.add_(0.3 * torch.randn(value.shape, generator=rng))
    return module


def test_block_is_the_papers_equations():
    """Two levels, N regions: written out with matrices, against RegionBlock with two maps and a bag from below."""
    torch.manual_seed(1)
    B, N, D, K = 3, 20, 8, 5
    block = randomize(RegionBlock([6, D], D, K, depth=2, first=False, bag_scale=1.5, backend="reference")).double()
    Y, below, X0 = torch.randn(B, N, 6).double(), torch.randn(B, N, D).double(), torch.randn(B, D).double()
    scores, x, X = block(Y, below, bag=X0)

    A = [torch.cat([layer.weight for layer in block.inputs], 1), block.layers[0].weight]
    c = [block.inputs[0].bias, block.layers[0].bias]
    joined, bag = torch.cat([Y, below], -1), X0
    for level in range(2):
        joined = torch.relu(joined @ A[level].T + c[level] + (bag @ block.bags[level].weight.T)[:, None])
        bag = bag + 1.5 * adjust_pool(joined, backend="reference")
    expected = joined @ block.score.weight.T + block.score.bias + (bag @ block.bag_score.weight.T)[:, None]
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(x, joined)
    torch.testing.assert_close(X, bag)


def test_every_region_sees_the_whole_map():
    torch.manual_seed(0)
    Y = torch.randn(1, 30, 8)
    other = Y.clone()
    other[0, -1] += 3
    for pooling, moves in (("adjust", True), ("mean", True), ("max", True), ("none", False)):
        block = randomize(RegionBlock([8], 8, 4, pooling=pooling))
        change = (block(Y)[0] - block(other)[0])[0, :-1].abs().amax()
        assert (change > 1e-4) == moves, pooling


def test_residual_is_a_flag():
    torch.manual_seed(0)
    Y = torch.randn(2, 10, 8)
    block = randomize(RegionBlock([8], 8, 4))
    on = block(Y)[2]
    block.residual = False
    x, bag = torch.relu(block.inputs[0](Y)), None
    for level, layer in enumerate([None, *block.layers]):
        if layer is not None:
            x = torch.relu(layer(x) + block.bags[level - 1](bag)[:, None])
        bag = adjust_pool(x)
    off = block(Y)[2]
    torch.testing.assert_close(off, bag)
    assert (on - off).abs().amax() > 1e-3


@pytest.mark.parametrize("scale", [1, 0.4, 3.0])
def test_probability_is_equation_12(scale):
    z = torch.linspace(-30, 30, 41, dtype=torch.float64)
    h = torch.log1p(torch.exp(z))
    torch.testing.assert_close(probability(z, scale), 1 - torch.exp(-scale * h), atol=1e-12, rtol=1e-7)
    z = torch.tensor([-200.0, 200.0], requires_grad=True)
    p = probability(z.bfloat16(), scale)
    assert p.dtype == torch.float32 and p[0] == 0 and p[1] == 1
    p.sum().backward()
    assert z.grad.isfinite().all()


def test_regions_and_maps_are_inverse_views():
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    flat = regions(x)
    assert flat.data_ptr() == x.data_ptr() and flat.shape == (2, 20, 3)
    assert flat[1, 7].equal(x[1, :, 1, 2])
    assert as_maps(flat, 4, 5).equal(x)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet18s", "resnet34", "resnet50", "hourglass1", "hourglass2"])
def test_backbones_give_a_quarter_of_the_resolution(backbone):
    net = make_backbone(backbone, 16).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 3, 64, 128)).shape == (1, 16, 16, 32)
    with pytest.raises(ValueError, match=r"images: expected shape \(B, 3, H, W\) with H and W multiples of"):
        net(torch.randn(1, 3, 72, 64))


# Number of parameters of torchvision's models without their classifier, from its documentation less 1000 (C + 1).
@pytest.mark.parametrize(
    ("name", "count"), [("resnet18", 11_176_512), ("resnet34", 21_284_672), ("resnet50", 23_508_032)]
)
def test_resnets_have_torchvisions_parameters(name, count, tmp_path):
    from safetensors.torch import save_file

    net = make_backbone(name, 8)
    names = {key: value for key, value in net.state_dict().items() if not key.startswith(("lateral", "smooth"))}
    parameters = [value for key, value in names.items() if "running" not in key and "num_batches" not in key]
    assert sum(value.numel() for value in parameters) == count
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv2.weight", "layer4.1.bn1.bias"} <= names.keys()
    assert "layer2.0.downsample.0.weight" in names and "layer2.0.downsample.1.running_var" in names

    stored = {key: torch.randn_like(value) if value.is_floating_point() else value for key, value in names.items()}
    stored["fc.weight"] = torch.zeros(3, 3)
    save_file({key: value.contiguous() for key, value in stored.items()}, tmp_path / "resnet.safetensors")
    net.load_resnet(tmp_path / "resnet.safetensors")
    assert net.layer1[0].conv1.weight.equal(stored["layer1.0.conv1.weight"])
    del stored["layer3.0.conv1.weight"]
    save_file({key: value.contiguous() for key, value in stored.items()}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"1 parameters differ, first layer3.0.conv1.weight"):
        net.load_resnet(tmp_path / "less.safetensors")
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="expected a safetensors file of ResNet weights"):
        net.load_resnet(tmp_path / "pickle.pth")


def test_generator_and_its_forms(generator):
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        heatmaps = generator(images)
        output = generator(images, all_blocks=True)
    assert isinstance(output, PoseOutput)
    assert heatmaps.shape == (2, 14, 16, 24) and heatmaps.dtype == torch.float32
    assert output.heatmaps.shape == output.scores.shape == (2, 2, 14, 16, 24)
    torch.testing.assert_close(output.heatmaps[-1], heatmaps)
    torch.testing.assert_close(output.heatmaps, torch.sigmoid(output.scores))
    assert generator.skeleton is LSP14 and generator.input_size == 64 and generator.stride == 4
    # Maps start nearly empty, as they end.
    assert 0.01 < heatmaps.mean() < 0.04


def test_generator_without_blocks_is_a_linear_head():
    net = PoseGenerator(**SMALL, blocks=0, skeleton="coco17").eval()
    with torch.no_grad():
        output = net(torch.randn(1, 3, 64, 64), all_blocks=True)
    assert output.scores is None and output.heatmaps.shape == (1, 1, 17, 16, 16)
    assert net.skeleton is COCO17
    assert output.heatmaps.amin() < 0


@pytest.mark.parametrize("pooling", [*POOLINGS, "none"])
def test_every_parameter_of_every_ablation_learns(pooling):
    """No parameter is left without a gradient: data-parallel training would stop at it."""
    torch.manual_seed(0)
    for options in ({"blocks": 2}, {"blocks": 1, "depth": 1}, {"residual": False}):
        net = PoseGenerator(**SMALL, pooling=pooling, **options)
        output = net(torch.randn(2, 3, 64, 64), all_blocks=True)
        (output.heatmaps * torch.randn_like(output.heatmaps)).sum().backward()
        assert [name for name, p in net.named_parameters() if p.grad is None] == []
        assert all(p.grad.isfinite().all() for p in net.parameters())


def test_discriminator_is_an_autoencoder():
    """What comes out depends on the maps and, where it may look, on the image."""
    torch.manual_seed(0)
    heatmaps, images = torch.rand(2, 14, 16, 16), torch.randn(2, 3, 64, 64)
    looks = randomize(PoseDiscriminator(features=16)).eval()
    blind = randomize(PoseDiscriminator(features=16, use_image=False)).eval()
    with torch.no_grad():
        assert looks(heatmaps, images).shape == heatmaps.shape
        assert not looks(heatmaps, images).equal(looks(heatmaps, images + 1))
        assert blind(heatmaps).equal(blind(heatmaps, images))
        assert not blind(heatmaps).equal(blind(heatmaps.flip(-1)))
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, H, W\), as use_image is on, got None"):
        looks(heatmaps)
    with pytest.raises(ValueError, match=r"heatmaps: expected shape \(B, K, h, w\) with h and w multiples of 8"):
        looks(heatmaps[..., :12], images)


@pytest.mark.parametrize("skip", [False, True])
def test_all_passes_the_coarsest_map_unless_skipped(skip, monkeypatch):
    net = randomize(Hourglass(8, 3, skip)).eval()
    coarsest = net.inner.inner.inner
    monkeypatch.setattr(coarsest, "forward", lambda x: torch.ones_like(x))
    with torch.no_grad():
        same = net(torch.randn(1, 8, 16, 16)).equal(net(torch.randn(1, 8, 16, 16)))
    assert same == (not skip)


def test_error_map():
    class Halves(nn.Module):
        def forward(self, heatmaps, images):
            return heatmaps / 2

    heatmaps = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(error_map(Halves(), heatmaps), (heatmaps / 2).square().sum(1))


@pytest.mark.parametrize("build", [PoseGenerator, PoseDiscriminator])
def test_saved_and_loaded(build, tmp_path):
    torch.manual_seed(0)
    net = randomize(build("coco17", features=16, pooling="mean", mil_scale=0.7)).eval()
    net.save_pretrained(tmp_path / "net", notes={"score": 1})
    again = build.from_pretrained(tmp_path / "net")
    assert not again.training and again.config == net.config
    assert {n: v for n, v in again.state_dict().items() if not v.equal(net.state_dict()[n])} == {}
    assert build.from_pretrained(str(tmp_path / "net" / "model.safetensors")).config == net.config
    net.save_pretrained(tmp_path / "half", dtype=torch.float16)
    half = build.from_pretrained(tmp_path / "half")
    assert next(half.parameters()).dtype == torch.float32
    size = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("half", "net")]
    assert size[0] < 0.7 * size[1]
    assert not list(tmp_path.rglob("*.partial"))
    assert json.loads((tmp_path / "net" / "config.json").read_text())["notes"] == {"score": 1}


def test_what_cannot_be_loaded(tmp_path, generator):
    with pytest.raises(ValueError, match=r"expected a folder with config.json and model.safetensors, config.json is m"):
        PoseGenerator.from_pretrained(tmp_path)
    generator.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a amil-pose-discriminator, got 'amil-pose-generator'"):
        PoseDiscriminator.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the files don't make a amil-pose-generator"):
        PoseGenerator.from_pretrained(tmp_path, features=24)
    assert PoseGenerator.from_pretrained(tmp_path, input_size=96).input_size == 96
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "version": 99}))
    with pytest.raises(ValueError, match="version 99 is newer"):
        PoseGenerator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="expected the description of a"):
        PoseGenerator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="the files don't make a"):
        PoseGenerator.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skeleton": "frog"}, "skeleton: expected one of"),
        ({"backbone": "vgg"}, "backbone: expected one of 'resnet18'"),
        ({"pooling": "sum"}, "pooling: expected one of"),
        ({"blocks": -1}, "blocks: expected an int of at least 0, got -1"),
        ({"depth": 0}, "depth: expected an int of at least 1, got 0"),
        ({"features": 1.5}, "features: expected an int of at least 1, got 1.5"),
        ({"mil_scale": 0}, "mil_scale: expected a positive number, got 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        PoseGenerator(**options)


def test_bf16_autocast_channels_last(generator):
    """The same maps within bfloat16's precision, and finite gradients everywhere."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = generator(images)
        fast = generator.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            found = fast(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(torch.logit(found), torch.logit(exact), atol=0.1, rtol=0.05)


def test_compiled(generator):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(generator, fullgraph=True, backend="aot_eager")(images), generator(images)
        )


def test_exported(generator, tmp_path):
    images = torch.randn(2, 3, 64, 64)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(generator, (images,), dynamic_shapes=({0: batch},))
    images = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), generator(images))
    # Without the package on the other side: plain PyTorch operators only.
    plain = PoseGenerator(**SMALL, backend="reference").eval()
    plain.load_state_dict(generator.state_dict())
    program = torch.export.export(plain, (images,))
    assert not [node for node in program.graph.nodes if "amil_fast" in str(node.target)]
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), generator(images), atol=1e-5, rtol=1e-4)


def test_image_reaches_the_discriminator_at_the_maps_resolution():
    net = PoseDiscriminator(features=16, blocks=0).eval()
    images = torch.randn(1, 3, 64, 64)
    averaged = F.avg_pool2d(images, 4)
    heatmaps = torch.rand(1, 14, 16, 16)
    with torch.no_grad():
        expected = net.heatmaps(net.autoencoder(torch.cat([heatmaps, averaged], 1)))
        torch.testing.assert_close(net(heatmaps, images), expected)
