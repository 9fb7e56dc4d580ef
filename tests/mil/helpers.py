"""Synthetic bags shared by the tests."""

import numpy as np

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
