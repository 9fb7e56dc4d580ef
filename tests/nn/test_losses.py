"""Losses for bags against hand-computed values, closed-form gradients and finite differences."""

import math

import pytest
import torch

from amil_fast.nn import level_loss, margin_loss, noisy_or_loss
from tests.helpers import relative_error


def test_margin_loss_by_hand():
    bag = torch.tensor([[0.3, 0.4], [0.0, 0.95], [0.3, 0.4], [0.0, 0.05]])  # lengths .5 .95 .5 .05
    labels = torch.tensor([1, 1, 0, 0])
    each = margin_loss(bag, labels, negative_weight=0.5, reduction="none")
    assert torch.allclose(each, torch.tensor([0.16, 0.0, 0.08, 0.0]))
    assert torch.allclose(margin_loss(bag, labels), torch.tensor(0.32 / 4))
    assert torch.allclose(margin_loss(bag, labels, reduction="sum"), torch.tensor(0.32))
    each = margin_loss(bag, labels, m_plus=1.0, m_minus=0.0, reduction="none")
    assert torch.allclose(each, torch.tensor([0.25, 0.0025, 0.25, 0.0025]))


def test_margin_loss_gradient():
    torch.manual_seed(0)
    bag = (torch.rand(6, 4, dtype=torch.float64) * 0.5).requires_grad_()
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    assert torch.autograd.gradcheck(lambda b: margin_loss(b, labels), bag)
    zero = torch.zeros(1, 4, requires_grad=True)
    margin_loss(zero, torch.tensor([1])).backward()
    assert torch.equal(zero.grad, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="labels: expected shape"):
        margin_loss(bag, labels[:3])


def test_level_loss():
    logits = torch.tensor([[0.0, 2.0], [-1.0, 1000.0]])
    labels = torch.tensor([0, 1])
    expected = torch.tensor([[math.log(2), math.log1p(math.exp(-2))], [math.log1p(math.exp(-1)), 0.0]])
    assert torch.allclose(level_loss(logits, labels, reduction="none"), expected)
    assert torch.allclose(level_loss(logits, labels), expected.mean())
    smooth = level_loss(logits[:1], labels, label_smoothing=0.2, reduction="none")
    assert torch.allclose(smooth[0, 1], torch.tensor(0.9 * math.log1p(math.exp(-2)) + 0.1 * math.log1p(math.exp(2))))
    classes = torch.randn(3, 4, 5)
    labels = torch.tensor([0, 4, 2, 1])
    expected = -torch.log_softmax(classes, -1)[:, torch.arange(4), labels]
    assert torch.allclose(level_loss(classes, labels, reduction="none"), expected)
    with pytest.raises(ValueError, match="logits, labels"):
        level_loss(classes, labels[:2])
    with pytest.raises(ValueError, match="reduction"):
        level_loss(classes, labels, reduction="max")


def naive(h, y, scale, gap_weight):
    """Eq. 10-18 implemented literally for one bag and one class, float64, away from 0 and saturation."""
    q = 1 - torch.exp(-scale * h)
    p = 1 - torch.exp(-scale * h.sum())
    bag = -torch.log(p) if y else -torch.log(1 - p)
    u = (q.detach() >= 0.5) if y else torch.zeros_like(q, dtype=torch.bool)
    instance = torch.where(u, -torch.log(q), -torch.log(1 - q)).mean()
    gap = (bag - instance).abs()
    return (bag + gap_weight * gap**2 if y else instance), bag, instance, gap


SIZES = [4, 1, 6]


@pytest.mark.parametrize("activation", ["softplus", None])
def test_noisy_or_is_the_papers_loss(activation):
    torch.manual_seed(0)
    z = torch.randn(sum(SIZES), 2, dtype=torch.float64)
    if activation is None:
        z = z.abs() + 0.05
    z.requires_grad_()
    labels = torch.tensor([[1, 0], [0, 1], [1, 1]])
    cu_seqlens = torch.tensor([0, 4, 5, 11])
    result = noisy_or_loss(
        z, labels, cu_seqlens=cu_seqlens, scale=0.7, gap_weight=0.3, activation=activation, reduction="none"
    )
    h = torch.log1p(torch.exp(z)) if activation else z
    for b, rows in enumerate(h.split(SIZES)):
        for c in range(2):
            expected = naive(rows[:, c], bool(labels[b, c]), 0.7, 0.3)
            got = [getattr(result, name)[b, c] for name in ("loss", "bag", "instance", "gap")]
            for e, g in zip(expected, got, strict=True):
                assert torch.allclose(e, g, rtol=1e-13, atol=1e-14), (b, c)
            p = 1 - torch.exp(-0.7 * rows[:, c].sum())
            assert torch.allclose(result.log_probability[b, c].exp(), p)
    upstream = torch.randn(3, 2, dtype=torch.float64)
    terms = [
        upstream[b, c] * naive(rows[:, c], bool(labels[b, c]), 0.7, 0.3)[0]
        for b, rows in enumerate(h.split(SIZES))
        for c in range(2)
    ]
    (expected,) = torch.autograd.grad(sum(terms), z, retain_graph=True)
    (got,) = torch.autograd.grad(result.loss, z, upstream)
    assert relative_error(got, expected) < 1e-13


@pytest.mark.parametrize("y", [0, 1])
def test_bag_loss_gradient_is_the_closed_form(y):
    """∂L/∂h = λ(1 − y/p), from bags that are almost surely negative to saturated ones."""
    scale = 1.3
    for size in (1e-30, 1e-12, 1e-3, 1.0, 30.0, 800.0):
        h = torch.full((1, 3, 1), size / 3, dtype=torch.float64, requires_grad=True)
        result = noisy_or_loss(h, torch.tensor([[y]]), scale=scale, activation=None)
        (grad,) = torch.autograd.grad(result.bag.sum(), h)
        # λ(1 − 1/p) = −λ / expm1(λ Σh)
        expected = torch.full_like(h, -scale / math.expm1(min(scale * size, 700)) if y else scale)
        assert torch.allclose(grad, expected, rtol=1e-12, atol=1e-300), size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_far_out_stay_finite_and_right(dtype):
    z = torch.tensor([[-1000.0], [-1001.0], [1000.0], [900.0], [-1000.0], [50.0]], dtype=dtype, requires_grad=True)
    cu_seqlens = torch.tensor([0, 2, 4, 6])
    # Positive bags: −log p is −logsumexp(z) = 1000 − log(1 + 1/e) where p is tiny, 0 where an instance is certain.
    result = noisy_or_loss(z, torch.ones(3, 1), cu_seqlens=cu_seqlens)
    expected = torch.tensor([[1000 - math.log1p(math.exp(-1))], [0], [math.exp(-50)]], dtype=dtype)
    assert torch.allclose(result.bag, expected, atol=1e-7)
    assert torch.allclose(result.log_probability, -expected, atol=1e-7)
    (grad,) = torch.autograd.grad(result.bag.sum(), z, retain_graph=True)
    share = 1 / (1 + math.exp(-1))
    expected = torch.tensor([[-share], [share - 1], [0], [0], [0], [0]], dtype=dtype)
    assert torch.allclose(grad, expected, atol=1e-6)
    (grad,) = torch.autograd.grad(result.loss, z)
    assert torch.isfinite(grad).all() and torch.isfinite(result.loss)
    # Negative bags: the loss is the mean of softplus(z).
    result = noisy_or_loss(z, torch.zeros(3, 1), cu_seqlens=cu_seqlens, reduction="none")
    assert torch.allclose(result.loss, torch.tensor([[0.0], [950.0], [25.0]], dtype=dtype))
    (grad,) = torch.autograd.grad(result.loss.sum(), z)
    assert torch.allclose(grad, torch.tensor([[0.0], [0], [0.5], [0.5], [0], [0.5]], dtype=dtype))


def test_activations_at_zero():
    h = torch.zeros(1, 2, 1, requires_grad=True)
    result = noisy_or_loss(h, torch.zeros(1, 1), activation=None, scale=2.0)
    (grad,) = torch.autograd.grad(result.loss, h)
    assert result.loss == 0 and torch.equal(grad, torch.full_like(h, 1.0))  # λ / m
    # p = 0 for a positive bag: infinite as the equation says, not NaN.
    result = noisy_or_loss(h, torch.ones(1, 1), activation=None)
    (grad,) = torch.autograd.grad(result.loss, h)
    assert result.loss == math.inf and (grad == -math.inf).all()


def test_pseudo_labels_are_constants():
    """At q = 1/2 the instance loss has a jump; its gradient must be that of the branch taken."""
    z = torch.tensor([[[1e-9], [-3.0]]], dtype=torch.float64, requires_grad=True)
    result = noisy_or_loss(z, torch.ones(1, 1))
    (grad,) = torch.autograd.grad(result.instance.sum(), z)
    expected = torch.tensor([[[-0.5], [torch.sigmoid(torch.tensor(-3.0, dtype=torch.float64)).item()]]]) / 2
    assert torch.allclose(grad, expected.double(), atol=1e-8)


@pytest.mark.parametrize("activation", ["softplus", None])
def test_padding_and_empty_bags(activation):
    torch.manual_seed(0)
    z = torch.randn(sum(SIZES), 2).abs()
    labels = torch.tensor([[1, 0], [0, 1], [1, 1], [1, 0]])
    cu_seqlens = torch.tensor([0, 4, 5, 11, 11])
    grid = torch.full((4, 6, 2), math.nan)
    for b, rows in enumerate(z.split(SIZES)):
        grid[b, : len(rows)] = rows
    grid.requires_grad_()
    packed = noisy_or_loss(z, labels, cu_seqlens=cu_seqlens, activation=activation)
    result = noisy_or_loss(grid, labels, lengths=torch.tensor([*SIZES, 0]), activation=activation)
    for name in ("loss", "bag", "instance", "gap", "log_probability"):
        assert torch.allclose(getattr(result, name), getattr(packed, name)), name
    assert (result.bag[3] == 0).all() and (result.log_probability[3] == -math.inf).all()
    (grad,) = torch.autograd.grad(result.loss, grid)
    real = torch.arange(6) < torch.tensor([*SIZES, 0])[:, None]
    assert (grad[~real] == 0).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize(("score", "activation"), [(0.0, "softplus"), (math.log(2), None)])
def test_an_instance_with_probability_one_half_is_positive(score, activation):
    """u_j = 1 for q_j = 1/2 (Eq. 14): the gradient is that of −log q, not of −log(1 − q)."""
    z = torch.full((1, 1, 1), score, dtype=torch.float64, requires_grad=True)
    result = noisy_or_loss(z, torch.ones(1, 1), activation=activation)
    assert result.instance.item() == pytest.approx(math.log(2))
    (grad,) = torch.autograd.grad(result.instance.sum(), z)
    assert grad.item() == pytest.approx(-0.5 if activation else -1.0)


def test_noisy_or_errors():
    with pytest.raises(ValueError, match="labels: expected shape"):
        noisy_or_loss(torch.zeros(2, 3, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="activation"):
        noisy_or_loss(torch.zeros(2, 3, 1), torch.zeros(2, 1), activation="relu")
