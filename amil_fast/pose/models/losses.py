"""Losses of generator and discriminator. Joints that aren't annotated count in none of the heatmap losses."""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from amil_fast.nn.losses import noisy_or_loss
from amil_fast.pose.models.regions import regions


def heatmap_loss(heatmaps, target, valid, count=None):
    """Squared error, averaged over pixels and annotated joints, summed over blocks.

    Args:
        heatmaps: ``(L, B, K, h, w)``, or ``(B, K, h, w)`` for one block.
        target: ``(B, K, h, w)``.
        valid: ``(B, K)`` bool, joints that count.
        count: number of joints to divide by; by default that of ``valid``. With several processes: the number in all
            of them over the number of processes, so that averaged gradients are those of one process with all crops.

    Returns:
        A float32 scalar; 0 where no joint is valid.
    """
    _check_maps("heatmaps", heatmaps, target, valid)
    # Before squaring: what stands in the maps of a joint without annotation must not matter, NaN included.
    error = _only(valid, heatmaps.float() - target.float())
    return _mean_over_joints(error.square(), valid, count)


def region_cross_entropy(scores, target, valid, count=None):
    r"""Cross-entropy of the regions' probabilities with target heatmaps, averaged and summed as :func:`heatmap_loss`.

    A heatmap value is the probability q that this region holds this joint (PAPER §5); this is the instance loss (14)
    with the target t in place of the pseudo label, less the target's own entropy, so that the best value is 0:

    .. math:: \sum t \log \frac{t}{q} + (1 - t) \log \frac{1 - t}{1 - q}, \quad q = \mathrm{sigmoid}(z)

    Unlike that of the squared error, the gradient q − t does not fade where a region is wrong and sure of it.

    Args:
        scores: ``(L, B, K, h, w)`` or ``(B, K, h, w)``, :attr:`amil_fast.pose.PoseOutput.scores` z of a generator with
            ``mil_scale=1``.
        target: ``(B, K, h, w)`` in [0, 1].
        valid, count: as for :func:`heatmap_loss`.

    Returns:
        A float32 scalar; 0 where no joint is valid. Finite for every finite score.
    """
    _check_maps("scores", scores, target, valid)
    z, t = _only(valid, scores.float()), _only(valid, target.float())
    entropy = -torch.xlogy(t, t) - torch.xlogy(1 - t, 1 - t)
    excess = F.binary_cross_entropy_with_logits(z, t.expand_as(z), reduction="none") - entropy
    return _mean_over_joints(_only(valid, excess), valid, count)


def region_loss(scores, valid, scale=1.0):
    """The multiple-instance loss of PAPER §4: the regions of a crop are a bag, its label for joint k is "k is annotated
    in this crop".

    Args:
        scores: ``(L, B, K, h, w)``, :attr:`amil_fast.pose.PoseOutput.scores`.
        valid: ``(B, K)`` bool.
        scale: λ, the generator's ``mil_scale``.

    Returns:
        A float32 scalar: the mean of :func:`amil_fast.nn.noisy_or_loss` over blocks, crops and joints.
    """
    bags = regions(scores.flatten(0, 1))
    return noisy_or_loss(bags, valid.repeat(len(scores), 1), scale=scale, reduction="mean").loss


def discriminator_losses(discriminator, real, fake, images, valid, count=None):
    """How well the discriminator reconstructs true and generated heatmaps, ``(l_real, l_fake)`` of PAPER §6.

    Args:
        discriminator: ``(heatmaps, images) -> heatmaps``.
        real, fake: ``(B, K, h, w)``, ground truth and generated; no gradient goes to them.
        images: ``(B, 3, H, W)``.
        valid, count: as for :func:`heatmap_loss`. Maps of joints that aren't valid are 0 in either input: their
            absence must not tell real from fake.
    """
    real, fake = (_only(valid, maps.detach()) for maps in (real, fake))
    # One pass for both: half the launches, and batch statistics that don't tell them apart.
    both = discriminator(torch.cat([real, fake]), None if images is None else torch.cat([images, images]))
    found_real, found_fake = both.split(len(real))
    return heatmap_loss(found_real, real, valid, count), heatmap_loss(found_fake, fake, valid, count)


def adversarial_loss(discriminator, heatmaps, images, valid, count=None):
    """``l_fake`` as the generator sees it: through the discriminator's input only.

    The gradient goes neither to the copy of the heatmaps that the reconstruction is compared with, nor to the
    discriminator's parameters.

    Args:
        discriminator: not wrapped for data parallelizm (its parameters get no gradient to reduce).
        heatmaps: ``(B, K, h, w)``, the generator's last block.
        images, valid, count: as for :func:`discriminator_losses`.
    """
    heatmaps = _only(valid, heatmaps)
    with _frozen(discriminator):
        return heatmap_loss(discriminator(heatmaps, images), heatmaps.detach(), valid, count)


class Balance(nn.Module):
    """The balance of BEGAN between the two: ``l_D = l_real − k l_fake`` (19), and after every step
    ``k ← clip(k + ω (γ l_real − l_fake), 0, 1)`` (20).

    Args:
        k: value to start from.
        step: ω.
        gamma: γ, the ratio l_fake / l_real to be held.

    The defaults are those of Chou et al. 2017. ``k`` is a float32 buffer on the losses' device: nothing is read back.
    """

    def __init__(self, k=0.0, step=0.001, gamma=0.5):
        super().__init__()
        if not 0 <= k <= 1:
            raise ValueError(f"k: expected 0 to 1, got {k}")
        if step < 0 or gamma < 0:
            raise ValueError(f"step, gamma: expected at least 0, got {step}, {gamma}")
        self.step, self.gamma = step, gamma
        self.register_buffer("k", torch.tensor(float(k)))

    def loss(self, real, fake):
        """What the discriminator minimizes (19)."""
        return real - self.k.clone() * fake

    @torch.no_grad()
    def update(self, real, fake):
        """One step of (20), with the losses averaged over all processes."""
        self.k.add_(self.step * (self.gamma * real - fake)).clamp_(0, 1)

    def convergence(self, real, fake):
        """BEGAN's measure of convergence, ``l_real + |γ l_real − l_fake|``."""
        return (real + (self.gamma * real - fake).abs()).detach()


def _check_maps(name, maps, target, valid):
    if target.dim() != 4 or valid.shape != target.shape[:2] or maps.shape[-4:] != target.shape:
        raise ValueError(
            f"{name}, target, valid: expected (L, B, K, h, w), (B, K, h, w) and (B, K), got "
            f"{tuple(maps.shape)}, {tuple(target.shape)} and {tuple(valid.shape)}"
        )


def _mean_over_joints(values, valid, count):
    count = valid.sum() if count is None else torch.as_tensor(count, device=valid.device)
    return values.mean((-1, -2)).sum() / count.clamp(min=1)


def _only(valid, maps):
    return torch.where(valid[..., None, None], maps, 0)


@contextmanager
def _frozen(module):
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
