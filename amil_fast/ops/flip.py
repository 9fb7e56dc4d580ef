"""What the functions on joints' heatmaps share: checks, and the way back from the mirror."""

import operator

import torch

from amil_fast.ops.bags import FLOAT_DTYPES


def check_float_maps(heatmaps, name, axes=2):
    """Raises unless ``heatmaps`` is a floating tensor of at least ``axes`` axes, the last two (H, W) not empty."""
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
    """Pairs of joints as a list: entry k is the joint in joint k's place in the mirror, k if it has no pair."""
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
            raise ValueError(f"flip_pairs: expected each joint at most once, got one again in the pair ({a}, {b})")
        swap[a], swap[b] = b, a
    return swap


def flip_maps(maps, swap, shift):
    """Maps ``(..., K, H, W)`` of a mirrored crop, mirrored back: joint k is ``maps``' joint ``swap[k]``."""
    if swap != list(range(len(swap))):
        maps = torch.stack([maps[..., k, :, :] for k in swap], -3)  # an index tensor would have to be sent to the GPU
    mirrored = maps.flip(-1)
    return torch.cat([mirrored[..., :1], mirrored[..., :-1]], -1) if shift else mirrored
