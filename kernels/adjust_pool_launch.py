"""Launches the adjust pooling kernels: the ``triton`` backend of ``torch.ops.amil_fast.adjust_pool``.

Arguments are canonical and checked (see ``amil_fast/ops/adjust_pool.py``). Nothing here waits for the device, and all
memory comes from torch, so that calls can be captured in a CUDA graph. The launches of a pass are first listed
(:class:`Launch`), then made; the ahead-of-time compilation and the tests look at the same list.
"""

import contextlib
import functools
from dataclasses import dataclass

import torch
import triton
from amil_fast.kernels.adjust_pool_backward import (
    adjust_pool_backward_chunks_kernel,
    adjust_pool_backward_detached_kernel,
    adjust_pool_backward_on_chip_kernel,
    adjust_pool_backward_write_kernel,
)
from amil_fast.kernels.adjust_pool_config import MAX_FEATURES, MAX_REGISTERS, REGISTERS, WARP, pick_plan
from amil_fast.kernels.adjust_pool_forward import (
    adjust_pool_forward_chunks_kernel,
    adjust_pool_forward_on_chip_kernel,
    adjust_pool_forward_weights_kernel,
)

BLOCK_WEIGHTS = 1024  # weights that a program turns from logits into weights at a time


@dataclass
class Launch:
    """One kernel launch: ``grid`` programs, the arguments by name, and the compiler's options."""

    kernel: object
    grid: int
    arguments: dict
    num_warps: int
    num_stages: int = 1
    registers: int | None = None

    @property
    def options(self):
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}

    def __call__(self):
        self.kernel[(self.grid,)](**self.arguments, **self.options)


def forward(instances, mask, lengths, cu_seqlens, num_iters, return_weights, plan=None):
    """``(bag, weights, sigma, lse)`` of the registered operator."""
    outputs, launches = forward_launches(instances, mask, lengths, cu_seqlens, num_iters, return_weights, plan)
    _run(launches, instances.device)
    return outputs


def backward(grad_bag, grad_weights, instances, mask, lengths, cu_seqlens, sigma, lse, detach_routing, plan=None):
    """``grad_instances`` of the registered operator, contiguous."""
    grad, launches = backward_launches(
        grad_bag, grad_weights, instances, mask, lengths, cu_seqlens, sigma, lse, detach_routing, plan
    )
    _run(launches, instances.device)
    return grad


def _run(launches, device):
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch()


@functools.lru_cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.lru_cache(maxsize=4096)
def _pick_plan(packed, B, N, D, itemsize, backward, device):
    return pick_plan(packed, B, N, D, itemsize, backward, _multiprocessors(device))


class _Bags:
    """The arguments that all kernels share, and the sizes behind them."""

    def __init__(self, instances, mask, lengths, cu_seqlens):
        self.packed = cu_seqlens is not None
        D = instances.shape[-1]
        if instances.stride(-1) != 1 and D > 1:
            instances = instances.contiguous()
        if self.packed:
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
        # The largest power of two, up to 16 bytes' worth of elements, that divides both strides.
        strides = stride_b | stride_n | (16 // instances.element_size())
        self.unit = strides & -strides
        self.D = D
        self.instances = instances
        self.where = {
            "mask_ptr": None if mask is None else mask.contiguous().view(torch.uint8),
            "lengths_ptr": None if lengths is None else lengths.contiguous(),
            "cu_seqlens_ptr": None if cu_seqlens is None else cu_seqlens.contiguous(),
            "B": self.B,
            "N": self.N,
        }
        self.input = {
            **self.where,
            "instances_ptr": instances,
            "stride_b": stride_b // self.unit,
            "stride_n": stride_n // self.unit,
            "D": D,
            "UNIT": self.unit,
        }

    def plan(self, backward):
        return _pick_plan(
            self.packed, self.B, self.N, self.D, self.instances.element_size(), backward, self.instances.device
        )

    def grids(self, config):
        """Number of slots, and of programs that look for bags without one."""
        slots = triton.cdiv(self.N, config.chunk_rows) * (1 if self.packed else self.B)
        return slots, triton.cdiv(self.B, config.own_bags) if self.packed else 0


def forward_launches(instances, mask, lengths, cu_seqlens, num_iters, return_weights, plan=None):
    """The outputs ``(bag, weights, sigma, lse)``, allocated, and the launches that fill them, in order."""
    bags = _Bags(instances, mask, lengths, cu_seqlens)
    B, T, D = bags.B, num_iters, bags.D
    dtype = torch.float64 if instances.dtype == torch.float64 else torch.float32
    if B == 0 or bags.rows == 0:
        bag, sigma = instances.new_zeros(B, D), instances.new_zeros(B, T, D, dtype=dtype)
        lse = instances.new_zeros(B, T, dtype=dtype)
        return (bag, instances.new_zeros(instances.shape[:-1] if return_weights else (0,), dtype=dtype), sigma, lse), []
    plan = plan or bags.plan(backward=False)
    bag = instances.new_empty(B, D)
    sigma = instances.new_empty(B, T, D, dtype=dtype)
    lse = instances.new_empty(B, T, dtype=dtype)
    weights = instances.new_empty(instances.shape[:-1] if return_weights else (0,), dtype=dtype)
    weights_ptr = weights if return_weights else None
    outputs = {"bag_ptr": bag, "weights_ptr": weights_ptr, "sigma_ptr": sigma, "lse_ptr": lse, "T": T}

    launches = []
    if plan.on_chip is not None:
        config = plan.on_chip
        constants = {"BAGS": config.bags, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d}
        grid = triton.cdiv(B, config.bags)
        arguments = {**bags.input, **outputs, **constants}
        launches.append(Launch(adjust_pool_forward_on_chip_kernel, grid, arguments, config.num_warps))
    if plan.chunks is not None:
        config = plan.chunks
        slots, own = bags.grids(config)
        layout = {"num_slots": slots, "chunk_rows": config.chunk_rows, "min_rows": config.min_rows}
        arguments = {
            **bags.input,
            **outputs,
            **layout,
            **_workspace(instances, dtype, slots, 2, D, T, config.split),
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "OWN_BAGS": config.own_bags,
            "GROUP": config.group,
            "SPLIT": config.split,
            "NUM_STAGES": config.num_stages,
        }
        for t in range(T if config.split else 1):
            launches.append(
                Launch(
                    adjust_pool_forward_chunks_kernel,
                    slots + own if t == 0 else slots,
                    {**arguments, "first_t": t},
                    config.num_warps,
                    config.num_stages,
                    config.registers,
                )
            )
        if return_weights:
            arguments = {**bags.where, **layout, "weights_ptr": weights, "lse_ptr": lse, "T": T}
            arguments |= {"OWN_BAGS": config.own_bags, "BLOCK_N": BLOCK_WEIGHTS}
            launches.append(Launch(adjust_pool_forward_weights_kernel, slots + own, arguments, 4))
    return (bag, weights, sigma, lse), launches


def _workspace(instances, dtype, slots, stats, D, T, split):
    """Memory for the partial results of chunks; only the counters need to start at 0."""
    if not split:
        return {"stats_ptr": None, "partial_ptr": None, "counters_ptr": None}
    return {
        "stats_ptr": instances.new_empty(slots, stats, dtype=dtype),
        "partial_ptr": instances.new_empty(slots, D, dtype=dtype),
        "counters_ptr": instances.new_zeros(T, 2, slots, dtype=torch.int32),
    }


def backward_launches(
    grad_bag, grad_weights, instances, mask, lengths, cu_seqlens, sigma, lse, detach_routing, plan=None
):
    """The gradient of the instances, allocated, and the launches that fill it, in order."""
    bags = _Bags(instances, mask, lengths, cu_seqlens)
    B, T, D = bags.B, sigma.shape[1], bags.D
    grad = torch.empty(instances.shape, dtype=instances.dtype, device=instances.device)
    if B == 0 or bags.rows == 0:
        return grad.zero_(), []
    plan = plan or bags.plan(backward=True)
    routing, read = T > 1 and not detach_routing, T > 1
    gradients = {
        "grad_bag_ptr": None if grad_bag is None else grad_bag.contiguous(),
        "sigma_ptr": sigma.contiguous(),
        "lse_ptr": lse.contiguous(),
        "T": T,
    }
    grad_weights_ptr = grad_weights.contiguous() if grad_weights is not None and routing else None

    launches = []
    if plan.on_chip is not None:
        config = plan.on_chip
        arguments = {
            **bags.input,
            **gradients,
            "grad_ptr": grad,
            "grad_weights_ptr": grad_weights_ptr,
            "BAGS": config.bags,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "ROUTING": routing,
            "READ": read,
        }
        grid = triton.cdiv(B, config.bags)
        launches.append(Launch(adjust_pool_backward_on_chip_kernel, grid, arguments, config.num_warps))
    if plan.chunks is not None:
        config = plan.chunks
        slots, own = bags.grids(config)
        layout = {"num_slots": slots, "chunk_rows": config.chunk_rows, "min_rows": config.min_rows}
        blocks = {"BLOCK_N": config.block_n, "BLOCK_D": config.block_d}
        programs = {"OWN_BAGS": config.own_bags, "NUM_STAGES": config.num_stages}
        if not routing:
            arguments = {**bags.input, **gradients, **layout, **blocks, **programs, "grad_ptr": grad, "READ": read}
            kernel = adjust_pool_backward_detached_kernel
            launches.append(
                Launch(kernel, slots + own, arguments, config.num_warps, config.num_stages, config.registers)
            )
            return grad, launches
        steps = {
            "scalars_ptr": sigma.new_empty(T - 1, 2, bags.rows),
            "e_ptr": torch.empty_like(sigma),
            "factors_ptr": sigma.new_empty(B, T),
            "num_rows": bags.rows,
        }
        arguments = {
            **bags.input,
            **gradients,
            **layout,
            **blocks,
            **programs,
            **steps,
            **_workspace(instances, sigma.dtype, slots, 1, D, T, config.split),
            "GROUP": config.group,
            "SPLIT": config.split,
        }
        # A mask or a gradient of the weights takes registers: better fewer programs per multiprocessor than spills.
        most_registers = min(MAX_REGISTERS, REGISTERS // (WARP * config.num_warps))
        for t in range(T - 1, 0 if config.split else T - 2, -1):
            first = t == T - 1
            launches.append(
                Launch(
                    adjust_pool_backward_chunks_kernel,
                    slots + own if first else slots,
                    {**arguments, "grad_weights_ptr": grad_weights_ptr if first else None, "first_t": t},
                    config.num_warps,
                    config.num_stages,
                    most_registers if mask is not None or (first and grad_weights is not None) else config.registers,
                )
            )
        arguments = {
            **bags.where,
            **gradients,
            **layout,
            **blocks,
            **steps,
            "grad_ptr": grad,
            "grad_weights_ptr": grad_weights_ptr,
            "D": D,
            "OWN_BAGS": config.own_bags,
        }
        del arguments["grad_bag_ptr"]
        registers = config.registers if mask is None and grad_weights is None else most_registers
        kernel = adjust_pool_backward_write_kernel
        launches.append(Launch(kernel, slots + own, arguments, config.num_warps, registers=registers))
    return grad, launches
