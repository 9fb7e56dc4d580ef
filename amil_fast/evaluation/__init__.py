"""Scores and pictures: PCK and PCKh, confusion of joints, curves, contact sheets, prediction on images."""

import importlib

# Public name -> module; what needs OpenCV or Matplotlib is imported when first asked for.
_LAZY = {
    "PCK": "metrics",
    "PCKh": "metrics",
    "JointConfusion": "metrics",
    "JointErrors": "metrics",
    "pair_distance": "metrics",
    "head_size": "metrics",
    "head_size_from_joints": "metrics",
    "draw_pose": "drawing",
    "contact_sheet": "drawing",
    "plot_curves": "plots",
    "plot_confusion": "plots",
    "plot_errors": "plots",
    "score": "scoring",
    "Predictor": "predictor",
    "load_model": "predictor",
}

__all__ = sorted(_LAZY)


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_LAZY})
