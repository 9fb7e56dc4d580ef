"""Human poses: skeletons, the networks that estimate them, and everything around their training and use."""

from amil_fast.pose.models.discriminator import PoseDiscriminator, error_map
from amil_fast.pose.models.generator import PoseGenerator, PoseOutput
from amil_fast.pose.models.losses import (
    Balance,
    adversarial_loss,
    discriminator_losses,
    heatmap_loss,
    region_cross_entropy,
    region_loss,
)

__all__ = [
    "PoseGenerator",
    "PoseOutput",
    "PoseDiscriminator",
    "error_map",
    "Balance",
    "heatmap_loss",
    "region_cross_entropy",
    "region_loss",
    "adversarial_loss",
    "discriminator_losses",
]
