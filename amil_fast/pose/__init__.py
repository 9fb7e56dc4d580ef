"""Human pose estimation: skeletons, networks, losses; data, training, inference and evaluation in the subpackages."""

from amil_fast.pose.models.discriminator import PoseDiscriminator, error_map
from amil_fast.pose.models.generator import PoseGenerator, PoseOutput
from amil_fast.pose.models.losses import (
    Balance,
    adversarial_loss,
    choose_sides,
    discriminator_losses,
    distillation_target,
    heatmap_loss,
    region_cross_entropy,
    region_loss,
    softmax_cross_entropy,
)
from amil_fast.pose.skeletons import SKELETONS, Skeleton, get_skeleton

__all__ = [
    "SKELETONS",
    "Skeleton",
    "get_skeleton",
    "PoseGenerator",
    "PoseOutput",
    "PoseDiscriminator",
    "error_map",
    "Balance",
    "heatmap_loss",
    "region_cross_entropy",
    "softmax_cross_entropy",
    "choose_sides",
    "distillation_target",
    "region_loss",
    "adversarial_loss",
    "discriminator_losses",
]
