"""Ablation study: rows, resuming, table and figure."""

import json

import numpy as np
import pytest

from amil_fast.mil import study
from amil_fast.mil.bag_files import save_bags
from amil_fast.mil.settings import LOSSES, PAPER_SETTINGS
from amil_fast.utils.files import DataError
from tests.cli.helpers import amil
from tests.mil.helpers import easy_bags


def test_rows():
    rows = study.study_rows(("all",))
    assert len(rows) == 10 * 2 * 2 * len(LOSSES) == len({c.settings for c in rows}) == len({c.label for c in rows})
    rows = study.study_rows(("ingredients",), seed=4)
    assert all(c.settings.seed == 4 for c in rows)
    by_label = {c.label: c.settings for c in rows}
    assert by_label["recipe without soft clip"].soft_clip == 0 != by_label["recipe"].soft_clip
    assert by_label["paper's settings"].loss == PAPER_SETTINGS.loss
    assert by_label["paper's settings with soft clip"].soft_clip == by_label["recipe"].soft_clip
    assert by_label["recipe with margin loss"].loss == "bce+margin" != by_label["recipe"].loss
    with pytest.raises(ValueError, match="groups: expected some of pooling"):
        study.study_rows(("poolings",))


def test_resumes(tmp_path, monkeypatch):
    files = {"easy": easy_bags()}
    rows = study.study_rows(("pooling",), epochs=1, hidden=4, backend="reference")[:3]
    path = tmp_path / "study.json"
    first = study.run_study(files, rows[:2], path, repetitions=1)
    assert study.complete_rows(files, rows, first, 1)[-1][0] == rows[1], "the third row has no result"
    calls = []
    original = study.cross_validate
    monkeypatch.setattr(study, "cross_validate", lambda *a, **k: calls.append(a) or original(*a, **k))
    second = study.run_study(files, rows, path, repetitions=1)
    assert len(calls) == 1 and calls[0][1] == rows[2].settings
    assert json.loads(path.read_text()) == second
    assert all(second["results"][key] == result for key, result in first["results"].items())
    table = study.complete_rows(files, rows, second, 1)
    assert [row for row, _ in table] == rows
    assert study.complete_rows(files, rows, second, 2) == [], "results of one repetition do not count for two"
    lines = study.to_markdown(table).splitlines()
    result = table[1][1]["easy"]
    assert lines[0].count("|") == lines[2].count("|") == 6
    assert result["accuracy_std"] is None, "a single repetition has no standard deviation"
    assert f"| adjust, T = 2 | {result['accuracy_mean']:.3f} / {result['auc_mean']:.3f} |" in lines[3]
    result["accuracy_std"] = 0.0  # as written by earlier versions
    assert "±" not in study.to_markdown(table)
    assert result["parameters"] == 4 * 5 + 2 * 4 * 5 + 3 * 5
    assert np.isfinite(result["ms_per_epoch"])


@pytest.mark.parametrize("content", ["[]", "{}", '{"results": 1}'])
def test_other_json_files_are_refused(tmp_path, content):
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(DataError, match=r"study\.json: expected the results of a study"):
        study.run_study({"easy": easy_bags()}, study.study_rows(("pooling",)), tmp_path / "study.json")
    assert (tmp_path / "study.json").read_text() == content


def test_command(tmp_path):
    data = easy_bags(12)
    for name in ("a", "b"):
        save_bags(tmp_path / f"{name}.npz", data.features, data.offsets, data.labels, data.folds)
    args = ("--group", "pooling", "--repetitions", 1, "--epochs", 1, "--out", tmp_path / "out")
    run = amil("mil", "study", tmp_path / "a.npz", tmp_path / "b.npz", *args)
    assert run.exit_code == 0, run.output
    assert "gated_attention" in (tmp_path / "out" / "study.md").read_text()
    assert (tmp_path / "out" / "study.png").stat().st_size > 10_000
    run = amil("mil", "study", tmp_path / "c.npz", *args)
    assert run.exit_code == 2 and "c.npz: no such file" in run.output
