"""Resumed, interrupted and failed trainings."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from amil_fast.pose import heatmap_loss
from amil_fast.pose.training import Interrupted, NotFinite, TrainingData
from amil_fast.pose.training.training_data import training_data
from amil_fast.utils import training_state
from tests.pose.training_runs import (  # one_thread is a fixture
    TINY,
    history,
    one_thread,  # noqa: F401
    stop_after,
    text_of,
    training,
)

# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "settings",
    [
        {"data__augmentation": "default", "data__workers": 1},
        {"discriminator": None, "run__ema_decay": 0.0, "run__accumulation": 2, "run__precision": "bf16"},
    ],
    ids=["adversarial, workers", "plain, accumulated, bf16"],
)
def test_resumed_run_is_bit_identical(tmp_path, settings):
    """Nine steps in one run, against five (to the middle of the second epoch) and four after a resume."""
    training(tmp_path / "straight", **settings).run()
    with pytest.raises(Interrupted, match="SIGTERM: stopped after step 5"):
        training(tmp_path / "parts", on_step=stop_after(5), **settings).run()
    _, facts = training_state.load_state(tmp_path / "parts" / "last")
    assert (facts["epoch"], facts["epoch_step"], facts["step"]) == (1, 2, 5)
    torch.manual_seed(999)  # another process has another random state
    run = training(tmp_path / "parts", resume=True, **settings)
    run.run()
    assert "resuming after step 5, in epoch 2" in text_of(run)
    one, facts_one = training_state.load_state(tmp_path / "straight" / "last")
    two, facts_two = training_state.load_state(tmp_path / "parts" / "last")
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different
    assert facts_one["best"] == facts_two["best"]
    rows, others = history(tmp_path / "straight"), history(tmp_path / "parts")
    for row, other in zip(rows, others, strict=True):
        for name in row.keys() - {"seconds", "images/s"}:
            assert row[name] == pytest.approx(other[name], rel=1e-9), name
    best = [load_file(tmp_path / name / "best" / "model.safetensors") for name in ("straight", "parts")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])


def test_longer_run_continues_from_the_state_before_the_decay(tmp_path):
    """Resumed from ``stable/``, a run of three epochs becomes bit-identical to one planned with four."""
    settings = {"schedule__kind": "wsd", "schedule__decay": 0.5, "schedule__warmup": 0.0, "discriminator": None}
    training(tmp_path / "short", schedule__epochs=3, **settings).run()
    _, facts = training_state.load_state(tmp_path / "short" / "stable")
    assert facts["step"] == 5  # of 9
    training(tmp_path / "straight", schedule__epochs=4, **settings).run()
    shutil.copytree(tmp_path / "short" / "stable", tmp_path / "longer" / "last")
    training(tmp_path / "longer", resume=True, schedule__epochs=4, **settings).run()
    one, two = (training_state.load_state(tmp_path / name / "last") for name in ("straight", "longer"))
    assert one[1]["step"] == two[1]["step"] == 12
    assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])


def test_resume_without_a_checkpoint_starts_a_run(tmp_path):
    training(tmp_path, resume=True, schedule__epochs=1).run()
    with pytest.raises(ValueError, match="already contains a training run; pass --resume"):
        training(tmp_path)
    longer = training(tmp_path, resume=True, schedule__epochs=2)
    assert longer.run()["step"] == 6


def test_resume_refuses_another_network_or_batch(tmp_path):
    training(tmp_path, schedule__epochs=1).run()
    with pytest.raises(ValueError, match="the networks differ from those of this configuration"):
        training(tmp_path, resume=True, generator__blocks=2)
    with pytest.raises(
        ValueError, match="expected 6 steps per epoch, got step 3 in epoch 2: the data or the batch size differs"
    ):
        training(tmp_path, resume=True, data__batch_size=2)


def test_history_drops_repeated_steps(tmp_path):
    training(tmp_path, schedule__epochs=2).run()
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write(json.dumps({"epoch": 3, "step": 9}) + "\n" + '{"epoch": 4, "st')
    training(tmp_path, resume=True).run()
    assert [row["step"] for row in history(tmp_path)] == [3, 6, 9] and "loss" in history(tmp_path)[-1]


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_signals_save(tmp_path, which):
    def kill(run, parts, terms):
        if run.progress.step == 4:
            os.kill(os.getpid(), which)

    before = signal.getsignal(which)
    with pytest.raises(Interrupted, match=f"{which.name}: stopped after step 4; .*last is saved"):
        training(tmp_path, run__log_every=100, on_step=kill).run()
    assert signal.getsignal(which) is before
    assert training_state.load_state(tmp_path / "last")[1]["step"] == 4


class Interrupting(torch.utils.data.Dataset):
    """Validation data that send SIGINT to their process when they are first read."""

    def __init__(self, dataset):
        self.dataset, self.skeleton, self.sent = dataset, dataset.skeleton, False

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        if not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGINT)
        return self.dataset[key]


def test_interrupted_while_validating(tmp_path):
    """The epoch does not count as finished; its validation is repeated after a resume."""
    data = training_data(TINY)
    with pytest.raises(Interrupted, match="SIGINT: stopped after step 6"):
        training(tmp_path, data=TrainingData(data.training, Interrupting(data.validation))).run()
    facts = training_state.load_state(tmp_path / "last")[1]
    assert (facts["epoch"], facts["epoch_step"]) == (1, 3)
    training(tmp_path, resume=True).run()
    assert [row["step"] for row in history(tmp_path) if "PCK@0.2" in row] == [6, 9]


def test_checkpoints_within_an_epoch(tmp_path):
    saved = []

    def on_save(run):
        saved.append(run.progress.step)

    training(tmp_path / "steps", run__checkpoint_steps=2, schedule__epochs=2, on_save=on_save).run()
    assert saved == [2, 3, 4, 6]
    saved.clear()
    options = {"run__checkpoint_minutes": 1e-9, "run__log_every": 1, "schedule__epochs": 1}
    training(tmp_path / "time", on_save=on_save, **options).run()
    assert saved == [1, 2, 3]


# ---------------------------------------------------------------------- losses that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value):
    calls = []

    def broken(heatmaps, target, valid, count=None):
        calls.append(1)
        loss = heatmap_loss(heatmaps, target, valid, count)
        return loss * value if len(calls) == 5 else loss

    terms = rf"the loss of step 5 is not finite \(loss {value}, heatmap {value}, mil 0\."
    with pytest.raises(NotFinite, match=terms) as error:
        training(tmp_path, run__log_every=100, heatmap_loss=broken).run()
    assert f"the last good checkpoint is {tmp_path / 'last'}, of step 3" in str(error.value)
    tensors, facts = training_state.load_state(tmp_path / "last")
    assert facts["step"] == 3 and all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """A finite loss whose gradient is NaN: the next checkpoint is not written."""

    def broken(heatmaps, target, valid, count=None):
        return heatmap_loss(heatmaps, target, valid, count) + (heatmaps.sum() * 0).sqrt()

    with pytest.raises(NotFinite, match=r"weights are not finite after step 1; there is no checkpoint yet"):
        options = {"optimizer__clip": 0, "discriminator": None, "run__checkpoint_steps": 1}
        training(tmp_path, heatmap_loss=broken, **options).run()
    assert not (tmp_path / "last").exists()
