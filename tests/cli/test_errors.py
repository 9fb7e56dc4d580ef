"""Errors of the command: one line and an exit code; --debug; option ranges; disk full."""

import errno
import json
import os
import resource
from contextlib import contextmanager

import numpy as np
import pytest

from amil_fast.cli import app as cli
from amil_fast.mil.bag_files import save_bags, stratified_folds
from amil_fast.utils.errors import Interrupted, RunFailed
from amil_fast.utils.files import DataError, write_json
from tests.cli.helpers import COLOR_FINDER, amil
from tests.pose import layouts as make
from tests.pose.training_runs import TINY


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("a.mat: damaged"), 2, "Error: a.mat: damaged"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 2, "Error: out/x: No space left on device"),
        (MemoryError(), 2, "Error: not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), 2, "Error: not enough memory: Default"),
        (RunFailed("two runs"), 2, "Error: two runs"),
        (Interrupted("SIGINT: stopped; --resume"), 130, "SIGINT: stopped; --resume"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyError("x"), 70, "Error: unexpected KeyError: 'x' (a defect of amil_fast: please report it"),
        (RuntimeError("odd\nstory"), 70, "Error: unexpected RuntimeError: odd (a defect"),
    ],
)
def test_every_exception_is_one_line(monkeypatch, error, code, message):
    def fail(_):
        raise error

    monkeypatch.setattr(cli.environment, "format_info", fail)
    for words in (["info"], ["--debug", "info"], ["info", "--debug"]):
        run = amil(*words)
        assert run.exit_code == code and message in " ".join(run.output.split())
        assert ("Traceback" in run.output) == ("--debug" in words)
        assert "--debug" in words or len(run.output.strip().splitlines()) == 1


@pytest.fixture
def bags(tmp_path):
    labels = np.arange(8) % 2
    save_bags(tmp_path / "a.npz", np.ones((24, 3)), np.arange(9) * 3, labels, stratified_folds(labels, 1, 2))
    return tmp_path / "a.npz"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mil", "cv", "BAGS", "--seed", -1], "seed: expected 0 to"),
        (["mil", "cv", "BAGS", "--hidden", 10**9], "hidden: expected 1 to 65536"),
        (["mil", "cv", "BAGS", "--num-iters", 10**12], "num_iters: expected 1 to 1000"),
        (["mil", "cv", "BAGS", "--lr", "inf"], "lr: expected a positive number"),
        (["predict", "IMAGE", "--device", "meta"], "device: 'meta' cannot be used"),
        (["predict", "IMAGE", "--model", "json:loads"], "model: json:loads() failed: TypeError"),
        (["predict", "IMAGE", "--size", 100_000], "Invalid value for '--size'"),
        (["show", "x.png", "--synthetic", "--seed", -1], "Invalid value for '--seed'"),
        (["show", "x.png", "--synthetic", "--size", 100_000], "Invalid value for '--size'"),
        (["pack", "x.pack", "--dataset", "lsp", "--root", ".", "--room", 1e9], "Invalid value for '--room'"),
        (["demo", "--seed", -1], "Invalid value for '--seed'"),
        (["train", "--preset", "demo", "--out", "run", "--seed", -1], "run.seed: expected 0 to 4294967295, got -1"),
        (["train", "--preset", "demo", "--out", "run", "--set", "generator.depth=2000"], "expected 0 to 1000"),
        (["train", "--preset", "demo", "--out", "run", "--set", f"run.seed={10**400}"], "run.seed: expected int"),
        (
            ["train", "--preset", "demo", "--out", "run", "--set", "data.workers=" + "[" * 9999],
            "data.workers: expected",
        ),
        (["ablate", "--preset", "demo", "--out", "run", "--seeds", "-1"], "run.seed: expected 0 to"),
    ],
)
def test_options_out_of_range(tmp_path, monkeypatch, bags, words, message):
    monkeypatch.chdir(tmp_path)
    image = make.picture(tmp_path / "a.jpg", 40, 30)
    run = amil(*({"BAGS": bags, "IMAGE": image}.get(word, word) for word in words))
    assert run.exit_code == 2 and message in " ".join(run.output.split()), run.output
    assert "Traceback" not in run.output and not (tmp_path / "run").exists()


@contextmanager
def full_disk(size):
    """Limits the size of written files, which fails like a full disk. Also that of pytest's own output: no longer than
    the command under test runs."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_earlier_result(tmp_path, bags):
    write_json(tmp_path / "result.json", {"earlier": 1})
    with full_disk(100):
        run = amil("mil", "cv", bags, "--epochs", 1, "--hidden", 4, "--json", tmp_path / "result.json", "--quiet")
    assert run.exit_code == 2 and f"Error: {tmp_path / 'result.json'}: File too large" in run.output
    assert json.loads((tmp_path / "result.json").read_text()) == {"earlier": 1}
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "result.json"]


def test_a_full_disk_ends_a_training_with_a_message(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY.to_dict()))
    with full_disk(10_000):
        run = amil("train", "--config", tmp_path / "tiny.json", "--out", tmp_path / "run", "--workers", 0)
    assert run.exit_code == 2 and "Traceback" not in run.output
    assert f"Error: {tmp_path / 'run/last/model.safetensors'}: File too large" in run.output


def test_a_full_disk_and_videos(tmp_path):
    """No truncated video remains; the predictions of all frames do."""
    make.video(tmp_path / "in/a.mp4", frames=30, width=320, height=240)
    make.picture(tmp_path / "in/b.jpg", 40, 30)
    words = ["predict", tmp_path / "in", "--model", COLOR_FINDER, "--out", tmp_path / "out", "--passes", 1]
    assert amil(*words).exit_code == 0
    size = (tmp_path / "out/a.mp4").stat().st_size
    (tmp_path / "out/a.mp4").unlink()
    with full_disk(size - 1000):
        run = amil(*words)
    assert run.exit_code == 1 and "a.mp4: overlay not written" in run.output, run.output
    assert "0 unreadable, 1 overlays not written" in " ".join(run.output.split())
    assert sorted(os.listdir(tmp_path / "out")) == ["b.jpg", "predictions.json"]
    assert len(json.loads((tmp_path / "out/predictions.json").read_text())) == 31
