"""Compilation of candidate configurations, in worker processes.

Workers import Triton inside :func:`compile_plan`: in a dry run TRITON_INTERPRET must be unset before.
"""

import os

import torch
from harness import short

NUM_ITERS = 3


def compile_plan(packed, B, N, D, dtype, backward, plan, dry_run):
    """Compiles the kernels of a plan into Triton's cache; returns registers, spills and shared bytes, or the error."""
    os.environ.pop("TRITON_INTERPRET", None)  # dry runs compile for sm_90 without a device

    from amil_fast.kernels import adjust_pool_launch, aot

    try:
        dtype = getattr(torch, dtype)
        f = torch.empty((N, D) if packed else (B, N, D), dtype=dtype, device="meta")
        cu_seqlens = torch.empty(B + 1, dtype=torch.int32, device="meta") if packed else None
        bags = (f, None, None, cu_seqlens)
        (bag, _w, sigma, stats), launches = adjust_pool_launch.forward_launches(
            *bags, NUM_ITERS, False, plan=None if backward else plan
        )
        if backward:
            _, launches = adjust_pool_launch.backward_launches(bag, None, *bags, sigma, stats, False, plan=plan)
        usage = {}
        for launch in launches:
            name = launch.kernel.fn.__name__
            if dry_run:
                job = aot.Compilation(name, "", 90, launch.kernel.fn.__module__, aot.signature(launch), launch.options)
                (found,) = aot.compile_kernels(job)
                if found.error:
                    raise RuntimeError(found.error)
                usage[name] = {"registers": found.registers, "spills": found.spills, "shared": found.shared}
            else:
                usage[name] = warm_up(launch)
        return {"kernels": usage, "spills": any(kernel["spills"] for kernel in usage.values())}
    except Exception as error:  # any compiler error is recorded
        return {"error": short(error)}


def warm_up(launch):
    """Compiles one launch for the GPU of this machine."""
    compiled = launch.kernel.warmup(**launch.arguments, **launch.options, grid=(launch.grid,))
    compiled._init_handles()
    return {"registers": compiled.n_regs, "spills": compiled.n_spills, "shared": compiled.metadata.shared}
