"""Losses of generator and discriminator. Heatmap losses exclude joints that are not annotated."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from amil_fast.nn.losses import noisy_or_loss
from amil_fast.pose.models.regions import regions


def heatmap_loss(
    heatmaps: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, count: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Squared error, averaged over pixels and valid joints, summed over blocks.

    Args:
        heatmaps: ``(L, B, K, h, w)``, or ``(B, K, h, w)`` for one block.
        target: ``(B, K, h, w)``.
        valid: ``(B, K)`` bool, joints included in the loss.
        count: number of joints to divide by; by default the number of valid ones. In data-parallel training: the number
            over all processes divided by the number of processes, so that averaged gradients equal those of a single
            process with the whole batch.

    Returns:
        A float32 scalar; 0 if no joint is valid.
    """
    _check_maps("heatmaps", heatmaps, target, valid)
    # Masked before squaring: maps of joints without annotation may hold anything, NaN included.
    error = _mask(heatmaps.float() - target.float(), valid)
    return _mean_over_joints(error.square(), valid, count)


def region_cross_entropy(
    scores: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, count: torch.Tensor | float | None = None
) -> torch.Tensor:
    r"""Cross-entropy between target heatmaps and region probabilities, averaged and summed as in :func:`heatmap_loss`.

    A heatmap value is the probability q that the region contains the joint (Eq. 12). This is the instance loss of
    Eq. 14 with the target t in place of the pseudo label, minus the entropy of the target, so that the minimum is 0:

    .. math:: \sum t \log \frac{t}{q} + (1 - t) \log \frac{1 - t}{1 - q}, \quad q = \mathrm{sigmoid}(z)

    The gradient q − t does not vanish at confident mistakes, unlike that of the squared error.

    Args:
        scores: ``(L, B, K, h, w)`` or ``(B, K, h, w)``, :attr:`amil_fast.pose.PoseOutput.scores` z of a generator with
            ``mil_scale=1``.
        target: ``(B, K, h, w)`` in [0, 1].
        valid, count: as for :func:`heatmap_loss`.

    Returns:
        A float32 scalar; 0 if no joint is valid, finite for all finite scores.
    """
    _check_maps("scores", scores, target, valid)
    z, t = _mask(scores.float(), valid), _mask(target.float(), valid)
    entropy = -torch.xlogy(t, t) - torch.xlogy(1 - t, 1 - t)
    excess = F.binary_cross_entropy_with_logits(z, t.expand_as(z), reduction="none") - entropy
    return _mean_over_joints(_mask(excess, valid), valid, count)


def softmax_cross_entropy(
    scores: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, count: torch.Tensor | float | None = None
) -> torch.Tensor:
    r"""Spatial cross-entropy: exactly one region contains the joint.

    The softmax q of the scores over all regions of a map is compared with the target t normalized to a sum of 1, minus
    the entropy of the target, so that the minimum is 0:

    .. math:: \sum t \log \frac{t}{q}, \quad q = \mathrm{softmax}(z)

    Args:
        scores: ``(L, B, K, h, w)`` or ``(B, K, h, w)``, :attr:`amil_fast.pose.PoseOutput.scores` z.
        target: ``(B, K, h, w)``, non-negative.
        valid: ``(B, K)`` bool, joints included in the loss; maps of joints outside the crop must not be.
        count: as for :func:`heatmap_loss`.

    Returns:
        A float32 scalar, in nats per joint, summed over blocks; 0 if no joint is valid.
    """
    divergence = _softmax_divergence(scores, target, valid)
    return divergence.sum() / _count(valid, count)


def choose_sides(
    scores: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, flip_index: Sequence[int], margin: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exchanges left and right in the labels of whole poses where that agrees better with the scores.

    LSPET's annotators exchanged the sides of many people. The labels of a crop are exchanged if this lowers the
    :func:`softmax_cross_entropy` of the last block, averaged over the crop's valid joints, by more than ``margin``.

    Args:
        scores, target, valid: as for :func:`softmax_cross_entropy`.
        flip_index: index of each joint's counterpart, :attr:`amil_fast.pose.Skeleton.flip_index`.
        margin: least improvement in nats per joint.

    Returns:
        ``(target, valid, exchanged)``: the labels to train with, and ``(B,)`` bool.
    """
    index = torch.as_tensor(flip_index, device=target.device)
    last = (scores if scores.dim() == 4 else scores[-1]).detach()
    other_target, other_valid = target[:, index], valid[:, index]
    loss, other_loss = (
        _softmax_divergence(last, t, v).sum(-1) / v.sum(-1).clamp(min=1)
        for t, v in ((target, valid), (other_target, other_valid))
    )
    exchanged = other_loss < loss - margin
    target = torch.where(exchanged[:, None, None, None], other_target, target)
    return target, torch.where(exchanged[:, None], other_valid, valid), exchanged


def distillation_target(target: torch.Tensor, heatmaps: torch.Tensor, weight: float) -> torch.Tensor:
    """Mixture of annotated and predicted distributions, a target of :func:`softmax_cross_entropy`.

    Args:
        target: ``(B, K, h, w)``, non-negative.
        heatmaps: ``(B, K, h, w)``, non-negative: the predictions of a teacher.
        weight: of the predictions, 0 to 1.

    Returns:
        ``(B, K, h, w)`` float32, ``(1 - weight) target + weight heatmaps``, each normalized to a sum of 1 before; maps
        without any positive value stay 0.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    if target.shape != heatmaps.shape:
        raise ValueError(f"heatmaps: expected the shape of target, {tuple(target.shape)}, got {tuple(heatmaps.shape)}")
    return torch.lerp(_normalized(target.float()), _normalized(heatmaps.float()), weight)


def region_loss(scores: torch.Tensor, valid: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Multiple-instance loss of the regions (Eq. 10-18).

    The regions of a crop form a bag, whose label for joint k is "joint k is annotated in this crop".

    Args:
        scores: ``(L, B, K, h, w)``, :attr:`amil_fast.pose.PoseOutput.scores`.
        valid: ``(B, K)`` bool, the bag labels.
        scale: λ of Eq. 12, the generator's ``mil_scale``.

    Returns:
        A float32 scalar: the mean of :func:`amil_fast.nn.noisy_or_loss` over blocks, crops and joints.
    """
    instances = regions(scores.flatten(0, 1))
    return noisy_or_loss(instances, valid.repeat(len(scores), 1), scale=scale, reduction="mean").loss


def discriminator_losses(
    discriminator: Callable[..., torch.Tensor],
    real: torch.Tensor,
    fake: torch.Tensor,
    images: torch.Tensor | None,
    valid: torch.Tensor,
    count: torch.Tensor | float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstruction errors of true and generated heatmaps, ``l_real`` and ``l_fake`` of Eq. 19.

    Args:
        discriminator: ``(heatmaps, images) -> heatmaps``.
        real, fake: ``(B, K, h, w)``, ground truth and generated heatmaps; detached.
        images: ``(B, 3, H, W)``, or None for a discriminator without ``use_image``.
        valid, count: as for :func:`heatmap_loss`. Maps of other joints are set to 0 in both inputs, so that missing
            annotations do not distinguish real from fake.

    Returns:
        ``(l_real, l_fake)``, float32 scalars.
    """
    real, fake = (_mask(maps.detach(), valid) for maps in (real, fake))
    # One forward pass for both: half the launches, and shared batch statistics.
    both = discriminator(torch.cat([real, fake]), None if images is None else torch.cat([images, images]))
    found_real, found_fake = both.split(len(real))
    return heatmap_loss(found_real, real, valid, count), heatmap_loss(found_fake, fake, valid, count)


def adversarial_loss(
    discriminator: nn.Module,
    heatmaps: torch.Tensor,
    images: torch.Tensor | None,
    valid: torch.Tensor,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Adversarial term of the generator: ``l_fake`` with the gradient through the discriminator's input only.

    Neither the copy of the heatmaps on the other side of the difference nor the discriminator's parameters receive a
    gradient.

    Args:
        discriminator: the bare module, without a data-parallel wrapper (no parameter gradients to reduce).
        heatmaps: ``(B, K, h, w)`` of the generator's last block.
        images, valid, count: as for :func:`discriminator_losses`.

    Returns:
        A float32 scalar.
    """
    heatmaps = _mask(heatmaps, valid)
    with _frozen(discriminator):
        return heatmap_loss(discriminator(heatmaps, images), heatmaps.detach(), valid, count)


class Balance(nn.Module):
    """BEGAN's balance between generator and discriminator.

    The discriminator's loss is ``l_D = l_real − k l_fake`` (Eq. 19); after every step
    ``k ← clip(k + ω (γ l_real − l_fake), 0, 1)`` (Eq. 20). ``k`` is a float32 buffer on the device of the losses;
    nothing synchronizes with the host. The defaults are those of Chou et al. 2017.

    Args:
        k: initial value.
        step: ω.
        gamma: γ, the target ratio l_fake / l_real.
    """

    def __init__(self, k: float = 0.0, step: float = 0.001, gamma: float = 0.5):
        super().__init__()
        if not 0 <= k <= 1:
            raise ValueError(f"k: expected 0 to 1, got {k}")
        if step < 0 or gamma < 0:
            raise ValueError(f"step, gamma: expected at least 0, got {step}, {gamma}")
        self.step, self.gamma = step, gamma
        self.k: torch.Tensor
        self.register_buffer("k", torch.tensor(float(k)))

    def loss(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """The discriminator's loss (Eq. 19)."""
        return real - self.k.clone() * fake

    @torch.no_grad()
    def update(self, real: torch.Tensor, fake: torch.Tensor) -> None:
        """Updates ``k`` (Eq. 20); the losses must already be averaged over all processes."""
        self.k.add_(self.step * (self.gamma * real - fake)).clamp_(0, 1)

    def convergence(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """BEGAN's convergence measure, ``l_real + |γ l_real − l_fake|``."""
        return (real + (self.gamma * real - fake).abs()).detach()


def _check_maps(name, maps, target, valid):
    if target.dim() != 4 or valid.shape != target.shape[:2] or maps.shape[-4:] != target.shape:
        raise ValueError(
            f"{name}, target, valid: expected (L, B, K, h, w), (B, K, h, w) and (B, K), got "
            f"{tuple(maps.shape)}, {tuple(target.shape)} and {tuple(valid.shape)}"
        )


def _softmax_divergence(scores, target, valid):
    """Kullback-Leibler divergence ``(..., B, K)`` of the softmax from the normalized target, 0 where not valid."""
    _check_maps("scores", scores, target, valid)
    log_q = F.log_softmax(_mask(scores.float(), valid).flatten(-2), -1)
    t = _normalized(_mask(target.float(), valid)).flatten(-2)
    return torch.xlogy(t, t).sum(-1) - (t * log_q).sum(-1)


def _normalized(maps):
    """Maps divided by their sums; maps of zeros stay 0."""
    return maps / maps.sum((-2, -1), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def _count(valid, count):
    count = valid.sum() if count is None else torch.as_tensor(count, device=valid.device)
    return count.clamp(min=1)


def _mean_over_joints(values, valid, count):
    return values.mean((-1, -2)).sum() / _count(valid, count)


def _mask(maps, valid):
    """Maps ``(..., B, K, h, w)`` with those of joints that are not valid set to 0."""
    return torch.where(valid[..., None, None], maps, 0)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Excludes the parameters of ``module`` from autograd; frozen ones stay frozen afterwards."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
