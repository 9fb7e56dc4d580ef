"""``amil predict``: results, overlays, exit codes."""

import json
from pathlib import Path

import pytest
import torch

from tests.cli.helpers import COLOR_FINDER, small_lsp
from tests.cli.helpers import amil_output as amil
from tests.pose import color_finder
from tests.pose import layouts as make


def test_help_has_an_example():
    assert "Example: amil predict" in amil("predict", "--help")


def test_evaluate_reads_predictions_json(tmp_path):
    small_lsp(tmp_path / "lsp")
    out = tmp_path / "out"
    text = amil("predict", tmp_path / "lsp/images", "--model", COLOR_FINDER, "--out", out, "--passes", 1)
    assert "6 images, 6 people" in text and "images/s" in text and "0 unreadable" in text
    arguments = ["--dataset", "lsp", "--root", tmp_path / "lsp", "--split", "all", "--json", tmp_path / "s.json", "-q"]
    assert amil("evaluate", "--predictions", out / "predictions.json", *arguments) == ""
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["samples"] == 6 and content["PCK@0.05"]["mean"] == 100


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(tmp_path, monkeypatch, precision, dtype):
    found = set()
    forward = color_finder.ColorFinder.forward

    def record(self, images):
        found.add(images.dtype)
        return forward(self, images)

    monkeypatch.setattr(color_finder.ColorFinder, "forward", record)
    make.picture(tmp_path / "in/a.jpg", 60, 50)
    arguments = ["--model", COLOR_FINDER, "--out", tmp_path / "out", "--no-overlays", "--precision", precision]
    amil("predict", tmp_path / "in", *arguments)
    assert found == {dtype}


def test_predict_reports_unreadable_inputs(tmp_path):
    make.picture(tmp_path / "in/a.jpg", 60, 50)
    make.truncate(make.picture(tmp_path / "in/b.jpg", 60, 50))
    make.video(tmp_path / "in/c.mp4", frames=4)
    arguments = ["predict", tmp_path / "in", "--model", COLOR_FINDER, "--out", tmp_path / "out"]
    out = amil(*arguments, "--json", tmp_path / "s.json", "--no-mirror", code=1)
    assert "failed:" in out and "b.jpg" in out and "5 images, 5 people" in out and "1 unreadable" in out
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["images"] == 5 and len(content["unreadable"]) == 1 and not content["interrupted"]
    assert {Path(name).name for name in content["written"]} == {"a.jpg", "c.mp4", "predictions.json"}
    out = amil(*arguments, "--no-overlays", "--quiet", "--out", tmp_path / "rows", code=1)
    assert "images/s" not in out and "b.jpg" in out  # --quiet does not silence errors
    assert [file.name for file in (tmp_path / "rows").iterdir()] == ["predictions.json"]


def test_interrupted_predict(tmp_path, monkeypatch):
    make.picture(tmp_path / "in/a.jpg", 60, 50)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(color_finder.ColorFinder, "forward", interrupt)
    out = amil("predict", tmp_path / "in", "--model", COLOR_FINDER, "--out", tmp_path / "out", code=130)
    assert "interrupted" in out and json.loads((tmp_path / "out/predictions.json").read_text()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "nothing.jpg", "--model", COLOR_FINDER], "nothing.jpg: no such file"),
        (["predict", "nothing.jpg", "--checkpoint", "x.pth"], "hold pickles"),
        (
            ["predict", "a.jpg", "--model", COLOR_FINDER, "--refine", "best"],
            "refine: expected one of none",
        ),
        (["predict", "a.jpg", "--precision", "fp8"], "precision: expected one of auto, fp32, bf16, fp16"),
        (
            ["predict", "a.jpg", "--model", COLOR_FINDER, "--device", "tpu9"],
            "device: 'tpu9' cannot be used",
        ),
    ],
)
def test_errors_are_one_message(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    out = amil(*arguments, code=2)
    assert message in out and out.startswith("Error:") and "Traceback" not in out
