"""Ceilings of the machine: memory bandwidth by size, and launch overhead."""

import functools
import statistics
import time

import torch
from harness import TURNS, in_turns
from null_kernel import null_kernel


def ceilings(device, results, dry_run):
    """Measures copy, read and write bandwidth by size, and launch overhead; returns the copy bandwidth in bytes/s."""
    limit = 1 << 16 if dry_run else min(1 << 32, device.free_bytes() // 4)
    sizes = [1 << k for k in range(14, 33, 2) if 1 << k <= limit]
    best = 0.0
    for size in sizes:
        copies = device.copies(size)
        x = [torch.randn(size // 4, device=device.device) for _ in range(copies)]
        y = torch.empty_like(x[0])
        moves = {
            "copy": (2, [functools.partial(y.copy_, a) for a in x]),
            "add one": (2, [functools.partial(torch.add, a, 1, out=y) for a in x]),
            "read": (1, [a.amax for a in x]),
            "write": (1, [functools.partial(a.fill_, 1.0) for a in x]),
        }
        turns = in_turns(device, {name: device.prepare(calls) for name, (_, calls) in moves.items()})
        for name, (factor, _) in moves.items():
            seconds = statistics.median(turns[name])
            row = {"what": name, "size": size, "us": seconds * 1e6, "gb_per_s": factor * size / seconds / 1e9}
            results.add("bandwidth", row)
            if factor == 2 and size >= sizes[-1] // 4:  # the plateau: the largest sizes
                best = max(best, factor * size / seconds)
        del x, y, moves
        device.free_bytes()
    results.data["copy_bandwidth_gb_per_s"] = best / 1e9

    x = torch.zeros(1, device=device.device)
    launches = {"torch add_": lambda: x.add_(1), "Triton kernel": lambda: null_kernel[(1,)](x)}
    for name, call in launches.items():
        results.add("launch", {"what": name, **launch_overhead(device, call)})
    return best


def launch_overhead(device, call):
    """Microseconds per call: host time of eager calls, in a CUDA graph of many, and of replays of a graph of one."""
    calls, in_graph = (200, 100) if device.name == "cuda" else (1, 2)
    for _ in range(calls // 10):
        call()
    host = []
    for _ in range(TURNS):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        host.append((time.perf_counter() - start) / calls)
        device.synchronize()
    many = device.prepare([call] * in_graph)
    one = device.prepare([call])
    single = []
    for _ in range(TURNS):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            one.run()
        device.synchronize()
        single.append((time.perf_counter() - start) / calls)
    return {
        "eager_host_us": statistics.median(host) * 1e6,
        "in_graph_us": statistics.median(device.block(many, 10)[1:] or device.block(many, 1)) * 1e6,
        "graph_of_one_us": statistics.median(single) * 1e6,
        "prepared": many.how,
    }
