"""Tests of the multiple-instance assumption: a bag is positive if and only if it contains a positive instance.

After Raff & Holt, *Reproducibility in Multiple Instance Learning: A Case For Algorithmic Unit Tests* (NeurIPS 2023,
arXiv 2310.17867). Besides the key instance, the training bags contain a shortcut: an instance whose presence indicates
a negative bag, or a kind of instance whose count indicates a positive bag. In the test bags the shortcut is reversed. A
model that respects the assumption cannot use the shortcut; one that uses it falls below AUC 0.5.
"""

import dataclasses

import numpy as np
import pytest

from amil_fast.mil import PAPER_SETTINGS, BagClassifiers, area_under_roc
from amil_fast.mil.bag_files import check_bag_data
from amil_fast.mil.bag_methods import BAG_METHODS
from amil_fast.nn import POOLINGS

_FEATURES = 6


def single_concept(rng, label, test):
    """A key instance in positive bags, and a poison instance: in negative bags (training), in positive bags (test)."""
    x = rng.normal(size=(int(rng.integers(8, 13)), _FEATURES))
    if label:
        x[0, 0] += 4
    if label == test:
        x[1, 1] += 8
    return x


def false_frequency(rng, label, test):
    """A key instance in positive bags, and a common kind: 6 in positive, 1 in negative bags; reversed in the test."""
    x = rng.normal(size=(12, _FEATURES))
    if label:
        x[0, 0] += 4
    x[1 : 1 + (6 if label != test else 1), 1] += 4
    return x


def two_concepts(rng, label, test):
    """Both kinds of key instance in positive bags, one of them in negative bags; poison as in `single_concept`."""
    x = rng.normal(size=(int(rng.integers(8, 13)), _FEATURES))
    key = rng.integers(2)
    x[0, 2 * key] += 6
    if label:
        x[2, 2 * (1 - key)] += 6
    if label == test:
        x[1, 1] += 8
    return x


def shortcut_bags(make_bag, seed=0):
    """300 training bags, 300 distributed like them and 300 with the reversed shortcut; and the part of every bag."""
    rng = np.random.default_rng(seed)
    bags = [make_bag(rng, b % 2, b >= 600) for b in range(900)]
    labels = np.arange(900) % 2
    part = np.repeat([0, 1, 2], 300)
    offsets = np.cumsum([0, *map(len, bags)])
    return check_bag_data(np.concatenate(bags), offsets, labels, (part == 0)[None, None]), part


def outcome(make_bag, pooling, loss, seed=0, **changes):
    """AUC on 300 bags distributed as in training, and on 300 bags with the reversed shortcut."""
    data, part = shortcut_bags(make_bag, seed)
    settings = dataclasses.replace(
        PAPER_SETTINGS, pooling=pooling, loss=loss, hidden=32, epochs=25, lr=3e-3, batch_size=32, **changes
    )
    models = BagClassifiers(data, settings, [part == 0], [(seed, 0)]).fit()
    probability = models.predict([part != 0])[0]
    return aucs(probability, data.labels, part)


def aucs(probability, labels, part):
    return tuple(area_under_roc(probability[part == k], labels[part == k]) for k in (1, 2))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_margin_loss_respects_the_assumption(pooling):
    """The score is the length of the bag vector; every pooling passes."""
    same_auc, reversed_auc = outcome(single_concept, pooling, "margin")
    assert same_auc > 0.9 and reversed_auc > 0.8


@pytest.mark.parametrize("pooling", POOLINGS)
def test_margin_loss_respects_the_assumption_with_two_keys(pooling):
    """Both keys are needed (AUC of either alone: at most 0.75); no pooling uses the poison."""
    same_auc, reversed_auc = outcome(two_concepts, pooling, "margin")
    assert same_auc > 0.75 and reversed_auc > 0.75


def test_max_pooling_does_not_count():
    """Max pooling with the margin loss is the only combination that is also robust to a false frequency."""
    same_auc, reversed_auc = outcome(false_frequency, "max", "margin")
    assert same_auc > 0.9 and reversed_auc > 0.8


@pytest.mark.parametrize("pooling", ["adjust", "mean", "attention"])
def test_other_poolings_count(pooling):
    """Known limitation: the frequency of a common kind is learned as evidence."""
    same_auc, reversed_auc = outcome(false_frequency, pooling, "margin")
    assert same_auc > 0.95 and reversed_auc < 0.5


@pytest.mark.parametrize("pooling", ["adjust", "attention"])
@pytest.mark.parametrize("loss, make_bag", [("bce", single_concept), ("mil", single_concept), ("bce", two_concepts)])
def test_scoring_heads_violate_the_assumption(pooling, loss, make_bag):
    """Known limitation: a head can weight any feature negatively, with every pooling."""
    same_auc, reversed_auc = outcome(make_bag, pooling, loss)
    assert same_auc > 0.95 and reversed_auc < 0.5


@pytest.mark.parametrize(
    ("method", "make_bag"),
    [("gaussian-process", single_concept), *(("extra-trees", m) for m in (single_concept, false_frequency))],
)
def test_methods_beside_the_network_violate_the_assumption(method, make_bag):
    """Known limitation: similarity to a training bag, or a statistic of a bag, can count against a class."""
    data, part = shortcut_bags(make_bag)
    same_auc, reversed_auc = aucs(BAG_METHODS[method](data, part == 0, 0), data.labels, part)
    assert same_auc > 0.95 and reversed_auc < 0.5
