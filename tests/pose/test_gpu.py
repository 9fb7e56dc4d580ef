"""The pose networks on a GPU: precision, memory format, compiler, and one training step against the CPU in float32."""

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

SIDE, MAPS = 64, 16  # of the crops, of the heatmaps


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """Convolutions in float32, not TF32: what is compared with the CPU is the networks, not the rounding."""
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
    """Losses and gradients of one adversarial training step: ``(losses, generator's gradients, discriminator's)``."""
    device = images.device.type
    balance = Balance(k=0.5).to(images.device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        heatmaps = generator(images, all_blocks=True).heatmaps
        real, fake = discriminator_losses(discriminator, target, heatmaps[-1].detach(), images, valid)
        judged = balance.loss(real, fake)
        found = heatmap_loss(heatmaps, target, valid)
        loss = found + 1e-2 * adversarial_loss(discriminator, heatmaps[-1], images, valid)
    judged.backward()
    loss.backward()
    gradients = [torch.cat([p.grad.float().flatten() for p in n.parameters()]) for n in (generator, discriminator)]
    return torch.stack([found, real, fake, loss]).detach().float().cpu(), *(g.cpu() for g in gradients)


def on_gpu(*networks):
    return [copy.deepcopy(network).to("cuda", memory_format=torch.channels_last) for network in networks]


def batch_on_gpu():
    images, target, valid = batch()
    return images.cuda().contiguous(memory_format=torch.channels_last), target.cuda(), valid.cuda()


def test_training_step_is_that_of_the_cpu():
    """Channels-last on the GPU against float32 on the CPU: losses, and both networks' gradients as vectors."""
    here = networks()
    there = on_gpu(*here)
    expected, actual = step(*here, *batch()), step(*there, *batch_on_gpu())
    assert relative_error(actual[0], expected[0]) < 1e-4
    # Batch statistics of few crops in front of every layer magnify rounding.
    assert relative_error(actual[1], expected[1]) < 1e-2
    assert relative_error(actual[2], expected[2]) < 1e-2


def test_training_step_in_bfloat16():
    here = networks()
    there = on_gpu(*here)
    expected, actual = step(*here, *batch()), step(*there, *batch_on_gpu(), autocast=True)
    assert relative_error(actual[0], expected[0]) < 5e-2
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert a.isfinite().all()
        assert torch.nn.functional.cosine_similarity(a, e, dim=0) > 0.9


@pytest.mark.parametrize("training", [False, True])
def test_forward_in_bfloat16(training):
    """Heatmaps are float32, probabilities, and near those of float32; inference too."""
    generator, _ = networks()
    (there,) = on_gpu(generator.train(training))
    images = batch()[0]
    with torch.no_grad():
        expected = generator(images)
        with torch.autocast("cuda", torch.bfloat16):
            actual = there(images.cuda().contiguous(memory_format=torch.channels_last))
    assert actual.dtype == torch.float32 and actual.min() >= 0 and actual.max() <= 1
    assert relative_error(actual.cpu(), expected) < 5e-2


def test_compile():
    """The compiled generator finds the same heatmaps and gradients as the plain one, on the GPU."""
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


def test_a_few_steps_of_training_learn():
    """bfloat16, both networks with their optimizers: the heatmap loss on one batch falls."""
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
