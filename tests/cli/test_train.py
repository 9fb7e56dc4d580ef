"""``amil train``: options, exit codes, SIGKILL and resume."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from amil_fast.pose.inference.predictor import load_model
from amil_fast.pose.training import PoseTraining
from amil_fast.utils import training_state
from tests.cli.helpers import amil
from tests.pose.training_runs import TINY, one_thread  # noqa: F401 (one_thread is a fixture)


@pytest.fixture
def tiny(tmp_path):
    """The configuration file of another run."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY.to_dict()))
    return tmp_path / "tiny.json"


def config_of(out):
    return json.loads((out / "last" / "train.json").read_text())


def test_train_options_and_networks(tiny, tmp_path):
    out = tmp_path / "run"
    options = ("--epochs", 1, "--batch-size", 3, "--pooling", "mean", "--blocks", 2, "--seed", 7, "--lr", "1e-4")
    run = amil("train", "--config", tiny, "--out", out, *options, "--set", "loss.mil=0.5", "--workers", 0)
    assert run.exit_code == 0, run.output
    config = config_of(out)
    assert config["generator"]["pooling"] == config["discriminator"]["pooling"] == "mean"
    assert (config["generator"]["blocks"], config["run"]["seed"], config["loss"]["mil"]) == (2, 7, 0.5)
    assert (config["data"]["batch_size"], config["optimizer"]["lr"], config["schedule"]["epochs"]) == (3, 1e-4, 1)
    for text in ("epoch 1/1  loss ", "best generator, PCK@0.2: mean ", "wrist ", "written: "):
        assert text in run.output
    assert load_model(out / "best").config["pooling"] == "mean"
    # A generator initializes another run, without a discriminator.
    run = amil(
        "train", "--config", tiny, "--out", tmp_path / "two", "--init", out / "best", "--no-adversarial", "--epochs", 1
    )
    assert run.exit_code == 0, run.output
    assert f"initialized from {out / 'best'}: " in run.output and "  not used: blocks.1.score.weight" in run.output
    assert config_of(tmp_path / "two")["discriminator"] is None and "fake" not in run.output


def test_resume_keeps_the_settings_of_the_run(tiny, tmp_path):
    out = tmp_path / "run"
    assert amil("train", "--config", tiny, "--out", out, "--epochs", 1, "--lr", "3e-4").exit_code == 0
    again = amil("train", "--config", tiny, "--out", out)
    assert again.exit_code == 2 and "already contains a training run; pass --resume" in again.output
    more = amil("train", "--out", out, "--resume", "--epochs", 2)
    assert more.exit_code == 0 and "resuming after step 3, in epoch 2" in more.output
    assert config_of(out)["optimizer"]["lr"] == 3e-4 and config_of(out)["generator"] == TINY.to_dict()["generator"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--preset", "lsp"), "preset: expected one of paper-lsp, paper-mpii, lspet-small, lspet, demo, got 'lsp'"),
        (
            ("--preset", "demo", "--set", "generator.bloks=1"),
            "generator.bloks: unknown setting, did you mean 'blocks'?",
        ),
        (("--preset", "demo", "--set", "generator.blocks"), "--set: expected section.key=value"),
        (("--preset", "demo", "--pooling", "median"), "pooling"),
        (("--preset", "lspet-small"), "data.root: 'lspet' requires the data set's folder (--root) or --archive"),
        (("--preset", "lspet-small", "--root", "nowhere"), "joints.mat: no such file"),
        (("--preset", "lspet-small", "--archive", "nothing.pack"), "nothing.pack: no such file"),
        (("--preset", "demo", "--precision", "fp16"), "run.precision: fp16 requires a GPU"),
        (("--preset", "demo", "--init", "nowhere"), "nowhere: expected a folder with model.safetensors"),
        (("--preset", "demo", "--config", "x.json"), "expected --preset or --config, got both"),
        (("--config", "nowhere.json"), "nowhere.json"),
    ],
)
def test_errors(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    run = amil("train", "--out", tmp_path / "out", *args)
    assert run.exit_code == 2 and message in run.output and "Traceback" not in run.output
    assert not (tmp_path / "out").exists()


def test_interrupt_is_exit_code_130(tiny, tmp_path, monkeypatch):
    train_step = PoseTraining.train_step

    def interrupted_step(self, parts):
        terms = train_step(self, parts)
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return terms

    monkeypatch.setattr(PoseTraining, "train_step", interrupted_step)
    run = amil("train", "--config", tiny, "--out", tmp_path / "run")
    assert run.exit_code == 130 and "SIGINT: stopped after step 2" in run.output


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_saves_and_ends(tiny, tmp_path, which):
    """A signal from another process, while loader workers run."""
    command = [sys.executable, "-m", "amil_fast.cli", "train", "--config", str(tiny), "--out", str(tmp_path / "run")]
    command += ["--epochs", "1000", "--workers", "2", "--set", "run.checkpoint_steps=1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while _step(tmp_path / "run") < 1 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(which)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said.decode()[-2000:]
    assert f"{which.name}: stopped after step" in said.decode()


def test_killed_and_resumed(tiny, tmp_path):
    """Two SIGKILLs at random moments: checkpoints are complete, and the result equals that of an uninterrupted run."""
    settings = ("--config", tiny, "--epochs", 25, "--workers", 1, "--set", "run.checkpoint_steps=1")
    settings += ("--set", "run.evaluate_every=10", "--set", "data.augmentation=default")
    command = [sys.executable, "-m", "amil_fast.cli", "train", *map(str, settings), "--resume", "--out"]
    out, rng, reached = tmp_path / "killed", random.Random(5), []
    for _ in range(2):
        before = reached[-1] if reached else 0
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 90
        while _step(out) <= before and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 0.3))
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        process.send_signal(signal.SIGKILL)
        process.wait()
        tensors, facts = training_state.load_state(out / "last")
        assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())
        load_model(out / "last")
        reached.append(facts["step"])
    assert 0 < reached[0] < reached[1] < 75
    end = amil("train", *settings, "--resume", "--out", out)
    assert end.exit_code == 0, end.output
    assert f"resuming after step {reached[1]}" in end.output
    assert amil("train", *settings, "--out", tmp_path / "uninterrupted").exit_code == 0
    states = [training_state.load_state(folder / "last") for folder in (out, tmp_path / "uninterrupted")]
    (one, facts), (two, _) = states
    assert facts["step"] == 75 and one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]


def _step(out):
    try:
        return training_state.load_state(out / "last")[1]["step"]
    except ValueError:
        return 0
