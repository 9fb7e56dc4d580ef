"""``amil pack`` and ``amil show``: crop archives and contact sheets."""

import json

import cv2
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from amil_fast.pose.data import CropArchive, load_lsp
from tests.cli.helpers import amil_output as amil
from tests.helpers import SHARED
from tests.pose import layouts as make

LSPET = SHARED / "data" / "lspet"


@pytest.mark.parametrize("command", ["pack", "show"])
def test_help_has_an_example(command):
    assert f"Example: amil {command}" in amil(command, "--help")


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


@pytest.mark.skipif(not LSPET.exists(), reason=f"{LSPET} is not here")
def test_show_lspet(tmp_path):
    arguments = ["--dataset", "lspet", "--root", LSPET, "--split", "val", "--augment", "--count", 8]
    amil("show", tmp_path / "sheet.png", *arguments)
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[1] > 1200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
