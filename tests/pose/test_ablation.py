"""The ablation study: planned runs, training and resuming, stopping, report."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
from typer.testing import CliRunner

from amil_fast.cli.app import app
from amil_fast.pose.training import Interrupted, TrainConfig, ablation, preset
from amil_fast.utils.training_state import STATE, load_state

TINY = [
    "generator.features=8",
    "discriminator.features=8",
    "data.input_size=64",
    "data.synthetic=16",
    "data.synthetic_validation=4",
    "data.batch_size=8",
    "run.tensorboard=false",
    "run.precision=fp32",
]


def test_rows_change_their_settings():
    rows = ablation.plan(TrainConfig(), list(ablation.GROUPS), [3, 4])
    plain, regions, adversarial, both = (
        rows["ideas", row][0][1] for row in ("backbone + L2", "+ MI-RNet", "+ adversarial", "+ both")
    )
    assert (plain.generator.blocks, plain.adversarial) == (0, False)
    assert (regions.generator.blocks, regions.adversarial) == (2, False)
    assert (adversarial.generator.blocks, adversarial.adversarial) == (0, True)
    assert (both.generator.blocks, both.adversarial) == (2, True)
    assert [config.run.seed for _, config in rows["pooling", "mean"]] == [3, 4]
    assert rows["pooling", "none"][0][1].generator.pooling == "none"
    assert rows["levels", "1 FC"][0][1].generator.depth == 1
    assert rows["routing", "T = 5"][0][1].generator.num_iters == 5
    assert rows["schedule", "without decay"][0][1].schedule.kind == "constant"
    # Equal configurations of several groups are trained once.
    assert rows["pooling", "adjust"] == rows["ideas", "+ MI-RNet"] == rows["levels", "3 FC"] == rows["routing", "T = 3"]
    names = {name: config for runs in rows.values() for name, config in runs}
    assert len({str(config) for config in names.values()}) == len(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TrainConfig(), ["idea"], [0]), "groups: expected some of ideas, .*, got 'idea'"),
        ((TrainConfig(), ["ideas"], []), "seeds: expected at least one"),
        ((TrainConfig().override({"discriminator": None}), ["ideas"], [0]), "base: expected MI-RNet blocks and a disc"),
    ],
)
def test_invalid_plans(arguments, message):
    with pytest.raises(ValueError, match=message):
        ablation.plan(*arguments)


def test_a_study_from_the_command_line(tmp_path):
    command = ["ablate", "--preset", "demo", "--out", str(tmp_path), "--groups", "pooling", "--epochs", "1"]
    command += ["--seeds", "0", "--jobs", "2", *(word for text in TINY for word in ("--set", text))]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    table = json.loads((tmp_path / "ablation.json").read_text())
    assert [entry["row"] for entry in table] == ["adjust", "mean", "max", "none"]
    for entry, folder in zip(table, ("adjust", "mean", "max", "none"), strict=True):
        summary = json.loads((tmp_path / f"pooling-{folder}-seed0" / "summary.json").read_text())
        assert entry["scores"]["mean"] == [summary["validation"]["PCK@0.2"]["mean"]]
        trained = json.loads((tmp_path / f"pooling-{folder}-seed0" / "best" / "config.json").read_text())
        assert trained["arguments"]["pooling"] == folder
    assert "| adjust |" in (tmp_path / "ablation.md").read_text()
    assert (tmp_path / "ablation.png").stat().st_size > 1000

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/best/*")}
    assert CliRunner().invoke(app, command).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/best/*")} == before  # nothing trained again


def test_a_failed_run_is_reported_with_its_error(tmp_path):
    rows = ablation.plan(preset("demo").override({"data.batch_size": 100_000}), ["routing"], [0])
    with pytest.raises(
        RuntimeError, match=r"routing-t-1-seed0: training failed: data\.batch_size: expected at most the 2000"
    ):
        ablation.run(rows, tmp_path)


def test_a_stopped_study_ends_its_runs_and_resumes(tmp_path, capfd):
    """SIGINT while two runs train: both save and end; nothing of their output reaches the terminal."""
    settings = {name: json.loads(value) if value[0].isdigit() else value for name, value in
                (text.split("=") for text in TINY)} | {"run.tensorboard": False}  # fmt: skip
    settings |= {"schedule.epochs": 10_000, "run.checkpoint_steps": 1, "run.log_every": 1, "run.evaluate_every": 10_000}
    rows = ablation.plan(preset("demo").override(settings), ["routing"], [0])
    folders = [tmp_path / name for runs in rows.values() for name, _ in runs][:2]

    def interrupt():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not all((f / "last" / STATE).is_file() for f in folders):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted, match="SIGINT: stopped after 0 of 4 runs"):
        ablation.run(rows, tmp_path, jobs=2)
    thread.join()
    assert not multiprocessing.active_children()
    steps = [load_state(folder / "last")[1]["step"] for folder in folders]
    assert min(steps) >= 1 and not (folders[0] / "summary.json").exists()
    assert "people for training" in (folders[0] / ablation.OUTPUT).read_text()
    assert capfd.readouterr() == ("", "")


def test_markdown_has_mean_and_spread():
    entry = {"group": "g", "row": "r", "metric": "PCK@0.2", "seeds": [0, 1], "images_per_second": [10.0, 20.0]}
    text = ablation.to_markdown([{**entry, "scores": {"head": [50.0, 60.0], "mean": [None, 1.0]}}])
    assert text.splitlines() == [
        "| **g**, PCK@0.2 | head | mean | images/s |",
        "|---|---:|---:|---:|",
        "| r | 55.0 ± 5.0 | - | 15 |",
    ]
