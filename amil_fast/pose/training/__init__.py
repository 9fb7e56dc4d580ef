"""Training of the pose model: configuration, trainer, checkpoints, ablation."""

from amil_fast.pose.training.config import TrainConfig, from_dict
from amil_fast.pose.training.overrides import parse_override
from amil_fast.pose.training.presets import PRESETS, preset
from amil_fast.pose.training.trainer import Interrupted, NotFinite, PoseTraining, train

__all__ = [
    "PRESETS",
    "Interrupted",
    "NotFinite",
    "PoseTraining",
    "TrainConfig",
    "from_dict",
    "parse_override",
    "preset",
    "train",
]
