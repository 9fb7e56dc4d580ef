"""Generator and discriminator: forward pass against the equations, save and load, torch.compile and torch.export."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from amil_fast import PoseDiscriminator, PoseGenerator, adjust_pool
from amil_fast.nn import POOLINGS
from amil_fast.pose import PoseOutput, Skeleton, error_map
from amil_fast.pose.codec import encode_targets
from amil_fast.pose.models.backbones import Hourglass, make_backbone
from amil_fast.pose.models.regions import RegionBlock, as_maps, probability, regions, softmax_heatmaps
from amil_fast.pose.skeletons import COCO17, LSP14, MPII16, get_skeleton

SMALL = {"input_size": 64, "features": 16}


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return PoseGenerator(**SMALL).eval()


def randomize(module, seed=0):
    """Perturbs biases and statistics: scores of a new network are nearly constant."""
    rng = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=rng)
        elif value.is_floating_point() and value.dim() <= 1:
            value.add_(0.3 * torch.randn(value.shape, generator=rng))
    return module


def test_region_block_follows_the_equations():
    """RegionBlock with two maps and the bag vector of a previous block, against the equations written with matrices."""
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


def test_every_region_depends_on_the_whole_map():
    torch.manual_seed(0)
    Y = torch.randn(1, 30, 8)
    other = Y.clone()
    other[0, -1] += 3
    for pooling, moves in (("adjust", True), ("mean", True), ("max", True), ("none", False)):
        block = randomize(RegionBlock([8], 8, 4, pooling=pooling))
        change = (block(Y)[0] - block(other)[0])[0, :-1].abs().amax()
        assert (change > 1e-4) == moves, pooling


def test_residual_flag():
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


@pytest.mark.parametrize(
    "backbone",
    [
        "resnet18",
        "resnet18s",
        "resnet34",
        "resnet50",
        "hourglass1",
        "hourglass2",
        "patchresnet8x2",
        "patchresnet8x1-1-2-1",
    ],
)
def test_backbones_give_a_quarter_of_the_resolution(backbone):
    net = make_backbone(backbone, 16).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 3, 64, 128)).shape == (1, 16, 16, 32)
    with pytest.raises(ValueError, match=r"images: expected shape \(B, 3, H, W\) with H and W multiples of"):
        net(torch.randn(1, 3, 72, 64))


def test_patch_resnet():
    """Widths, depths and strides of the stages; the features see the whole crop."""
    net = make_backbone("patchresnet8x1-2-3-1", 16).eval()
    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    assert [len(stage) for stage in stages] == [1, 2, 3, 1]
    assert [stage[-1].conv2.out_channels for stage in stages] == [8, 16, 32, 64]
    assert [stage[0].conv1.stride[0] for stage in stages] == [1, 2, 2, 2]
    assert net.stem.weight.shape == (8, 3, 4, 4) and net.stem.stride == (4, 4)
    assert len(make_backbone("patchresnet8x2", 16).layer4) == 2
    x = torch.randn(1, 3, 64, 64)
    other = x.clone()
    other[..., :4, :4] += 1
    with torch.no_grad():
        assert (net(x) - net(other))[..., -1, -1].abs().amax() > 1e-6
    for shape in ("0x2", "32", "32x2-2", "32x2-2-0-2", "32x2-2-2-2-2"):
        name = f"patchresnet{shape}"
        with pytest.raises(ValueError, match=f"backbone: expected one of .* 'patchresnet32x2', .*, got '{name}'"):
            make_backbone(name, 16)


def test_softmax_heatmaps(tmp_path):
    """Heatmaps have the scale of the training target: a Gaussian with a maximum of 1."""
    target = encode_targets(torch.tensor([[[29.5, 25.5]]]), 64, heatmap_std=1.5, visible=torch.ones(1, 1))
    torch.testing.assert_close(softmax_heatmaps(target.log() + 3, 1.5), target, atol=0.002, rtol=0)
    half = softmax_heatmaps((0.5 * target + 0.5 * target.roll(7, -1)).log().bfloat16(), 1.5)  # two candidates
    assert half.dtype == torch.float32 and half.amax() == pytest.approx(0.5, abs=0.01)

    for blocks in (0, 2):
        torch.manual_seed(0)
        net = randomize(PoseGenerator(**SMALL, blocks=blocks, softmax_std=1.5)).eval()
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            heatmaps, output = net(images), net(images, all_blocks=True)
        assert output.scores.shape == output.heatmaps.shape == (max(blocks, 1), 2, 14, 16, 16)
        torch.testing.assert_close(heatmaps, output.heatmaps[-1])
        torch.testing.assert_close(output.heatmaps, softmax_heatmaps(output.scores, 1.5))
        net.save_pretrained(tmp_path)
        loaded = PoseGenerator.from_pretrained(tmp_path)
        with torch.no_grad():
            assert loaded.softmax_std == 1.5 and loaded(images).equal(heatmaps)


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
    # Heatmaps start near the prior.
    assert 0.01 < heatmaps.mean() < 0.04


def test_generator_without_blocks_is_a_linear_head():
    net = PoseGenerator(**SMALL, blocks=0, skeleton="coco17").eval()
    with torch.no_grad():
        output = net(torch.randn(1, 3, 64, 64), all_blocks=True)
    assert output.scores is None and output.heatmaps.shape == (1, 1, 17, 16, 16)
    assert net.skeleton is COCO17
    assert output.heatmaps.amin() < 0


@pytest.mark.parametrize("pooling", [*POOLINGS, "none"])
def test_every_parameter_receives_a_gradient(pooling):
    """DistributedDataParallel raises on parameters without a gradient."""
    torch.manual_seed(0)
    for options in ({"blocks": 2}, {"blocks": 1, "depth": 1}, {"residual": False}):
        net = PoseGenerator(**SMALL, pooling=pooling, **options)
        output = net(torch.randn(2, 3, 64, 64), all_blocks=True)
        (output.heatmaps * torch.randn_like(output.heatmaps)).sum().backward()
        assert [name for name, p in net.named_parameters() if p.grad is None] == []
        assert all(p.grad.isfinite().all() for p in net.parameters())


def test_discriminator_is_an_autoencoder():
    """The output depends on the heatmaps and, with ``use_image``, on the image."""
    torch.manual_seed(0)
    heatmaps, images = torch.rand(2, 14, 16, 16), torch.randn(2, 3, 64, 64)
    conditioned = randomize(PoseDiscriminator(features=16)).eval()
    unconditioned = randomize(PoseDiscriminator(features=16, use_image=False)).eval()
    with torch.no_grad():
        assert conditioned(heatmaps, images).shape == heatmaps.shape
        assert not conditioned(heatmaps, images).equal(conditioned(heatmaps, images + 1))
        assert unconditioned(heatmaps).equal(unconditioned(heatmaps, images))
        assert not unconditioned(heatmaps).equal(unconditioned(heatmaps.flip(-1)))
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, H, W\) because of use_image=True, got None"):
        conditioned(heatmaps)
    with pytest.raises(ValueError, match=r"heatmaps: expected shape \(B, K, h, w\) with h and w multiples of 8"):
        conditioned(heatmaps[..., :12], images)


@pytest.mark.parametrize("skip", [False, True])
def test_coarsest_map_is_a_bottleneck_without_skip_connections(skip, monkeypatch):
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
def test_save_and_load(build, tmp_path):
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


def test_load_errors(tmp_path, generator):
    with pytest.raises(ValueError, match=r"expected a folder with config.json and model.safetensors, config.json is m"):
        PoseGenerator.from_pretrained(tmp_path)
    generator.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="format: expected 'amil-pose-discriminator', got 'amil-pose-generator'"):
        PoseDiscriminator.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected the files of a model of format 'amil-pose-generator'"):
        PoseGenerator.from_pretrained(tmp_path, features=24)
    assert PoseGenerator.from_pretrained(tmp_path, input_size=96).input_size == 96
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "version": 99}))
    with pytest.raises(ValueError, match="version: expected at most 1, got 99"):
        PoseGenerator.from_pretrained(tmp_path)
    for damaged in ([], {**config, "arguments": None}, {"format": config["format"]}):
        (tmp_path / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"config\.json: expected a JSON object with 'format'"):
            PoseGenerator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON file"):
        PoseGenerator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="expected the files of a model"):
        PoseGenerator.from_pretrained(tmp_path)


def custom_skeleton(**changes):
    """Five joints, the trunk of LSP."""
    arguments = {
        "name": "trunk",
        "joints": ("right hip", "left hip", "right shoulder", "left shoulder", "neck"),
        "short_names": ("rhip", "lhip", "rsho", "lsho", "neck"),
        "limbs": ((0, 1), (2, 4), (3, 4)),
        "groups": {"hip": (0, 1), "shoulder": (2, 3)},
        "scored": (0, 1, 2, 3),
        "normalizer_pairs": {"paper": (1, 2)},
        "head_segment": (4, 4),
        "head_factor": 0.5,
        "derived": (4,),
    }
    return Skeleton(**{**arguments, **changes})


@pytest.mark.parametrize("build", [PoseGenerator, PoseDiscriminator])
def test_save_and_load_with_a_custom_skeleton(build, tmp_path):
    own = custom_skeleton()
    net = build(own, features=16).eval()
    net.save_pretrained(tmp_path)
    again = build.from_pretrained(tmp_path)
    for item in dataclasses.fields(Skeleton):
        assert getattr(again.skeleton, item.name) == getattr(own, item.name), item.name
    assert again.skeleton.flip_pairs == ((0, 1), (2, 3)) and again.config == net.config
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
    heatmaps, images = torch.rand(1, 5, 16, 16), torch.randn(1, 3, 64, 64)
    inputs = (images,) if build is PoseGenerator else (heatmaps, images)
    with torch.no_grad():
        assert again(*inputs).equal(net(*inputs)) and again(*inputs).shape == heatmaps.shape


@pytest.mark.parametrize("build", [PoseGenerator, PoseDiscriminator])
def test_built_in_skeletons_are_stored_by_name(build, tmp_path):
    build("mpii16", features=16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["arguments"]["skeleton"] == "mpii16"
    assert build.from_pretrained(tmp_path).skeleton is MPII16
    # The name of a built-in skeleton does not make a custom one equal to it.
    build(custom_skeleton(name="lsp14"), features=16).save_pretrained(tmp_path)
    assert build.from_pretrained(tmp_path).skeleton.num_joints == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"joints": None}, "joints: expected a list of names, got None"),
        ({"joints": ["a", "a", "b", "c", "d"]}, "joints: expected unique names"),
        ({"short_names": ["a"]}, "short_names: expected 5, one per joint, got 1"),
        ({"limbs": [[0, 5]]}, r"limbs: expected 2 joint indices from 0 to 4, got \[0, 5\]"),
        ({"limbs": [[0]]}, r"limbs: expected 2 joint indices from 0 to 4, got \[0\]"),
        ({"limbs": 3}, "limbs: expected pairs of joint indices, got 3"),
        ({"groups": {"hip": "ab"}}, r"groups\['hip'\]: expected joint indices from 0 to 4, got 'ab'"),
        ({"groups": [1]}, "groups: expected a mapping of names"),
        ({"scored": [-1]}, r"scored: expected joint indices from 0 to 4, got \[-1\]"),
        ({"normalizer_pairs": {"paper": [0, 1, 2]}}, r"normalizer_pairs\['paper'\]: expected 2 joint indices"),
        ({"head_segment": [0, 1.5]}, "head_segment: expected 2 joint indices"),
        ({"head_factor": "big"}, "head_factor: expected None or a positive number, got 'big'"),
        ({"name": ""}, "name: expected a non-empty string, got ''"),
        ({"colors": []}, "unexpected keyword argument 'colors'"),
        ("limbs", "missing 1 required positional argument: 'limbs'"),
    ],
)
def test_damaged_skeleton_definitions(change, message):
    definition = custom_skeleton().to_config()
    assert get_skeleton(json.loads(json.dumps(definition))).to_config() == definition
    if isinstance(change, dict):
        definition.update(change)
    else:
        del definition[change]
    with pytest.raises(ValueError, match=f"skeleton: expected the definition of a skeleton: .*{message}"):
        get_skeleton(definition)


@pytest.mark.parametrize("build", [PoseGenerator, PoseDiscriminator])
def test_load_with_a_damaged_skeleton_definition(build, tmp_path):
    build(custom_skeleton(), features=16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["arguments"]["skeleton"]["limbs"] = [[0, 9]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{tmp_path}: .* limbs: expected 2 joint indices from 0 to 4"):
        build.from_pretrained(tmp_path)
    config["arguments"]["skeleton"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{tmp_path}: .* skeleton: expected one of 'lsp14', .*, got 7"):
        build.from_pretrained(tmp_path)


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
        ({"softmax_std": -1}, "softmax_std: expected at least 0, got -1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        PoseGenerator(**options)


def test_bf16_autocast_channels_last(generator):
    """The same heatmaps within the precision of bfloat16."""
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
    # With backend="reference" the program contains no operator of this package.
    plain = PoseGenerator(**SMALL, backend="reference").eval()
    plain.load_state_dict(generator.state_dict())
    program = torch.export.export(plain, (images,))
    assert not [node for node in program.graph.nodes if "amil_fast" in str(node.target)]
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), generator(images), atol=1e-5, rtol=1e-4)


def test_image_is_averaged_to_the_resolution_of_the_heatmaps():
    net = PoseDiscriminator(features=16, blocks=0).eval()
    images = torch.randn(1, 3, 64, 64)
    averaged = F.avg_pool2d(images, 4)
    heatmaps = torch.rand(1, 14, 16, 16)
    with torch.no_grad():
        expected = net.heatmaps(net.autoencoder(torch.cat([heatmaps, averaged], 1)))
        torch.testing.assert_close(net(heatmaps, images), expected)
