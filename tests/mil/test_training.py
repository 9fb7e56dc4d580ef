"""Training on bags on disk: tasks, early stopping, resume, processes, memory bounds."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import amil_fast
from amil_fast.mil import (
    BagTraining,
    TrainSettings,
    evaluate_scores,
    load_labeled_bags,
    make_targets,
    predict_bags,
)
from amil_fast.mil import training as training_module
from amil_fast.mil.step_loss import bag_losses, class_weights, score_losses
from amil_fast.nn import MIRNet
from amil_fast.utils.errors import Interrupted
from tests.helpers import ROOT
from tests.mil.own_bags import learnable_bags, write_csv

FAST = TrainSettings(hidden=16, epochs=3, lr=1e-2, weight_decay=0.0, tensorboard=False, device="cpu", max_instances=40)


def bags_in(folder, *arguments, **kwargs):
    rows = learnable_bags(folder / "bags", *arguments, **kwargs)
    return load_labeled_bags(folder / "bags", write_csv(folder / "labels.csv", rows))


def train(folder, bags, settings=FAST, part=None, **kwargs):
    targets = make_targets(bags.labels, settings.task, positive=settings.positive)
    part = np.arange(len(bags.labels)) if part is None else part
    run = BagTraining(bags, targets, part, folder, settings, **kwargs)
    return run, run.run()


@pytest.mark.parametrize(
    ("classes", "changes"),
    [(2, {}), (3, {"class_weights": "balanced"}), (3, {"task": "one_vs_rest"}), (2, {"task": "regression"})],
)
def test_tasks_are_learned(tmp_path, classes, changes):
    bags = bags_in(tmp_path, 150, classes)
    settings = dataclasses.replace(FAST, epochs=15, **changes)
    run, summary = train(tmp_path / "run", bags, settings, np.arange(100))
    net = amil_fast.MIRNet.from_pretrained(tmp_path / "run")
    test = np.arange(100, 150)
    found = predict_bags(net, bags.source, test)
    values = run.targets.values[test]
    scores = evaluate_scores(net.task, net.label_names, found.scores, values, threshold=net.threshold, resamples=0)
    if net.task == "regression":
        assert net.label_names == () and scores["r2"]["value"] > 0.5
        assert net.target_mean == pytest.approx(run.targets.values[run.train].mean())
    else:
        assert net.label_names == tuple(str(c) for c in range(classes)) and net.num_classes == (1, 3)[classes == 3]
        assert scores["accuracy"]["value"] > 0.8
    assert summary["training_bags"] == 80 and summary["validation_bags"] == 20
    # The statistics are those of the training part only, without the validation part.
    rows = torch.cat([bags.source.features(i) for i in run.train]).double()
    torch.testing.assert_close(net.normalization.mean, rows.mean(0).float())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["notes"]["settings"]["lr"] == 1e-2 and config["arguments"]["threshold"] == summary["threshold"]


def test_early_stopping_keeps_the_best_epoch_of_the_inner_part(tmp_path, monkeypatch):
    bags = bags_in(tmp_path, 24)
    losses = iter([0.5, 0.3, 0.4, 0.35, 0.31, 0.1])
    states = []

    def scripted(task, scores, values):
        states.append({name: value.clone() for name, value in run.net.state_dict().items()})
        return np.array([next(losses)])

    monkeypatch.setattr(training_module, "score_losses", scripted)
    settings = dataclasses.replace(FAST, epochs=6, patience=3)
    run = BagTraining(bags, make_targets(bags.labels), np.arange(24), tmp_path / "run", settings)
    summary = run.run()
    assert summary["epochs"] == 5 and summary["best"] == {"epoch": 2, "validation_loss": 0.3}
    assert all(torch.equal(value, states[1][name]) for name, value in run.net.state_dict().items())
    assert not torch.equal(states[1]["heads.0.weight"], states[4]["heads.0.weight"])
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["validation_loss"] for line in lines] == [0.5, 0.3, 0.4, 0.35, 0.31]


def test_inner_part_and_its_absence(tmp_path):
    bags = bags_in(tmp_path, 24)
    bags = dataclasses.replace(bags, groups=[f"p{i // 4}" for i in range(24)])
    targets = make_targets(bags.labels)
    run = BagTraining(bags, targets, np.arange(20), tmp_path / "a", FAST)
    assert sorted([*run.train, *run.validation]) == list(range(20)) and len(run.validation)
    assert not {bags.groups[i] for i in run.train} & {bags.groups[i] for i in run.validation}
    given = BagTraining(bags, targets, np.arange(16), tmp_path / "b", FAST, validation=np.arange(16, 24))
    assert given.train.tolist() == list(range(16)) and given.validation.tolist() == list(range(16, 24))
    _, summary = train(tmp_path / "c", bags, dataclasses.replace(FAST, patience=0), np.arange(20))
    assert summary["validation_bags"] == 0 and summary["best"] is None and summary["epochs"] == 3
    with pytest.raises(ValueError, match="got none of '1'"):
        BagTraining(bags, targets, np.arange(0, 20, 2), tmp_path / "d", dataclasses.replace(FAST, patience=0))


def weights_of(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_max_instances_changes_rounding_only(tmp_path):
    bags = bags_in(tmp_path, 16)
    results = []
    for bound in (1, 30, 1000):
        settings = dataclasses.replace(FAST, max_instances=bound, epochs=2, patience=0, lr=1e-3)
        results.append(weights_of(train(tmp_path / str(bound), bags, settings)[0].net))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(results[2], results[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stop_at", [2, 4])
def test_resume_is_exact(tmp_path, stop_at):
    """Interrupted within an epoch (step 2 of 3) and after one (step 4), with dropout."""
    bags = bags_in(tmp_path, 30)
    settings = dataclasses.replace(FAST, dropout=0.2, batch_size=10)
    whole, expected = train(tmp_path / "whole", bags, settings)
    targets = make_targets(bags.labels)

    def interrupt(description, done, total):
        if description.startswith("epoch"):
            steps.append(done)
            if len(steps) == stop_at:
                run.stop.request("SIGTERM")

    steps = []
    run = BagTraining(bags, targets, np.arange(30), tmp_path / "run", settings, on_progress=interrupt)
    with pytest.raises(Interrupted, match="SIGTERM: stopped"):
        run.run()
    with pytest.raises(ValueError, match="already contains a training run; pass --resume"):
        BagTraining(bags, targets, np.arange(30), tmp_path / "run", settings)
    with pytest.raises(ValueError, match=r"lr: expected 0\.01 as in the run to resume, got 0\.1"):
        BagTraining(bags, targets, np.arange(30), tmp_path / "run", dataclasses.replace(settings, lr=0.1), resume=True)
    with pytest.raises(ValueError, match="expected the bags of the run to resume"):
        BagTraining(bags, targets, np.arange(28), tmp_path / "run", settings, resume=True)
    with (tmp_path / "run" / "history.jsonl").open("a") as file:  # killed after the rows and before the state
        file.write('{"epoch": 3, "loss": 1.0}\n{"epoch": 3, "lo')
    resumed, summary = train(tmp_path / "run", bags, settings, resume=True)
    assert torch.equal(weights_of(resumed.net), weights_of(whole.net))
    assert {**summary, "seconds": 0} == {**expected, "seconds": 0}
    assert (tmp_path / "run" / "history.jsonl").read_text() == (tmp_path / "whole" / "history.jsonl").read_text()


def test_tensorboard(tmp_path):
    bags = bags_in(tmp_path, 16)
    train(tmp_path / "run", bags, dataclasses.replace(FAST, epochs=1, tensorboard=True))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_losses_and_class_weights():
    assert class_weights(np.array([0, 0, 0, 1]), 2).tolist() == pytest.approx([4 / 6, 2.0])
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 4), torch.tensor([0, 3, 1])
    net = MIRNet(2, num_classes=4, task="one_vs_rest")
    expected = torch.zeros(3)
    for level in logits:
        for b in range(3):
            p = torch.sigmoid(level[b])
            expected[b] -= sum(torch.log(p[c] if c == targets[b] else 1 - p[c]) for c in range(4)) / 2
    torch.testing.assert_close(bag_losses(net, logits, targets), expected)
    probabilities = torch.softmax(logits[0], -1).numpy()
    assert score_losses("classification", probabilities, targets.numpy()) == pytest.approx(
        bag_losses(MIRNet(2, num_classes=4), logits[:1], targets).numpy(), rel=1e-5
    )
    assert score_losses("classification", np.array([0.2, 0.9]), np.array([1, 0])) == pytest.approx(
        [-np.log(0.2), -np.log(0.1)]
    )
    values = torch.tensor([0.5, -1.0, 2.0])
    net = MIRNet(2, task="regression")
    torch.testing.assert_close(bag_losses(net, logits[..., 0], values), (logits[..., 0] - values).square().mean(0))
    assert score_losses("regression", np.array([1.0]), np.array([3.0])).tolist() == [4.0]


def test_settings():
    for changes, message in [
        ({"loss": "mil"}, "loss: expected 'bce'"),
        ({"method": "blend"}, "method: expected 'network'"),
        ({"task": "ranking"}, "task: expected one of auto, classification"),
        ({"class_weights": "all"}, "class_weights: expected one of none, balanced, got 'all'"),
        ({"precision": "fp16"}, "precision: expected one of fp32, bf16"),
        ({"max_instances": 0}, "max_instances: expected at least 1"),
        ({"validation": 1.0}, r"validation: expected a number in \[0, 1\), got 1.0"),
        ({"patience": -1}, "patience: expected a number of at least 0"),
        ({"epochs": 0}, "epochs: expected 1 to"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrainSettings(**changes)


def test_two_processes_train_the_same_model(tmp_path):
    """Steps of up to two bags: in the steps of one bag, one process has none."""
    bags = bags_in(tmp_path, 14)
    settings = dataclasses.replace(FAST, batch_size=2, epochs=2, lr=1e-3, class_weights="balanced")
    (tmp_path / "settings.json").write_text(json.dumps(dataclasses.asdict(settings)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("two_processes.py")), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    run, summary = train(tmp_path / "one", bags, settings)
    assert any(len(step) == 1 for step in np.array_split(run.train, run.epoch_steps))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in run.net.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-3, atol=1e-4)
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert two["threshold"] == pytest.approx(summary["threshold"], abs=1e-3) and two["epochs"] == 2
    rows = [json.loads(line) for line in (tmp_path / "two" / "history.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (tmp_path / "one" / "history.jsonl").read_text().splitlines()]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-3)
