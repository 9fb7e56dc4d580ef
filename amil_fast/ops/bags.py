"""Input forms of bags and their validation, shared by all poolings.

A bag is a set of rows. Four forms are accepted: padded with a mask, padded with lengths, packed with ``cu_seqlens``,
and a jagged nested tensor, which is a packed tensor with offsets.
"""

import contextlib

import numpy as np
import torch

from amil_fast.ops.backends import is_plain

# Supported dtypes, and their codes in csrc/runtime/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
FLOAT_DTYPES = tuple(DTYPE_CODES)
_INDEX_DTYPES = (torch.int32, torch.int64)


def accumulation_dtype(dtype):
    """Dtype of sums over instances: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device_type):
    """Context that disables autocast; does nothing on devices without autocast, such as meta."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def check_bags(instances, mask, lengths, cu_seqlens):
    """Validates bags and returns ``(instances, mask, lengths, cu_seqlens)`` in canonical form.

    In canonical form ``instances`` is a ``(B, N, D)`` tensor or, with ``cu_seqlens``, a ``(total, D)`` tensor; ``mask``
    is bool; at most one of the other three is not None. Only shapes, dtypes and devices are checked (values in
    :func:`check_bag_values`), which needs no synchronization with a GPU and works under tracing.
    """
    if not isinstance(instances, torch.Tensor):
        raise TypeError(f"instances: expected a torch.Tensor, got {type(instances).__name__}")
    if instances.is_nested:
        if mask is not None or lengths is not None or cu_seqlens is not None:
            raise ValueError("instances: a nested tensor carries its own bag sizes; drop mask, lengths and cu_seqlens")
        if instances.layout != torch.jagged:
            raise ValueError(
                "instances: expected a nested tensor of layout torch.jagged, got layout "
                f"{instances.layout}; create it with torch.nested.nested_tensor(..., layout=torch.jagged)"
            )
        if instances.dim() != 3 or instances._ragged_idx != 1:
            raise ValueError("instances: expected a jagged nested tensor of shape (B, ragged, D)")
        if instances.lengths() is not None:
            raise ValueError("instances: expected a jagged nested tensor without holes; call .contiguous() first")
        instances, cu_seqlens = instances.values(), instances.offsets()
    if instances.dtype not in FLOAT_DTYPES:
        raise TypeError(f"instances: expected dtype float16, bfloat16, float32 or float64, got {instances.dtype}")
    check_strided(instances, "instances")

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
            check_strided(mask, "mask")
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


def check_max_seqlen(instances, cu_seqlens, max_seqlen):
    """Validates ``max_seqlen``; returns it, or for a nested tensor the value that it carries, or None if unknown.

    ``instances`` and ``cu_seqlens`` as passed by the caller, before :func:`check_bags`.
    """
    if max_seqlen is None:
        # Not the public max_seqlen, which synchronizes with a GPU where the value is unknown.
        nested = isinstance(instances, torch.Tensor) and instances.is_nested
        return getattr(instances, "_maybe_max_seqlen", None) if nested else None
    if not isinstance(max_seqlen, (int, torch.SymInt)) or isinstance(max_seqlen, bool):
        raise TypeError(f"max_seqlen: expected an int, got {type(max_seqlen).__name__}")
    if cu_seqlens is None:
        raise ValueError("max_seqlen: expected together with cu_seqlens only")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen: expected a non-negative int, got {max_seqlen}")
    return max_seqlen


def check_bag_values(instances, lengths, cu_seqlens, max_seqlen=None):
    """Raises ValueError if values of ``lengths`` or ``cu_seqlens`` are out of range, or a bag is too long.

    For CPU tensors only. Tensors whose memory does not hold their values (:func:`amil_fast.ops.backends.is_plain`) are
    not checked.
    """
    if lengths is not None and lengths.shape[0] and is_plain(lengths):
        values = _numpy(lengths)
        low, high = values.min(), values.max()
        if low < 0 or high > instances.shape[1]:
            bad = int(np.argmax((values < 0) | (values > instances.shape[1])))
            raise ValueError(f"lengths: expected values in 0..{instances.shape[1]}, got lengths[{bad}] = {values[bad]}")
    if cu_seqlens is not None and is_plain(cu_seqlens):
        values = _numpy(cu_seqlens)
        if values[0] != 0:
            raise ValueError(f"cu_seqlens: expected cu_seqlens[0] = 0, got {values[0]}")
        if values[-1] > instances.shape[0]:
            raise ValueError(
                f"cu_seqlens: expected the last value to be at most the number of instances {instances.shape[0]}, "
                f"got {values[-1]}"
            )
        decreasing = values[1:] < values[:-1]  # differences could overflow
        if decreasing.any():
            bad = int(np.argmax(decreasing))
            raise ValueError(
                f"cu_seqlens: expected non-decreasing values, got cu_seqlens[{bad}] = {values[bad]}, "
                f"cu_seqlens[{bad + 1}] = {values[bad + 1]}"
            )
        steps = np.diff(values) if max_seqlen is not None else values[:0]
        if steps.size and steps.max() > max_seqlen:
            bad = int(np.argmax(steps))
            raise ValueError(f"max_seqlen: expected at least {steps[bad]}, the length of bag {bad}, got {max_seqlen}")


def _numpy(tensor):
    """Array of a plain tensor; ``Tensor.numpy`` fails in ``torch.func`` transforms and takes a tenth of the time."""
    return np.from_dlpack(tensor) if torch._C._are_functorch_transforms_active() else tensor.numpy()


def _check_index(tensor, name, device):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _INDEX_DTYPES:
        raise TypeError(f"{name}: expected dtype int32 or int64, got {tensor.dtype}")
    check_strided(tensor, name)
    _check_device(tensor, name, device)


def check_strided(tensor, name):
    """Raises TypeError for sparse and other tensors without strides."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}; call .to_dense() first")


def _check_device(tensor, name, device):
    if tensor.device != device:
        raise ValueError(f"{name}: expected the device of instances ({device}), got {tensor.device}")


def bag_mask(instances, mask, lengths):
    """Bool mask ``(B, N)`` of padded bags; None without padding."""
    if lengths is None:
        return mask
    return torch.arange(instances.shape[1], device=instances.device) < lengths[:, None]


def bag_index(instances, cu_seqlens):
    """Bag index of every row of packed bags: int64 ``(total,)``; B for the rows after the last bag."""
    total = instances.shape[0]
    sizes = torch.diff(cu_seqlens, append=cu_seqlens.new_full((1,), total))
    bag_indices = torch.arange(sizes.shape[0], device=instances.device)
    return torch.repeat_interleave(bag_indices, sizes, output_size=total)
