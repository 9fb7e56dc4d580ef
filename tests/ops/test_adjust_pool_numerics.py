"""adjust_pool at the ends of the number range: large logits, weights close to one-hot, tiny and subnormal instances."""

import pytest
import torch

from amil_fast import adjust_pool
from tests.helpers import assert_as_accurate, relative_error

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
COMPILED = pytest.mark.parametrize("backend", ["cpp", "triton"])


def gradient(x, backend, **kwargs):
    """Returns the gradient of ``x`` for a random upstream gradient of the bag vectors."""
    x = x.clone().requires_grad_()
    bag = adjust_pool(x, backend=backend, **kwargs)
    upstream = torch.randn(bag.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad(bag, x, upstream.to(bag.dtype))[0]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@BACKENDS
@pytest.mark.parametrize("norm", [1e2, 1e4, 1e6, 1e8])
def test_weights_sum_to_one_at_large_logits(backend, norm):
    """In float32, a log-sum-exp loses log m to rounding: sums of 1.03 at logits of 10⁶, and of m at 10⁸."""
    x = torch.zeros(2, 5000, 16)
    x[..., 3] = norm
    lengths = torch.tensor([5000, 1000])  # several chunks, and one
    _, weights = adjust_pool(x, lengths=lengths, return_weights=True, backend=backend)
    torch.testing.assert_close(weights.double().sum(1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)
    packed = torch.cat([x[0], x[1, :1000]])
    _, weights = adjust_pool(packed, cu_seqlens=torch.tensor([0, 5000, 6000]), return_weights=True, backend=backend)
    sums = torch.stack([part.double().sum() for part in weights.split([5000, 1000])])
    torch.testing.assert_close(sums, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)


@COMPILED
def test_saved_statistics_give_the_weights(backend):
    """(shift, scale) of every iteration: w = exp(b - shift) * scale, with logits 0 in the first; (0, 0) if empty."""
    x = normal(3, 20, 8)
    lengths = torch.tensor([20, 0, 7])
    for num_iters in (1, 2, 4):
        stats = torch.ops.amil_fast.adjust_pool(x, None, lengths, None, num_iters, True, False, backend)[3]
        assert stats.shape == (3, num_iters, 2)
        torch.testing.assert_close(stats[:, 0], torch.tensor([[0, 1 / 20], [0, 0], [0, 1 / 7]]), rtol=1e-6, atol=0)
    _, weights, sigma, stats = torch.ops.amil_fast.adjust_pool(x, None, lengths, None, 2, True, False, backend)
    n = sigma[:, 0].norm(dim=1, keepdim=True)
    logits = torch.einsum("bnd,bd->bn", x, sigma[:, 0] * n / (1 + n.square()))
    expected = torch.exp(logits - stats[:, 1, :1]) * stats[:, 1, 1:] * (torch.arange(20) < lengths[:, None])
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("detach_routing", [False, True])
@pytest.mark.parametrize(
    ("backend", "exponent"), [(b, e) for b in ("cpp", "triton") for e in (14, 20, 27, 45)] + [("cpp", 60)]
)  # Triton: norms up to 7e16
def test_gradient_at_large_logits(backend, exponent, detach_routing):
    """Tests the weights computed again by the backward pass, and the squash's Jacobian, whose terms cancel along sigma.

    Sums of 4096 equal powers of two are exact, so all other errors are small.
    """
    x = torch.zeros(1, 4096, 16)
    x[..., 3] = 2.0**exponent
    options = {"num_iters": 2, "detach_routing": detach_routing}
    truth = gradient(x.double(), "reference", **options)
    assert relative_error(gradient(x, backend, **options), truth) < 1e-6


@COMPILED
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("scale", [0.3, 0.55, 0.7, 0.75, 0.8, 1.0])
def test_gradient_of_nearly_one_hot_weights(backend, scale, seed):
    """The gradients of the logits vanish up to rounding, and every iteration multiplies their error by the instances.

    Subtracting a mean that is not the weighted sum of the same rounded numbers gave 200 times the reference's error.
    """
    x = normal(4, 64, 512, seed=seed) * scale
    truth = gradient(x.double(), "reference", num_iters=5)
    reference = gradient(x, "reference", num_iters=5)
    assert_as_accurate(gradient(x, backend, num_iters=5), reference, truth, factor=3)


@pytest.mark.parametrize("num_iters", [1, 3])
@pytest.mark.parametrize(
    ("backend", "exponent"),
    [(b, e) for b in ("cpp", "triton") for e in (-10, -18, -19, -20)] + [("cpp", -25), ("cpp", -30)],
)  # Triton: norms from 4e-22
def test_gradient_of_tiny_instances(backend, num_iters, exponent):
    """The squared norm of these instances underflows, their norm, which is the squash's derivative, does not."""
    x = normal(3, 20, 48) * 10.0**exponent
    truth = gradient(x.double(), "reference", num_iters=num_iters)
    assert truth.abs().max() > 0
    assert relative_error(gradient(x, backend, num_iters=num_iters), truth) < 1e-6


def test_gradient_of_tiny_float64_instances():
    """Scaling the instances by a power of two scales their gradient as long as the squash is quadratic."""
    x = normal(3, 20, 48).double()
    expected = gradient(x * 2.0**-500, "cpp", num_iters=1) * 2.0**-450
    assert expected.abs().max() > 0
    assert relative_error(gradient(x * 2.0**-950, "cpp", num_iters=1), expected) < 1e-12


def test_subnormal_sums_do_not_depend_on_the_number_of_threads():
    """A bag that threads share is merged as it is by one thread: subnormal sums are 0 in both."""
    x = torch.zeros(1, 40000, 128)
    x[:, :100] = 3.6e-37  # the mean is 9e-40
    arguments = (x, None, None, None, 1, False, False, "cpp")
    before = torch.get_num_threads()
    try:
        sigmas = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            sigmas.append(torch.ops.amil_fast.adjust_pool(*arguments)[2])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(sigma, sigmas[0]) for sigma in sigmas)
    assert (sigmas[0] == 0).all()


@COMPILED
@pytest.mark.parametrize("norm", [1.0, 30.0, 1e3, 1e6])
def test_gradient_of_the_weights_of_nearly_one_hot_bags(backend, norm):
    """One-hot weights are constant: the upstream gradient of the weights cancels against its weighted mean.

    A mean without the term of that gradient, corrected by the sum of the gradients of the logits afterwards, leaves
    errors of eps times the upstream gradient: a relative error of 0.01 at norm 10⁶, where the reference has 10⁻⁷.
    """
    x = normal(2, 40, 48) * (norm / 48**0.5)
    v = normal(2, 40, seed=2).double()

    def gradient_of(x, backend):
        x = x.clone().requires_grad_()
        bag, weights = adjust_pool(x, num_iters=5, return_weights=True, backend=backend)
        g = normal(2, 48, seed=1)
        return torch.autograd.grad([bag, weights], x, [g.to(x.dtype), v.to(x.dtype)])[0]

    truth = gradient_of(x.double(), "reference")
    assert_as_accurate(gradient_of(x, backend), gradient_of(x, "reference"), truth, factor=3)
