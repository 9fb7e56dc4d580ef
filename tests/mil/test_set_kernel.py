"""The set kernel's classifier."""

import numpy as np
import pytest
import torch

from amil_fast.mil.cross_validation import area_under_roc
from amil_fast.mil.set_kernel import SetKernel
from tests.mil.helpers import easy_bags


def bags_of(data, bags):
    rows, cu_seqlens = data.rows(np.asarray(bags))
    x = torch.from_numpy(data.features[rows]).double()
    x[:, 1] = (x[:, 1] - 5000) / 1000
    return x, torch.from_numpy(cu_seqlens)


def test_is_ridge_regression_on_the_sum_of_both_kernels():
    data = easy_bags(14)
    train, test = np.arange(10), np.arange(10, 14)
    labels = torch.from_numpy(data.labels)
    classifier = SetKernel(*bags_of(data, train), labels[train], width=0.8, ridge=0.2)

    x, _ = bags_of(data, train)
    distances = torch.tensor([(x[i] - x[j]).norm() for i in range(len(x)) for j in range(i)])
    scale = 2 * (0.8 * distances.median()) ** 2
    split = [bags_of(data, [b])[0] for b in range(14)]
    r = [[torch.exp(-torch.cdist(a, b).square() / scale) for b in split] for a in split]
    mean = torch.stack([torch.stack([r[a][b].mean() for b in range(14)]) for a in range(14)])
    largest = torch.stack([torch.cat([r[a][b].amax(0) for b in train]) for a in range(14)])
    kernel = 0
    for k in (mean, largest @ largest.T):
        origin = torch.full((10,), 0.1, dtype=torch.float64)
        k = k - (k[:, :10] @ origin)[:, None] - (origin @ k[:10])[None] + origin @ k[:10, :10] @ origin
        kernel = kernel + k / (2 * k.diagonal()[:10].mean())
    y = 2.0 * labels[:10].double() - 1
    expected = kernel[10:, :10] @ torch.linalg.inv(kernel[:10, :10] + 0.2 * torch.eye(10)) @ (y - y.mean()) + y.mean()

    got = classifier.decision(*bags_of(data, test))
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(classifier.probabilities(*bags_of(data, test)), torch.sigmoid(2.5 * got))


def test_learns_and_a_bags_value_does_not_depend_on_its_neighbors():
    data = easy_bags(200)
    train, test = np.arange(100), np.arange(100, 200)
    classifier = SetKernel(*bags_of(data, train), torch.from_numpy(data.labels[train]))
    together = classifier.decision(*bags_of(data, test))  # more bags than are compared at once
    assert area_under_roc(together.numpy(), data.labels[test]) > 0.95
    alone = torch.cat([classifier.decision(*bags_of(data, [b])) for b in test])
    assert torch.allclose(together, alone, rtol=1e-9, atol=1e-9)
    order = np.random.default_rng(0).permutation(train)
    shuffled = SetKernel(*bags_of(data, order), torch.from_numpy(data.labels[order])).decision(*bags_of(data, test))
    assert torch.allclose(together, shuffled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bags", [[0], [0, 1]])
def test_equal_instances(bags):
    """Identical instances yield the fraction of positive bags, not NaN."""
    x = torch.ones(len(bags), 3)
    cu_seqlens = torch.arange(len(bags) + 1)
    decision = SetKernel(x, cu_seqlens, torch.tensor(bags)).decision(x, cu_seqlens)
    assert torch.allclose(decision, torch.full((len(bags),), 2 * sum(bags) / len(bags) - 1.0), atol=1e-4)
