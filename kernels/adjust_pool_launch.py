"""Launches of the adjust pooling kernels: the ``triton`` backend of ``torch.ops.amil_fast.adjust_pool``.

Arguments are canonical and checked (see ``amil_fast/ops/adjust_pool_checks.py``). Nothing synchronizes with the device,
and all memory is allocated by torch, so that calls can be captured in a CUDA graph. The launches of a pass are first
listed (:class:`TritonLaunch`), then run; ahead-of-time compilation and tests inspect the same list. A pass over tensors
of shapes seen before repeats recorded launches (:class:`RecordedPass`).
"""

import functools
from collections.abc import Callable, Sequence

import torch
import triton
from amil_fast.kernels.adjust_pool_backward import (
    adjust_pool_backward_chunks_kernel,
    adjust_pool_backward_detached_kernel,
    adjust_pool_backward_on_chip_kernel,
    adjust_pool_backward_write_kernel,
)
from amil_fast.kernels.adjust_pool_bags import KernelBags, bag_inputs
from amil_fast.kernels.adjust_pool_config import MAX_REGISTERS, REGISTERS, WARP, TritonPlan
from amil_fast.kernels.adjust_pool_dot import OUTER_TERMS
from amil_fast.kernels.adjust_pool_forward import (
    adjust_pool_forward_chunks_kernel,
    adjust_pool_forward_on_chip_kernel,
    adjust_pool_forward_weights_kernel,
)
from amil_fast.kernels.adjust_pool_on_chip_dot import (
    adjust_pool_backward_on_chip_dot_kernel,
    adjust_pool_forward_on_chip_dot_kernel,
)
from amil_fast.kernels.triton_launch import PassTensors, RecordedPass, TritonLaunch, aligned

BLOCK_WEIGHTS = 1024  # tile of the kernel that converts logits to weights
# Inputs of a pass, by the names of the kernels' pointers.
BAG_POINTERS = ("instances_ptr", "mask_ptr", "lengths_ptr", "cu_seqlens_ptr")
GRADIENT_POINTERS = ("sigma_ptr", "softmax_stats_ptr", "grad_bag_ptr", "grad_weights_ptr")


def forward(
    instances: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    num_iters: int,
    return_weights: bool,
    max_seqlen: int | None = None,
    *,
    plan: TritonPlan | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(bag, weights, sigma, softmax_stats)`` of the registered operator."""
    inputs = bag_inputs(instances, mask, lengths, cu_seqlens)
    bag, weights, sigma, softmax_stats = _run(
        _forward_pass, inputs, (num_iters, return_weights, max_seqlen, plan), num_outputs=4
    )
    return bag, weights, sigma, softmax_stats


def backward(
    grad_bag: torch.Tensor | None,
    grad_weights: torch.Tensor | None,
    instances: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    sigma: torch.Tensor,
    softmax_stats: torch.Tensor,
    detach_routing: bool,
    max_seqlen: int | None = None,
    *,
    plan: TritonPlan | None = None,
) -> torch.Tensor:
    """``grad_instances`` of the registered operator, contiguous."""
    inputs = (
        *bag_inputs(instances, mask, lengths, cu_seqlens),
        *_gradient_inputs(sigma, softmax_stats, grad_bag, grad_weights),
    )
    (grad,) = _run(_backward_pass, inputs, (sigma.shape[1], detach_routing, max_seqlen, plan), num_outputs=1)
    return grad


def forward_launches(
    instances: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    num_iters: int,
    return_weights: bool,
    max_seqlen: int | None = None,
    plan: TritonPlan | None = None,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], list[TritonLaunch]]:
    """Allocated outputs ``(bag, weights, sigma, softmax_stats)`` and the launches that fill them, in order."""
    inputs = bag_inputs(instances, mask, lengths, cu_seqlens)
    tensors, launches = _forward_pass(inputs, num_iters, return_weights, max_seqlen, plan)
    bag, weights, sigma, softmax_stats = tensors.allocated(4)
    return (bag, weights, sigma, softmax_stats), launches


def backward_launches(
    grad_bag: torch.Tensor | None,
    grad_weights: torch.Tensor | None,
    instances: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    sigma: torch.Tensor,
    softmax_stats: torch.Tensor,
    detach_routing: bool,
    max_seqlen: int | None = None,
    plan: TritonPlan | None = None,
) -> tuple[torch.Tensor, list[TritonLaunch]]:
    """Allocated gradient of the instances and the launches that fill it, in order."""
    inputs = (
        *bag_inputs(instances, mask, lengths, cu_seqlens),
        *_gradient_inputs(sigma, softmax_stats, grad_bag, grad_weights),
    )
    tensors, launches = _backward_pass(inputs, sigma.shape[1], detach_routing, max_seqlen, plan)
    return tensors.allocated(1)[0], launches


def _gradient_inputs(sigma, softmax_stats, grad_bag, grad_weights):
    return (
        sigma.contiguous(),
        softmax_stats.contiguous(),
        None if grad_bag is None else grad_bag.contiguous(),
        None if grad_weights is None else grad_weights.contiguous(),
    )


@functools.lru_cache(maxsize=1024)
def _record(list_pass, settings, *key):
    """A list for the recorded pass of a key: empty until the pass has been run once."""
    return []


def _run(
    list_pass: Callable, inputs: Sequence[torch.Tensor | None], settings: tuple, num_outputs: int
) -> list[torch.Tensor]:
    """Runs a pass on the current stream of the device of the instances; returns the first tensors that it allocates.

    ``list_pass(inputs, *settings)`` returns its tensors and launches. What it returns depends on ``settings`` and on
    what is in the key: presence, dtypes, shapes and strides of the inputs, and the device.
    """
    instances, mask, lengths, cu_seqlens, *gradients = inputs
    device = instances.get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _run(list_pass, inputs, settings, num_outputs)
    record = _record(
        list_pass,
        settings,
        device,
        instances.dtype,
        instances.shape,
        instances.stride(),
        mask is None,
        None if lengths is None else lengths.dtype,
        None if cu_seqlens is None else (cu_seqlens.dtype, cu_seqlens.shape),
        *[tensor is None for tensor in gradients],
    )
    if record and aligned(inputs):
        return record[0](inputs)[len(inputs) : len(inputs) + num_outputs]
    tensors, launches = list_pass(inputs, *settings)
    compiled = [launch() for launch in launches]
    if None not in compiled:
        record[:] = [RecordedPass(tensors, launches, compiled)]
    return tensors.allocated(num_outputs)


def _forward_pass(inputs, T, return_weights, max_seqlen, plan):
    """Tensors and launches of a forward pass; allocates bag, weights, sigma, softmax_stats and workspace."""
    instances, bags = inputs[0], KernelBags(*inputs)
    tensors = PassTensors(dict(zip(BAG_POINTERS, inputs, strict=True)))
    dtype = torch.float64 if instances.dtype == torch.float64 else torch.float32
    empty = bags.B == 0 or bags.rows == 0
    tensors.allocate("bag_ptr", (bags.B, bags.D), instances.dtype, empty)
    tensors.allocate("weights_ptr", instances.shape[:-1] if return_weights else (0,), dtype, empty)
    tensors.allocate("sigma_ptr", (bags.B, T, bags.D), dtype, empty)
    tensors.allocate("softmax_stats_ptr", (bags.B, T, 2), dtype, empty)
    if empty:
        return tensors, []
    plan = plan or bags.plan(False, T, max_seqlen=max_seqlen)
    arguments = {"T": T} if return_weights else {"T": T, "weights_ptr": None}
    launches = []
    if plan.on_chip is not None:
        kernels = adjust_pool_forward_on_chip_kernel, adjust_pool_forward_on_chip_dot_kernel
        launches.append(_on_chip_launch(*kernels, bags, plan, tensors, arguments))
    if plan.chunks is not None:
        chunks = _ChunkLaunches(bags, plan.chunks, tensors, arguments)
        chunks.add_iterations(
            adjust_pool_forward_chunks_kernel, range(T), 2, dtype, lambda _: ({}, chunks.config.registers)
        )
        if return_weights:
            chunks.add(adjust_pool_forward_weights_kernel, {"BLOCK_N": BLOCK_WEIGHTS}, num_warps=4)
        launches += chunks.launches
    return tensors, launches


def _backward_pass(inputs, T, detach_routing, max_seqlen, plan):
    """Tensors and launches of a backward pass; allocates the gradient and workspace."""
    instances, mask, _, _, sigma, _, _, grad_weights = inputs
    bags = KernelBags(*inputs[:4])
    tensors = PassTensors(dict(zip(BAG_POINTERS + GRADIENT_POINTERS, inputs, strict=True)))
    empty = bags.B == 0 or bags.rows == 0
    tensors.allocate("grad_ptr", instances.shape, instances.dtype, empty)
    if empty:
        return tensors, []
    routing, read = T > 1 and not detach_routing, T > 1
    plan = plan or bags.plan(True, T, routing, max_seqlen)
    arguments = {"T": T, "ROUTING": routing, "READ": read, "num_rows": bags.rows}
    if not routing:
        arguments["grad_weights_ptr"] = None
    launches = []
    if plan.on_chip is not None:
        kernels = adjust_pool_backward_on_chip_kernel, adjust_pool_backward_on_chip_dot_kernel
        launches.append(_on_chip_launch(*kernels, bags, plan, tensors, arguments))
    if plan.chunks is not None:
        config = plan.chunks
        chunks = _ChunkLaunches(bags, config, tensors, arguments)
        if not routing:
            contiguous = {"CONTIGUOUS": bags.contiguous}
            chunks.add(adjust_pool_backward_detached_kernel, contiguous, config.registers, config.num_stages)
            return tensors, launches + chunks.launches
        tensors.allocate("scalars_ptr", (2 * T - 2, bags.rows), sigma.dtype)
        tensors.allocate("vectors_ptr", (bags.B, 2 * T - 1, bags.D), sigma.dtype)
        tensors.allocate("deltas_ptr", (bags.B, T), sigma.dtype)
        # A mask or a gradient of the weights increases register pressure: lower occupancy is preferred to spills.
        max_registers = min(MAX_REGISTERS, REGISTERS // (WARP * config.num_warps))

        def per_iteration(first):
            high_pressure = mask is not None or (first and grad_weights is not None)
            more = {} if first else {"grad_weights_ptr": None}
            return more, max_registers if high_pressure else config.registers

        iterations = range(T - 1, 0, -1)
        chunks.add_iterations(adjust_pool_backward_chunks_kernel, iterations, 1, sigma.dtype, per_iteration)
        tile = {"ONE_BLOCK": config.dot and 2 * T - 1 <= OUTER_TERMS.value}
        if not config.dot and config.registers < MAX_REGISTERS:  # a whole tile spills on sm_100
            tile["BLOCK_N"] = max(config.block_n // 2, 1)
        chunks.add(adjust_pool_backward_write_kernel, tile, per_iteration(first=True)[1])
        launches += chunks.launches
    return tensors, launches


def _on_chip_launch(kernel, kernel_dot, bags, plan, tensors, arguments):
    """Launch of the on-chip kernel of a pass."""
    config = plan.on_chip
    arguments = {
        **bags.arguments,
        **arguments,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d,
        "ALONE": bags.packed and plan.chunks is None,
    }
    if config.dot:
        kernel = kernel_dot
        arguments["CONTIGUOUS"] = bags.contiguous
        arguments["FULL"] = not bags.ragged and not bags.masked and bags.N == config.block_n
        arguments["HALF"] = bags.ragged and config.block_n >= 32
    else:
        arguments["BAGS"] = config.bags
    return tensors.launch(kernel, triton.cdiv(bags.B, config.bags), arguments, config.num_warps)


class _ChunkLaunches:
    """Lists the launches of the chunk kernels of one pass, which share the assignment of chunks to programs."""

    def __init__(self, bags, config, tensors, arguments):
        self.bags, self.config, self.tensors = bags, config, tensors
        if not bags.packed:
            self.slots = triton.cdiv(bags.N, config.chunk_rows) * bags.B
        else:
            self.slots = bags.N // config.chunk_rows + bags.B if config.split else bags.B
        self.arguments = {
            **bags.arguments,
            **arguments,
            "num_slots": self.slots,
            "chunk_rows": config.chunk_rows,
            "min_rows": config.min_rows,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "SPLIT": config.split,
            "GROUP": config.group,
            "MERGE_N": config.merge_n,
            "NUM_STAGES": config.num_stages,
            "DOT": config.dot,
            "CONTIGUOUS": config.dot and bags.contiguous,
        }
        self.launches = []

    def add(self, kernel, arguments, registers=None, num_stages=1, num_warps=None):
        """Appends a launch of one program per slot, with ``arguments`` besides those of the pass."""
        num_warps = num_warps or self.config.num_warps
        arguments = {**self.arguments, **arguments}
        launch = self.tensors.launch(
            kernel, self.slots, arguments, num_warps, num_stages=num_stages, registers=registers
        )
        self.launches.append(launch)

    def add_iterations(self, kernel, iterations, num_stats, dtype, per_iteration):
        """Appends one launch per iteration if bags can be split, else a single one that runs all iterations.

        ``num_stats``: scalars of a partial result; ``dtype``: its dtype. ``per_iteration(first)`` returns the further
        arguments and the maximum number of registers of a launch.
        """
        if self.config.split:
            self.tensors.allocate("stats_ptr", (self.slots, num_stats), dtype)
            self.tensors.allocate("partial_ptr", (self.slots, self.bags.D), dtype)
            self.tensors.allocate("counters_ptr", (self.arguments["T"], 2, self.slots), torch.int32, zero=True)
        else:
            self.arguments |= dict.fromkeys(("stats_ptr", "partial_ptr", "counters_ptr"))
            iterations = iterations[:1]
        for i, t in enumerate(iterations):
            more, registers = per_iteration(i == 0)
            self.add(kernel, {**more, "first_t": t}, registers, self.config.num_stages)
