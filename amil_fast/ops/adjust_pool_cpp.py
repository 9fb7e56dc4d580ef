"""CPU backend of adjust pooling: passes tensors to ``csrc/adjust_pool/adjust_pool.cpp`` as addresses and sizes."""

import math

import torch

from amil_fast.ops.backends import native
from amil_fast.ops.bags import DTYPE_CODES, accumulation_dtype

# Smaller blocks are cached by the C library once a block of their size has been freed.
_PAGE_BLOCK_BYTES = 4 << 20


def _describe(instances, mask, lengths, cu_seqlens, num_iters):
    """Leading arguments of both C++ functions, and the tensors whose memory they refer to."""
    if instances.stride(-1) != 1 and instances.shape[-1] > 1:
        instances = instances.contiguous()
    offsets = _int64(cu_seqlens)
    lengths = _int64(lengths)
    mask = mask.contiguous() if mask is not None else None
    if cu_seqlens is not None:
        num_bags, max_instances, bag_stride = cu_seqlens.shape[0] - 1, 0, 0
    else:
        num_bags, max_instances, bag_stride = instances.shape[0], instances.shape[1], instances.stride(0)
    described = (
        instances.data_ptr(),
        DTYPE_CODES[instances.dtype],
        num_bags,
        max_instances,
        instances.shape[-1],
        bag_stride,
        instances.stride(-2),
        _address(offsets),
        _address(lengths),
        _address(mask),
        num_iters,
        torch.get_num_threads(),
    )
    return described, (instances, offsets, lengths, mask)


def forward(instances, mask, lengths, cu_seqlens, num_iters, return_weights, max_seqlen=None):
    """Returns ``(bag, weights, sigma, softmax_stats)`` of the registered operator ``amil_fast::adjust_pool``.

    ``max_seqlen`` is unused: the lengths are in host memory.
    """
    num_bags = instances.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    D = instances.shape[-1]
    dtype = accumulation_dtype(instances.dtype)
    bag = instances.new_empty(num_bags, D)
    weights = instances.new_empty(instances.shape[:-1] if return_weights else (0,), dtype=dtype)
    sigma = instances.new_empty(num_bags, num_iters, D, dtype=dtype)
    softmax_stats = instances.new_empty(num_bags, num_iters, 2, dtype=dtype)
    described, kept_alive = _describe(instances, mask, lengths, cu_seqlens, num_iters)
    native().adjust_pool_forward(
        *described,
        bag.data_ptr(),
        weights.data_ptr() if return_weights else 0,
        sigma.data_ptr(),
        softmax_stats.data_ptr(),
    )
    del kept_alive
    if return_weights:
        _zero_after_last_bag(weights, cu_seqlens)
    return bag, weights, sigma, softmax_stats


def backward(
    grad_bag, grad_weights, instances, mask, lengths, cu_seqlens, sigma, softmax_stats, detach_routing, max_seqlen=None
):
    """Returns the gradient of ``instances``, a contiguous tensor."""
    grad_bag = grad_bag.contiguous() if grad_bag is not None else None
    grad_weights = grad_weights.contiguous() if grad_weights is not None else None
    sigma, softmax_stats = sigma.contiguous(), softmax_stats.contiguous()
    grad_instances = _empty(instances.shape, instances.dtype)
    described, kept_alive = _describe(instances, mask, lengths, cu_seqlens, sigma.shape[1])
    native().adjust_pool_backward(
        *described,
        _address(grad_bag),
        _address(grad_weights),
        sigma.data_ptr(),
        softmax_stats.data_ptr(),
        detach_routing,
        grad_instances.data_ptr(),
    )
    del kept_alive
    _zero_after_last_bag(grad_instances, cu_seqlens)
    return grad_instances


def _zero_after_last_bag(rows, cu_seqlens):
    """Zeros the rows of packed bags that belong to no bag."""
    if cu_seqlens is not None and (end := int(cu_seqlens[-1])) < rows.shape[0]:
        rows[end:] = 0


def _empty(shape, dtype):
    """``torch.empty`` that reuses pages for large tensors (csrc/runtime/page_cache.h)."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < _PAGE_BLOCK_BYTES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(native().PageBlock(size), dtype=dtype, count=count).view(shape)


def _int64(tensor):
    return tensor.to(torch.int64).contiguous() if tensor is not None else None


def _address(tensor):
    return tensor.data_ptr() if tensor is not None else 0
