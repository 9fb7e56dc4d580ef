"""Adjust pooling: the public function and its registration as ``torch.ops.amil_fast.adjust_pool``."""

import functools
import importlib
from collections.abc import Callable

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from amil_fast.ops import backends
from amil_fast.ops.adjust_pool_reference import adjust_pool_jvp, adjust_pool_reference
from amil_fast.ops.bags import accumulation_dtype, check_bag_values, check_bags, check_max_seqlen, check_strided
from amil_fast.ops.registration import (
    batch_first,
    call_below_autograd,
    fold_batch,
    in_derivative_transform,
    non_differentiable,
    register_function,
)

_SUPPORTED = {
    "auto": lambda device: {"cpu": "cpp", "cuda": "triton"}.get(device, "reference"),
    "reference": lambda device: None,
    "cpp": lambda device: None if device == "cpu" else f"expected CPU tensors, got a tensor on {device!r}",
    "triton": backends.why_not_triton,
}
# Modules with functions forward and backward, which the registered operator calls.
_IMPLEMENTATIONS = {"cpp": "amil_fast.ops.adjust_pool_cpp", "triton": "amil_fast.kernels.adjust_pool_launch"}

# The weights of the paper's routing settle within tens of iterations; the bound turns a typing error into a message
# instead of an allocation of (B, num_iters, D) numbers that can end the process.
MAX_NUM_ITERS = 10_000


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
        num_iters: number of iterations T, 1 to 10,000; 1 is squashed mean pooling.
        max_seqlen: for packed bags: no bag is longer (FlashAttention's argument). Saves kernel launches on a GPU, where
            the lengths are unknown to the host; nested tensors carry their own. There, a longer bag may pool to NaN,
            with an undefined gradient.
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
        TypeError: an argument has another type or dtype than those above, or is a sparse tensor.
        ValueError: shapes or devices do not match; more than one of ``mask``, ``lengths`` and ``cu_seqlens``; values of
            ``lengths`` or ``cu_seqlens`` out of range, or a bag longer than ``max_seqlen`` (checked on the CPU only,
            since a check on the GPU would synchronize); ``num_iters`` out of range; an unknown backend, or one that
            cannot serve the call.

    Notes:
        Sums are accumulated in float32 (float64 for float64). An empty bag pools to 0. The values of padding, NaN
        included, have no effect and get zero gradient; a non-finite instance affects its own bag only. Results are
        deterministic, on a CPU also for any number of threads; subnormal numbers are treated as 0 there. Forward-mode
        and higher derivatives are computed in plain PyTorch, with its memory use; all ``torch.func`` transforms are
        supported. Gradients on a CPU above 4 MiB cannot be enlarged in place (``Tensor.resize_``).

    Source: Shamsolmoali et al., AMIL, ACM TOMM 2020, Eq. 2-5; Yan et al., Deep Multi-instance Learning with Dynamic
    Pooling, ACML 2018.
    """
    max_seqlen = check_max_seqlen(instances, cu_seqlens, max_seqlen)
    instances, mask, lengths, cu_seqlens = check_bags(instances, mask, lengths, cu_seqlens)
    check_settings(num_iters, return_weights, detach_routing, backend)
    bag, weights = pool_bags(
        instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen
    )
    return (bag, weights) if return_weights else bag


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
        if backends.dispatcher_has_work(instances, mask, lengths, cu_seqlens):
            call = torch.ops.amil_fast.adjust_pool.default
        else:
            call = _DirectAdjustPool.apply if instances.requires_grad and torch.is_grad_enabled() else _forward
        bag, weights, _, _ = call(
            instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen
        )
    return bag, weights


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
    return importlib.import_module(_IMPLEMENTATIONS[backend])


def _forward(instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen=None):
    """The operator for plain tensors whose shapes have been checked; values of index tensors are checked here."""
    if instances.device.type == "cpu":
        check_bag_values(instances, lengths, cu_seqlens, max_seqlen)
    return _implementation(backend).forward(instances, mask, lengths, cu_seqlens, num_iters, return_weights, max_seqlen)


def _backward(
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
    """Likewise, for checked values too."""
    return _implementation(backend).backward(
        grad_bag, grad_weights, instances, mask, lengths, cu_seqlens, sigma, softmax_stats, detach_routing, max_seqlen
    )


def _check_registered(
    instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen=None
):
    """Checks what :func:`adjust_pool` checks, for calls of the registered operators."""
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    check_max_seqlen(instances, cu_seqlens, max_seqlen)
    check_bags(instances, mask, lengths, cu_seqlens)
    check_settings(num_iters, return_weights, detach_routing, backend)
    if backend not in _IMPLEMENTATIONS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, _IMPLEMENTATIONS))}, got {backend!r}")


def _saved_shapes(instances, cu_seqlens, num_iters):
    """Shapes of bag, sigma and softmax_stats."""
    num_bags = instances.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    D = instances.shape[-1]
    return (num_bags, D), (num_bags, num_iters, D), (num_bags, num_iters, 2)


def _check_registered_backward(
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
    num_iters = sigma.shape[1] if sigma.dim() == 3 else 1
    _check_registered(instances, mask, lengths, cu_seqlens, num_iters, True, detach_routing, backend, max_seqlen)
    bag_shape, sigma_shape, stats_shape = _saved_shapes(instances, cu_seqlens, num_iters)
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


def _forward_registered(*arguments):
    _check_registered(*arguments)
    instances, backend = arguments[0], arguments[7]
    backends.choose(backend, instances.device.type, _SUPPORTED)
    return _forward(*arguments)


def _backward_registered(*arguments):
    _check_registered_backward(*arguments)
    _, _, instances, _, lengths, cu_seqlens, _, _, _, backend, *max_seqlen = arguments
    backends.choose(backend, instances.device.type, _SUPPORTED)
    if instances.device.type == "cpu":
        check_bag_values(instances, lengths, cu_seqlens, *max_seqlen)
    return _backward(*arguments)


for _device in ("CPU", "CUDA"):
    _library.impl("adjust_pool", _forward_registered, _device)
    _library.impl("adjust_pool_backward", _backward_registered, _device)


@torch.library.register_fake("amil_fast::adjust_pool", lib=_library)
def _forward_fake(
    instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen=None
):
    _check_registered(
        instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen
    )
    bag_shape, sigma_shape, stats_shape = _saved_shapes(instances, cu_seqlens, num_iters)
    dtype = accumulation_dtype(instances.dtype)
    return (
        instances.new_empty(bag_shape),
        instances.new_empty(instances.shape[:-1] if return_weights else (0,), dtype=dtype),
        instances.new_empty(sigma_shape, dtype=dtype),
        instances.new_empty(stats_shape, dtype=dtype),
    )


@torch.library.register_fake("amil_fast::adjust_pool_backward", lib=_library)
def _backward_fake(grad_bag, grad_weights, instances, *others):
    _check_registered_backward(grad_bag, grad_weights, instances, *others)
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


def _setup_context(ctx, inputs, output):
    instances, mask, lengths, cu_seqlens, *settings = inputs
    _save(ctx, (instances, *_private_copies(mask, lengths, cu_seqlens), *settings), output)


def _save(ctx, inputs, output):
    instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen = inputs
    _, weights, sigma, softmax_stats = output
    ctx.set_materialize_grads(False)
    # The weights of the first iteration are 1/m; detached weights are constants by definition.
    ctx.constant_weights = not return_weights or detach_routing or num_iters == 1
    ctx.mark_non_differentiable(*([weights] if ctx.constant_weights else []), sigma, softmax_stats)
    ctx.save_for_backward(instances, mask, lengths, cu_seqlens, sigma, softmax_stats)
    ctx.shape, ctx.dtype = instances.shape, instances.dtype
    ctx.num_iters, ctx.detach_routing, ctx.backend, ctx.max_seqlen = num_iters, detach_routing, backend, max_seqlen


def _autograd(ctx, grad_bag, grad_weights, _grad_sigma, _grad_softmax_stats):
    instances, mask, lengths, cu_seqlens, sigma, softmax_stats = ctx.saved_tensors
    no_grads = (None,) * 8  # for the other inputs
    if grad_bag is None and grad_weights is None:
        return None, *no_grads
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
        return _differentiable_gradient(ctx, grad_bag, grad_weights, instances, mask, lengths, cu_seqlens), *no_grads
    if not direct:
        grad_bag, grad_weights = (
            g if g is None or g.layout is torch.strided else g.to_dense() for g in (grad_bag, grad_weights)
        )
    call = _backward if direct else torch.ops.amil_fast.adjust_pool_backward.default
    bags = (instances, mask, lengths, cu_seqlens)
    grad = call(grad_bag, grad_weights, *bags, sigma, softmax_stats, ctx.detach_routing, ctx.backend, ctx.max_seqlen)
    return grad, *no_grads


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


class _DirectAdjustPool(torch.autograd.Function):
    """The operator without the dispatcher, whose overhead exceeds the arithmetic of small bags."""

    @staticmethod
    def forward(ctx, instances, mask, lengths, cu_seqlens, *settings):
        inputs = (instances, *_private_copies(mask, lengths, cu_seqlens), *settings)
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_autograd)


class _AdjustPool(torch.autograd.Function):
    """The registered operator with its derivatives and its rules for ``torch.func`` transforms."""

    @staticmethod
    def forward(*inputs):
        return call_below_autograd(torch.ops.amil_fast.adjust_pool.default, *inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_context(ctx, inputs, output)
        ctx.save_for_forward(*ctx.to_save)

    backward = staticmethod(_autograd)

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

    @staticmethod
    def vmap(info, in_dims, *inputs):
        operator = torch.ops.amil_fast.adjust_pool.default
        tensors, settings = batch_first(info, in_dims[:4], inputs[:4]), inputs[4:]
        if tensors[-1] is not None:
            calls = [
                operator(*(None if t is None else t[i] for t in tensors), *settings) for i in range(info.batch_size)
            ]
            return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * 4
        sizes = tensors[0].shape[:2]
        bag, weights, sigma, softmax_stats = operator(*fold_batch(tensors), *settings)
        has_weights = weights.dim() > 1
        bag, sigma, softmax_stats = (out.unflatten(0, sizes) for out in (bag, sigma, softmax_stats))
        return (bag, weights.unflatten(0, sizes) if has_weights else weights, sigma, softmax_stats), (
            0,
            0 if has_weights else None,
            0,
            0,
        )


def _backward_vmap(info, in_dims, *inputs):
    operator = torch.ops.amil_fast.adjust_pool_backward.default
    tensors, settings = batch_first(info, in_dims[:8], inputs[:8]), inputs[8:]
    if tensors[5] is not None:
        calls = [operator(*(None if t is None else t[i] for t in tensors), *settings) for i in range(info.batch_size)]
        return torch.stack(calls), 0
    return operator(*fold_batch(tensors), *settings).unflatten(0, tensors[2].shape[:2]), 0


_backward_message = "adjust_pool_backward is not differentiable; differentiate amil_fast.adjust_pool twice"
_AdjustPoolBackward = non_differentiable(
    torch.ops.amil_fast.adjust_pool_backward.default, _backward_message, _backward_vmap
)
register_function(_library, "adjust_pool", _AdjustPool)
register_function(_library, "adjust_pool_backward", _AdjustPoolBackward)
