"""``amil evaluate``: scores of prediction files and of networks."""

import json

import cv2
import numpy as np
import pytest

from tests.cli.helpers import COLOR_FINDER, small_lsp
from tests.cli.helpers import amil_output as amil
from tests.helpers import SHARED
from tests.pose import layouts as make

MPII = SHARED / "data" / "mpii"


def test_help_has_an_example():
    assert "Example: amil evaluate" in amil("evaluate", "--help")


@pytest.mark.skipif(not MPII.exists(), reason=f"{MPII} is not here")
def test_evaluate_mpii_detections(tmp_path):
    out = amil("evaluate", "--predictions", MPII / "detections_our_format.mat", "--json", tmp_path / "s.json")
    assert "PCKh in percent" in out and "2958 people" in out and "82.34" in out and "81.46" in out
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["PCKh@0.5"]["head"] == 95.6003 and content["PCKh@0.5"]["joints"]["right ankle"] == 65.2009


def test_evaluate_predictions_with_pictures(tmp_path):
    joints = small_lsp(tmp_path / "lsp")
    np.save(tmp_path / "p.npy", joints)
    arguments = ["evaluate", "--predictions", tmp_path / "p.npy", "--dataset", "lsp", "--root", tmp_path / "lsp"]
    out = amil(*arguments, "--split", "all", "--json", tmp_path / "s.json", "--pictures", tmp_path / "pictures")
    assert "6 people" in out and "100.00" in out
    assert json.loads((tmp_path / "s.json").read_text())["PCK@0.05"]["mean"] == 100
    names = sorted(file.name for file in (tmp_path / "pictures").iterdir())
    assert names == ["confusion.png", "curves.png", "errors.png", "samples.jpg"]
    assert all(cv2.imread(str(tmp_path / "pictures" / name)) is not None for name in names)
    out = amil(*arguments, code=2)  # the test split has 3 people
    assert "p.npy: expected predictions for 3 people x 14 joints x (x, y), got (6, 14, 2)" in out


def test_evaluate_needs_no_images_for_scores(tmp_path):
    joints = small_lsp(tmp_path / "lsp")
    for image in (tmp_path / "lsp/images").iterdir():
        image.unlink()
    np.save(tmp_path / "p.npy", joints)
    arguments = ["evaluate", "--dataset", "lsp", "--root", tmp_path / "lsp", "--split", "all"]
    assert "100.00" in amil(*arguments, "--predictions", tmp_path / "p.npy")
    assert "holds 0 files" in amil(*arguments, "--model", COLOR_FINDER, code=2)


def test_evaluate_a_network(tmp_path):
    small_lsp(tmp_path / "lsp")
    arguments = ["evaluate", "--model", COLOR_FINDER, "--dataset", "lsp", "--root", tmp_path / "lsp"]
    out = amil(*arguments, "--json", tmp_path / "s.json", "--batch-size", 2)
    content = json.loads((tmp_path / "s.json").read_text())
    assert "3 people" in out and "images/s" in out and content["images_per_second"] > 0
    assert content["PCK@0.05"]["mean"] == 100  # sub-pixel accurate, flip test included
    # The second stage enlarges the dots; their centers stay within a few pixels.
    assert "3 people" in amil(*arguments, "--passes", 2)
    assert json.loads((tmp_path / "s.json").read_text())["PCK@0.2"]["mean"] == 100
    out = amil(*arguments, "--passes", 2, "--crop", "joints", code=2)
    assert "passes: expected 1 for people with boxes" in out
    make.coco(tmp_path / "coco")
    out = amil(*arguments[:3], "--dataset", "coco", "--root", tmp_path / "coco", code=2)
    assert "expected coco17 of the data set, the network predicts lsp14" in out


def test_pair_by_joints(tmp_path):
    joints = small_lsp(tmp_path / "lsp")
    np.save(tmp_path / "p.npy", joints + 2)
    arguments = ["evaluate", "--predictions", tmp_path / "p.npy", "--dataset", "lsp", "--root", tmp_path / "lsp"]
    amil(*arguments, "--split", "all", "--pair", "neck, left ankle", "--json", tmp_path / "s.json", "-q")
    assert json.loads((tmp_path / "s.json").read_text())["normalizer"] == [["neck", "left ankle"]]
    out = amil(*arguments, "--split", "all", "--pair", "neck,tail", code=2)
    assert "joint: expected one of right ankle" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "a network needs --dataset and --root"),
        (["evaluate", "--dataset", "coco", "--root", ".", "--crop", "image"], "--crop is for lsp and lspet"),
        (["evaluate", "--predictions", "a.npy", "--model", "m:f"], "got both"),
        (["evaluate", "--model", COLOR_FINDER], "a network needs --dataset and --root"),
        (["evaluate", "--predictions", "a.npy"], "a.npy: no ground truth in this file"),
        (["evaluate", "--predictions", "a.npy", "--dataset", "lsp"], "--dataset needs --root"),
        (["evaluate", "--predictions", "a.npy", "--dataset", "x", "--root", "."], "dataset: expected one of 'lsp'"),
        (["evaluate", "--predictions", "a.mat"], "a.mat: no such file"),
        (["evaluate", "--predictions", "a.npz", "--pair", "a,b,c"], "pair: expected paper, lsp, or two joints"),
    ],
)
def test_errors_are_one_message(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    out = amil(*arguments, code=2)
    assert message in out and out.startswith("Error:") and "Traceback" not in out
