"""Human poses: skeletons, and the networks that find them."""

import importlib

# Name -> module; imported when first asked for: a skeleton needs no network.
_LAZY = {
    "PoseGenerator": "generator",
    "PoseOutput": "generator",
    "PoseDiscriminator": "discriminator",
    "error_map": "discriminator",
    "Balance": "losses",
    "heatmap_loss": "losses",
    "region_cross_entropy": "losses",
    "region_loss": "losses",
    "adversarial_loss": "losses",
    "discriminator_losses": "losses",
}
__all__ = list(_LAZY)


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_LAZY})
