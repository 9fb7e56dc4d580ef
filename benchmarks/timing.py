"""Timing shared by the pytest benchmarks and the GPU scripts."""

import statistics
import time

import torch


def timed(call, device):
    """Wall-clock seconds of one call, including device synchronization on CUDA."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(calls, device, turns=7, seconds=0.05, max_calls=20):
    """Times the calls in turns, each in blocks of about ``seconds``: name -> one median per turn, in seconds.

    The first quarter of a block is dropped: the preceding block of another call leaves cold caches and idle threads.
    """
    once = {name: min(timed(call, device) for _ in range(3)) for name, call in calls.items()}
    medians = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            block = [timed(call, device) for _ in range(int(min(max_calls, max(2, seconds / once[name]))))]
            medians[name].append(statistics.median(block[len(block) // 4 :]))
    return medians


def ratio(medians, a, b):
    """Time of ``a`` divided by the time of ``b``: median of the ratios of the turns."""
    return statistics.median(x / y for x, y in zip(medians[a], medians[b], strict=True))
