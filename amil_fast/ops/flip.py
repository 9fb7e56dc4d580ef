"""Validation of heatmaps and flip pairs, and flipping of heatmaps."""

import operator

import torch

from amil_fast.ops.bags import FLOAT_DTYPES


def check_float_maps(heatmaps, name, axes=2):
    """Raises unless ``heatmaps`` is a floating-point tensor of at least ``axes`` axes with non-empty maps (H, W)."""
    if not isinstance(heatmaps, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(heatmaps).__name__}")
    if heatmaps.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected dtype float16, bfloat16, float32 or float64, got {heatmaps.dtype}")
    if heatmaps.dim() < axes:
        expected = "(..., H, W)" if axes == 2 else "(..., K, H, W)"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(heatmaps.shape)}")
    if 0 in heatmaps.shape[-2:]:
        raise ValueError(f"{name}: expected maps of at least one pixel, got shape {tuple(heatmaps.shape)}")


def check_pairs(flip_pairs, K):
    """Flip pairs as a permutation: entry k is the joint that joint k changes places with, or k."""
    if isinstance(flip_pairs, torch.Tensor):
        raise TypeError("flip_pairs: expected a sequence of pairs of ints, got a torch.Tensor; pass its .tolist()")
    try:
        pairs = [(operator.index(a), operator.index(b)) for a, b in flip_pairs]
    except (TypeError, ValueError):
        raise TypeError(f"flip_pairs: expected a sequence of pairs of ints, got {flip_pairs!r}") from None
    swap = list(range(K))
    for a, b in pairs:
        if not (0 <= a < K and 0 <= b < K):
            raise ValueError(f"flip_pairs: expected joints in 0..{K - 1}, got the pair ({a}, {b})")
        if a == b or swap[a] != a or swap[b] != b:
            raise ValueError(
                f"flip_pairs: expected each joint at most once, got a repeated joint in the pair ({a}, {b})"
            )
        swap[a], swap[b] = b, a
    return swap


def flip_maps(maps, swap, shift):
    """Flips heatmaps ``(..., K, H, W)`` horizontally; joint k of the result is joint ``swap[k]`` of ``maps``."""
    if swap != list(range(len(swap))):
        maps = torch.stack([maps[..., k, :, :] for k in swap], -3)  # an index tensor would need a copy to the GPU
    flipped = maps.flip(-1)
    return torch.cat([flipped[..., :1], flipped[..., :-1]], -1) if shift else flipped
