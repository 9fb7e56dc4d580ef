"""The commands about poses, as a user calls them."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from amil_fast.pose.data import CropArchive, load_lsp
from tests.cli import helpers
from tests.helpers import SHARED
from tests.pose import layouts as make
from tests.pose.color_finder import GROUND, paint, person

MPII = SHARED / "data" / "mpii"
LSPET = SHARED / "data" / "lspet"
COLOR_FINDER = "tests.pose.color_finder:build"


def amil(*arguments, code=0):
    """Runs the command; returns what it printed, with line breaks as spaces."""
    result = helpers.amil(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


@pytest.mark.parametrize("command", ["evaluate", "predict", "pack", "show"])
def test_help_has_an_example(command):
    assert f"Example: amil {command}" in amil(command, "--help")


@pytest.mark.skipif(not MPII.exists(), reason=f"{MPII} is not here")
def test_evaluate_mpii_detections(tmp_path):
    out = amil("evaluate", "--predictions", MPII / "detections_our_format.mat", "--json", tmp_path / "s.json")
    assert "PCKh in percent" in out and "2958 people" in out and "82.34" in out and "81.46" in out
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["PCKh@0.5"]["head"] == 95.6003 and content["PCKh@0.5"]["joints"]["right ankle"] == 65.2009


def small_lsp(root):
    """An LSP whose joints can be found by their colors; returns them."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    joints = []
    for i in range(6):
        width, height = (200, 160) if i % 2 else (150, 220)
        joints.append(person(rng, width, height))
        image = paint(np.full((height, width, 3), GROUND[::-1], np.uint8), joints[-1], 5)
        cv2.imwrite(str(root / f"images/im{i + 1:04d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    raw = np.stack(joints).transpose(2, 1, 0)
    savemat(root / "joints.mat", {"joints": np.concatenate([raw, np.zeros((1, 14, 6))])})
    return np.array(joints)


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
    assert content["PCK@0.05"]["mean"] == 100  # sub-pixel exact, mirror averaging included
    # Around the joints found: the dots are larger there, their middles the same up to a few pixels.
    assert "3 people" in amil(*arguments, "--passes", 2)
    assert json.loads((tmp_path / "s.json").read_text())["PCK@0.2"]["mean"] == 100
    out = amil(*arguments, "--passes", 2, "--crop", "joints", code=2)
    assert "passes: expected 1 for people with boxes" in out
    make.coco(tmp_path / "coco")
    out = amil(*arguments[:3], "--dataset", "coco", "--root", tmp_path / "coco", code=2)
    assert "expected coco17 of the data set, the network predicts lsp14" in out


def test_evaluate_reads_predictions(tmp_path):
    small_lsp(tmp_path / "lsp")
    out = tmp_path / "out"
    text = amil("predict", tmp_path / "lsp/images", "--model", COLOR_FINDER, "--out", out, "--passes", 1)
    assert "6 images, 6 people" in text and "images/s" in text and "0 unreadable" in text
    arguments = ["--dataset", "lsp", "--root", tmp_path / "lsp", "--split", "all", "--json", tmp_path / "s.json", "-q"]
    assert amil("evaluate", "--predictions", out / "predictions.json", *arguments) == ""
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["samples"] == 6 and content["PCK@0.05"]["mean"] == 100


def test_predict_reports_unreadable_images(tmp_path):
    make.picture(tmp_path / "in/a.jpg", 60, 50)
    make.truncate(make.picture(tmp_path / "in/b.jpg", 60, 50))
    make.video(tmp_path / "in/c.mp4", frames=4)
    arguments = ["predict", tmp_path / "in", "--model", COLOR_FINDER, "--out", tmp_path / "out"]
    out = amil(*arguments, "--json", tmp_path / "s.json", "--no-mirror", code=1)
    assert "unreadable:" in out and "b.jpg" in out and "5 images, 5 people" in out and "1 unreadable" in out
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["images"] == 5 and len(content["unreadable"]) == 1 and not content["interrupted"]
    assert {Path(name).name for name in content["written"]} == {"a.jpg", "c.mp4", "predictions.json"}
    out = amil(*arguments, "--no-overlays", "--quiet", "--out", tmp_path / "rows", code=1)
    assert "images/s" not in out and "b.jpg" in out  # errors are never quiet
    assert [file.name for file in (tmp_path / "rows").iterdir()] == ["predictions.json"]


def test_interrupted_predict(tmp_path, monkeypatch):
    make.picture(tmp_path / "in/a.jpg", 60, 50)
    from tests.pose import color_finder

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(color_finder.ColorFinder, "forward", interrupt)
    out = amil("predict", tmp_path / "in", "--model", COLOR_FINDER, "--out", tmp_path / "out", code=130)
    assert "interrupted" in out and json.loads((tmp_path / "out/predictions.json").read_text()) == []


def test_pack_and_show(tmp_path):
    joints, _ = make.lsp(tmp_path / "lsp")
    arguments = ["--dataset", "lsp", "--root", tmp_path / "lsp", "--split", "all"]
    out = amil("pack", tmp_path / "x/lsp.pack", *arguments, "--size", 64, "--json", tmp_path / "s.json")
    assert "6 crops of 64 px" in out and "crops/s" in out
    assert json.loads((tmp_path / "s.json").read_text())["crops"] == 6
    packed = CropArchive(tmp_path / "x/lsp.pack")
    np.testing.assert_allclose(packed.annotations.joints, joints, atol=1e-3)
    packed.verify()
    around = tmp_path / "around.pack"
    amil("pack", around, *arguments, "--size", 64, "--crop", "joints", "--room", 1.5, "-q")
    assert CropArchive(around).settings["stored"] == 96
    for number, source in enumerate((["--archive", around], arguments, ["--synthetic"])):
        sheet = tmp_path / f"sheet{number}.jpg"
        assert "written" in amil("show", sheet, *source, "--size", 64, "--count", 6, "--augment")
        assert cv2.imread(str(sheet)).std() > 20


def test_skip_bad(tmp_path):
    make.lsp(tmp_path)
    make.truncate(tmp_path / "images/im0002.jpg")
    content = loadmat(tmp_path / "joints.mat")["joints"]
    content[:2, 7, 2] = 999
    savemat(tmp_path / "joints.mat", {"joints": content})
    arguments = ["pack", tmp_path / "a.pack", "--dataset", "lsp", "--root", tmp_path, "--size", 32]
    out = amil(*arguments, code=2)
    assert "joints.mat: entry 1:" in out and "im0002.jpg" in out and "--skip-bad" in out
    assert not (tmp_path / "a.pack").exists()
    out = amil(*arguments, "--skip-bad", "--json", tmp_path / "s.json")
    assert "left out: 2" in out and "entry 2, joint 7 (right elbow): (999, 999) lies outside" in out
    assert len(json.loads((tmp_path / "s.json").read_text())["left_out"]) == 2
    packed = CropArchive(tmp_path / "a.pack")
    assert len(packed) == 2 == len(load_lsp(tmp_path, skip_bad=True))
    assert packed.annotations.visibility[1, 7] == 0 and len(packed.settings["left_out"]) == 2


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
        (["predict", "nothing.jpg", "--model", COLOR_FINDER], "nothing.jpg: no such file"),
        (["predict", "nothing.jpg", "--checkpoint", "x.pth"], "hold pickles"),
        (
            ["predict", "a.jpg", "--model", COLOR_FINDER, "--refine", "best"],
            "refine: expected one of none",
        ),
        (
            ["predict", "a.jpg", "--model", COLOR_FINDER, "--device", "tpu9"],
            "device: 'tpu9' cannot be used",
        ),
        (["pack", "a.pack"], "expected --dataset and --root"),
        (["pack", "a.pack", "--dataset", "coco", "--root", ".", "--crop", "image"], "--crop is for lsp and lspet"),
        (["pack", "a.pack", "--dataset", "lsp", "--root", "."], "joints.mat: no such file"),
        (["show", "a.png"], "expected one of --dataset, --archive and --synthetic"),
        (["show", "a.gif", "--synthetic"], "a.gif: expected a .jpg or .png file"),
        (["show", "a.png", "--archive", "no.pack"], "no.pack: no such file"),
    ],
)
def test_errors_are_one_message(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    out = amil(*arguments, code=2)
    assert message in out and out.startswith("Error:") and "Traceback" not in out


def test_pair_by_joints(tmp_path):
    joints = small_lsp(tmp_path / "lsp")
    np.save(tmp_path / "p.npy", joints + 2)
    arguments = ["evaluate", "--predictions", tmp_path / "p.npy", "--dataset", "lsp", "--root", tmp_path / "lsp"]
    amil(*arguments, "--split", "all", "--pair", "neck, left ankle", "--json", tmp_path / "s.json", "-q")
    assert json.loads((tmp_path / "s.json").read_text())["normalizer"] == [["neck", "left ankle"]]
    out = amil(*arguments, "--split", "all", "--pair", "neck,tail", code=2)
    assert "joint: expected one of right ankle" in out


@pytest.mark.skipif(not LSPET.exists(), reason=f"{LSPET} is not here")
def test_show_lspet(tmp_path):
    arguments = ["--dataset", "lspet", "--root", LSPET, "--split", "val", "--augment", "--count", 8]
    amil("show", tmp_path / "sheet.png", *arguments)
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[1] > 1200
