"""Synthetic bags shared by the tests."""

import numpy as np
from sklearn.feature_extraction.text import TfidfTransformer

from amil_fast.mil.bag_files import check_bag_data, stratified_folds


def easy_bags(num_bags=30, seed=0, folds=3):
    """Bags separable by the mean of feature 0; feature 1 has a different scale, feature 2 is constant."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 8, num_bags)
    labels = np.arange(num_bags) % 2
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    features = rng.normal(size=(offsets[-1], 4))
    features[:, 0] += 3 * np.repeat(labels, sizes)
    features[:, 1] = features[:, 1] * 1000 + 5000
    features[:, 2] = 7
    return check_bag_data(features, offsets, labels, stratified_folds(labels, 2, folds))


def tf_idf_bags(num_bags=100, seed=0, folds=5):
    """Bags of 12 to 58 texts as 200 tf-idf features, 98.6 % zeros, with word frequencies by Zipf's law.

    15 % of the texts of a positive bag are on one topic of 10 words.
    """
    rng = np.random.default_rng(seed)
    frequencies = rng.permutation(1 / np.arange(1, 201))
    topic = np.isin(np.arange(200), rng.choice(200, 10, replace=False)).astype(float)
    labels = np.arange(num_bags) % 2
    sizes = rng.integers(12, 59, num_bags)
    counts = np.zeros((sizes.sum(), 200))
    for text, label in zip(counts, np.repeat(labels, sizes), strict=True):
        words = topic if label and rng.random() < 0.15 else frequencies
        np.add.at(text, rng.choice(200, 1 + rng.poisson(2), p=words / words.sum()), 1)
    features = TfidfTransformer().fit_transform(counts).toarray()
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return check_bag_data(features, offsets, labels, stratified_folds(labels, 1, folds))
