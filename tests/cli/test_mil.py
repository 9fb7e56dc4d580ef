"""``amil mil cv``: options, table, JSON, error messages. For ``amil mil study`` see ``tests/mil/test_study.py``."""

import dataclasses
import json

import numpy as np
import pytest

from amil_fast.mil.bag_files import save_bags
from amil_fast.mil.settings import PAPER_SETTINGS
from tests.cli.helpers import amil
from tests.mil.helpers import easy_bags


@pytest.fixture
def bag_file(tmp_path):
    data = easy_bags()
    save_bags(tmp_path / "easy.npz", data.features, data.offsets, data.labels, data.folds)
    return tmp_path / "easy.npz"


FAST = ("--epochs", 3, "--hidden", 8, "--ensemble", 1, "--backend", "reference")


def test_cv_prints_a_table_and_writes_json(bag_file, tmp_path):
    out = tmp_path / "new" / "result.json"
    run = amil("mil", "cv", bag_file, "--pooling", "max", "--seed", 5, *FAST, "--json", out)
    assert run.exit_code == 0, run.output
    assert "30 bags (15 positive)" in run.output and "2 x 3 folds" in run.output
    result = json.loads(out.read_text())
    assert f"{result['accuracy_mean']:.3f} ± {result['accuracy_std']:.3f}" in run.output
    keys = {"accuracy_mean", "accuracy_std", "auc_mean", "per_fold", "seconds", "settings", "data", "file"}
    assert keys <= result.keys()
    assert len(result["per_fold"]) == 6
    assert result["settings"]["pooling"] == "max" and result["settings"]["epochs"] == 3
    assert result["settings"]["seed"] == 5 and result["file"] == "easy.npz"


def test_cv_of_one_repetition_prints_no_deviation(tmp_path):
    data = easy_bags()
    save_bags(tmp_path / "one.npz", data.features, data.offsets, data.labels, data.folds[:1])
    run = amil("mil", "cv", tmp_path / "one.npz", *FAST, "--json", tmp_path / "one.json")
    assert run.exit_code == 0 and "±" not in run.output
    result = json.loads((tmp_path / "one.json").read_text())
    assert result["accuracy_std"] is None and f"{result['accuracy_mean']:.3f}" in run.output


def test_cv_paper_settings(bag_file, tmp_path):
    run = amil("mil", "cv", bag_file, "--paper", *FAST, "--json", tmp_path / "paper.json")
    assert run.exit_code == 0, run.output
    settings = json.loads((tmp_path / "paper.json").read_text())["settings"]
    changed = {"epochs": 3, "hidden": 8, "backend": "reference"}
    assert settings == dataclasses.asdict(dataclasses.replace(PAPER_SETTINGS, **changed))


def test_cv_of_another_method(bag_file, tmp_path):
    run = amil("mil", "cv", bag_file, "--method", "gaussian-process", "--json", tmp_path / "result.json")
    assert run.exit_code == 0, run.output
    assert "gaussian-process" in run.output and "pooling" not in run.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"]["method"] == "gaussian-process" and result["auc_mean"] > 0.95


def test_cv_quiet(bag_file):
    run = amil("mil", "cv", bag_file, *FAST, "--quiet")
    assert run.exit_code == 0 and run.output == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--pooling", "median"), "pooling: expected one of adjust, mean"),
        (("--method", "forest"), "method: expected one of network, gaussian-process"),
        (("--epochs", 0), "epochs: expected 1 to 2147483647, got 0"),
        (("--backend", "triton"), "backend 'triton' cannot serve this call"),
    ],
)
def test_cv_bad_options(bag_file, args, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the interpreter accepts CPU tensors
    run = amil("mil", "cv", bag_file, *args)
    assert run.exit_code == 2
    assert message in run.output and "Traceback" not in run.output


def test_cv_bad_files(bag_file, tmp_path):
    run = amil("mil", "cv", tmp_path / "absent.npz")
    assert run.exit_code == 2 and "absent.npz: no such file" in run.output
    entries = dict(np.load(bag_file))
    np.savez(bag_file, **(entries | {"labels": entries["labels"] + 1}))
    run = amil("mil", "cv", bag_file)
    assert run.exit_code == 2
    assert "easy.npz: entry 'labels': expected 0 or 1, got [2] for bag 1" in run.output
    assert "Traceback" not in run.output


def test_cv_unwritable_json(bag_file, tmp_path):
    (tmp_path / "file").write_text("")
    run = amil("mil", "cv", bag_file, *FAST, "--json", tmp_path / "file" / "x.json")
    assert run.exit_code == 2 and f"Error: {tmp_path / 'file'}: File exists" in run.output
