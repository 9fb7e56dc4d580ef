"""Host time of a call of adjust_pool, without a GPU: Triton's real launcher over a CUDA driver without a device.

    python benchmarks/gpu/host_path.py --out DIR [--dry-run]

Per case: microseconds per call, and of these Triton's launches of compiled kernels, PyTorch's allocations and, with a
backward pass, autograd (an identity function with as many inputs and outputs); the rest is this package. For
comparison, the launches as Triton binds them anew in every call. Not included, since only a GPU has it: the driver's
time of a launch, the switch to another current device, and the thread in which autograd runs a backward pass. Figures
are medians and 5th percentiles over calls; on a shared machine the latter are closer to those of an idle one.
"""

import ctypes
import sys
import tempfile
import time

import torch
from harness import Results, parse, print_table

from tests.ops import stub_driver

CASES = {
    "on chip (16, 64, 128)": ((16, 64, 128), {}),
    "tiny (16, 8, 32)": ((16, 8, 32), {}),
    "split (4, 1024, 128)": ((4, 1024, 128), {}),
    "split, weights": ((4, 1024, 128), {"return_weights": True}),
}


class Identity(torch.autograd.Function):
    """Autograd's own share of a forward and backward pass."""

    @staticmethod
    def forward(ctx, x, *_):
        ctx.save_for_backward(x)
        return x[:, 0], x.new_empty(0)

    @staticmethod
    def backward(ctx, *_):
        return ctx.saved_tensors[0], *[None] * 8


def microseconds(call, calls):
    """``(median, 5th percentile)`` over ``calls`` calls."""
    times = []
    for _ in range(calls // 10):
        call()
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    times.sort()
    return 1e6 * times[calls // 2], 1e6 * times[calls // 20]


def bound_and_compiled(launches, calls):
    """``microseconds`` of launches with Triton's binding of arguments, and of launches of the compiled kernels."""
    bound = [0.0, 0.0]
    compiled = [0.0, 0.0]
    for launch in launches:
        kernel = launch.kernel[(launch.grid,)](**launch.arguments, **launch.options)[(launch.grid, 1, 1)]
        arguments = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in launch.arguments.values()]

        def bind(launch=launch):
            launch.kernel[(launch.grid,)](**launch.arguments, **launch.options)

        for total, call in ((bound, bind), (compiled, lambda k=kernel, a=arguments: k(*a, stream=0))):
            for i, figure in enumerate(microseconds(call, calls)):
                total[i] += figure
    return bound, compiled


def measure(shape, options, calls):
    """Rows of a case: forward, forward and backward."""
    from amil_fast import adjust_pool
    from amil_fast.kernels import adjust_pool_launch

    f = torch.randn(shape, dtype=torch.bfloat16)
    with_grad = f.clone().requires_grad_()
    grad = torch.randn(shape[0], shape[2], dtype=torch.bfloat16)

    def both():
        pooled = adjust_pool(with_grad, **options)
        torch.autograd.grad(pooled[0] if options else pooled, with_grad, grad)

    def identity():
        torch.autograd.grad(Identity.apply(with_grad, *[None] * 8)[0], with_grad, grad)

    bags = f, None, None, None
    weights = options.get("return_weights", False)
    (bag, _, sigma, stats), forward = adjust_pool_launch.forward_launches(*bags, 3, weights)
    _, backward = adjust_pool_launch.backward_launches(bag, None, *bags, sigma, stats, False)
    split = len(forward) > 1
    passes = {
        "forward": (lambda: adjust_pool(f, **options), forward, 4 + 3 * split, None),
        "forward + backward": (both, forward + backward, 5 + 9 * split, identity),
    }
    for name, (call, launches, allocations, floor) in passes.items():
        total = microseconds(call, calls)
        bound, compiled = bound_and_compiled(launches, calls)
        allocation = microseconds(lambda: f.new_empty((4, 4), dtype=torch.float32), calls)
        autograd = microseconds(floor, calls) if floor else (0.0, 0.0)
        torch_us = [a * allocations + b for a, b in zip(allocation, autograd, strict=True)]
        yield {
            "pass": name,
            "launches": len(launches),
            "us": total,
            "triton_us": compiled,
            "torch_us": torch_us,
            "ours_us": [a - b - c for a, b, c in zip(total, compiled, torch_us, strict=True)],
            "triton_bound_us": bound,
        }


def keep_freed_memory():
    """Makes malloc keep freed memory, as PyTorch's allocator for GPUs does, instead of returning it to the system."""
    libc = ctypes.CDLL(None)
    for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        libc.mallopt(parameter, 1 << 30)


def main():
    options = parse(__doc__.splitlines()[0])
    if stub_driver.COMPILER is None:
        raise SystemExit("no C compiler (CC, gcc)")
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        stub_driver.activate(folder)
        import triton

        results = Results(options, "host_path", {"torch": torch.__version__, "triton": triton.__version__})
        torch.set_num_threads(1)
        rows = []
        for name, (shape, arguments) in CASES.items():
            for row in measure(shape, arguments, 20 if options.dry_run else 2000):
                rows.append({"case": name, **row})
                results.add("host_path", rows[-1])
    columns = {"case": lambda r: r["case"], "pass": lambda r: r["pass"], "launches": lambda r: r["launches"]}
    for name, key in {
        "us (5 %)": "us",
        "Triton": "triton_us",
        "PyTorch": "torch_us",
        "ours": "ours_us",
        "Triton, bound": "triton_bound_us",
    }.items():
        columns[name] = lambda r, key=key: "{:.0f} ({:.0f})".format(*r[key])
    print_table(rows, columns, f"host path, Triton {triton.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
