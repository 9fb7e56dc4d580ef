"""Shared by the tests of training: a configuration so small that a step takes milliseconds."""

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console

from amil_fast.pose import heatmap_loss
from amil_fast.pose.training import (
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    OptimizerConfig,
    PoseTraining,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from amil_fast.pose.training.training_data import training_data

TINY = TrainConfig(
    generator=GeneratorConfig(backbone="hourglass1", features=16, blocks=1, depth=2),
    discriminator=DiscriminatorConfig(features=8, depth=2),
    data=DataConfig(
        dataset="synthetic",
        input_size=64,
        batch_size=4,
        heatmap_std=1.0,
        synthetic=12,
        synthetic_validation=6,
        workers=0,
    ),
    optimizer=OptimizerConfig(name="adamw", lr=2e-3, weight_decay=0.01, clip=1.0),
    loss=LossConfig(adversarial=1e-3, mil=1e-4),
    schedule=ScheduleConfig(epochs=3, kind="cosine", warmup=1.0),
    run=RunConfig(device="cpu", threads=1, evaluate_every=2, log_every=2, overlays=2, tensorboard=False, ema_decay=0.9),
)


@pytest.fixture(autouse=True)
def one_thread():
    """Restores the number of threads after each test of a module that imports this fixture (TINY sets one)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class WithGaps(torch.utils.data.Dataset):
    """A pose data set in which some joints, different ones in each crop, are not annotated."""

    def __init__(self, dataset):
        self.dataset, self.skeleton = dataset, dataset.skeleton

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        sample = self.dataset[key]
        sample["valid"][: 1 + 2 * int(sample["index"]) % 11] = False
        return sample


def data_with_gaps(config):
    """The data of a configuration, with :class:`WithGaps` for training."""
    data = training_data(config)
    return dataclasses.replace(data, training=WithGaps(data.training))


def quiet_console():
    """A console that prints to ``console.file``, a StringIO."""
    return Console(file=io.StringIO(), width=300)


def training(out, *, resume=False, data=None, on_step=None, on_save=None, heatmap_loss=heatmap_loss, **settings):
    """A run of TINY with some settings changed: ``data__workers=1`` sets ``data.workers``."""
    config = TINY.override({name.replace("__", "."): value for name, value in settings.items()})
    options = {"resume": resume, "data": data, "on_step": on_step, "on_save": on_save, "heatmap_loss": heatmap_loss}
    return PoseTraining(config, out, quiet_console(), **options)


def text_of(run):
    return run.console.file.getvalue()


def history(out):
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def stop_after(step):
    """A callback that requests a stop after a step, as a signal would."""

    def on_step(run, parts, terms):
        if run.progress.step == step:
            run.stop.request("SIGTERM")

    return on_step
