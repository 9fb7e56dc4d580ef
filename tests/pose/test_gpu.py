"""Pose networks on a GPU: precision, memory format, torch.compile, and training steps against float32 on the CPU."""

import copy

import pytest
import torch

from amil_fast.pose import (
    Balance,
    PoseDiscriminator,
    PoseGenerator,
    adversarial_loss,
    discriminator_losses,
    heatmap_loss,
)
from tests.helpers import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIDE, MAPS = 64, 16  # side of the crops and of the heatmaps, in pixels


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """Disables TF32 convolutions, so that the comparison with the CPU is not dominated by rounding."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def networks():
    torch.manual_seed(0)
    generator = PoseGenerator("lsp14", SIDE, features=32)
    return generator, PoseDiscriminator("lsp14", features=16)


def batch(B=4):
    """``images (B, 3, S, S)``, ``target (B, K, h, w)``, ``valid (B, K)``."""
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(B, 3, SIDE, SIDE, generator=g),
        torch.rand(B, 14, MAPS, MAPS, generator=g),
        torch.rand(B, 14, generator=g) < 0.9,
    )


def step(generator, discriminator, images, target, valid, autocast=False):
    """One adversarial training step; returns ``(losses, generator gradient, discriminator gradient)``, flattened."""
    device = images.device.type
    balance = Balance(k=0.5).to(images.device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        heatmaps = generator(images, all_blocks=True).heatmaps
        real, fake = discriminator_losses(discriminator, target, heatmaps[-1].detach(), images, valid)
        loss_d = balance.loss(real, fake)
        supervised = heatmap_loss(heatmaps, target, valid)
        loss = supervised + 1e-2 * adversarial_loss(discriminator, heatmaps[-1], images, valid)
    loss_d.backward()
    loss.backward()
    gradients = [torch.cat([p.grad.float().flatten() for p in n.parameters()]) for n in (generator, discriminator)]
    return torch.stack([supervised, real, fake, loss]).detach().float().cpu(), *(g.cpu() for g in gradients)


def on_gpu(*networks):
    return [copy.deepcopy(network).to("cuda", memory_format=torch.channels_last) for network in networks]


def batch_on_gpu():
    images, target, valid = batch()
    return images.cuda().contiguous(memory_format=torch.channels_last), target.cuda(), valid.cuda()


def test_training_step_matches_the_cpu():
    """Channels-last on the GPU against float32 on the CPU: losses, and the gradient vectors of both networks."""
    on_cpu = networks()
    on_device = on_gpu(*on_cpu)
    expected, actual = step(*on_cpu, *batch()), step(*on_device, *batch_on_gpu())
    assert relative_error(actual[0], expected[0]) < 1e-4
    # Batch statistics over few crops amplify rounding errors layer by layer.
    assert relative_error(actual[1], expected[1]) < 1e-2
    assert relative_error(actual[2], expected[2]) < 1e-2


def test_training_step_in_bfloat16():
    on_cpu = networks()
    on_device = on_gpu(*on_cpu)
    expected, actual = step(*on_cpu, *batch()), step(*on_device, *batch_on_gpu(), autocast=True)
    assert relative_error(actual[0], expected[0]) < 5e-2
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert a.isfinite().all()
        assert torch.nn.functional.cosine_similarity(a, e, dim=0) > 0.9


@pytest.mark.parametrize("training", [False, True])
def test_forward_in_bfloat16(training):
    """Heatmaps under autocast are float32, in [0, 1], and close to those computed in float32."""
    generator, _ = networks()
    (on_device,) = on_gpu(generator.train(training))
    images = batch()[0]
    with torch.no_grad():
        expected = generator(images)
        with torch.autocast("cuda", torch.bfloat16):
            actual = on_device(images.cuda().contiguous(memory_format=torch.channels_last))
    assert actual.dtype == torch.float32 and actual.min() >= 0 and actual.max() <= 1
    assert relative_error(actual.cpu(), expected) < 5e-2


def test_compile():
    """torch.compile leaves the heatmaps and gradients of the generator unchanged."""
    generator, _ = networks()
    plain, compiled_network = on_gpu(generator, generator)
    compiled = torch.compile(compiled_network)
    images, target, valid = batch_on_gpu()
    gradients = []
    for network, parameters in ((plain, plain.parameters()), (compiled, compiled_network.parameters())):
        heatmaps = network(images, all_blocks=True).heatmaps
        heatmap_loss(heatmaps, target, valid).backward()
        gradients.append((heatmaps.detach(), torch.cat([p.grad.flatten() for p in parameters])))
    assert relative_error(gradients[1][0], gradients[0][0]) < 1e-4
    assert relative_error(gradients[1][1], gradients[0][1]) < 1e-2


def test_loss_decreases():
    """bfloat16, both networks with their optimizers: the heatmap loss on one batch decreases."""
    generator, discriminator = on_gpu(*networks())
    optimizers = [torch.optim.Adam(n.parameters(), 1e-3, fused=True) for n in (generator, discriminator)]
    data = batch_on_gpu()
    losses = []
    for _ in range(15):
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(step(generator, discriminator, *data, autocast=True)[0][0].item())
        for optimizer in optimizers:
            optimizer.step()
    assert losses[-1] < 0.97 * losses[0], losses
