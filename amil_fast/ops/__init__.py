"""Operators: public functions, validation, selection of backends, ``torch.library`` registration, references."""

from amil_fast.ops.adjust_pool import adjust_pool
from amil_fast.ops.adjust_pool_reference import squash
from amil_fast.ops.decode_heatmaps import decode_heatmaps
from amil_fast.ops.heatmaps import encode_heatmaps, flip_back, soft_argmax

__all__ = ["adjust_pool", "decode_heatmaps", "encode_heatmaps", "flip_back", "soft_argmax", "squash"]
