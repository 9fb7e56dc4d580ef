"""Losses of generator and discriminator: values by hand, masking, gradient paths, and the BEGAN balance."""

import pytest
import torch
from torch import nn

from amil_fast.nn import noisy_or_loss
from amil_fast.pose import (
    Balance,
    PoseDiscriminator,
    PoseGenerator,
    adversarial_loss,
    choose_sides,
    discriminator_losses,
    distillation_target,
    heatmap_loss,
    region_cross_entropy,
    region_loss,
    softmax_cross_entropy,
)
from amil_fast.pose.skeletons import LSP14


class Scale(nn.Module):
    """D(x) = a x, with one parameter."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, heatmaps, images):
        return self.a * heatmaps


def maps(B=2, K=3, h=4, w=5, seed=0):
    return torch.rand(B, K, h, w, generator=torch.Generator().manual_seed(seed))


def test_heatmap_loss_by_hand():
    heatmaps = torch.zeros(2, 1, 2, 1, 2)
    heatmaps[0, 0, 0, 0] = torch.tensor([1.0, 3.0])  # squared error mean (1 + 9) / 2 = 5
    heatmaps[1, 0, 0, 0] = torch.tensor([2.0, 0.0])  # (4 + 0) / 2 = 2
    heatmaps[:, 0, 1] = torch.nan  # not annotated
    target = torch.zeros(1, 2, 1, 2)
    valid = torch.tensor([[True, False]])
    assert heatmap_loss(heatmaps, target, valid) == 7
    assert heatmap_loss(heatmaps[1], target, valid) == 2
    assert heatmap_loss(heatmaps, target, valid, count=3.5) == 2
    assert heatmap_loss(heatmaps, target, torch.zeros_like(valid)) == 0
    with pytest.raises(ValueError, match=r"heatmaps, target, valid: expected \(L, B, K, h, w\)"):
        heatmap_loss(heatmaps, target, valid[:, :1])


def test_joints_without_annotation_receive_no_gradient():
    heatmaps = maps().requires_grad_()
    valid = torch.tensor([[True, False, True], [False, True, True]])
    target = maps(seed=1)
    target[~valid] = torch.nan
    heatmap_loss(heatmaps[None], target, valid).backward()
    assert heatmaps.grad[~valid].eq(0).all() and heatmaps.grad[valid].abs().amin() > 0
    expected = 2 * (heatmaps - target)[valid] / (valid.sum() * 20)
    torch.testing.assert_close(heatmaps.grad[valid], expected.detach())


def test_losses_of_the_parts_of_a_batch_average_to_that_of_the_batch():
    """As in data-parallel training, with the global number of joints per process as the count."""
    heatmaps, target, valid = maps(4), maps(4, seed=1), torch.rand(4, 3) < 0.7
    whole = heatmap_loss(heatmaps, target, valid)
    parts = [heatmap_loss(heatmaps[i], target[i], valid[i], count=valid.sum() / 2) for i in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_region_cross_entropy_by_hand():
    p, t = torch.tensor([0.9, 0.3]).double(), torch.tensor([0.5, 0.0]).double()
    scores = torch.logit(p).float().view(1, 1, 1, 1, 2).repeat(2, 1, 2, 1, 1)
    target = t.float().view(1, 1, 1, 2).repeat(1, 2, 1, 1)
    scores[:, :, 1], target[:, 1] = torch.nan, torch.nan  # not annotated
    scores.requires_grad_()
    valid = torch.tensor([[True, False]])
    loss = region_cross_entropy(scores, target, valid)
    divergence = (0.5 * torch.log(0.5 / p[0]) + 0.5 * torch.log(0.5 / (1 - p[0])) - torch.log(1 - p[1])) / 2
    torch.testing.assert_close(loss.double(), 2 * divergence)  # two blocks
    torch.testing.assert_close(region_cross_entropy(scores, target, valid, count=4), loss / 4)
    loss.backward()
    torch.testing.assert_close(scores.grad[1, 0, 0, 0].double(), (p - t) / 2)
    assert scores.grad[:, :, 1].eq(0).all()
    with pytest.raises(ValueError, match=r"scores, target, valid: expected \(L, B, K, h, w\)"):
        region_cross_entropy(scores, target, valid[:, :1])


def test_region_cross_entropy_is_minimal_at_the_target_and_always_finite():
    target, valid = maps(), torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(region_cross_entropy(torch.logit(target), target, valid), torch.tensor(0.0))
    target[0, 0] = torch.tensor([0.0, 1.0]).repeat(10).view(4, 5)
    for z in (-1e30, 1e30):
        scores = torch.full_like(target, z).requires_grad_()
        loss = region_cross_entropy(scores, target, valid)
        loss.backward()
        assert loss.isfinite() and loss > 0 and scores.grad.isfinite().all()


def test_softmax_cross_entropy_by_hand():
    q, t = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([0.5, 0.5, 0.0]).double()
    scores = (q.log() + 7).float().view(1, 1, 1, 1, 3).repeat(2, 1, 2, 1, 1)  # a constant has no effect
    target = (0.6 * t).float().view(1, 1, 1, 3).repeat(1, 2, 1, 1)  # nor has the sum of the target
    scores[:, :, 1], target[:, 1] = torch.nan, torch.nan  # not annotated
    scores.requires_grad_()
    valid = torch.tensor([[True, False]])
    loss = softmax_cross_entropy(scores, target, valid)
    divergence = 0.5 * torch.log(0.5 / q[0]) + 0.5 * torch.log(0.5 / q[1])
    torch.testing.assert_close(loss.double(), 2 * divergence)  # two blocks
    torch.testing.assert_close(softmax_cross_entropy(scores, target, valid, count=4), loss / 4)
    assert softmax_cross_entropy(scores, target, torch.zeros_like(valid)) == 0
    loss.backward()
    torch.testing.assert_close(scores.grad[1, 0, 0, 0].double(), q - t)
    assert scores.grad[:, :, 1].eq(0).all()
    with pytest.raises(ValueError, match=r"scores, target, valid: expected \(L, B, K, h, w\)"):
        softmax_cross_entropy(scores, target, valid[:, :1])


@pytest.mark.parametrize("z", [-1e30, 1e30])
def test_softmax_cross_entropy_is_always_finite(z):
    target, valid = maps(), torch.ones(2, 3, dtype=torch.bool)
    target[0, 0] = 0
    scores = torch.zeros_like(target)
    scores[..., 0, 0] = z
    scores.requires_grad_()
    loss = softmax_cross_entropy(scores, target, valid)
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()


def test_choose_sides():
    """Labels are exchanged where the scores contradict them by more than the margin, with the flags of the joints."""
    flip_index = LSP14.flip_index
    K = len(flip_index)
    target = torch.zeros(3, K, 4, 4).flatten(2)
    target[:, torch.arange(K), torch.arange(K)] = 1
    target = target.view(3, K, 4, 4)
    valid = torch.ones(3, K, dtype=torch.bool)
    valid[:, 0] = False  # right ankle: its counterpart keeps its annotation
    scores = 9 * target.clone()
    scores[1] = scores[1, list(flip_index)]  # the second person is predicted with sides exchanged
    scores[2] = 0  # undecided
    labels, flags, exchanged = choose_sides(scores[None], target, valid, flip_index)
    assert exchanged.tolist() == [False, True, False]
    assert labels[1].equal(target[1, list(flip_index)]) and labels[[0, 2]].equal(target[[0, 2]])
    assert flags[1].equal(valid[1, list(flip_index)]) and flags[[0, 2]].equal(valid[[0, 2]])
    assert softmax_cross_entropy(scores[:2], labels[:2], flags[:2]) < 0.01
    loss = float(softmax_cross_entropy(scores[1:2], target[1:2], valid[1:2]))
    assert not choose_sides(scores, target, valid, flip_index, margin=loss)[2].any()
    assert choose_sides(scores, target, valid, flip_index, margin=loss - 0.1)[2].tolist() == exchanged.tolist()


def test_distillation_target():
    """Both distributions have a sum of 1 before they are mixed; a map of zeros contributes nothing."""
    target, heatmaps = maps(seed=1), 5 * maps(seed=2)
    target[0, 0] = 0
    mixed = distillation_target(target, heatmaps, 0.25)
    assert torch.allclose(mixed.sum((-2, -1)), torch.tensor([[0.25, 1, 1], [1, 1, 1]]))
    expected = 0.75 * target[1, 2] / target[1, 2].sum() + 0.25 * heatmaps[1, 2] / heatmaps[1, 2].sum()
    torch.testing.assert_close(mixed[1, 2], expected)
    with pytest.raises(ValueError, match=r"heatmaps: expected the shape of target, \(2, 3, 4, 5\), got \(1, 3, 4, 5\)"):
        distillation_target(target, heatmaps[:1], 0.25)


def test_region_loss_is_the_noisy_or_loss_of_the_regions():
    scores = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    valid = torch.rand(3, 4) < 0.6
    expected = torch.stack(
        [noisy_or_loss(scores[i].flatten(2).transpose(1, 2), valid, scale=0.7, reduction="mean").loss for i in (0, 1)]
    ).mean()
    torch.testing.assert_close(region_loss(scores, valid, scale=0.7), expected)
    region_loss(scores.bfloat16() * 1000, valid).backward()
    assert scores.grad.isfinite().all()


def test_discriminator_losses_by_hand():
    """D(x) = 2 x: the error of a map is its mean square. Maps without annotation are 0 in both inputs."""
    D = Scale(2.0)
    real, fake = maps(), maps(seed=1).requires_grad_()
    valid = torch.tensor([[True, False, True], [False, True, True]])
    l_real, l_fake = discriminator_losses(D, real, fake, None, valid)
    torch.testing.assert_close(l_real.detach(), real[valid].square().mean())
    torch.testing.assert_close(l_fake, fake[valid].square().mean())
    l_fake.backward()
    assert fake.grad is None and D.a.grad != 0

    class Recorder(nn.Module):
        def forward(self, heatmaps, images):
            assert images.shape[0] == heatmaps.shape[0] == 4
            self.inputs = heatmaps
            return heatmaps

    recorder = Recorder()
    discriminator_losses(recorder, real, fake, torch.zeros(2, 3, 8, 8), valid)
    assert recorder.inputs[:2][~valid].eq(0).all() and recorder.inputs[2:][~valid].eq(0).all()
    assert recorder.inputs[:2][valid].equal(real[valid])


def test_adversarial_gradient_goes_through_the_input_only():
    """l = mean (S − 2 S')² with S constant: dl/dS' = −4 (S − 2 S) / n = 4 S / n; dl/dS would add 2 (S − 2 S) / n."""
    D = Scale(2.0)
    heatmaps = maps().requires_grad_()
    valid = torch.ones(2, 3, dtype=torch.bool)
    loss = adversarial_loss(D, heatmaps, None, valid)
    loss.backward()
    torch.testing.assert_close(loss.detach(), heatmaps.detach().square().mean())
    torch.testing.assert_close(heatmaps.grad, 4 * heatmaps.detach() / heatmaps.numel())
    assert D.a.grad is None and D.a.requires_grad


def test_frozen_parameters_stay_frozen():
    D = PoseDiscriminator(features=8)
    D.autoencoder[0].weight.requires_grad_(False)
    before = [p.requires_grad for p in D.parameters()]
    with pytest.raises(RuntimeError):
        adversarial_loss(D, torch.rand(1, 13, 16, 16), torch.rand(1, 3, 64, 64), torch.ones(1, 13, dtype=torch.bool))
    assert [p.requires_grad for p in D.parameters()] == before


def test_balance_is_equation_20():
    balance = Balance(k=0.1, step=0.01, gamma=0.5)
    assert balance.loss(torch.tensor(3.0), torch.tensor(2.0)) == pytest.approx(2.8)
    balance.update(torch.tensor(3.0), torch.tensor(2.0))  # 0.1 + 0.01 (1.5 - 2)
    assert float(balance.k) == pytest.approx(0.095)
    assert float(balance.convergence(torch.tensor(3.0), torch.tensor(2.0))) == pytest.approx(3.5)
    balance.update(torch.tensor(0.0), torch.tensor(1e6))
    assert balance.k == 0
    balance.update(torch.tensor(1e6), torch.tensor(0.0))
    assert balance.k == 1
    again = Balance()
    again.load_state_dict(balance.state_dict())
    assert again.k == 1
    loss = balance.loss(torch.tensor(3.0, requires_grad=True), torch.tensor(2.0))
    balance.update(torch.tensor(0.0), torch.tensor(1.0))
    loss.backward()  # independent of the update in between
    with pytest.raises(ValueError, match="k: expected 0 to 1, got 2"):
        Balance(k=2)


def test_one_step_of_both_in_bf16():
    """One training step of both networks: finite, and each loss reaches its own network only."""
    torch.manual_seed(0)
    G, D = PoseGenerator(input_size=64, features=16), PoseDiscriminator(features=16)
    images, target = torch.randn(4, 3, 64, 64), maps(4, 14, 16, 16)
    valid = torch.rand(4, 14) < 0.9
    with torch.autocast("cpu", torch.bfloat16):
        output = G(images, all_blocks=True)
        last = output.heatmaps[-1]
        loss = heatmap_loss(output.heatmaps, target, valid) + 0.1 * region_loss(output.scores, valid)
        loss = loss + adversarial_loss(D, last, images, valid)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in G.parameters())
    assert all(p.grad is None for p in D.parameters())
    before = [p.grad.clone() for p in G.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        real, fake = discriminator_losses(D, target, last, images, valid)
    Balance(k=0.5).loss(real, fake).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in D.parameters())
    assert all(p.grad.equal(b) for p, b in zip(G.parameters(), before, strict=True))
