"""Losses for bags: margin loss on the length of a bag's vector, cross-entropy over levels, and the noisy-OR losses of
scored instances (PAPER §4), all written so that no value has to be clamped.
"""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from amil_fast.nn.bag_view import BagView


def margin_loss(bag, labels, *, m_plus=0.9, m_minus=0.1, negative_weight=1.0, reduction="mean"):
    """``L = Y·max(0, m⁺ − ‖s‖)² + λ(1 − Y)·max(0, ‖s‖ − m⁻)²`` (Eq. 6).

    Args:
        bag: ``(..., D)`` bag vectors s, of length in [0, 1) where they come from adjust pooling.
        labels: ``(...)``, 0 or 1.
        m_plus, m_minus: the length to reach for positive bags and to stay under for negative ones.
        negative_weight: λ. 1 as printed; Sabour et al. use 0.5.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``(...)`` for ``"none"``. The gradient at ``s = 0`` is 0 (the length has none there).
    """
    length = torch.linalg.vector_norm(bag, dim=-1)
    if labels.shape != length.shape:
        raise ValueError(f"labels: expected shape {tuple(length.shape)}, got {tuple(labels.shape)}")
    y = labels.to(length.dtype)
    short, long = F.relu(m_plus - length), F.relu(length - m_minus)
    return _reduce(y * short.square() + negative_weight * (1 - y) * long.square(), reduction)


def level_loss(logits, labels, *, label_smoothing=0.0, reduction="mean"):
    """Deep supervision: the cross-entropy of every level's scores with the same bag labels.

    Args:
        logits: ``(L, B)`` with ``labels (B,)`` of 0 and 1 (binary cross-entropy), or ``(L, B, C)`` with int64 class
            numbers ``labels (B,)``: :attr:`amil_fast.nn.MIROutput.logits`.
        label_smoothing: share of the target spread evenly over the classes.
        reduction: ``"mean"`` over levels and bags, ``"sum"`` or ``"none"`` (``(L, B)``).
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
    """What :func:`noisy_or_loss` returns; the last four are ``(B, C)``, 0 for empty bags."""

    loss: torch.Tensor  # reduced as asked for
    bag: torch.Tensor  # bag loss (10)
    instance: torch.Tensor  # mean instance loss (14)
    gap: torch.Tensor  # their distance d (15)
    log_probability: torch.Tensor  # log p of the bag (11), −inf for empty bags


def noisy_or_loss(
    scores,
    labels,
    mask=None,
    *,
    lengths=None,
    cu_seqlens=None,
    scale=1.0,
    gap_weight=1.0,
    activation="softplus",
    reduction="sum",
):
    r"""The bag and instance losses of scored instances (Eq. 10-18): a bag holds a class iff one of its instances does.

    With :math:`h_j \ge 0` from the scores, per class

    .. math::
        q_j = 1 - e^{-\lambda h_j} \;(12), \quad p = 1 - e^{-\lambda \sum_j h_j} \;(11), \quad
        L_{bag} = -y \log p - (1 - y) \log(1 - p) \;(10)

        L_{inst} = \tfrac1m \sum_j -u_j \log q_j - (1 - u_j) \log(1 - q_j), \quad
        u_j = y \cdot [q_j \ge 1/2] \text{ held constant} \;(14), \quad d = |L_{bag} - L_{inst}| \;(15)

    and a positive bag's loss is :math:`L_{bag} + \lambda_{gap} d^2` (16), a negative one's :math:`L_{inst}` (17).

    Everything is computed from logarithms, nothing is clamped. With ``activation="softplus"`` values and gradients are
    finite for every finite score; ``1 − exp(−softplus(z))`` is ``sigmoid(z)``, so for λ = 1 the scores are the
    instances' logits.

    Args:
        scores: ``(B, N, C)`` padded or ``(total, C)`` packed, one column per class; the four input forms of
            :func:`amil_fast.adjust_pool`.
        labels: ``(B, C)``, 0 or 1: whether bag b holds class c.
        scale: λ of (12).
        gap_weight: λ_gap of (16).
        activation: ``"softplus"``: :math:`h = \log(1 + e^z)` of the scores z. ``None``: the scores are h >= 0
            themselves; a positive bag whose h are all 0 has p = 0 and so, as the equation says, infinite loss.
        reduction: ``"sum"`` over bags and classes as printed, ``"mean"`` or ``"none"``.

    Returns:
        :class:`NoisyOrLoss`. For the bag loss ∂L/∂h = λ(1 − y/p).
    """
    bags = BagView(scores, mask, lengths, cu_seqlens)
    if labels.shape != (bags.count, bags.x.shape[-1]):
        raise ValueError(f"labels: expected shape ({bags.count}, {bags.x.shape[-1]}) (B, C), got {tuple(labels.shape)}")
    with torch.autocast(bags.x.device.type, enabled=False):
        a, a_bag, log_a_bag = _noisy_or(bags, scale, activation)
        sizes = bags.sizes()[:, None]
        positive = (labels != 0) & (sizes > 0)
        # Only where it is used: log p of a bag without evidence would send 0 · ∞ back.
        log_p = _log1mexp(torch.where(positive, a_bag, 1), log_a_bag)
        bag = torch.where(positive, -log_p, a_bag)  # a_bag is 0 for empty bags
        # A padded instance has a = 0 and so u = 0 and no loss.
        u = bags.spread(positive) & (a.detach() >= math.log(2))
        instance = bags.sum(torch.where(u, -_log1mexp(torch.where(u, a, 1)), a)) / sizes.clamp(min=1)
        gap = (bag - instance).abs()
        loss = torch.where(positive, bag + gap_weight * gap.square(), instance)
        log_probability = _bag_log_probability(bags, a_bag.detach(), log_a_bag)
    return NoisyOrLoss(_reduce(loss, reduction), bag, instance, gap, log_probability.detach())


def noisy_or(scores, mask=None, *, lengths=None, cu_seqlens=None, scale=1.0, activation="softplus"):
    """Probability that a bag holds a class, from its instances' scores: ``p = 1 − exp(−λ Σ_j h_j)`` (11).

    The arguments are those of :func:`noisy_or_loss`.

    Returns:
        ``(log p, log(1 − p))``, each ``(B, C)`` in float32 (float64 for float64); ``(−inf, 0)`` for empty bags. Their
        difference is the bag's logit.
    """
    bags = BagView(scores, mask, lengths, cu_seqlens)
    with torch.autocast(bags.x.device.type, enabled=False):
        _, a_bag, log_a_bag = _noisy_or(bags, scale, activation)
        return _bag_log_probability(bags, a_bag, log_a_bag), -a_bag


def _noisy_or(bags, scale, activation):
    """``a = λh`` per instance, its sum over each bag ``a_bag = −log(1 − p)``, and ``log a_bag``.

    The latter, from the logarithms of the scores, survives where a_bag underflows to 0; None where the scores are h.
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
    """``log(1 − exp(−a))`` for a >= 0; with ``log_a`` also where a itself is too small for its dtype."""
    if log_a is not None:
        tiny = a < torch.finfo(a.dtype).eps  # log(1 − e^{−a}) = log a − a/2 + …
        return torch.where(tiny, log_a, _log1mexp(torch.where(tiny, 1, a)))
    large = a > math.log(2)  # each form where it keeps its digits, on an argument that leaves the other one finite
    return torch.where(
        large,
        torch.log1p(-torch.exp(-torch.where(large, a, 1))),
        torch.log(-torch.expm1(-torch.where(large, 1, a))),
    )


def _softplus(z):
    """``log(1 + e^z)``; PyTorch's own threshold of 20 costs float64 half its digits."""
    return F.softplus(z, threshold=40)


def _log_softplus(z):
    """``log(log(1 + e^z))``, which is z where e^z is below the dtype's rounding."""
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
