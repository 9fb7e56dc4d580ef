"""What the tests of training share: a run so small that a step takes milliseconds."""

import io

from rich.console import Console

from amil_fast.training.config import (
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

TINY = TrainConfig(
    generator=GeneratorConfig(backbone="hourglass1", features=16, blocks=1, depth=2),
    discriminator=DiscriminatorConfig(features=8, depth=2),
    data=DataConfig(
        dataset="drawn", input_size=64, batch_size=4, heatmap_std=1.0, drawn=12, drawn_validation=6, workers=0
    ),
    optimizer=OptimizerConfig(name="adamw", lr=2e-3, weight_decay=0.01, clip=1.0),
    loss=LossConfig(adversarial=1e-3, mil=1e-4),
    schedule=ScheduleConfig(epochs=3, kind="cosine", warmup=1.0),
    run=RunConfig(device="cpu", threads=1, evaluate_every=2, log_every=2, overlays=2, tensorboard=False, ema_decay=0.9),
)


def quiet_console():
    """A console whose text is ``console.file.getvalue()``."""
    return Console(file=io.StringIO(), width=300)
