"""Rules of ``torch.vmap`` for the registered operators of adjust pooling."""

import torch

from amil_fast.ops.registration import batch_first, fold_batch


def forward_vmap(info, in_dims, *inputs):
    """Folds the mapped axis into the bags; packed bags, whose offsets differ, take one call per element."""
    operator = torch.ops.amil_fast.adjust_pool.default
    tensors, settings = batch_first(info, in_dims[:4], inputs[:4]), inputs[4:]
    if tensors[-1] is not None:
        calls = [operator(*(None if t is None else t[i] for t in tensors), *settings) for i in range(info.batch_size)]
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * 4
    sizes = tensors[0].shape[:2]
    bag, weights, sigma, softmax_stats = operator(*fold_batch(tensors), *settings)
    has_weights = weights.dim() > 1
    bag, sigma, softmax_stats = (out.unflatten(0, sizes) for out in (bag, sigma, softmax_stats))
    weights = weights.unflatten(0, sizes) if has_weights else weights
    return (bag, weights, sigma, softmax_stats), (0, 0 if has_weights else None, 0, 0)


def backward_vmap(info, in_dims, *inputs):
    """As :func:`forward_vmap`, for ``adjust_pool_backward``."""
    operator = torch.ops.amil_fast.adjust_pool_backward.default
    tensors, settings = batch_first(info, in_dims[:8], inputs[:8]), inputs[8:]
    if tensors[5] is not None:
        calls = [operator(*(None if t is None else t[i] for t in tensors), *settings) for i in range(info.batch_size)]
        return torch.stack(calls), 0
    return operator(*fold_batch(tensors), *settings).unflatten(0, tensors[2].shape[:2]), 0
