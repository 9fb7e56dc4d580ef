"""Scores of predictions, thresholds, intervals and curves."""

import numpy as np
import pytest

from amil_fast.mil import best_threshold, curves, evaluate_scores
from amil_fast.mil.metrics import interval, resampled


def test_threshold():
    # Perfectly separated below 0.5: the middle of the gap; the gap contains 0.5: 0.5.
    values = np.array([0, 0, 1, 1])
    assert best_threshold(np.array([0.1, 0.2, 0.3, 0.4]), values) == pytest.approx(0.25)
    assert best_threshold(np.array([0.1, 0.4, 0.6, 0.9]), values) == 0.5
    assert best_threshold(np.array([0.9, 0.8, 0.95, 0.99]), values) == pytest.approx(0.925)
    assert best_threshold(np.array([0.1, 0.2]), np.array([1, 1])) == 0.5
    # Balanced accuracy, not accuracy: the rare class counts as much as the frequent one.
    scores = np.concatenate([np.linspace(0, 0.4, 99), [0.38]])
    assert best_threshold(scores, np.array([0] * 99 + [1])) == pytest.approx(0.378, abs=0.003)


def test_binary_scores():
    scores, values = np.array([0.1, 0.4, 0.35, 0.8, 0.3]), np.array([0, 0, 1, 1, 1])
    result = evaluate_scores("classification", ("no", "yes"), scores, values, threshold=0.32, resamples=0)
    found = {name: result[name]["value"] for name in result if isinstance(result[name], dict)}
    assert found["accuracy"] == pytest.approx(3 / 5) and found["accuracy_at_half"] == pytest.approx(3 / 5)
    assert found["auc"] == pytest.approx(4 / 6)  # of 6 pairs, 0.35 < 0.4 and 0.3 < 0.4 are wrong
    assert found["sensitivity"] == pytest.approx(2 / 3) and found["specificity"] == pytest.approx(1 / 2)
    assert found["balanced_accuracy"] == pytest.approx(7 / 12)
    assert found["average_precision"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert found["brier"] == pytest.approx((0.01 + 0.16 + 0.65**2 + 0.04 + 0.49) / 5)
    assert found["log_loss"] == pytest.approx(-np.log([0.9, 0.6, 0.35, 0.8, 0.3]).mean())
    assert result["confusion"] == [[1, 1], [1, 2]] and result["confusion_at_half"] == [[2, 0], [2, 1]]
    assert result["names"] == ["no", "yes"] and result["threshold"] == 0.32
    assert result["auc"]["low"] is None
    per_bag = evaluate_scores(
        "classification", ("no", "yes"), scores, values, threshold=np.array([0.5, 0.5, 0.3, 0.5, 0.3]), resamples=0
    )
    assert per_bag["accuracy"]["value"] == 1 and per_bag["threshold"] is None


def test_auc_of_perfect_scores_with_a_bad_threshold():
    """AUC 1.0 and accuracy at 0.5 of 0.6: both accuracies are there."""
    scores, values = np.array([0.1, 0.1, 0.1, 0.2, 0.2]), np.array([0, 0, 0, 1, 1])
    result = evaluate_scores(
        "classification", ("0", "1"), scores, values, threshold=best_threshold(scores, values), resamples=0
    )
    assert result["auc"]["value"] == 1 and result["accuracy_at_half"]["value"] == pytest.approx(0.6)
    assert result["accuracy"]["value"] == 1


def test_several_classes_and_values():
    scores = np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.3, 0.4, 0.3], [0.1, 0.2, 0.7]])
    values = np.array([0, 1, 2, 2])
    result = evaluate_scores("classification", "abc", scores, values, resamples=0)
    assert result["accuracy"]["value"] == 0.75 and result["balanced_accuracy"]["value"] == pytest.approx(5 / 6)
    assert result["auc"]["value"] == pytest.approx((1 + 1 + (0.5 + 3) / 4) / 3)
    assert result["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert result["log_loss"]["value"] == pytest.approx(-np.log([0.7, 0.5, 0.3, 0.7]).mean())
    result = evaluate_scores("regression", (), np.array([1.0, 2, 4]), np.array([1.0, 3, 5]), resamples=0)
    assert result["mae"]["value"] == pytest.approx(2 / 3) and result["rmse"]["value"] == pytest.approx((2 / 3) ** 0.5)
    assert result["r2"]["value"] == pytest.approx(1 - 2 / 8)
    one = evaluate_scores("classification", "ab", np.array([0.3]), np.array([0]), resamples=5)
    assert one["auc"] == {"value": None, "low": None, "high": None}
    with pytest.raises(ValueError, match="at least one bag"):
        evaluate_scores("regression", (), np.zeros(0), np.zeros(0))


def test_intervals_cover_the_truth():
    """Bootstrap intervals of the accuracy of coin flips: about 95 % contain 0.7."""
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        values = np.ones(100, dtype=int)
        scores = (rng.random(100) < 0.7).astype(float)
        entry = evaluate_scores("classification", "ab", scores, values, resamples=100, seed=trial)["accuracy"]
        hits += entry["low"] <= 0.7 <= entry["high"]
    assert 86 <= hits <= 99


def test_groups_are_resampled_whole():
    groups = ["a", "b", "a", "c", "c", "c"]
    members = {"a": {0, 2}, "b": {1}, "c": {3, 4, 5}}
    for sample in resampled(6, groups, 20, seed=0):
        counts = np.bincount(sample, minlength=6)
        assert all(len({counts[i] for i in group}) == 1 for group in members.values())
        assert sum(counts[min(group)] for group in members.values()) == 3
    # Perfectly dependent bags: intervals over groups are wider than those over bags.
    rng = np.random.default_rng(1)
    correct = np.repeat(rng.random(20) < 0.6, 10)
    by_bag = evaluate_scores("classification", "ab", correct.astype(float), np.ones(200, dtype=int), resamples=200)
    by_group = evaluate_scores(
        "classification",
        "ab",
        correct.astype(float),
        np.ones(200, dtype=int),
        groups=[f"g{i // 10}" for i in range(200)],
        resamples=200,
    )
    width = [entry["accuracy"]["high"] - entry["accuracy"]["low"] for entry in (by_bag, by_group)]
    assert width[1] > 2 * width[0]
    assert interval([None, None, 1.0]) == (None, None) and interval([1.0, 3.0, None])[0] == pytest.approx(1.05)


def test_curves():
    rng = np.random.default_rng(0)
    scores = rng.random(400)
    values = (rng.random(400) < scores).astype(int)  # calibrated by construction
    found = curves(scores, values, resamples=50)
    roc, pr, calibration = found["roc"], found["pr"], found["calibration"]
    auc = evaluate_scores("classification", "ab", scores, values, resamples=0)["auc"]["value"]
    assert np.trapezoid(roc["y"], roc["x"]) == pytest.approx(auc, abs=0.01)
    for curve in (roc, pr):
        assert len(curve["x"]) == 101 and (curve["low"] <= curve["high"]).all()
    assert (np.diff(roc["y"]) >= 0).all() and (np.diff(pr["y"]) <= 1e-12).all()
    assert pr["y"][-1] == pytest.approx(values.mean(), abs=0.02)
    assert len(calibration["x"]) == 8 and np.abs(calibration["x"] - calibration["y"]).max() < 0.15
    inside = (calibration["low"] <= calibration["x"]) & (calibration["x"] <= calibration["high"])
    assert inside.sum() >= 6
    equal = curves(np.full(6, 0.3), np.array([0, 1, 0, 1, 0, 1]), resamples=5)
    assert equal["calibration"]["x"].tolist() == pytest.approx([0.3])
    assert equal["calibration"]["y"].tolist() == pytest.approx([0.5])
    perfect = curves(np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 0, 1, 1]), resamples=0)
    assert (perfect["pr"]["y"] == 1).all() and (perfect["roc"]["y"] == 1).all()
    with pytest.raises(ValueError, match="expected bags of both classes"):
        curves(scores, np.ones(400, dtype=int))
