"""Training of the pose model: configuration, presets, trainer, checkpoints."""

from amil_fast.pose.training.config import (
    BalanceConfig,
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    from_dict,
)
from amil_fast.pose.training.meter import NotFinite, TrainingProgress
from amil_fast.pose.training.overrides import parse_override
from amil_fast.pose.training.presets import PRESETS, preset
from amil_fast.pose.training.trainer import PoseTraining, train
from amil_fast.pose.training.training_data import TrainingData
from amil_fast.utils.errors import Interrupted
from amil_fast.utils.signals import StopRequest

__all__ = [
    # configuration
    "TrainConfig",
    "GeneratorConfig",
    "DiscriminatorConfig",
    "DataConfig",
    "OptimizerConfig",
    "LossConfig",
    "BalanceConfig",
    "ScheduleConfig",
    "RunConfig",
    "from_dict",
    "parse_override",
    "PRESETS",
    "preset",
    # training
    "train",
    "PoseTraining",
    "TrainingData",
    "TrainingProgress",
    "StopRequest",
    "Interrupted",
    "NotFinite",
]
