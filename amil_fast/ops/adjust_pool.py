"""Adjust pooling: the public function and its registration as ``torch.ops.amil_fast.adjust_pool``."""

import functools
import importlib
from collections.abc import Callable

import torch

from amil_fast.ops import backends
from amil_fast.ops.adjust_pool_reference import adjust_pool_reference
from amil_fast.ops.bags import accumulation_dtype, check_bag_values, check_bags, check_max_seqlen

_SUPPORTED = {
    "auto": lambda device: {"cpu": "cpp", "cuda": "triton"}.get(device, "reference"),
    "reference": lambda device: None,
    "cpp": lambda device: None if device == "cpu" else f"expected CPU tensors, got a tensor on {device!r}",
    "triton": backends.why_not_triton,
}
# Modules with functions forward and backward, which the registered operator calls.
_IMPLEMENTATIONS = {"cpp": "amil_fast.ops.adjust_pool_cpp", "triton": "amil_fast.kernels.adjust_pool_launch"}


def adjust_pool(
    instances: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    num_iters: int = 3,
    max_seqlen: int | None = None,
    return_weights: bool = False,
    detach_routing: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Pools every bag of instances to one vector by iterated, agreement-weighted averaging.

    For a bag with instances :math:`f_1 \dots f_m` and initial logits :math:`b_i = 0`, repeats ``num_iters`` times

    .. math::
        w = \mathrm{softmax}(b) \;(4), \quad \sigma = \sum_i w_i f_i \;(2), \quad
        s = \frac{\|\sigma\|^2}{1 + \|\sigma\|^2} \frac{\sigma}{\|\sigma\|} \;(3), \quad
        b_i \leftarrow b_i + f_i \cdot s \;(5)

    and returns the last :math:`s`, whose length in [0, 1) can be interpreted as the probability of a positive bag.

    Args:
        instances: ``(B, N, D)`` padded bags; or ``(total, D)`` packed bags with ``cu_seqlens``; or a jagged nested
            tensor of shape ``(B, ragged, D)``. float16, bfloat16, float32 or float64, CPU or CUDA, any strides.
        mask: ``(B, N)``, bool or any real dtype, nonzero for instances and zero for padding, in any pattern. For padded
            bags.
        lengths: ``(B,)``, int32 or int64: bag b has ``lengths[b]`` instances, followed by padding. For padded bags.
        cu_seqlens: ``(B + 1,)``, int32 or int64: bag b is ``instances[cu_seqlens[b] : cu_seqlens[b + 1]]``
            (FlashAttention's convention, PyG's ``ptr``). Rows after ``cu_seqlens[-1]`` are padding.
        num_iters: number of iterations T >= 1; 1 is squashed mean pooling.
        max_seqlen: for packed bags: no bag is longer (FlashAttention's argument). Saves kernel launches on a GPU, where
            the lengths are unknown to the host; nested tensors carry their own. Longer bags pool to NaN there.
        return_weights: also return the weights w of the last iteration.
        detach_routing: stop gradients through the weights, so that they flow through the last weighted sum only, as in
            many implementations of capsule routing. The returned weights are then constants.
        backend: ``"auto"`` (``"cpp"`` on a CPU, ``"triton"`` on CUDA, otherwise ``"reference"``), ``"reference"``
            (plain PyTorch), ``"cpp"`` or ``"triton"`` (also on CPU tensors under ``TRITON_INTERPRET=1``).

    Returns:
        ``bag (B, D)`` in the dtype of ``instances``; with ``return_weights`` a tuple ``(bag, weights)``. Weights have
        shape ``(B, N)`` or, for packed and nested bags, ``(total,)``, and dtype float32 (float64 for float64), since
        weights in bags of 10⁵ instances underflow in float16. They are exactly 0 in the padding, and differentiable.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype than those above.
        ValueError: shapes or devices do not match; more than one of ``mask``, ``lengths`` and ``cu_seqlens``; values of
            ``lengths`` or ``cu_seqlens`` out of range, or a bag longer than ``max_seqlen`` (checked on the CPU only,
            since a check on the GPU would synchronize); ``num_iters`` below 1; an unknown backend, or one that cannot
            serve the call.

    Notes:
        Sums are accumulated in float32 (float64 for float64). An empty bag pools to 0. The values of padding, NaN
        included, have no effect and get zero gradient; a non-finite instance affects its own bag only. Results are
        deterministic, on a CPU also for any number of threads; subnormal numbers are treated as 0 there. Higher
        derivatives are computed by the reference, with its memory use. ``torch.func`` transforms (vmap, grad) need
        ``backend="reference"``.

    Source: Shamsolmoali et al., AMIL, ACM TOMM 2020, Eq. 2-5; Yan et al., Deep Multi-instance Learning with Dynamic
    Pooling, ACML 2018.
    """
    max_seqlen = check_max_seqlen(instances, cu_seqlens, max_seqlen)
    instances, mask, lengths, cu_seqlens = check_bags(instances, mask, lengths, cu_seqlens)
    check_settings(num_iters, backend)
    bag, weights = pool_bags(
        instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen
    )
    return (bag, weights) if return_weights else bag


def check_settings(num_iters: int, backend: str) -> None:
    """Raises TypeError or ValueError for an invalid ``num_iters`` or the name of an unknown backend."""
    if not isinstance(num_iters, int) or isinstance(num_iters, bool):
        raise TypeError(f"num_iters: expected an int, got {type(num_iters).__name__}")
    if num_iters < 1:
        raise ValueError(f"num_iters: expected an int of at least 1, got {num_iters}")
    backends.check_name(backend, _SUPPORTED)


def pool_bags(
    instances: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    num_iters: int,
    return_weights: bool,
    detach_routing: bool,
    backend: str,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`adjust_pool` of bags in canonical form; the weights are meaningless unless ``return_weights``."""
    backend = backends.choose(backend, instances.device.type, _SUPPORTED)
    if backend == "reference":
        if instances.device.type == "cpu" and not torch.compiler.is_compiling():
            check_bag_values(instances, lengths, cu_seqlens, max_seqlen)
        bag, weights = adjust_pool_reference(
            instances, mask, lengths=lengths, cu_seqlens=cu_seqlens, num_iters=num_iters, detach_routing=detach_routing
        )
    else:
        call: Callable
        if backends.dispatcher_has_work(instances):
            call = torch.ops.amil_fast.adjust_pool.default
        else:
            call = _AdjustPool.apply if instances.requires_grad and torch.is_grad_enabled() else _forward
        bag, weights, _, _ = call(
            instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen
        )
    return bag, weights


# The registered operator. Besides bag vectors and weights (of shape (0,) unless requested) it returns the saved
# activations of the backward pass: sigma (B, T, D), the bag embeddings before the squash, and lse (B, T), the
# log-sum-exp of the logits, both in the accumulation dtype. Nothing of size N x D is saved.
_library = torch.library.Library("amil_fast", "FRAGMENT")
_BAGS = "Tensor instances, Tensor? mask, Tensor? lengths, Tensor? cu_seqlens"
_library.define(
    f"adjust_pool({_BAGS}, int num_iters, bool return_weights, bool detach_routing, str backend,"
    " SymInt? max_seqlen=None) -> (Tensor bag, Tensor weights, Tensor sigma, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"adjust_pool_backward(Tensor? grad_bag, Tensor? grad_weights, {_BAGS}, Tensor sigma, Tensor lse,"
    " bool detach_routing, str backend, SymInt? max_seqlen=None) -> Tensor grad_instances",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@functools.cache
def _implementation(backend):
    return importlib.import_module(_IMPLEMENTATIONS[backend])


def _forward(instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen=None):
    if instances.device.type == "cpu":
        check_bag_values(instances, lengths, cu_seqlens, max_seqlen)
    return _implementation(backend).forward(instances, mask, lengths, cu_seqlens, num_iters, return_weights, max_seqlen)


def _backward(
    grad_bag, grad_weights, instances, mask, lengths, cu_seqlens, sigma, lse, detach_routing, backend, max_seqlen=None
):
    return _implementation(backend).backward(
        grad_bag, grad_weights, instances, mask, lengths, cu_seqlens, sigma, lse, detach_routing, max_seqlen
    )


for _device in ("CPU", "CUDA"):
    _library.impl("adjust_pool", _forward, _device)
    _library.impl("adjust_pool_backward", _backward, _device)


@torch.library.register_fake("amil_fast::adjust_pool", lib=_library)
def _forward_fake(
    instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen=None
):
    num_bags = instances.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    D = instances.shape[-1]
    dtype = accumulation_dtype(instances.dtype)
    return (
        instances.new_empty(num_bags, D),
        instances.new_empty(instances.shape[:-1] if return_weights else (0,), dtype=dtype),
        instances.new_empty(num_bags, num_iters, D, dtype=dtype),
        # backend "triton": shift and scale of each softmax (kernels/adjust_pool_forward.py)
        instances.new_empty(num_bags, num_iters, *((2,) if backend == "triton" else ()), dtype=dtype),
    )


@torch.library.register_fake("amil_fast::adjust_pool_backward", lib=_library)
def _backward_fake(
    grad_bag, grad_weights, instances, mask, lengths, cu_seqlens, sigma, lse, detach_routing, backend, max_seqlen=None
):
    return instances.new_empty(instances.shape)


def _setup_context(ctx, inputs, output):
    instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen = inputs
    _, weights, sigma, lse = output
    ctx.set_materialize_grads(False)
    # The weights of the first iteration are 1/m; detached weights are constants by definition.
    constant_weights = not return_weights or detach_routing or num_iters == 1
    ctx.mark_non_differentiable(*([weights] if constant_weights else []), sigma, lse)
    ctx.save_for_backward(instances, mask, lengths, cu_seqlens, sigma, lse)
    ctx.num_iters, ctx.detach_routing, ctx.backend, ctx.max_seqlen = num_iters, detach_routing, backend, max_seqlen


def _autograd(ctx, grad_bag, grad_weights, _grad_sigma, _grad_lse):
    instances, mask, lengths, cu_seqlens, sigma, lse = ctx.saved_tensors
    no_grads = (None,) * 8  # for the other inputs
    if grad_bag is None and grad_weights is None:
        return None, *no_grads
    if torch.is_grad_enabled():  # create_graph=True
        return _differentiable_gradient(ctx, grad_bag, grad_weights, instances, mask, lengths, cu_seqlens), *no_grads
    registered = torch.ops.amil_fast.adjust_pool_backward.default
    call = registered if backends.dispatcher_has_work(instances) else _backward
    bags = (instances, mask, lengths, cu_seqlens)
    grad = call(grad_bag, grad_weights, *bags, sigma, lse, ctx.detach_routing, ctx.backend, ctx.max_seqlen)
    return grad, *no_grads


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
    """The registered operator without the dispatcher, whose overhead exceeds the arithmetic of small bags."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_autograd)


torch.library.register_autograd("amil_fast::adjust_pool", _autograd, setup_context=_setup_context, lib=_library)
