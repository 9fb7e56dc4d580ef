"""Launches of Triton kernels by name of argument, and their repetition for other tensors of the same shapes.

Triton binds the arguments of a launch to a specialization of the kernel anew in every call, at two thirds of the host
time of a launch with 25 arguments (benchmarks/gpu/host_path.py). A pass over tensors is therefore recorded when it is
first launched and repeated by :class:`RecordedPass`, which allocates, replaces the pointers and launches the compiled
kernels.
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

ALIGNMENT = 16  # bytes: Triton specializes on pointers that are multiples
# Compiled kernels by TritonLaunch.specialization, for tensors that are aligned.
_compiled: dict[tuple, Any] = {}


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

    def specialization(self) -> tuple:
        """All that the compiled kernel depends on, except the alignment of the tensors."""
        device = triton.runtime.driver.active.get_current_device()
        key = [id(self.kernel), device, self.num_warps, self.num_stages, self.registers]
        for value, is_constexpr in zip(self.arguments.values(), _constexprs(self.kernel), strict=True):
            if is_constexpr or value is None:
                key.append(value)
            elif isinstance(value, torch.Tensor):
                key.append(value.dtype)
            else:
                key.append(-(2**31) <= value < 2**31)  # a 32-bit argument
        return tuple(key)

    def __call__(self) -> Any:
        """Launches; returns the compiled kernel if others can be launched with it, None in the interpreter."""
        if not isinstance(self.kernel, triton.JITFunction):
            return self.kernel[(self.grid,)](**self.arguments, **self.options)
        if not aligned([value for value in self.arguments.values() if isinstance(value, torch.Tensor)]):
            self.kernel[(self.grid,)](**self.arguments, **self.options)
            return None
        key = self.specialization()
        if key in _compiled:
            _compiled[key][(self.grid, 1, 1)](*self.arguments.values())
        else:
            _compiled[key] = self.kernel[(self.grid,)](**self.arguments, **self.options)
        return _compiled[key]


@functools.cache
def _constexprs(kernel):
    return [parameter.is_constexpr for parameter in kernel.params]


class PassTensors:
    """Tensors of a pass by the kernels' names of their pointers: inputs first, then those allocated for the pass."""

    def __init__(self, inputs: dict[str, torch.Tensor | None]) -> None:
        self.by_name = dict(inputs)
        self.allocations: list[tuple[Sequence[int], torch.dtype, bool]] = []

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
        """Allocates a tensor on the device of the instances; ``zero``: initialized to 0."""
        self.allocations.append((shape, dtype, zero))
        self.by_name[name] = _allocate(self.by_name["instances_ptr"], shape, dtype, zero)
        return self.by_name[name]

    def allocated(self, count: int) -> list[torch.Tensor]:
        """The first tensors allocated."""
        first = len(self.by_name) - len(self.allocations)
        return list(self.by_name.values())[first : first + count]

    def launch(self, kernel: Any, grid: int, arguments: dict[str, Any], num_warps: int, **options: Any) -> TritonLaunch:
        """Launch with these tensors and ``arguments``, which take precedence and may be more than the kernel takes."""
        values = {**self.by_name, **arguments}
        return TritonLaunch(kernel, grid, {name: values[name] for name in kernel.arg_names}, num_warps, **options)


def _allocate(like, shape, dtype, zero):
    return like.new_zeros(shape, dtype=dtype) if zero else like.new_empty(shape, dtype=dtype)


def aligned(tensors: Sequence[torch.Tensor | None]) -> bool:
    """True if the compiled kernels of a recorded pass can be launched with these tensors."""
    bits = 0
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr()
    return bits % ALIGNMENT == 0


class RecordedPass:
    """Launches of a pass, repeated for other inputs.

    These must agree with those recorded in presence, dtype, shape, strides and device, and be :func:`aligned`. The
    recorded tensors are not kept.

    Args:
        tensors: of the recorded pass.
        launches: of the recorded pass.
        compiled: kernel compiled for each launch.
    """

    def __init__(self, tensors: PassTensors, launches: Sequence[TritonLaunch], compiled: Sequence[Any]) -> None:
        self._allocations = tensors.allocations
        position = {name: i for i, name in enumerate(tensors.by_name)}
        self._numbers: list[Any] = []
        self._calls = []
        for launch, kernel in zip(launches, compiled, strict=True):
            indices = []
            for name, value in launch.arguments.items():
                if isinstance(value, torch.Tensor):
                    indices.append(position[name])
                else:
                    indices.append(len(position) + len(self._numbers))
                    self._numbers.append(value)
            self._calls.append((kernel[(launch.grid, 1, 1)], operator.itemgetter(*indices)))

    def __call__(self, inputs: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Launches on the current stream; returns the inputs and the allocated tensors, in the order of the names."""
        instances = inputs[0]
        tensors = [*inputs, *[_allocate(instances, *allocation) for allocation in self._allocations]]
        values = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        values += self._numbers
        stream = triton.runtime.driver.active.get_current_stream(instances.get_device())
        for run, pick in self._calls:
            run(*pick(values), stream=stream)
        return tensors
