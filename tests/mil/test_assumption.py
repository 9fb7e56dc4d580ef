"""Does a bag classifier keep the MIL assumption: a bag is positive iff it holds a positive instance?

After Raff & Holt, *Reproducibility in Multiple Instance Learning: A Case For Algorithmic Unit Tests* (NeurIPS 2023,
arXiv 2310.17867): beside the key instance, the training bags offer a shortcut that only a model can take which lets the
presence of something else lower, or the count of something raise, a bag's score; in the test bags the shortcut points
the other way. A model that keeps the assumption doesn't notice; one that breaks it falls below AUC 0.5.
"""

import dataclasses

import numpy as np
import pytest

from amil_fast.mil import PAPER_SETTINGS, BagClassifiers, area_under_roc
from amil_fast.mil.bag_files import check_bag_data
from amil_fast.nn import POOLINGS

_FEATURES = 6


def single_concept(rng, label, test):
    """A key instance in positive bags. Training: negative bags hold a poison instance. Test: positive bags hold it."""
    x = rng.normal(size=(int(rng.integers(8, 13)), _FEATURES))
    if label:
        x[0, 0] += 4
    if label == test:
        x[1, 1] += 8
    return x


def false_frequency(rng, label, test):
    """A key instance in positive bags. Training: they also hold 6 of a common kind, negative bags 1; test: reversed."""
    x = rng.normal(size=(12, _FEATURES))
    if label:
        x[0, 0] += 4
    x[1 : 1 + (6 if label != test else 1), 1] += 4
    return x


def two_concepts(rng, label, test):
    """Positive bags hold two kinds of key, negative bags one of them; poison as in :func:`single_concept`."""
    x = rng.normal(size=(int(rng.integers(8, 13)), _FEATURES))
    key = rng.integers(2)
    x[0, 2 * key] += 6
    if label:
        x[2, 2 * (1 - key)] += 6
    if label == test:
        x[1, 1] += 8
    return x


def outcome(make_bag, pooling, loss, seed=0, **changes):
    """AUC on 300 more bags as in training, and on 300 bags in which the shortcut points the other way."""
    rng = np.random.default_rng(seed)
    bags = [make_bag(rng, b % 2, b >= 600) for b in range(900)]
    labels = np.arange(900) % 2
    part = np.repeat([0, 1, 2], 300)
    offsets = np.cumsum([0, *map(len, bags)])
    data = check_bag_data(np.concatenate(bags), offsets, labels, (part == 0)[None, None])
    settings = dataclasses.replace(
        PAPER_SETTINGS, pooling=pooling, loss=loss, hidden=32, epochs=25, lr=3e-3, batch_size=32, **changes
    )
    models = BagClassifiers(data, settings, [part == 0], [(seed, 0)]).fit()
    probability = models.predict([part != 0])[0]
    return tuple(area_under_roc(probability[part == k], labels[part == k]) for k in (1, 2))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_margin_loss_keeps_the_assumption(pooling):
    """With the margin loss a bag's score is the length of its vector: every pooling passes."""
    trained, turned = outcome(single_concept, pooling, "margin")
    assert trained > 0.9 and turned > 0.8


@pytest.mark.parametrize("pooling", POOLINGS)
def test_margin_loss_keeps_the_assumption_of_two_keys(pooling):
    """Harder: both keys are needed (AUC of one of the two alone: 0.75 at best); the poison fools no pooling."""
    trained, turned = outcome(two_concepts, pooling, "margin")
    assert trained > 0.75 and turned > 0.75


def test_max_pooling_does_not_count():
    """Max pooling with the margin loss is the only pair of pooling and loss that also withstands a false frequency."""
    trained, turned = outcome(false_frequency, "max", "margin")
    assert trained > 0.9 and turned > 0.8


@pytest.mark.parametrize("pooling", ["adjust", "mean", "attention"])
def test_other_poolings_count(pooling):
    """Kept as a known limit: a frequency in the training bags is learned as if it were evidence."""
    trained, turned = outcome(false_frequency, pooling, "margin")
    assert trained > 0.95 and turned < 0.5


@pytest.mark.parametrize("pooling", ["adjust", "attention"])
@pytest.mark.parametrize("loss, bags", [("bce", single_concept), ("mil", single_concept), ("bce", two_concepts)])
def test_scoring_heads_break_it(pooling, loss, bags):
    """Kept as a known limit: a head weighs a feature negatively as easily as positively, whatever the pooling."""
    trained, turned = outcome(bags, pooling, loss)
    assert trained > 0.95 and turned < 0.5


@pytest.mark.parametrize("bags", [single_concept, false_frequency, two_concepts])
def test_set_kernel_breaks_it(bags):
    """Kept as a known limit: likeness to a training bag weighs negatively as easily as positively."""
    trained, turned = outcome(bags, "mean", "margin", kernel_weight=1)
    assert trained > 0.95 and turned < 0.5
