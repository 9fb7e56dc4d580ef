"""Bag classifiers: settings, batching, training, prediction, cross-validation."""

import dataclasses

import numpy as np
import pytest
import torch

from amil_fast.mil.bag_files import check_bag_data, load_bags
from amil_fast.mil.classifiers import BagClassifiers, pack_members
from amil_fast.mil.cross_validation import area_under_roc, cross_validate
from amil_fast.mil.settings import LOSSES, PAPER_SETTINGS, MilSettings
from amil_fast.nn import POOLINGS, MIRNet, level_loss
from amil_fast.nn.feature_normalization import soft_clip
from tests.helpers import SHARED
from tests.mil.helpers import easy_bags, tf_idf_bags


def plain(**changes):
    return dataclasses.replace(PAPER_SETTINGS, backend="reference", **changes)


MUSK1 = SHARED / "data" / "mil" / "musk1.npz"


def test_pack_members():
    data = easy_bags(6)
    bag_indices = np.array([[2, 0, 5], [4, -1, -1], [-1, 3, 1]])
    rows, cu_seqlens = pack_members(data, bag_indices)
    assert rows.shape[1] == cu_seqlens[:, -1].max()
    for member in range(3):
        for place, bag in enumerate(bag_indices[member]):
            got = rows[member, cu_seqlens[member, place] : cu_seqlens[member, place + 1]]
            expected = range(data.offsets[bag], data.offsets[bag + 1]) if bag >= 0 else []
            assert list(got) == list(expected)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_learns(pooling):
    data = easy_bags(40)
    result = cross_validate(data, plain(pooling=pooling, hidden=16, epochs=30, lr=1e-2))
    assert result["accuracy_mean"] > 0.9 and result["auc_mean"] > 0.95


def test_sparse_features_are_scaled_instead_of_standardized():
    # Rare words are hundreds of deviations away from a mean of almost 0, which the clipping at 3 levels.
    data = tf_idf_bags(seed=1)
    assert cross_validate(data, MilSettings())["accuracy_mean"] > 0.9
    assert cross_validate(data, MilSettings(normalization="standard"))["accuracy_mean"] < 0.8
    every = np.ones((1, 100), dtype=bool)
    chosen, scaled = (BagClassifiers(data, MilSettings(normalization=kind), every, [[0]]) for kind in ("auto", "scale"))
    assert torch.equal(chosen.inverse_std, scaled.inverse_std) and (chosen.mean == 0).all() and chosen.bound.isinf()


def test_without_normalization():
    data = easy_bags(12)
    every = np.ones((1, 12), dtype=bool)
    raw = BagClassifiers(data, plain(normalization="none", soft_clip=3, hidden=8, epochs=1), every, [[0]])
    assert (raw.mean == 0).all() and (raw.inverse_std == 1).all() and raw.bound.isinf().all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pooling", ["adjust", "max"])
def test_learns_with_every_loss(pooling, loss):
    settings = plain(pooling=pooling, loss=loss, hidden=16, epochs=30, lr=1e-2)
    result = cross_validate(easy_bags(40), settings)
    assert result["auc_mean"] > 0.9
    assert result["accuracy_mean"] > (0.9 if "bce" in loss else 0.75)


def test_recipe_options_and_ensemble():
    settings = plain(
        instance_norm=2,
        instance_scale=0.5,
        bag_scale=10,
        input_dropout=0.2,
        dropout=0.2,
        soft_clip=3,
        loss="bce+margin",
        hidden=16,
        epochs=20,
        lr=1e-2,
    )
    data = easy_bags(40)
    result = cross_validate(data, settings)
    assert result["accuracy_mean"] > 0.9
    state = torch.get_rng_state()
    assert cross_validate(data, settings)["per_fold"] == result["per_fold"], "dropout is seeded"
    assert torch.equal(torch.get_rng_state(), state)
    together = cross_validate(data, dataclasses.replace(settings, ensemble=3), at_once=4)
    assert together["accuracy_mean"] > 0.9


def test_ensemble_is_the_mean_of_its_networks():
    data = easy_bags(12)
    settings = plain(hidden=8, epochs=3, ensemble=2)
    part = data.folds[0, :1]
    expected = [BagClassifiers(data, settings, part, [(0, 0, n)]).fit().predict(~part)[0] for n in range(2)]
    data = check_bag_data(data.features, data.offsets, data.labels, data.folds[:1, :1])
    got = cross_validate(data, settings, at_once=1)["per_fold"][0]
    mean = np.mean(expected, 0)[~part[0]]
    assert got["accuracy"] == ((mean >= 0.5) == data.labels[~part[0]]).mean()
    assert got["auc"] == pytest.approx(area_under_roc(mean, data.labels[~part[0]]))


def test_standardization_uses_the_training_part_only():
    data = easy_bags()
    train = data.folds[0, :2]
    settings = plain(hidden=8, epochs=1)
    models = BagClassifiers(data, settings, train, [(0, 0), (0, 1)])
    for member in range(2):
        rows = data.features[np.repeat(train[member], data.sizes)]
        assert np.allclose(models.mean[member, 0], rows.mean(0), rtol=1e-5)
        assert np.allclose(models.inverse_std[member, 0, [0, 1, 3]], 1 / rows.std(0)[[0, 1, 3]], rtol=1e-4)
        assert models.inverse_std[member, 0, 2] == 0, "the factor of a constant feature is 0"


def test_model_is_independent_of_the_test_bags():
    """Other features and labels in the test part change neither the parameters nor predictions on the training part."""
    data = easy_bags()
    train = data.folds[0, :1]
    features = data.features.copy()
    features[np.repeat(~train[0], data.sizes)] = 1e4
    other = check_bag_data(features, data.offsets, np.where(train[0], data.labels, 1 - data.labels), data.folds)
    settings = plain(hidden=8, epochs=3)
    fitted = [BagClassifiers(d, settings, train, [(0, 0)]).fit() for d in (data, other)]
    for a, b in zip(fitted[0].net.parameters(), fitted[1].net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert np.array_equal(*(models.predict(train) for models in fitted), equal_nan=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_side_by_side_equals_separate_training(loss):
    data = easy_bags(23)  # folds of different sizes
    settings = plain(hidden=8, epochs=4, batch_size=4, loss=loss, instance_norm=2)

    def fitted(train, seeds):
        models = BagClassifiers(data, settings, train, seeds)
        models.net.double()  # Adam amplifies rounding of near-zero gradients to full steps
        for name in ("_features", "mean", "inverse_std"):
            setattr(models, name, getattr(models, name).double())
        return models.fit().predict(~train)

    train = data.folds[0]
    together = fitted(train, [(1, i) for i in range(3)])
    assert np.array_equal(np.isnan(together), train)
    for i in range(3):
        alone = fitted(train[i : i + 1], [(1, i)])
        assert np.allclose(together[i], alone[0], atol=1e-6, equal_nan=True)
    assert not np.allclose(together[0], fitted(train[:1], [(2, 0)])[0], atol=1e-3, equal_nan=True), (
        "a different seed gives different weights"
    )


def test_one_step_equals_an_adam_step_on_the_mean_loss():
    """Compares one stacked training step on a full batch with one optimizer step of a plain MIRNet."""
    data = easy_bags(10)
    train = np.ones((1, 10), dtype=bool)
    settings = plain(hidden=8, epochs=1, batch_size=10, lr=1e-2, weight_decay=0.1)
    models = BagClassifiers(data, settings, train, [(0, 0)])
    net = MIRNet(4, hidden=8, backend="reference")
    net.load_state_dict(models.net.member(0))
    x = (torch.from_numpy(data.features) - models.mean[0]) * models.inverse_std[0]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=0.1)
    logits = net(x, cu_seqlens=torch.from_numpy(data.offsets)).logits
    level_loss(logits, torch.from_numpy(data.labels)).backward()
    optimizer.step()
    models.fit()
    for name, value in models.net.member(0).items():
        assert torch.allclose(value, net.state_dict()[name], atol=1e-5), name


def test_result_of_cross_validation():
    data = easy_bags()
    seen = []
    settings = plain(hidden=8, epochs=2, seed=3)
    result = cross_validate(data, settings, at_once=4, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12) and seen == sorted(seen)
    per_fold = result["per_fold"]
    assert [(f["repetition"], f["fold"]) for f in per_fold] == [(r, f) for r in range(2) for f in range(3)]
    by_repetition = np.array([f["accuracy"] for f in per_fold]).reshape(2, 3).mean(1)
    assert result["accuracy_mean"] == pytest.approx(by_repetition.mean())
    assert result["accuracy_std"] == pytest.approx(abs(by_repetition[0] - by_repetition[1]) / 2**0.5)
    assert result["settings"]["seed"] == 3
    assert cross_validate(data, settings, at_once=4)["per_fold"] == per_fold, "repeated runs are equal"


def test_soft_clip():
    x = torch.tensor([-1e12, -5.0, -1.0, 0.0, 2.5, 30.0, 1e12])
    expected = torch.tensor([-5.0, -5 * 2**-0.25, -((1 + 5**-4) ** -0.25), 0.0, 2.5 * (17 / 16) ** -0.25, 4.99904, 5.0])
    assert torch.allclose(soft_clip(x, 5.0), expected, rtol=1e-5)


def test_area_under_roc():
    assert area_under_roc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == pytest.approx(0.75)
    assert area_under_roc(np.array([0.5, 0.5]), np.array([0, 1])) == pytest.approx(0.5)
    assert area_under_roc(np.array([2.0, -3.0, 5.0]), np.array([0, 0, 1])) == pytest.approx(1.0)
    assert area_under_roc(np.array([0.5, 0.6]), np.array([1, 1])) is None


def test_settings_are_checked():
    with pytest.raises(ValueError, match="pooling: expected one of"):
        MilSettings(pooling="x")
    with pytest.raises(ValueError, match="epochs: expected 1 to 2147483647, got 0"):
        MilSettings(epochs=0)
    with pytest.raises(ValueError, match="lr: expected a positive number"):
        MilSettings(lr=0)
    with pytest.raises(ValueError, match="instance_scale: expected a positive number, got 0"):
        MilSettings(instance_scale=0)
    with pytest.raises(ValueError, match=r"method: expected one of network, gaussian-process, .*, got 'forest'"):
        MilSettings(method="forest")
    with pytest.raises(ValueError, match="weight_decay"):
        MilSettings(weight_decay=-1)


@pytest.mark.skipif(not MUSK1.exists(), reason=f"benchmark file {MUSK1} not found")
def test_musk1():
    """One repetition of musk1 with few epochs; the majority class has 51 %."""
    data = load_bags(MUSK1)
    data = check_bag_data(data.features, data.offsets, data.labels, data.folds[:1])
    result = cross_validate(data, dataclasses.replace(PAPER_SETTINGS, pooling="mean", epochs=10))
    assert result["accuracy_mean"] > 0.75
