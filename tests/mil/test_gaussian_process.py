"""Kernels between bags, the Gaussian process on them, and the other classifiers beside the network."""

import dataclasses

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import WhiteKernel

from amil_fast.mil.bag_files import check_bag_data
from amil_fast.mil.bag_kernels import bag_kernels
from amil_fast.mil.bag_methods import BAG_METHODS, blended
from amil_fast.mil.cross_validation import area_under_roc, cross_validate
from amil_fast.mil.gaussian_process import GaussianProcess, _WeightedSum
from amil_fast.mil.settings import MilSettings
from tests.mil.helpers import easy_bags


def two_part_bags(num_bags=20):
    data = easy_bags(num_bags)
    return data, data.folds[0, 0]


def standardized_split(data, train):
    """Clipped, standardized instances of every bag, straight from the definition."""
    rows = data.features[np.repeat(train, data.sizes)].astype(np.float64)
    std = np.where(rows.std(0) > 0, rows.std(0), np.inf)
    x = np.clip((data.features - rows.mean(0)) / std, -3, 3)
    return np.split(x, data.offsets[1:-1])


def test_kernels_follow_their_definitions():
    data, train = two_part_bags()
    bags = standardized_split(data, train)
    instances = np.concatenate([b for b, t in zip(bags, train, strict=True) if t])
    pairs = np.linalg.norm(instances[:, None] - instances, axis=-1)[np.triu_indices(len(instances), 1)]
    width = 0.5 * np.sort(pairs)[(len(pairs) - 1) // 2]  # torch's median: the lower of two
    distances = [[np.linalg.norm(a[:, None] - b, axis=-1) for b in bags] for a in bags]
    r = [[np.exp(-((d / width) ** 2) / 2) for d in row] for row in distances]
    to_training = [np.concatenate([row[b].max(0) for b in np.flatnonzero(train)]) for row in r]
    mean_distance = np.array([[row[b].min(1).mean() for b in np.flatnonzero(train)] for row in distances])
    highest = np.array([b.max(0) for b in bags])
    between = np.linalg.norm(highest[:, None] - highest, axis=-1)
    bag_pairs = between[np.ix_(train, train)][np.triu_indices(train.sum(), 1)]
    bag_width = np.sort(bag_pairs)[(len(bag_pairs) - 1) // 2]
    expected = {
        "mean 0.5": np.array([[m.mean() for m in row] for row in r]),
        "max 0.5": np.array([[a @ b for b in to_training] for a in to_training]),
        "match 0.5": np.array([[(m.max(0).mean() + m.max(1).mean()) / 2 for m in row] for row in r]),
        "distance": mean_distance @ mean_distance.T,
        "bag max 1.0": np.exp(-((between / bag_width) ** 2) / 2),
    }
    got = bag_kernels(data, train)
    assert len(got) == 13
    weights = train / train.sum()
    for name, gram in expected.items():
        gram = gram - (gram @ weights)[:, None] - gram @ weights + weights @ gram @ weights
        gram = gram / gram.diagonal()[train].mean()
        np.testing.assert_allclose(got[name], gram, rtol=1e-4, atol=1e-4, err_msg=name)


def test_kernels_do_not_depend_on_other_test_bags():
    data, train = two_part_bags(70)  # more than one chunk
    features = data.features.copy()
    changed = np.flatnonzero(~train)[-1]
    features[data.offsets[changed] : data.offsets[changed + 1]] = 9
    other = bag_kernels(dataclasses.replace(data, features=features), train)
    same = np.arange(len(train)) != changed
    for name, gram in bag_kernels(data, train).items():
        np.testing.assert_allclose(gram[np.ix_(same, same)], other[name][np.ix_(same, same)], atol=1e-9, err_msg=name)
        assert not np.allclose(gram, other[name], atol=1e-3), name


def test_gradient_of_the_marginal_likelihood():
    data, train = two_part_bags()
    grams = np.stack(list(bag_kernels(data, train).values()))
    kernel = _WeightedSum(grams, np.full(13, 0.1)) + WhiteKernel(0.2)
    x = np.flatnonzero(train)[:, None].astype(float)
    process = GaussianProcessRegressor(kernel, optimizer=None).fit(x, data.labels[train] - 0.5)
    theta = process.kernel_.theta
    _, gradient = process.log_marginal_likelihood(theta, eval_gradient=True)
    steps = 1e-5 * np.eye(len(theta))
    values = [[process.log_marginal_likelihood(theta + s * step) for s in (1, -1)] for step in steps]
    np.testing.assert_allclose(gradient, [(a - b) / 2e-5 for a, b in values], rtol=1e-4, atol=1e-6)


def test_gaussian_process_equals_its_closed_form():
    data, train = two_part_bags()
    process = GaussianProcess(data, train)
    grams = bag_kernels(data, train)
    kernel = sum(weight * grams[name] for name, weight in process.kernel_weights.items())
    y = 2.0 * data.labels[train] - 1
    inverse = np.linalg.inv(kernel[np.ix_(train, train)] + process.noise * np.eye(train.sum()))
    cross = kernel[np.ix_(~train, train)]
    mean = y.mean() + y.std() * cross @ inverse @ ((y - y.mean()) / y.std())
    variance = kernel.diagonal()[~train] + process.noise - np.einsum("ij,jk,ik->i", cross, inverse, cross)
    expected = norm.cdf(mean / (y.std() * np.sqrt(variance)))
    np.testing.assert_allclose(process.predict(~train), expected, rtol=1e-4, atol=1e-5)
    assert process.predict(np.zeros_like(train)).shape == (0,)


@pytest.mark.parametrize("method", BAG_METHODS)
def test_methods_separate_easy_bags(method):
    data, train = two_part_bags(60)
    probabilities = BAG_METHODS[method](data, train, 0)
    assert np.array_equal(np.isnan(probabilities), train)
    assert area_under_roc(probabilities[~train], data.labels[~train]) > 0.95
    assert ((probabilities[~train] >= 0.5) == data.labels[~train]).mean() > 0.85
    flipped = np.where(train, data.labels, 1 - data.labels)
    again = BAG_METHODS[method](dataclasses.replace(data, labels=flipped), train, 0)
    assert np.array_equal(probabilities, again, equal_nan=True), "labels of the test part are not used"


def test_blend_averages_the_logits():
    process, trees = np.array([0.2, 0.9, 0.0, np.nan]), np.array([0.6, 0.7, 1.0, np.nan])
    expected = expit((2 * logit([0.2, 0.9, 0.001]) + logit([0.6, 0.7, 0.999])) / 3)
    np.testing.assert_allclose(blended(process, trees)[:3], expected, rtol=1e-12)
    assert np.isnan(blended(process, trees)[3])
    data, train = two_part_bags()
    parts = [BAG_METHODS[name](data, train, 3) for name in ("gaussian-process", "extra-trees")]
    np.testing.assert_allclose(BAG_METHODS["blend"](data, train, 3), blended(*parts), equal_nan=True)


@pytest.mark.parametrize("method", BAG_METHODS)
def test_degenerate_bags(method):
    """Equal instances, an empty bag, one class only: finite probabilities."""
    train = np.array([True, True, True, True, False])
    data = check_bag_data(np.zeros((4, 2)), [0, 1, 2, 3, 3, 4], [0, 1, 0, 1, 0], train[None, None])
    assert BAG_METHODS[method](data, train, 0)[4] == pytest.approx(0.5, abs=0.1)
    one_class = dataclasses.replace(data, labels=np.zeros(5, dtype=np.int64))
    assert BAG_METHODS[method](one_class, train, 0)[4] < 0.5


def test_cross_validation_by_method():
    data = easy_bags()
    seen = []
    settings = MilSettings(method="logistic-regression")
    result = cross_validate(data, settings, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (6, 6) and result["settings"]["method"] == "logistic-regression"
    expected = BAG_METHODS["logistic-regression"](data, data.folds[1, 2], 0)
    test = ~data.folds[1, 2]
    assert result["per_fold"][5]["accuracy"] == ((expected[test] >= 0.5) == data.labels[test]).mean()
