"""The ablation study: which runs it plans, that it trains each once and goes on, and what it reports."""

import json

import pytest
from typer.testing import CliRunner

from amil_fast.cli.app import app
from amil_fast.pose.training import ablation
from amil_fast.pose.training.config import TrainConfig
from amil_fast.pose.training.presets import preset

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


def test_rows_change_what_they_say():
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
    # One training for what is the same in several groups.
    assert rows["pooling", "adjust"] == rows["ideas", "+ MI-RNet"] == rows["levels", "3 FC"] == rows["routing", "T = 3"]
    names = {name: config for runs in rows.values() for name, config in runs}
    assert len({str(config) for config in names.values()}) == len(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TrainConfig(), ["idea"], [0]), "groups: expected some of ideas, .*, got 'idea'"),
        ((TrainConfig(), ["ideas"], []), "seeds: expected at least one"),
        (
            (TrainConfig().override({"discriminator": None}), ["ideas"], [0]),
            "base: expected MI-RNet blocks and a discriminator, got",
        ),
    ],
)
def test_bad_plans(arguments, message):
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


def test_a_run_that_fails_is_reported(tmp_path):
    rows = ablation.plan(preset("demo").override({"data.batch_size": 100_000}), ["routing"], [0])
    with pytest.raises(RuntimeError, match=r"exited with code 2: .*data.batch_size: expected at most the 2000"):
        ablation.run(rows, tmp_path)


def test_markdown_has_mean_and_spread():
    entry = {"group": "g", "row": "r", "metric": "PCK@0.2", "seeds": [0, 1], "images_per_second": [10.0, 20.0]}
    text = ablation.to_markdown([{**entry, "scores": {"head": [50.0, 60.0], "mean": [None, 1.0]}}])
    assert text.splitlines() == [
        "| **g**, PCK@0.2 | head | mean | images/s |",
        "|---|---:|---:|---:|",
        "| r | 55.0 ± 5.0 | - | 15 |",
    ]
