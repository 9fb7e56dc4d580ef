"""Bags of instances: the input forms, and the checks that every pooling over bags shares.

A bag is a set of rows. Four forms are accepted: padded with a mask, padded with lengths, packed with ``cu_seqlens`` and
a jagged nested tensor, which is packed in disguise.
"""

import numpy as np
import torch

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INDEX_DTYPES = (torch.int32, torch.int64)


def accumulation_dtype(dtype):
    """The dtype in which sums over instances are taken: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_bags(instances, mask, lengths, cu_seqlens):
    """Checks one call's bags and returns ``(instances, mask, lengths, cu_seqlens)`` in canonical form.

    Canonical: ``instances`` is a plain ``(B, N, D)`` or, exactly where ``cu_seqlens`` is given, ``(total, D)`` tensor;
    ``mask`` is bool; at most one of the other three is not None. Only shapes, dtypes and devices are looked at here
    (see :func:`check_bag_values`), so that the checks cost nothing on a GPU and hold under tracing.
    """
    if not isinstance(instances, torch.Tensor):
        raise TypeError(f"instances: expected a torch.Tensor, got {type(instances).__name__}")
    if instances.is_nested:
        if mask is not None or lengths is not None or cu_seqlens is not None:
            raise ValueError("instances: a nested tensor carries its own bag sizes; drop mask, lengths and cu_seqlens")
        if instances.layout != torch.jagged:
            raise ValueError(
                "instances: expected a nested tensor of layout torch.jagged, got layout "
                f"{instances.layout}; make it with torch.nested.nested_tensor(..., layout=torch.jagged)"
            )
        if instances.dim() != 3 or instances._ragged_idx != 1:
            raise ValueError("instances: expected a jagged nested tensor of shape (B, ragged, D)")
        if instances.lengths() is not None:
            raise ValueError("instances: expected a jagged nested tensor without holes; call .contiguous() first")
        instances, cu_seqlens = instances.values(), instances.offsets()
    if instances.dtype not in FLOAT_DTYPES:
        raise TypeError(f"instances: expected dtype float16, bfloat16, float32 or float64, got {instances.dtype}")

    if cu_seqlens is not None:
        if mask is not None or lengths is not None:
            raise ValueError("cu_seqlens: expected alone, got it together with mask or lengths")
        if instances.dim() != 2:
            raise ValueError(f"instances: expected shape (total, D) with cu_seqlens, got {tuple(instances.shape)}")
        _check_index(cu_seqlens, "cu_seqlens", instances.device)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens: expected shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    else:
        if instances.dim() != 3:
            raise ValueError(
                f"instances: expected shape (B, N, D), or (total, D) with cu_seqlens, got {tuple(instances.shape)}"
            )
        if mask is not None:
            if lengths is not None:
                raise ValueError("mask: expected mask or lengths, got both")
            if not isinstance(mask, torch.Tensor):
                raise TypeError(f"mask: expected a torch.Tensor, got {type(mask).__name__}")
            if mask.shape != instances.shape[:2]:
                raise ValueError(f"mask: expected shape {tuple(instances.shape[:2])} (B, N), got {tuple(mask.shape)}")
            _check_device(mask, "mask", instances.device)
            if mask.dtype != torch.bool:
                mask = mask != 0
        elif lengths is not None:
            _check_index(lengths, "lengths", instances.device)
            if lengths.shape != instances.shape[:1]:
                raise ValueError(f"lengths: expected shape ({instances.shape[0]},) (B,), got {tuple(lengths.shape)}")
    if instances.shape[-1] == 0:
        raise ValueError(f"instances: expected at least one feature, got shape {tuple(instances.shape)}")
    return instances, mask, lengths, cu_seqlens


def check_bag_values(instances, lengths, cu_seqlens):
    """Raises ValueError where ``lengths`` or ``cu_seqlens`` hold impossible values. For CPU tensors only."""
    if lengths is not None and lengths.shape[0]:
        values = lengths.numpy()
        low, high = values.min(), values.max()
        if low < 0 or high > instances.shape[1]:
            bad = int(np.argmax((values < 0) | (values > instances.shape[1])))
            raise ValueError(f"lengths: expected values in 0..{instances.shape[1]}, got lengths[{bad}] = {values[bad]}")
    if cu_seqlens is not None:
        values = cu_seqlens.numpy()
        if values[0] != 0:
            raise ValueError(f"cu_seqlens: expected cu_seqlens[0] = 0, got {values[0]}")
        if values[-1] != instances.shape[0]:
            raise ValueError(
                f"cu_seqlens: expected the last value to be the number of instances {instances.shape[0]}, "
                f"got {values[-1]}"
            )
        steps = np.diff(values)
        if steps.size and steps.min() < 0:
            bad = int(np.argmin(steps))
            raise ValueError(
                f"cu_seqlens: expected values that never fall, got cu_seqlens[{bad}] = {values[bad]}, "
                f"cu_seqlens[{bad + 1}] = {values[bad + 1]}"
            )


def _check_index(tensor, name, device):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _INDEX_DTYPES:
        raise TypeError(f"{name}: expected dtype int32 or int64, got {tensor.dtype}")
    _check_device(tensor, name, device)


def _check_device(tensor, name, device):
    if tensor.device != device:
        raise ValueError(f"{name}: expected the device of instances ({device}), got {tensor.device}")


def bag_mask(instances, mask, lengths):
    """The bool ``(B, N)`` mask of padded bags, or None where every instance is real."""
    if lengths is None:
        return mask
    return torch.arange(instances.shape[1], device=instances.device) < lengths[:, None]


def bag_index(instances, cu_seqlens):
    """Which bag each row of packed bags belongs to: int64 ``(total,)``."""
    sizes = cu_seqlens.diff()
    bags = torch.arange(sizes.shape[0], device=instances.device)
    return torch.repeat_interleave(bags, sizes, output_size=instances.shape[0])
