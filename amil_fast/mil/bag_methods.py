"""Bag classifiers beside the network, by name: Gaussian process, classifiers of scikit-learn, and their blend.

A method is ``method(data, train, seed) -> probabilities``: ``train`` is bool ``(num_bags,)``, the training part, and
the result float64 ``(num_bags,)``, NaN in the training part. None of them respects the multiple-instance assumption:
each can count an instance as evidence for a negative bag.
"""

from collections.abc import Callable

import numpy as np

from amil_fast.mil.bag_files import BagData
from amil_fast.mil.bag_kernels import bag_kernels, bag_statistics, filled_bags
from amil_fast.utils.optional import require

Method = Callable[[BagData, np.ndarray, int], np.ndarray]

_TREES = 300


def gaussian_process(data: BagData, train: np.ndarray, seed: int = 0) -> np.ndarray:
    """:class:`~amil_fast.mil.gaussian_process.GaussianProcess`; without randomness."""
    _sklearn("gaussian_process")
    from amil_fast.mil.gaussian_process import GaussianProcess

    return _in_test_part(train, GaussianProcess(data, train).predict(~train))


def extra_trees(data: BagData, train: np.ndarray, seed: int = 0) -> np.ndarray:
    """Extremely randomized trees on the mean, maximum and minimum of every feature over the bag."""
    statistics = bag_statistics(*filled_bags(data.features, data.offsets))
    points = np.concatenate(list(statistics.values()), 1)
    return _fitted(_sklearn("ensemble").ExtraTreesClassifier(_TREES, random_state=seed), points, data.labels, train)


def logistic_regression(data: BagData, train: np.ndarray, seed: int = 0) -> np.ndarray:
    """Logistic regression on the mean of every feature over the bag, standardized; without randomness."""
    points = bag_statistics(*filled_bags(data.features, data.offsets))["mean"]
    scaler = _sklearn("preprocessing").StandardScaler()
    regression = _sklearn("linear_model").LogisticRegression(max_iter=1000)
    classifier = _sklearn("pipeline").make_pipeline(scaler, regression)
    return _fitted(classifier, points, data.labels, train)


def set_kernel_svm(data: BagData, train: np.ndarray, seed: int = 0) -> np.ndarray:
    """Support vector machine with the set kernel, the mean RBF similarity of instances; without randomness.

    Source: Gärtner et al., *Multi-Instance Kernels*, ICML 2002.
    """
    gram = bag_kernels(data, train)["mean 0.5"]
    if _single_class(data.labels[train]):
        return _in_test_part(train, data.labels[train][0])
    machine = _sklearn("svm").SVC(kernel="precomputed").fit(gram[np.ix_(train, train)], data.labels[train])
    return _in_test_part(train, _sigmoid(machine.decision_function(gram[np.ix_(~train, train)])))


def blend(data: BagData, train: np.ndarray, seed: int = 0) -> np.ndarray:
    """Gaussian process and extra trees, their logits averaged 2 : 1."""
    return blended(gaussian_process(data, train, seed), extra_trees(data, train, seed))


def blended(process: np.ndarray, trees: np.ndarray) -> np.ndarray:
    """The probabilities of :func:`blend` from those of its parts; logits are limited to those of .001 and .999."""
    process, trees = (_logit(np.clip(p, 0.001, 0.999)) for p in (process, trees))
    return _sigmoid((2 * process + trees) / 3)


BAG_METHODS: dict[str, Method] = {
    "gaussian-process": gaussian_process,
    "extra-trees": extra_trees,
    "blend": blend,
    "set-kernel-svm": set_kernel_svm,
    "logistic-regression": logistic_regression,
}


def _sklearn(module):
    return require(f"sklearn.{module}", "bag classifiers beside the network", package="scikit-learn")


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _logit(p):
    return np.log(p / (1 - p))


def _fitted(classifier, points, labels, train):
    if _single_class(labels[train]):
        return _in_test_part(train, labels[train][0])
    classifier.fit(points[train], labels[train])
    return _in_test_part(train, classifier.predict_proba(points[~train])[:, 1])


def _single_class(labels):
    return len(np.unique(labels)) < 2


def _in_test_part(train, values):
    result = np.full(train.shape, np.nan)
    result[~train] = values
    return result
