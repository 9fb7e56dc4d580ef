"""Generator and discriminator: forward pass against the equations, torch.compile and torch.export."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from amil_fast import PoseDiscriminator, PoseGenerator, adjust_pool
from amil_fast.nn import POOLINGS
from amil_fast.pose import PoseOutput, error_map
from amil_fast.pose.codec import encode_targets
from amil_fast.pose.models.backbones import Hourglass
from amil_fast.pose.models.regions import RegionBlock, as_maps, probability, regions, softmax_heatmaps
from amil_fast.pose.skeletons import COCO17, LSP14
from tests.pose.helpers import SMALL, randomize, small_generator


@pytest.fixture(scope="module")
def generator():
    return small_generator()


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
