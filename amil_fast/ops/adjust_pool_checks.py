"""Checks of the settings of adjust pooling, and of calls of its registered operators."""

import torch

from amil_fast.ops import backends
from amil_fast.ops.bags import accumulation_dtype, check_bags, check_max_seqlen, check_strided

SUPPORTED = {
    "auto": lambda device: {"cpu": "cpp", "cuda": "triton"}.get(device, "reference"),
    "reference": lambda device: None,
    "cpp": lambda device: None if device == "cpu" else f"expected CPU tensors, got a tensor on {device!r}",
    "triton": backends.why_not_triton,
}
# Modules with functions forward and backward, which the registered operator calls.
IMPLEMENTATIONS = {"cpp": "amil_fast.ops.adjust_pool_cpp", "triton": "amil_fast.kernels.adjust_pool_launch"}

# The weights of the paper's routing settle within tens of iterations; the bound turns a typing error into a message
# instead of an allocation of (B, num_iters, D) numbers that can end the process.
MAX_NUM_ITERS = 10_000


def check_settings(num_iters: int, return_weights: bool, detach_routing: bool, backend: str) -> None:
    """Raises TypeError or ValueError for invalid arguments other than tensors."""
    if not isinstance(num_iters, (int, torch.SymInt)) or isinstance(num_iters, bool):
        raise TypeError(f"num_iters: expected an int, got {type(num_iters).__name__}")
    if not 1 <= num_iters <= MAX_NUM_ITERS:
        raise ValueError(f"num_iters: expected an int from 1 to {MAX_NUM_ITERS}, got {num_iters}")
    if return_weights is not True and return_weights is not False:
        raise TypeError(f"return_weights: expected a bool, got {return_weights!r}")
    if detach_routing is not True and detach_routing is not False:
        raise TypeError(f"detach_routing: expected a bool, got {detach_routing!r}")
    backends.check_name(backend, SUPPORTED)


def check_forward(
    instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen=None
):
    """Checks what :func:`adjust_pool` checks, for calls of the registered operators."""
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    check_max_seqlen(instances, cu_seqlens, max_seqlen)
    check_bags(instances, mask, lengths, cu_seqlens)
    check_settings(num_iters, return_weights, detach_routing, backend)
    if backend not in IMPLEMENTATIONS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {backend!r}")


def saved_shapes(instances, cu_seqlens, num_iters):
    """Shapes of bag, sigma and softmax_stats."""
    num_bags = instances.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    D = instances.shape[-1]
    return (num_bags, D), (num_bags, num_iters, D), (num_bags, num_iters, 2)


def check_backward(
    grad_bag,
    grad_weights,
    instances,
    mask,
    lengths,
    cu_seqlens,
    sigma,
    softmax_stats,
    detach_routing,
    backend,
    max_seqlen=None,
):
    """Checks the arguments of ``adjust_pool_backward``."""
    num_iters = sigma.shape[1] if sigma.dim() == 3 else 1
    check_forward(instances, mask, lengths, cu_seqlens, num_iters, True, detach_routing, backend, max_seqlen)
    bag_shape, sigma_shape, stats_shape = saved_shapes(instances, cu_seqlens, num_iters)
    dtype = accumulation_dtype(instances.dtype)
    for name, tensor, expected_shape, expected_dtype in (
        ("grad_bag", grad_bag, bag_shape, instances.dtype),
        ("grad_weights", grad_weights, instances.shape[:-1], dtype),
        ("sigma", sigma, sigma_shape, dtype),
        ("softmax_stats", softmax_stats, stats_shape, dtype),
    ):
        if tensor is None:
            continue
        if tensor.shape != expected_shape or tensor.dtype != expected_dtype:
            raise ValueError(
                f"{name}: expected shape {tuple(expected_shape)} and dtype {expected_dtype}, "
                f"got {tuple(tensor.shape)} and {tensor.dtype}"
            )
        check_strided(tensor, name)
        if tensor.device != instances.device:
            raise ValueError(f"{name}: expected the device of instances ({instances.device}), got {tensor.device}")
