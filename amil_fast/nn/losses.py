"""Losses for bags: margin loss on the length of bag vectors (Eq. 6), cross-entropy over levels, and the noisy-OR losses
of scored instances (Eq. 10-18). All are computed in forms that need no clamping.
"""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from amil_fast.nn.bag_view import BagView
from amil_fast.ops.bags import without_autocast


def margin_loss(
    bag: torch.Tensor,
    labels: torch.Tensor,
    *,
    m_plus: float = 0.9,
    m_minus: float = 0.1,
    negative_weight: float = 1.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """Margin loss on the length of bag vectors: ``L = Y·max(0, m⁺ − ‖s‖)² + λ(1 − Y)·max(0, ‖s‖ − m⁻)²`` (Eq. 6).

    Args:
        bag: ``(..., D)`` bag vectors s; those of adjust pooling have lengths in [0, 1).
        labels: ``(...)``, 0 or 1.
        m_plus: minimum length of positive bags.
        m_minus: maximum length of negative bags.
        negative_weight: λ. 1 in the paper; Sabour et al. (2017) use 0.5.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(...)`` for ``"none"``. The gradient at ``s = 0`` is 0.

    Raises:
        ValueError: ``labels`` of another shape, or an unknown reduction.
    """
    length = torch.linalg.vector_norm(bag, dim=-1)
    if labels.shape != length.shape:
        raise ValueError(f"labels: expected shape {tuple(length.shape)}, got {tuple(labels.shape)}")
    y = labels.to(length.dtype)
    short, long = F.relu(m_plus - length), F.relu(length - m_minus)
    return _reduce(y * short.square() + negative_weight * (1 - y) * long.square(), reduction)


def level_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float = 0.0, reduction: str = "mean"
) -> torch.Tensor:
    """Cross-entropy of every level's scores with the bag labels (deep supervision).

    Args:
        logits: ``(L, B)`` for binary, ``(L, B, C)`` for multi-class labels: ``MIROutput.logits``.
        labels: ``(B,)``, 0 or 1, or int64 class indices.
        label_smoothing: fraction of the target distributed over all classes.
        reduction: ``"mean"`` over levels and bags, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(L, B)`` for ``"none"``.

    Raises:
        ValueError: shapes that do not match, or an unknown reduction.
    """
    if logits.dim() not in (2, 3) or labels.shape != logits.shape[1:2]:
        raise ValueError(
            f"logits, labels: expected shapes (L, B) or (L, B, C) and (B,), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if logits.dim() == 2:
        target = labels.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
        loss = F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none")
    else:
        target = labels.expand(logits.shape[:2])
        loss = F.cross_entropy(
            logits.flatten(0, 1), target.flatten(), label_smoothing=label_smoothing, reduction="none"
        ).view(target.shape)
    return _reduce(loss, reduction)


class NoisyOrLoss(NamedTuple):
    """Result of :func:`noisy_or_loss`.

    Attributes:
        loss: the reduced loss.
        bag: ``(B, C)`` bag loss (10), 0 for empty bags.
        instance: ``(B, C)`` mean instance loss (14), 0 for empty bags.
        gap: ``(B, C)`` their distance d (15), 0 for empty bags.
        log_probability: ``(B, C)`` log p of the bag (11), −inf for empty bags.
    """

    loss: torch.Tensor
    bag: torch.Tensor
    instance: torch.Tensor
    gap: torch.Tensor
    log_probability: torch.Tensor


def noisy_or_loss(
    scores: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float = 1.0,
    gap_weight: float = 1.0,
    activation: str | None = "softplus",
    reduction: str = "sum",
) -> NoisyOrLoss:
    r"""Bag and instance losses of scored instances (Eq. 10-18): a bag has a class if one of its instances has it.

    With :math:`h_j \ge 0` computed from the scores, for every class

    .. math::
        q_j = 1 - e^{-\lambda h_j} \;(12), \quad p = 1 - e^{-\lambda \sum_j h_j} \;(11), \quad
        L_{bag} = -y \log p - (1 - y) \log(1 - p) \;(10)

        L_{inst} = \tfrac1m \sum_j -u_j \log q_j - (1 - u_j) \log(1 - q_j), \quad
        u_j = y \cdot [q_j \ge 1/2] \text{ held constant} \;(14), \quad d = |L_{bag} - L_{inst}| \;(15)

    The loss of a positive bag is :math:`L_{bag} + \lambda_{gap} d^2` (16), of a negative bag :math:`L_{inst}` (17).

    Computed in the log domain, without clamping. With ``activation="softplus"`` values and gradients are finite for
    every finite score; since ``1 − exp(−softplus(z)) = sigmoid(z)``, for λ = 1 the scores are the instances' logits.

    Args:
        scores: ``(B, N, C)`` padded or ``(total, C)`` packed, a column per class.
        labels: ``(B, C)``, 1 if bag b has class c, otherwise 0.
        mask: ``(B, N)``, as for :func:`amil_fast.ops.adjust_pool`.
        lengths: ``(B,)``, as for :func:`amil_fast.ops.adjust_pool`.
        cu_seqlens: ``(B + 1,)``, as for :func:`amil_fast.ops.adjust_pool`.
        scale: λ of (12).
        gap_weight: λ_gap of (16).
        activation: ``"softplus"``: :math:`h = \log(1 + e^z)` of the scores z. ``None``: the scores are h >= 0
            themselves; a positive bag whose h are all 0 has p = 0 and infinite loss.
        reduction: ``"sum"`` over bags and classes as in the paper, ``"mean"`` or ``"none"``.

    Returns:
        :class:`NoisyOrLoss`. For the bag loss ∂L/∂h = λ(1 − y/p).

    Raises:
        TypeError, ValueError: as :func:`amil_fast.ops.adjust_pool`; ``labels`` of another shape, an unknown activation
            or reduction.
    """
    bags = BagView(scores, mask, lengths, cu_seqlens)
    if labels.shape != (bags.num_bags, bags.x.shape[-1]):
        raise ValueError(
            f"labels: expected shape ({bags.num_bags}, {bags.x.shape[-1]}) (B, C), got {tuple(labels.shape)}"
        )
    with without_autocast(bags.x.device.type):
        a, a_bag, log_a_bag = _evidence(bags, scale, activation)
        sizes = bags.sizes()[:, None]
        positive = (labels != 0) & (sizes > 0)
        # Restricted to positive bags: log p of a bag without evidence would give 0 · ∞ in the backward pass.
        log_p = _log1mexp(torch.where(positive, a_bag, 1), log_a_bag)
        bag = torch.where(positive, -log_p, a_bag)  # a_bag is 0 for empty bags
        # Padding has a = 0, hence u = 0 and no loss.
        u = bags.spread(positive) & (a.detach() >= math.log(2))
        instance = bags.sum(torch.where(u, -_log1mexp(torch.where(u, a, 1)), a)) / sizes.clamp(min=1)
        gap = (bag - instance).abs()
        loss = torch.where(positive, bag + gap_weight * gap.square(), instance)
        log_probability = _bag_log_probability(bags, a_bag.detach(), log_a_bag)
    return NoisyOrLoss(_reduce(loss, reduction), bag, instance, gap, log_probability.detach())


def noisy_or(
    scores: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float = 1.0,
    activation: str | None = "softplus",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probability that a bag has a class, from the scores of its instances: ``p = 1 − exp(−λ Σ_j h_j)`` (11).

    Arguments as for :func:`noisy_or_loss`.

    Returns:
        ``(log p, log(1 − p))``, each ``(B, C)`` in float32 (float64 for float64); ``(−inf, 0)`` for empty bags. Their
        difference is the bag's logit.
    """
    return noisy_or_of(BagView(scores, mask, lengths, cu_seqlens), scale, activation)


def noisy_or_of(
    bags: BagView, scale: float = 1.0, activation: str | None = "softplus"
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`noisy_or` of validated bags, whose instances are scores."""
    with without_autocast(bags.x.device.type):
        _, a_bag, log_a_bag = _evidence(bags, scale, activation)
        return _bag_log_probability(bags, a_bag, log_a_bag), -a_bag


def _evidence(bags, scale, activation):
    """``a = λh`` per instance, its sum over each bag ``a_bag = −log(1 − p)``, and ``log a_bag``.

    The last one is computed from the logarithms of the scores and stays finite where ``a_bag`` underflows; it is None
    if the scores are h.
    """
    if activation not in ("softplus", None):
        raise ValueError(f"activation: expected 'softplus' or None, got {activation!r}")
    z = bags.wide()
    real = torch.ones_like(z, dtype=torch.bool) if bags.mask is None else bags.mask[:, :, None].expand_as(z)
    empty = (bags.sizes() == 0)[:, None]
    a = torch.where(real, scale * (_softplus(z) if activation else z), 0)
    a_bag = bags.sum(a)
    log_a_bag = None
    if activation:
        log_a = math.log(scale) + _log_softplus(z)
        largest = bags.max(log_a.detach())
        e = torch.where(real, torch.exp(log_a - bags.spread(largest)), 0)
        log_a_bag = largest + torch.log(torch.where(empty, 1, bags.sum(e)))
    return a, a_bag, log_a_bag


def _bag_log_probability(bags, a_bag, log_a_bag):
    empty = (bags.sizes() == 0)[:, None]
    return _log1mexp(torch.where(empty, 1, a_bag), log_a_bag).masked_fill(empty, -torch.inf)


def _log1mexp(a, log_a=None):
    """``log(1 − exp(−a))`` for a >= 0; with ``log_a`` also for a that underflows."""
    if log_a is not None:
        tiny = a < torch.finfo(a.dtype).eps  # log(1 − e^{−a}) = log a − a/2 + …
        return torch.where(tiny, log_a, _log1mexp(torch.where(tiny, 1, a)))
    large = a > math.log(2)  # each form on its accurate side, with an argument of 1 on the other side
    return torch.where(
        large,
        torch.log1p(-torch.exp(-torch.where(large, a, 1))),
        torch.log(-torch.expm1(-torch.where(large, 1, a))),
    )


def _softplus(z):
    """``log(1 + e^z)``; the default threshold of 20 costs float64 half of its digits."""
    return F.softplus(z, threshold=40)


def _log_softplus(z):
    """``log(log(1 + e^z))``, which equals z where e^z is below the rounding error."""
    tiny = z < math.log(torch.finfo(z.dtype).eps)
    return torch.where(tiny, z, torch.log(_softplus(torch.where(tiny, 0, z))))


def _reduce(loss, reduction):
    if reduction == "none":
        return loss
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
