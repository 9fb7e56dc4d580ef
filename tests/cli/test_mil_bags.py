"""``amil mil train``, ``predict``, ``evaluate`` and ``cv`` on folders of bags."""

import csv
import json

import cv2
import numpy as np
import pytest

from amil_fast.nn import MIRNet
from tests.cli.helpers import amil, amil_output
from tests.mil.own_bags import learnable_bags, write_csv

FAST = ("--hidden", 16, "--lr", 0.01, "--weight-decay", 0, "--resamples", 20, "--no-tensorboard", "--device", "cpu")


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def probabilities(path):
    return [float(row["probability_tumor"]) for row in rows_of(path)]


def rounded(expected):
    """Probabilities up to the rounding of matrix products, which depends on batches and addresses, and of 6 digits."""
    return pytest.approx(expected, rel=0, abs=2e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Bags with groups and splits, and a model trained on them: ``(folder, output of the command)``."""
    folder = tmp_path_factory.mktemp("own")
    rows = learnable_bags(folder / "bags", 100, suffix=".h5")
    for i, row in enumerate(rows):
        row["label"] = ("normal", "tumor")[row["label"]]
        row |= {"group": f"p{i // 2}", "split": "train" if i < 70 else "test"}
    write_csv(folder / "labels.csv", rows)
    output = amil_output(
        "mil",
        "train",
        folder / "bags",
        "--labels",
        folder / "labels.csv",
        "--out",
        folder / "run",
        "--epochs",
        15,
        *FAST,
    )
    return folder, output


def test_train(trained):
    folder, output = trained
    assert "100 bags of 3 to 11 instances, 6 features; normal: 50, tumor: 50; 50 groups" in output
    assert "test part of 30 bags accuracy" in output or "test part of 30 bags AUC" in output
    assert "AUC: 1.000" in output or "AUC: 0.9" in output
    assert "effective number of instances: " in output and f"written: {folder / 'run'}" in output
    net = MIRNet.from_pretrained(folder / "run")
    assert net.label_names == ("normal", "tumor")
    rows = rows_of(folder / "run" / "predictions.csv")
    assert list(rows[0]) == [
        "bag_id", "label", "part", "instances", "effective_instances",
        "probability_normal", "probability_tumor", "predicted",
    ]  # fmt: skip
    assert [row["bag_id"] for row in rows] == [f"bag{i:03}" for i in range(100)]
    parts = [row["part"] for row in rows]
    assert parts[70:] == ["test"] * 30 and set(parts[:70]) == {"train", "validation"}
    in_part = {part: {f"p{i // 2}" for i in range(70) if parts[i] == part} for part in ("train", "validation")}
    assert not in_part["train"] & in_part["validation"], "a group is in both parts"
    for row in rows:
        probability = float(row["probability_tumor"])
        assert probability + float(row["probability_normal"]) == pytest.approx(1, abs=1e-5)
        assert (row["predicted"] == "tumor") == (probability >= net.threshold)
        assert 1 <= float(row["effective_instances"]) <= int(row["instances"]) + 1e-2
    scores = json.loads((folder / "run" / "evaluation.json").read_text())
    test = rows[70:]
    assert scores["bags"] == 30
    assert scores["accuracy"]["value"] == pytest.approx(np.mean([row["predicted"] == row["label"] for row in test]))
    assert scores["accuracy"]["value"] > 0.8 and scores["auc"]["low"] <= scores["auc"]["value"]
    picture = cv2.imread(str(folder / "run" / "evaluation.png"))
    assert picture.shape[1] > 1000 and picture.std() > 10


def test_train_refuses_and_resumes(trained):
    folder, _ = trained
    arguments = ("mil", "train", folder / "bags", "--labels", folder / "labels.csv", "--out", folder / "run")
    assert "already contains a training run; pass --resume" in amil_output(*arguments, *FAST, code=2)
    before = probabilities(folder / "run" / "predictions.csv")
    output = amil_output(*arguments, "--epochs", 15, *FAST, "--resume")
    assert "resuming in epoch" in output and probabilities(folder / "run" / "predictions.csv") == rounded(before)


def test_predict_and_evaluate(trained):
    folder, _ = trained
    output = amil_output("mil", "predict", folder / "run", folder / "bags", "--out", folder / "p" / "all.csv")
    assert f"written: {folder / 'p' / 'all.csv'}" in output
    assert "label" not in rows_of(folder / "p" / "all.csv")[0]
    trained_on = probabilities(folder / "run" / "predictions.csv")
    assert probabilities(folder / "p" / "all.csv") == rounded(trained_on)
    (folder / "some.csv").write_text("bag_id\nbag007\nbag003\n")
    amil_output(
        "mil", "predict", folder / "run", folder / "bags", "--labels", folder / "some.csv",
        "--out", folder / "some2.csv", "--max-instances", 1, "--quiet",
    )  # fmt: skip
    assert [row["bag_id"] for row in rows_of(folder / "some2.csv")] == ["bag007", "bag003"]

    output = amil_output(
        "mil", "evaluate", folder / "run", folder / "bags", "--labels", folder / "labels.csv", "--split", "test",
        "--out", folder / "scored", "--resamples", 20, "--json", folder / "scored.json",
    )  # fmt: skip
    scores = json.loads((folder / "scored.json").read_text())
    assert scores == json.loads((folder / "scored" / "evaluation.json").read_text())
    of_training = json.loads((folder / "run" / "evaluation.json").read_text())  # of batches with all 100 bags
    assert scores.keys() == of_training.keys()
    for name, score in scores.items():
        expected = of_training[name]
        assert score == (pytest.approx(expected, rel=1e-6) if isinstance(expected, dict) else expected), name
    assert f"AUC: {scores['auc']['value']:.3f}" in output and len(rows_of(folder / "scored" / "predictions.csv")) == 30


def test_bad_threshold_is_reported(trained, tmp_path):
    """A model whose probabilities are all above 0.5: both accuracies are printed."""
    folder, _ = trained
    net = MIRNet.from_pretrained(folder / "run")
    for head in net.heads:
        head.bias.data += 4
    net.threshold = 0.97
    net.save_pretrained(tmp_path / "shifted")
    output = amil_output(
        "mil", "evaluate", tmp_path / "shifted", folder / "bags", "--labels", folder / "labels.csv",
        "--out", tmp_path / "scores", "--resamples", 0,
    )  # fmt: skip
    scores = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    at_half, at_threshold = scores["accuracy_at_half"]["value"], scores["accuracy"]["value"]
    assert at_threshold > at_half + 0.1
    assert f"accuracy at the threshold 0.970 chosen on training data: {at_threshold:.3f}" in output
    assert f"accuracy at 0.5: {at_half:.3f}" in output


def test_several_classes_and_values(tmp_path):
    rows = learnable_bags(tmp_path / "bags", 60, 3, suffix=".pt")
    write_csv(tmp_path / "labels.csv", rows)
    arguments = ("--labels", tmp_path / "labels.csv", "--epochs", 6, *FAST)
    output = amil_output("mil", "train", tmp_path / "bags", "--out", tmp_path / "a", *arguments)
    assert "validation part of 12 bags, which chose the epoch and the threshold: optimistic" in output
    assert len(json.loads((tmp_path / "a" / "evaluation.json").read_text())["confusion"]) == 3
    assert {"probability_0", "probability_1", "probability_2"} <= rows_of(tmp_path / "a" / "predictions.csv")[0].keys()
    output = amil_output(
        "mil",
        "train",
        tmp_path / "bags",
        "--out",
        tmp_path / "b",
        *arguments,
        "--task",
        "regression",
        "--pooling",
        "max",
    )
    assert "R²: " in output and "effective" not in output
    assert "prediction" in rows_of(tmp_path / "b" / "predictions.csv")[0]
    output = amil_output(
        "mil",
        "evaluate",
        tmp_path / "b",
        tmp_path / "bags",
        "--labels",
        tmp_path / "labels.csv",
        "--out",
        tmp_path / "c",
    )
    assert "mean absolute error" in output


def test_cv_of_a_folder(tmp_path):
    rows = learnable_bags(tmp_path / "bags", 36, suffix=".npz")
    for i, row in enumerate(rows):
        row["group"] = f"p{i // 3}"
    write_csv(tmp_path / "labels.csv", rows)
    arguments = ("mil", "cv", tmp_path / "bags", "--labels", tmp_path / "labels.csv", "--folds", 3, "--epochs", 4)
    arguments += ("--out", tmp_path / "cv", "--hidden", 8, "--resamples", 10, "--device", "cpu")
    output = amil_output(*arguments, "--json", tmp_path / "cv.json")
    assert "repetition 1, fold 3: " in output and "accuracy at 0.5" in output
    assert "accuracy at the thresholds chosen on training data" in output
    result = json.loads((tmp_path / "cv.json").read_text())
    assert result["bags"] == 36 and len(result["per_fold"]) == 3
    predictions = rows_of(tmp_path / "cv" / "predictions.csv")
    folds_of = {}
    for row, source in zip(predictions, rows, strict=True):
        folds_of.setdefault(source["group"], set()).add(row["fold"])
    assert all(len(folds) == 1 for folds in folds_of.values()) and len(set.union(*folds_of.values())) == 3
    # Again: refused; resumed without a finished fold: the same result.
    assert "already contains a cross-validation; pass --resume" in amil_output(*arguments, code=2)
    (tmp_path / "cv" / "repetition-1-fold-2" / "fold.json").unlink()
    finished = tmp_path / "cv" / "repetition-1-fold-1" / "fold.json"
    before = finished.stat().st_mtime_ns
    amil_output(*arguments, "--resume", "--max-instances", 9, "--json", tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["auc"] == result["auc"] and finished.stat().st_mtime_ns == before
    assert "expected the settings, bags and folds of the results to resume" in amil_output(
        *arguments, "--resume", "--lr", 0.5, code=2
    )
    # Folds of the CSV file.
    for i, row in enumerate(rows):
        row["fold"] = i // 3 % 2
    write_csv(tmp_path / "labels.csv", rows)
    output = amil_output(*arguments[:-2], "--device", "cpu", "--out", tmp_path / "two")
    assert "fold 2: 18 test bags" in output and "fold 3" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "bags", "--out", "x"), "contains no labels; pass a CSV file"),
        (("train", "bags", "--labels", "none.csv", "--out", "x"), "none.csv: cannot be read"),
        (("train", "bags", "--labels", "labels.csv", "--out", "x", "--pooling", "median"), "pooling: expected one of"),
        (("train", "bags", "--labels", "labels.csv", "--out", "x", "--positive", "z"), "positive: expected one of two"),
        (("cv", "bags", "--labels", "labels.csv"), "out: expected a folder for the results"),
        (("cv", "bags", "--labels", "labels.csv", "--out", "x", "--loss", "mil"), "loss: expected 'bce' for bags"),
        (("predict", "none", "bags"), "expected a folder with config.json and model.safetensors"),
        (("evaluate", "run", "narrow", "--out", "x"), "contains no labels"),
        (("predict", "run", "narrow"), "bags: expected 6 features as in the model, got 2"),
        (("evaluate", "run", "bags", "--labels", "labels.csv", "--split", "val", "--out", "x"), "found none"),
    ],
)
def test_messages(trained, monkeypatch, arguments, message):
    folder, _ = trained
    monkeypatch.chdir(folder)
    (folder / "narrow").mkdir(exist_ok=True)
    np.save(folder / "narrow" / "a.npy", np.ones((3, 2), dtype=np.float32))
    run = amil("mil", *arguments)
    assert run.exit_code == 2, run.output
    assert message in " ".join(run.output.split()) and "Traceback" not in run.output
