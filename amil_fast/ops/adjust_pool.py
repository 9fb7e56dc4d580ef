"""Adjust pooling: the public function."""

import torch

from amil_fast.ops import backends
from amil_fast.ops.adjust_pool_checks import SUPPORTED, check_settings
from amil_fast.ops.adjust_pool_operator import DirectAdjustPool, run_forward
from amil_fast.ops.adjust_pool_reference import adjust_pool_reference
from amil_fast.ops.bags import check_bag_values, check_bags, check_max_seqlen


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
    return pool_bags(
        instances, mask, lengths, cu_seqlens, num_iters, return_weights, detach_routing, backend, max_seqlen
    )


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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`adjust_pool` of bags in canonical form."""
    bags = (mask, lengths, cu_seqlens)
    backend = backends.choose(backend, instances.device.type, SUPPORTED)
    settings = (num_iters, return_weights, detach_routing, backend, max_seqlen)
    if backend == "reference":
        if instances.device.type == "cpu" and not torch.compiler.is_compiling():
            check_bag_values(instances, lengths, cu_seqlens, max_seqlen)
        bag, weights = adjust_pool_reference(
            instances, mask, lengths=lengths, cu_seqlens=cu_seqlens, num_iters=num_iters, detach_routing=detach_routing
        )
    elif backends.dispatcher_has_work(instances, *bags):
        bag, weights, _, _ = torch.ops.amil_fast.adjust_pool.default(instances, *bags, *settings)
    elif instances.requires_grad and torch.is_grad_enabled():
        return DirectAdjustPool.apply(instances, bags, settings)
    else:
        bag, weights, _, _ = run_forward(instances, *bags, *settings)
    return (bag, weights) if return_weights else bag
