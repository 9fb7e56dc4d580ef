"""Helpers of the network tests."""

import torch

from amil_fast.pose import PoseGenerator

SMALL = {"input_size": 64, "features": 16}


def small_generator():
    """A generator with reproducible weights, in evaluation mode."""
    torch.manual_seed(0)
    return PoseGenerator(**SMALL).eval()


def randomize(module, seed=0):
    """Perturbs biases and statistics: scores of a new network are nearly constant."""
    rng = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=rng)
        elif value.is_floating_point() and value.dim() <= 1:
            value.add_(0.3 * torch.randn(value.shape, generator=rng))
    return module
