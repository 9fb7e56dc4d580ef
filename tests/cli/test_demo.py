"""``amil demo``: its trainings, scores and pictures."""

import functools
import json

import cv2
import numpy as np
import torch
from typer.testing import CliRunner

from amil_fast.cli.app import app
from amil_fast.mil import demo as mil_demo
from amil_fast.pose import demo as pose_demo
from amil_fast.pose.skeletons import LSP14

TINY = {
    "generator.features": 16,
    "discriminator.features": 16,
    "data.input_size": 64,
    "data.synthetic": 64,
    "data.synthetic_validation": 8,
    "data.batch_size": 16,
    "schedule.epochs": 2,
    "run.tensorboard": False,
}


def test_demo(tmp_path, monkeypatch):
    """Both demos; the pose model with a training too short to be accurate."""
    monkeypatch.setattr(pose_demo, "run", functools.partial(pose_demo.run, changes=TINY))
    folder = tmp_path / "demo"
    run = CliRunner().invoke(app, ["demo", "--out", str(folder), "--seed", "1"])
    assert run.exit_code == 0, run.output
    assert "synthetic bags" in run.output and "PCK@0.2 on 8 held-out figures" in run.output
    scores = json.loads((folder / "mil_scores.json").read_text())
    assert scores["problem"] == "synthetic"
    assert scores["accuracy"] > 0.85 and scores["pointing"] > 0.9 > 0.3 > scores["by_chance"]
    assert (folder / "mil_weights.png").stat().st_size > 20_000
    scores = json.loads((folder / "pose_scores.json").read_text())
    assert scores["figures"] == 8 and 0 <= scores["PCK@0.2"] <= 100
    for name in ("pose_curves.png", "pose_sheet.jpg", "pose_errors.jpg", "photo.jpg"):
        assert cv2.imread(str(folder / name)).std() > 10, name
        assert f"written: {folder / name}" in run.output
    assert (folder / "pose" / "best" / "model.safetensors").is_file()
    again = CliRunner().invoke(app, ["demo", "--out", str(folder), "--seed", "2"])
    assert again.exit_code == 2
    assert "holds a demo with other settings, run.seed 1 instead of 2; choose another --out" in " ".join(
        again.output.replace("│", "").split()
    )


def test_corrupted_poses_differ_in_the_moved_joints_only():
    joints = torch.rand(3, 14, 2) * 63
    wrong = pose_demo.corrupted(joints, LSP14, 64)
    moved = [LSP14.index(name) for name in ("right elbow", "right wrist", "left knee", "left ankle")]
    kept = [k for k in range(14) if k not in moved]
    assert wrong[:, kept].equal(joints[:, kept])
    assert (wrong[:, moved] - joints[:, moved]).abs().amax((1, 2)).min() > 1
    assert wrong.min() >= 0 and wrong.max() <= 63


def test_photo_of_the_user(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (90, 60, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    assert pose_demo.photo(tmp_path / "a.png").shape == (90, 60, 3)


def test_synthetic_bags():
    bags = mil_demo.make_synthetic_bags(50, seed=0)
    sizes = bags.cu_seqlens.diff()
    assert sizes.min() >= 5 and sizes.max() <= 40 and bags.cu_seqlens[-1] == len(bags.features)
    keys = [int(k.sum()) for k in bags.key.split(sizes.tolist())]
    assert all((k > 0) == bool(label) for k, label in zip(keys, bags.labels, strict=True))
