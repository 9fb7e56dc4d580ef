"""Verification and timing of candidate configurations."""

import functools
import math
import statistics

import torch
from harness import in_turns, short
from sweep_compile import NUM_ITERS

from amil_fast.kernels import adjust_pool_launch


class SweepProblem:
    """One case in one dtype: inputs for all copies of a call, and the saved activations of the backward pass."""

    def __init__(self, device, case, dtype):
        self.name, cu_seqlens, self.B, self.N, self.D = case
        self.packed = cu_seqlens is not None
        shape = (self.N, self.D) if self.packed else (self.B, self.N, self.D)
        self.size = math.prod(shape) * dtype.itemsize
        if 5 * self.size > device.free_bytes():
            raise MemoryError(f"5 x {self.size / 1e9:.1f} GB exceed the free memory")
        self.where = (None, None, torch.tensor(cu_seqlens, dtype=torch.int32, device=device.device)
                      if self.packed else None)  # fmt: skip
        self.inputs = []
        for seed in range(device.copies(self.size)):
            generator = torch.Generator(device.device).manual_seed(seed)
            f = torch.randn(shape, generator=generator, device=device.device, dtype=dtype).mul_(2 / self.D**0.5)
            g = torch.randn(self.B, self.D, generator=generator, device=device.device, dtype=dtype)
            _bag, _w, sigma, stats = adjust_pool_launch.forward(f, *self.where, NUM_ITERS, False)
            self.inputs.append((f, g, sigma, stats))

    def calls(self, backward, plan):
        """One call per input."""

        def forward(f, g, sigma, stats):
            return adjust_pool_launch.forward(f, *self.where, NUM_ITERS, False, plan=plan)[0]

        def back(f, g, sigma, stats):
            return adjust_pool_launch.backward(g, None, f, *self.where, sigma, stats, False, plan=plan)

        return [functools.partial(back if backward else forward, *pair) for pair in self.inputs]

    def single_pass_bytes(self, backward):
        """Minimum bytes moved if every bag fits on chip."""
        return self.size * (2 if backward else 1)


def poisoned(call):
    """Result of a call with uninitialized memory filled with NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(False)


def measure(device, problem, backward, plans, tolerance):
    """Times plans in turns: name -> ``{"median_us", "spread_us"}`` or ``{"error"}``. The first must be "current"."""
    rows, works = {}, {}
    for name, plan in plans.items():
        try:
            calls = problem.calls(backward, plan)
            if name == "current":
                problem.expected = poisoned(calls[0]).float()
                assert problem.expected.isfinite().all(), "not finite"
            error = (poisoned(calls[0]).float() - problem.expected).norm() / problem.expected.norm()
            if not error.item() < tolerance:
                raise ValueError(f"relative error {error.item():.1e}")
            works[name] = device.prepare(calls)
        except Exception as error:
            rows[name] = {"error": short(error)}
    turns = in_turns(device, works, seconds=0.01)
    for name, medians in turns.items():
        rows[name] = {
            "median_us": statistics.median(medians) * 1e6,
            "spread_us": [min(medians) * 1e6, max(medians) * 1e6],
            "prepared": works[name].how,
        }
    return rows
