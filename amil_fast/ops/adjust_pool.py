"""Adjust pooling: the public function and its registration as ``torch.ops.amil_fast.adjust_pool``."""

import functools
import importlib

import torch

from amil_fast.ops import backends
from amil_fast.ops.adjust_pool_reference import adjust_pool_reference
from amil_fast.ops.bags import accumulation_dtype, check_bag_values, check_bags

_SUPPORTED = {
    "auto": lambda device: {"cpu": "cpp", "cuda": "triton"}.get(device, "reference"),
    "reference": lambda device: None,
    "cpp": lambda device: None if device == "cpu" else f"it runs on CPU tensors, got a tensor on {device!r}",
    "triton": backends.why_not_triton,
}
# Modules with the two functions forward(...) and backward(...) that the registered operator calls.
_IMPLEMENTATIONS = {"cpp": "amil_fast.ops.adjust_pool_cpp", "triton": "amil_fast.kernels.adjust_pool_launch"}


def adjust_pool(
    instances,
    mask=None,
    *,
    lengths=None,
    cu_seqlens=None,
    num_iters=3,
    return_weights=False,
    detach_routing=False,
    backend="auto",
):
    r"""Pools every bag of instances to one vector by iterated, agreement-weighted averaging.

    For one bag with instances :math:`f_1 \dots f_m` and logits :math:`b_i = 0` at the start, ``num_iters`` times

    .. math::
        w = \mathrm{softmax}(b) \;(4), \quad \sigma = \sum_i w_i f_i \;(2), \quad
        s = \frac{\|\sigma\|^2}{1 + \|\sigma\|^2} \frac{\sigma}{\|\sigma\|} \;(3), \quad
        b_i \leftarrow b_i + f_i \cdot s \;(5)

    The last :math:`s` is the bag's vector; its length, in [0, 1), can be read as the probability that the bag is
    positive.

    Args:
        instances: ``(B, N, D)`` padded bags; or ``(total, D)`` packed bags with ``cu_seqlens``; or a jagged nested
            tensor of shape ``(B, ragged, D)``. float16, bfloat16, float32 or float64, CPU or CUDA, any strides.
        mask: ``(B, N)``, bool or any real dtype, nonzero = real instance, in any pattern. Only for padded bags.
        lengths: ``(B,)``, int32 or int64: the first ``lengths[b]`` instances of bag b are real. Only for padded bags.
        cu_seqlens: ``(B + 1,)``, int32 or int64: bag b is ``instances[cu_seqlens[b] : cu_seqlens[b + 1]]``
            (FlashAttention's convention, PyG's ``ptr``).
        num_iters: number of iterations T >= 1; 1 is the squashed mean.
        return_weights: also return the weights w of the last iteration.
        detach_routing: let no gradient pass through the weights, only through the last weighted sum, as many ports of
            capsule routing do. The returned weights are constants then.
        backend: ``"auto"`` (``"cpp"`` on a CPU, ``"triton"`` on CUDA, else ``"reference"``), ``"reference"`` (plain
            PyTorch), ``"cpp"`` or ``"triton"`` (also on CPU tensors under ``TRITON_INTERPRET=1``).

    Returns:
        ``bag (B, D)`` in the dtype of ``instances``; with ``return_weights`` a tuple ``(bag, weights)``, the weights
        ``(B, N)`` or, for packed and nested bags, ``(total,)``, in float32 (float64 for float64): in a bag of 10⁵
        instances a weight is too small for float16. They are exactly 0 where masked, and differentiable.

    Raises:
        TypeError: an argument that is no tensor, or of a dtype not named above.
        ValueError: shapes or devices that don't fit together, more than one of ``mask``, ``lengths``, ``cu_seqlens``,
            values of ``lengths`` or ``cu_seqlens`` out of range (looked at on the CPU only: on a GPU it would mean
            waiting for the device; there they are the caller's promise), ``num_iters < 1``, an unknown backend or one
            that can't serve the call.

    Notes:
        Sums are accumulated in float32 (float64 for float64). An empty bag pools to 0; what padding holds, NaN
        included, changes nothing and gets zero gradient; a non-finite instance spoils its own bag only. Results are
        bit-equal from run to run; on a CPU whatever the number of threads, and subnormal numbers count as 0 there.
        Differentiable again: higher derivatives go through the reference's formula, with its memory use. Not for
        ``torch.func`` (vmap, grad), which wants ``backend="reference"``.

    Source: Shamsolmoali et al., AMIL, ACM TOMM 2020, Eq. 2-5; Yan et al., Deep Multi-instance Learning with Dynamic
    Pooling, ACML 2018.
    """
    instances, mask, lengths, cu_seqlens = check_bags(instances, mask, lengths, cu_seqlens)
    if not isinstance(num_iters, int) or isinstance(num_iters, bool):
        raise TypeError(f"num_iters: expected an int, got {type(num_iters).__name__}")
    if num_iters < 1:
        raise ValueError(f"num_iters: expected at least 1, got {num_iters}")
    backend = backends.choose(backend, instances.device.type, _SUPPORTED)

    if backend == "reference":
        if instances.device.type == "cpu" and not torch.compiler.is_compiling():
            check_bag_values(instances, lengths, cu_seqlens)
        bag, weights = adjust_pool_reference(
            instances, mask, lengths=lengths, cu_seqlens=cu_seqlens, num_iters=num_iters, detach_routing=detach_routing
        )
    else:
        if backends.dispatcher_has_work(instances):
            call = torch.ops.amil_fast.adjust_pool.default
        else:
            call = _AdjustPool.apply if instances.requires_grad and torch.is_grad_enabled() else _forward
        bag, weights, _, _ = call(
            instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend
        )
    return (bag, weights) if return_weights else bag


# The registered operator. Besides the bag vectors and the weights (of shape (0,) unless asked for) it returns what the
# backward pass needs: sigma (B, T, D), the bag embeddings before the squash, and lse (B, T), the log-sum-exp of the
# logits, both in the accumulation dtype (nothing of size N x D is stored).
_library = torch.library.Library("amil_fast", "FRAGMENT")
_BAGS = "Tensor instances, Tensor? mask, Tensor? lengths, Tensor? cu_seqlens"
_library.define(
    f"adjust_pool({_BAGS}, int num_iters, bool return_weights, bool detach_routing, str backend)"
    " -> (Tensor bag, Tensor weights, Tensor sigma, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"adjust_pool_backward(Tensor? grad_bag, Tensor? grad_weights, {_BAGS}, Tensor sigma, Tensor lse,"
    " bool detach_routing, str backend) -> Tensor grad_instances",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@functools.cache
def _implementation(backend):
    return importlib.import_module(_IMPLEMENTATIONS[backend])


def _forward(instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend):
    if instances.device.type == "cpu":
        check_bag_values(instances, lengths, cu_seqlens)
    return _implementation(backend).forward(instances, mask, lengths, cu_seqlens, num_iters, return_weights)


def _backward(grad_bag, grad_weights, instances, mask, lengths, cu_seqlens, sigma, lse, detach_routing, backend):
    return _implementation(backend).backward(
        grad_bag, grad_weights, instances, mask, lengths, cu_seqlens, sigma, lse, detach_routing
    )


for _device in ("CPU", "CUDA"):
    _library.impl("adjust_pool", _forward, _device)
    _library.impl("adjust_pool_backward", _backward, _device)


@torch.library.register_fake("amil_fast::adjust_pool", lib=_library)
def _forward_fake(instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend):
    bags = instances.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    D = instances.shape[-1]
    dtype = accumulation_dtype(instances.dtype)
    return (
        instances.new_empty(bags, D),
        instances.new_empty(instances.shape[:-1] if return_weights else (0,), dtype=dtype),
        instances.new_empty(bags, num_iters, D, dtype=dtype),
        instances.new_empty(bags, num_iters, dtype=dtype),
    )


@torch.library.register_fake("amil_fast::adjust_pool_backward", lib=_library)
def _backward_fake(grad_bag, grad_weights, instances, mask, lengths, cu_seqlens, sigma, lse, detach_routing, backend):
    return instances.new_empty(instances.shape)


def _setup_context(ctx, inputs, output):
    instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend = inputs
    _, weights, sigma, lse = output
    ctx.set_materialize_grads(False)
    # The weights of one iteration are 1/m, and detached weights are constants by definition.
    constant_weights = not return_weights or detach_routing or num_iters == 1
    ctx.mark_non_differentiable(*([weights] if constant_weights else []), sigma, lse)
    ctx.save_for_backward(instances, mask, lengths, cu_seqlens, sigma, lse)
    ctx.num_iters, ctx.detach_routing, ctx.backend = num_iters, detach_routing, backend


def _autograd(ctx, grad_bag, grad_weights, _grad_sigma, _grad_lse):
    instances, mask, lengths, cu_seqlens, sigma, lse = ctx.saved_tensors
    nothing = (None,) * 7
    if grad_bag is None and grad_weights is None:
        return None, *nothing
    if torch.is_grad_enabled():  # create_graph=True: a gradient that can be differentiated again
        return _differentiable_gradient(ctx, grad_bag, grad_weights, instances, mask, lengths, cu_seqlens), *nothing
    registered = torch.ops.amil_fast.adjust_pool_backward.default
    call = registered if backends.dispatcher_has_work(instances) else _backward
    grad = call(
        grad_bag, grad_weights, instances, mask, lengths, cu_seqlens, sigma, lse, ctx.detach_routing, ctx.backend
    )
    return grad, *nothing


def _differentiable_gradient(ctx, grad_bag, grad_weights, instances, mask, lengths, cu_seqlens):
    bag, weights = adjust_pool_reference(
        instances,
        mask,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        num_iters=ctx.num_iters,
        detach_routing=ctx.detach_routing,
    )
    pairs = [(out, grad) for out, grad in ((bag, grad_bag), (weights, grad_weights)) if grad is not None]
    outputs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, instances, grads, create_graph=True)[0]


class _AdjustPool(torch.autograd.Function):
    """The registered operator without the dispatcher, which costs more than a small bag's arithmetic."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_autograd)


torch.library.register_autograd("amil_fast::adjust_pool", _autograd, setup_context=_setup_context, lib=_library)
