"""Fused adjust pooling and heatmap decoding for PyTorch, and the AMIL pose model based on them.

``import amil_fast`` needs PyTorch and NumPy only. Triton and the compiled extension are loaded by the first call that
uses them, the subpackages ``nn``, ``metrics``, ``mil`` and ``pose`` on first access.
"""

import importlib
from typing import Any

from amil_fast.ops import adjust_pool, decode_heatmaps, soft_argmax

__version__ = "0.2.0"

# Public name -> module that defines it, imported on first access; None: the name is a subpackage.
_LAZY = {
    "AdjustPool": "amil_fast.nn",
    "MIRNet": "amil_fast.nn",
    "PoseGenerator": "amil_fast.pose",
    "PoseDiscriminator": "amil_fast.pose",
    "info": "amil_fast.environment",
    "nn": None,
    "metrics": None,
    "pose": None,
    "mil": None,
}

__all__ = [
    "__version__",
    "adjust_pool",
    "decode_heatmaps",
    "soft_argmax",
    "AdjustPool",
    "MIRNet",
    "PoseGenerator",
    "PoseDiscriminator",
    "info",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'amil_fast' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name] or f"amil_fast.{name}")
    value = module if _LAZY[name] is None else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
