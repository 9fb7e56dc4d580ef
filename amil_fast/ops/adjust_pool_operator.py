"""``torch.ops.amil_fast.adjust_pool`` and ``adjust_pool_backward``: registration, derivatives, and the direct path."""

import functools
import importlib

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from amil_fast.ops import backends
from amil_fast.ops.adjust_pool_checks import (
    IMPLEMENTATIONS,
    SUPPORTED,
    check_backward,
    check_forward,
    saved_shapes,
)
from amil_fast.ops.adjust_pool_reference import adjust_pool_jvp, adjust_pool_reference
from amil_fast.ops.adjust_pool_vmap import backward_vmap, forward_vmap
from amil_fast.ops.bags import accumulation_dtype, check_bag_values
from amil_fast.ops.registration import (
    call_below_autograd,
    in_derivative_transform,
    non_differentiable,
    register_function,
)

# The registered operator. Besides bag vectors and weights (of shape (0,) unless requested) it returns the saved
# activations of the backward pass, in the accumulation dtype: sigma (B, T, D), the bag embeddings before the squash;
# and softmax_stats (B, T, 2), pairs (shift, scale) with w_i = exp(b_i - shift) * scale for the logits b, (0, 0) for an
# empty bag. (The log-sum-exp, shift - log(scale), would lose log(scale) to rounding at large logits.) Nothing of size
# N x D is saved.
_library = torch.library.Library("amil_fast", "FRAGMENT")
_BAGS = "Tensor instances, Tensor? mask, Tensor? lengths, Tensor? cu_seqlens"
_library.define(
    f"adjust_pool({_BAGS}, int num_iters, bool return_weights, bool detach_routing, str backend,"
    " SymInt? max_seqlen=None)"
    " -> (Tensor bag, Tensor weights, Tensor sigma, Tensor softmax_stats)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"adjust_pool_backward(Tensor? grad_bag, Tensor? grad_weights, {_BAGS}, Tensor sigma, Tensor softmax_stats,"
    " bool detach_routing, str backend, SymInt? max_seqlen=None) -> Tensor grad_instances",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@functools.cache
def _implementation(backend):
    return importlib.import_module(IMPLEMENTATIONS[backend])


def run_forward(
    instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen=None
):
    """The operator for plain tensors of checked shapes; checks the values of index tensors."""
    if instances.device.type == "cpu":
        check_bag_values(instances, lengths, cu_seqlens, max_seqlen)
    return _implementation(backend).forward(instances, mask, lengths, cu_seqlens, num_iters, return_weights, max_seqlen)


def _run_backward(
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
    """The backward operator for plain tensors of checked shapes and values."""
    return _implementation(backend).backward(
        grad_bag, grad_weights, instances, mask, lengths, cu_seqlens, sigma, softmax_stats, detach_routing, max_seqlen
    )


def _forward_registered(*arguments):
    check_forward(*arguments)
    instances, backend = arguments[0], arguments[7]
    backends.choose(backend, instances.device.type, SUPPORTED)
    return run_forward(*arguments)


def _backward_registered(*arguments):
    check_backward(*arguments)
    _, _, instances, _, lengths, cu_seqlens, _, _, _, backend, *max_seqlen = arguments
    backends.choose(backend, instances.device.type, SUPPORTED)
    if instances.device.type == "cpu":
        check_bag_values(instances, lengths, cu_seqlens, *max_seqlen)
    return _run_backward(*arguments)


for _device in ("CPU", "CUDA"):
    _library.impl("adjust_pool", _forward_registered, _device)
    _library.impl("adjust_pool_backward", _backward_registered, _device)


@torch.library.register_fake("amil_fast::adjust_pool", lib=_library)
def _forward_fake(
    instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen=None
):
    check_forward(instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen)
    bag_shape, sigma_shape, stats_shape = saved_shapes(instances, cu_seqlens, num_iters)
    dtype = accumulation_dtype(instances.dtype)
    return (
        instances.new_empty(bag_shape),
        instances.new_empty(instances.shape[:-1] if return_weights else (0,), dtype=dtype),
        instances.new_empty(sigma_shape, dtype=dtype),
        instances.new_empty(stats_shape, dtype=dtype),
    )


@torch.library.register_fake("amil_fast::adjust_pool_backward", lib=_library)
def _backward_fake(grad_bag, grad_weights, instances, *others):
    check_backward(grad_bag, grad_weights, instances, *others)
    return instances.new_empty(instances.shape)


def _private_copies(mask, lengths, cu_seqlens):
    """Copies of what the backward pass addresses memory by, since NumPy can change the originals after the checks.

    Only on a CPU: other writes count in the tensor's version, which autograd compares. A mask is 1/4D of the bytes of
    its instances.
    """
    if cu_seqlens is not None:
        return None, None, _private_index(cu_seqlens)
    if lengths is not None:
        return None, _private_index(lengths), None
    return mask if mask is None or mask.device.type != "cpu" else mask.clone(), None, None


def _private_index(tensor):
    if tensor.device.type != "cpu":
        return tensor
    return tensor.clone() if tensor.dtype == torch.int64 else tensor.to(torch.int64)


def _save(ctx, inputs, sigma, softmax_stats):
    instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen = inputs
    ctx.set_materialize_grads(False)
    # The weights of the first iteration are 1/m; detached weights are constants by definition.
    ctx.constant_weights = not return_weights or detach_routing or num_iters == 1
    ctx.save_for_backward(instances, mask, lengths, cu_seqlens, sigma, softmax_stats)
    ctx.shape, ctx.dtype = instances.shape, instances.dtype
    ctx.num_iters, ctx.detach_routing, ctx.backend, ctx.max_seqlen = num_iters, detach_routing, backend, max_seqlen


def _gradient(ctx, grad_bag, grad_weights):
    """Gradient of the instances for a context filled by :func:`_save`."""
    instances, mask, lengths, cu_seqlens, sigma, softmax_stats = ctx.saved_tensors
    if grad_bag is None and grad_weights is None:
        return None
    if instances.shape != ctx.shape or instances.dtype != ctx.dtype:
        raise RuntimeError(
            f"instances: expected shape {tuple(ctx.shape)} and dtype {ctx.dtype} of the forward pass in backward, got "
            f"{tuple(instances.shape)} and {instances.dtype}; was instances.data replaced?"
        )
    direct = not backends.dispatcher_has_work(instances, grad_bag, grad_weights, mask, lengths, cu_seqlens)
    if not direct:
        saved = (instances, mask, lengths, cu_seqlens, sigma, softmax_stats)
        instances, mask, lengths, cu_seqlens, sigma, softmax_stats = unwrap_dead_wrappers(saved)
    if torch.is_grad_enabled() or (not direct and in_derivative_transform()):  # create_graph=True
        return _differentiable_gradient(ctx, grad_bag, grad_weights, instances, mask, lengths, cu_seqlens)
    if not direct:
        grad_bag, grad_weights = (
            g if g is None or g.layout is torch.strided else g.to_dense() for g in (grad_bag, grad_weights)
        )
    call = _run_backward if direct else torch.ops.amil_fast.adjust_pool_backward.default
    bags = (instances, mask, lengths, cu_seqlens)
    return call(grad_bag, grad_weights, *bags, sigma, softmax_stats, ctx.detach_routing, ctx.backend, ctx.max_seqlen)


def _differentiable_gradient(ctx, grad_bag, grad_weights, instances, mask, lengths, cu_seqlens):
    settings = {"num_iters": ctx.num_iters, "detach_routing": ctx.detach_routing}
    grads = tuple(grad for grad in (grad_bag, grad_weights) if grad is not None)

    def pool(instances):
        outputs = adjust_pool_reference(instances, mask, lengths=lengths, cu_seqlens=cu_seqlens, **settings)
        return tuple(out for out, grad in zip(outputs, (grad_bag, grad_weights), strict=True) if grad is not None)

    if instances.requires_grad and not torch._C._are_functorch_transforms_active():
        with torch.enable_grad():  # forward mode over a backward pass without create_graph
            return torch.autograd.grad(pool(instances), instances, grads, create_graph=True)[0]
    # The pullback of torch.func.vjp can run after the end of its transform, when nothing requires grad any more.
    return torch.func.vjp(pool, instances)[1](grads)[0]


class DirectAdjustPool(torch.autograd.Function):
    """The operator without the dispatcher, whose overhead exceeds the arithmetic of small bags.

    ``apply(instances, (mask, lengths, cu_seqlens), (num_iters, ..., max_seqlen))`` returns ``bag`` or, if requested,
    ``(bag, weights)``: every input and output of an autograd function costs about 1 us.
    """

    @staticmethod
    def forward(ctx, instances, bags, settings):
        inputs = (instances, *_private_copies(*bags), *settings)
        bag, weights, sigma, softmax_stats = run_forward(*inputs)
        _save(ctx, inputs, sigma, softmax_stats)
        _, return_weights, *_ = settings
        if not return_weights:
            return bag
        if ctx.constant_weights:
            ctx.mark_non_differentiable(weights)
        return bag, weights

    @staticmethod
    def backward(ctx, grad_bag, grad_weights=None):
        return _gradient(ctx, grad_bag, grad_weights), None, None


class _AdjustPool(torch.autograd.Function):
    """The registered operator with its derivatives and its rules for ``torch.func`` transforms."""

    @staticmethod
    def forward(*inputs):
        return call_below_autograd(torch.ops.amil_fast.adjust_pool.default, *inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        instances, mask, lengths, cu_seqlens, *settings = inputs
        _, weights, sigma, softmax_stats = output
        _save(ctx, (instances, *_private_copies(mask, lengths, cu_seqlens), *settings), sigma, softmax_stats)
        ctx.mark_non_differentiable(*([weights] if ctx.constant_weights else []), sigma, softmax_stats)
        ctx.save_for_forward(*ctx.to_save)

    @staticmethod
    def backward(ctx, grad_bag, grad_weights, *_):
        return _gradient(ctx, grad_bag, grad_weights), *[None] * 8

    @staticmethod
    def jvp(ctx, tangent, *_):
        instances, mask, lengths, cu_seqlens, _, _ = ctx.saved_tensors
        # Forward mode is disabled here; enabled, the tangent is differentiable itself by an outer forward mode.
        with forward_ad._set_fwd_grad_enabled(True):
            primal = forward_ad.unpack_dual(instances, level=0).primal
            d_bag, d_weights = adjust_pool_jvp(
                primal,
                tangent,
                mask,
                lengths=lengths,
                cu_seqlens=cu_seqlens,
                num_iters=ctx.num_iters,
                detach_routing=ctx.detach_routing,
            )
        return d_bag, None if ctx.constant_weights else d_weights, None, None

    vmap = staticmethod(forward_vmap)


_backward_message = "adjust_pool_backward is not differentiable; differentiate amil_fast.adjust_pool twice"
_AdjustPoolBackward = non_differentiable(
    torch.ops.amil_fast.adjust_pool_backward.default, _backward_message, backward_vmap
)
register_function(_library, "adjust_pool", _AdjustPool)
register_function(_library, "adjust_pool_backward", _AdjustPoolBackward)
