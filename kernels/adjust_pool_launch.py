"""Launches of the adjust pooling kernels: the ``triton`` backend of ``torch.ops.amil_fast.adjust_pool``.

Arguments are canonical and checked (see ``amil_fast/ops/adjust_pool_checks.py``). Nothing synchronizes with the device,
and all memory is allocated by torch, so that calls can be captured in a CUDA graph. The launches of a pass are first
listed (:class:`TritonLaunch`), then run; ahead-of-time compilation and tests inspect the same list.
"""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from amil_fast.kernels.adjust_pool_backward import (
    adjust_pool_backward_chunks_kernel,
    adjust_pool_backward_detached_kernel,
    adjust_pool_backward_on_chip_kernel,
    adjust_pool_backward_write_kernel,
)
from amil_fast.kernels.adjust_pool_config import (
    MAX_FEATURES,
    MAX_REGISTERS,
    REGISTERS,
    WARP,
    ChunkConfig,
    TritonPlan,
    pick_plan,
)
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

BLOCK_WEIGHTS = 1024  # tile of the kernel that converts logits to weights


@dataclass
class TritonLaunch:
    """One kernel launch: ``grid`` programs, the arguments by name, and the compiler options."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    registers: int | None = None  # maximum per thread

    @property
    def options(self) -> dict[str, int]:
        """Compiler options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}

    def __call__(self) -> None:
        self.kernel[(self.grid,)](**self.arguments, **self.options)


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
    outputs, launches = forward_launches(
        instances, mask, lengths, cu_seqlens, num_iters, return_weights, max_seqlen, plan
    )
    _run(launches, instances.device)
    return outputs


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
    grad, launches = backward_launches(
        grad_bag,
        grad_weights,
        instances,
        mask,
        lengths,
        cu_seqlens,
        sigma,
        softmax_stats,
        detach_routing,
        max_seqlen,
        plan,
    )
    _run(launches, instances.device)
    return grad


def _run(launches: Sequence[TritonLaunch], device: torch.device) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch()


@functools.lru_cache
def _device_limits(device):
    """Multiprocessors, shared memory per program, compute capability; of an H200 for tensors that are not on a GPU."""
    if device.type != "cuda":
        return 132, 227 << 10, 90
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    return properties.multi_processor_count, properties.shared_memory_per_block_optin, capability


@functools.lru_cache(maxsize=4096)
def _pick_plan(packed, B, N, D, itemsize, backward, num_iters, routing, max_seqlen, device):
    multiprocessors, *limits = _device_limits(device)
    return pick_plan(
        packed, B, N, D, itemsize, backward, multiprocessors, None, num_iters, routing, max_seqlen, *limits
    )


class KernelBags:
    """Bags as kernel arguments: sizes, strides and the pointers shared by all kernels.

    ``layout_arguments``: the pointers and sizes that describe the bags; ``arguments``: these and the instances.
    """

    def __init__(
        self,
        instances: torch.Tensor,
        mask: torch.Tensor | None,
        lengths: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> None:
        self.packed = cu_seqlens is not None
        D = instances.shape[-1]
        if instances.stride(-1) != 1 and D > 1:
            instances = instances.contiguous()
        if cu_seqlens is not None:
            self.B, self.N, self.rows = cu_seqlens.shape[0] - 1, instances.shape[0], instances.shape[0]
            stride_b, stride_n = 0, instances.stride(0)
        else:
            self.B, self.N = instances.shape[:2]
            self.rows = self.B * self.N
            stride_b, stride_n = instances.stride()[:2] if self.B > 1 else (0, instances.stride(1))
        if self.N <= 1:
            stride_n = 0
        if D > MAX_FEATURES:
            raise ValueError(
                f"instances: backend 'triton' serves up to {MAX_FEATURES} features, got {D}; use 'reference'"
            )
        if max(self.N, self.B) >= 2**31:
            raise ValueError(
                "instances: backend 'triton' serves fewer than 2**31 bags and instances (per bag if padded), got "
                f"{self.B} bags and {self.N} instances; use 'reference'"
            )
        # Largest power of two, up to 16 bytes in elements, that divides both strides.
        strides = stride_b | stride_n | (16 // instances.element_size())
        self.unit = strides & -strides
        self.D = D
        self.contiguous = stride_n == D or self.N <= 1
        self.instances = instances
        self.layout_arguments = {
            "mask_ptr": None if mask is None else mask.contiguous().view(torch.uint8),
            "lengths_ptr": None if lengths is None else lengths.contiguous(),
            "cu_seqlens_ptr": None if cu_seqlens is None else cu_seqlens.contiguous(),
            "B": self.B,
            "N": self.N,
        }
        self.arguments = {
            **self.layout_arguments,
            "instances_ptr": instances,
            "stride_b": stride_b // self.unit,
            "stride_n": stride_n // self.unit,
            "D": D,
            "UNIT": self.unit,
        }

    def plan(
        self, backward: bool, num_iters: int = 3, routing: bool = True, max_seqlen: int | None = None
    ) -> TritonPlan:
        """Default plan of a pass on the device of the instances."""
        itemsize, device = self.instances.element_size(), self.instances.device
        return _pick_plan(
            self.packed, self.B, self.N, self.D, itemsize, backward, num_iters, routing, max_seqlen, device
        )


def _on_chip_launch(kernel, kernel_dot, bags, plan, arguments):
    """Launch of the on-chip kernel of a pass; ``arguments`` may contain more than it takes."""
    config = plan.on_chip
    arguments = {**bags.arguments, **arguments, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d}
    arguments["ALONE"] = bags.packed and plan.chunks is None
    if config.dot:
        kernel = kernel_dot
        layout = bags.layout_arguments
        ragged = bags.packed or layout["lengths_ptr"] is not None
        arguments["CONTIGUOUS"] = bags.contiguous
        arguments["FULL"] = not ragged and layout["mask_ptr"] is None and bags.N == config.block_n
        arguments["HALF"] = ragged and config.block_n >= 32
    else:
        arguments["BAGS"] = config.bags
    taken = {name: arguments[name] for name in kernel.arg_names}
    return TritonLaunch(kernel, triton.cdiv(bags.B, config.bags), taken, config.num_warps)


class _ChunkLaunches:
    """Lists the launches of the chunk kernels of one pass, which share the assignment of chunks to programs."""

    def __init__(self, bags: KernelBags, config: ChunkConfig, T: int) -> None:
        self.bags, self.config, self.T = bags, config, T
        if not bags.packed:
            self.slots = triton.cdiv(bags.N, config.chunk_rows) * bags.B
        else:
            self.slots = bags.N // config.chunk_rows + bags.B if config.split else bags.B
        self.layout = {
            "T": T,
            "chunk_rows": config.chunk_rows,
            "min_rows": config.min_rows,
            "SPLIT": config.split,
        }
        self.blocks = {"BLOCK_N": config.block_n, "BLOCK_D": config.block_d}
        self.launches: list[TritonLaunch] = []

    def add(self, kernel, arguments, registers=None, num_warps=None, num_stages=1):
        """Appends a launch of one program per slot."""
        arguments = {**self.layout, **arguments}
        num_warps = num_warps or self.config.num_warps
        self.launches.append(TritonLaunch(kernel, self.slots, arguments, num_warps, num_stages, registers))

    def add_iterations(self, kernel, iterations, arguments, num_stats, dtype, per_iteration):
        """Appends one launch per iteration if bags can be split, else a single one that runs all iterations.

        ``num_stats``: scalars of a partial result; ``dtype``: its dtype. ``per_iteration(first)`` returns the further
        arguments and the maximum number of registers of a launch.
        """
        config, bags = self.config, self.bags
        workspace = dict.fromkeys(("stats_ptr", "partial_ptr", "counters_ptr"))
        if config.split:
            workspace = {
                "stats_ptr": bags.instances.new_empty(self.slots, num_stats, dtype=dtype),
                "partial_ptr": bags.instances.new_empty(self.slots, bags.D, dtype=dtype),
                "counters_ptr": bags.instances.new_zeros(self.T, 2, self.slots, dtype=torch.int32),
            }
        constants = {
            "GROUP": config.group,
            "NUM_STAGES": config.num_stages,
            "num_slots": self.slots,
            "MERGE_N": config.merge_n,
        }
        constants |= {"DOT": config.dot, "CONTIGUOUS": config.dot and bags.contiguous}
        shared = {**bags.arguments, **self.blocks, **arguments, **workspace, **constants}
        for i, t in enumerate(iterations if config.split else iterations[:1]):
            more, registers = per_iteration(i == 0)
            self.add(kernel, {**shared, **more, "first_t": t}, registers, num_stages=config.num_stages)


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
    bags = KernelBags(instances, mask, lengths, cu_seqlens)
    B, T, D = bags.B, num_iters, bags.D
    dtype = torch.float64 if instances.dtype == torch.float64 else torch.float32
    weights_shape = instances.shape[:-1] if return_weights else (0,)
    if B == 0 or bags.rows == 0:
        bag, sigma = instances.new_zeros(B, D), instances.new_zeros(B, T, D, dtype=dtype)
        softmax_stats = instances.new_zeros(B, T, 2, dtype=dtype)
        return (bag, instances.new_zeros(weights_shape, dtype=dtype), sigma, softmax_stats), []
    plan = plan or bags.plan(False, T, max_seqlen=max_seqlen)
    bag = instances.new_empty(B, D)
    sigma = instances.new_empty(B, T, D, dtype=dtype)
    softmax_stats = instances.new_empty(B, T, 2, dtype=dtype)
    weights = instances.new_empty(weights_shape, dtype=dtype)
    weights_ptr = weights if return_weights else None
    outputs = {"bag_ptr": bag, "weights_ptr": weights_ptr, "sigma_ptr": sigma, "softmax_stats_ptr": softmax_stats}

    launches = []
    if plan.on_chip is not None:
        kernels = adjust_pool_forward_on_chip_kernel, adjust_pool_forward_on_chip_dot_kernel
        launches.append(_on_chip_launch(*kernels, bags, plan, {**outputs, "T": T}))
    if plan.chunks is not None:
        chunks = _ChunkLaunches(bags, plan.chunks, T)
        chunks.add_iterations(
            adjust_pool_forward_chunks_kernel, range(T), outputs, 2, dtype, lambda _: ({}, chunks.config.registers)
        )
        if return_weights:
            arguments = {
                **bags.layout_arguments,
                "weights_ptr": weights,
                "softmax_stats_ptr": softmax_stats,
                "BLOCK_N": BLOCK_WEIGHTS,
            }
            chunks.add(adjust_pool_forward_weights_kernel, arguments, num_warps=4)
        launches += chunks.launches
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
    bags = KernelBags(instances, mask, lengths, cu_seqlens)
    T = sigma.shape[1]
    grad = torch.empty(instances.shape, dtype=instances.dtype, device=instances.device)
    if bags.B == 0 or bags.rows == 0:
        return grad.zero_(), []
    routing, read = T > 1 and not detach_routing, T > 1
    plan = plan or bags.plan(True, T, routing, max_seqlen)
    saved = {"sigma_ptr": sigma.contiguous(), "softmax_stats_ptr": softmax_stats.contiguous()}
    grad_bag_ptr = None if grad_bag is None else grad_bag.contiguous()
    grad_weights_ptr = grad_weights.contiguous() if grad_weights is not None and routing else None

    launches = []
    if plan.on_chip is not None:
        arguments = {
            **saved,
            "T": T,
            "grad_bag_ptr": grad_bag_ptr,
            "grad_weights_ptr": grad_weights_ptr,
            "grad_ptr": grad,
            "ROUTING": routing,
            "READ": read,
        }
        kernels = adjust_pool_backward_on_chip_kernel, adjust_pool_backward_on_chip_dot_kernel
        launches.append(_on_chip_launch(*kernels, bags, plan, arguments))
    if plan.chunks is not None:
        config = plan.chunks
        chunks = _ChunkLaunches(bags, config, T)
        if not routing:
            arguments = {**bags.arguments, **chunks.blocks, **saved, "grad_bag_ptr": grad_bag_ptr, "grad_ptr": grad}
            arguments |= {"READ": read, "NUM_STAGES": config.num_stages, "CONTIGUOUS": bags.contiguous}
            chunks.add(adjust_pool_backward_detached_kernel, arguments, config.registers, num_stages=config.num_stages)
            return grad, launches + chunks.launches
        steps = {
            "scalars_ptr": sigma.new_empty(2 * T - 2, bags.rows),
            "vectors_ptr": sigma.new_empty(bags.B, 2 * T - 1, bags.D),
            "deltas_ptr": sigma.new_empty(bags.B, T),
            "num_rows": bags.rows,
        }
        # A mask or a gradient of the weights increases register pressure: lower occupancy is preferred to spills.
        max_registers = min(MAX_REGISTERS, REGISTERS // (WARP * config.num_warps))

        def per_iteration(first):
            high_pressure = mask is not None or (first and grad_weights is not None)
            arguments = {"grad_weights_ptr": grad_weights_ptr if first else None}
            return arguments, max_registers if high_pressure else config.registers

        chunks.add_iterations(
            adjust_pool_backward_chunks_kernel,
            range(T - 1, 0, -1),
            {**saved, **steps, "grad_bag_ptr": grad_bag_ptr},
            1,
            sigma.dtype,
            per_iteration,
        )
        arguments = {**bags.layout_arguments, **chunks.blocks, **steps, "D": bags.D, "grad_ptr": grad}
        arguments |= {"softmax_stats_ptr": saved["softmax_stats_ptr"], "DOT": config.dot}
        arguments["ONE_BLOCK"] = config.dot and 2 * T - 1 <= OUTER_TERMS.value
        chunks.add(adjust_pool_backward_write_kernel, arguments, per_iteration(first=True)[1])
        launches += chunks.launches
    return grad, launches
