"""``accelerate.Accelerator`` of a training run."""

from typing import Any

import torch

from amil_fast.utils.optional import require


def make_accelerator(device: str | None, precision: str) -> Any:
    """Returns an ``accelerate.Accelerator``: one process, unless started by torchrun or ``accelerate launch``.

    Args:
        device: ``"cpu"``; otherwise a GPU is used if there is one.
        precision: ``"fp32"``, ``"bf16"``, ``"fp16"`` (GPU only) or ``"auto"``: bf16 where the device multiplies it
            in hardware, otherwise fp32.

    Raises:
        MissingDependency: accelerate is not installed.
    """
    accelerate = require("accelerate", "training")
    # An earlier run in this process may have used another precision.
    require("accelerate.state", "training", package="accelerate").AcceleratorState._reset_state()
    # Without cpu=True, processes under torchrun fail to connect on a machine without a GPU.
    cpu = uses_cpu(device)
    if precision == "auto":
        precision = fastest_precision(cpu)
    return accelerate.Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=cpu)


def uses_cpu(device: str | None) -> bool:
    """Whether a run with this ``device`` is on the CPU; arguments as for :func:`make_accelerator`."""
    return device == "cpu" or not torch.accelerator.is_available()


def fastest_precision(cpu: bool) -> str:
    """``"bf16"`` or ``"fp32"``; without instructions for it, bf16 takes ten times as long on a CPU."""
    if cpu:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return "bf16" if fast else "fp32"
