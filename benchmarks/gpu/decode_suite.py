"""decode_heatmaps on a GPU: cases, verification and timing beside its rivals.

Rivals: vectorized PyTorch in float32, torch.compile of it, and the NumPy and OpenCV code of the pose projects on the
CPU, including the copy to the host. Minimum bytes moved: the maps once, both of a pair with flip averaging; 12 bytes
per joint.
"""

import functools
import statistics
import time

import torch
from harness import dtype_name, in_turns, reason, short

from amil_fast import decode_heatmaps
from benchmarks.rivals import DECODE_CASES, decode_data, peer_decode, torch_decode
from benchmarks.timing import ratio

SHAPES = ((1024, 17, 96, 72), (64, 17, 64, 48), (64, 133, 64, 48))
DRY_SHAPES = ((2, 5, 20, 16),)
CASES = {**DECODE_CASES, "flip": {"flip": True}}


def measure_decode(device, shape, dtype, names, bandwidth, results, budget, dry_run):
    """Measures one shape: all cases, ours against PyTorch rivals (``names``) and, in float32, the peers on the CPU."""
    maps, flipped, pairs, order = decode_data(shape, "cpu")
    maps, flipped = (t.to(device.device, dtype) for t in (maps, flipped))
    copies = device.copies(maps.nbytes)
    inputs = [(maps.clone(), flipped.clone()) for _ in range(copies)]
    device_order = torch.tensor(order, device=device.device)
    label = f"{shape} {dtype_name(dtype)}"
    backend = "cpp" if dry_run else "cuda"
    for function, arguments in CASES.items():
        if budget.over():
            results.add("not_reached", f"decode {label} {function}")
            continue
        settings = dict(arguments)
        flip = settings.pop("flip", False)

        def ours(h, m, settings=settings, flip=flip, backend=backend):
            more = {"flipped": m, "flip_pairs": pairs} if flip else {}
            return decode_heatmaps(h, **settings, **more, backend=backend)

        def plain(h, m, settings=settings, flip=flip):
            more = {"flipped": m, "order": device_order} if flip else {}
            return torch_decode(h, **settings, **more)

        functions = {"ours": ours, "torch": plain}
        if "compile" in names:
            functions["compile"] = torch.compile(plain, dynamic=False, **({"backend": "eager"} if dry_run else {}))
        few = [t[:8] for t in inputs[0]]
        more = {"flipped": few[1], "flip_pairs": pairs} if flip else {}
        expected = decode_heatmaps(few[0], **settings, **more, backend="reference")
        works = {"amax": device.prepare([lambda h=h: h.flatten(2).amax(-1) for h, _ in inputs])}
        for name, call in functions.items():
            try:
                coords, scores = (t[:8] for t in call(*inputs[0]))
                difference = (coords - expected[0]).abs().max().item()
                if not (torch.equal(scores, expected[1]) and difference < (1e-3 if name == "ours" else 1e-2)):
                    raise ValueError(f"{name}: coordinates differ by {difference}, or scores differ")
                works[name] = device.prepare([functools.partial(call, *pair) for pair in inputs])
            except Exception as error:
                results.add("failed", {"case": f"decode {label} {function}", "rival": name, "reason": reason(error)})
                device.free_bytes()
        turns = in_turns(device, works)
        read = maps.nbytes * (2 if flip else 1)
        minimum = read + 12 * shape[0] * shape[1]
        for name, medians in turns.items():
            seconds = statistics.median(medians)
            results.add("decode_heatmaps", {
                "shape": str(shape), "dtype": dtype_name(dtype), "function": function, "rival": name,
                "median_ms": seconds * 1e3, "spread_ms": [min(medians) * 1e3, max(medians) * 1e3],
                "prepared": works[name].how, "copies": works[name].count,
                "times_of_ours": ratio(turns, name, "ours") if "ours" in turns else None,
                "times_of_amax": ratio(turns, name, "amax"),
                "min_bytes": read if name == "amax" else minimum,
                "share_of_roofline": (maps.nbytes if name == "amax" else minimum) / seconds / bandwidth,
            })  # fmt: skip
        if dtype == torch.float32 and "peer" in names and function in DECODE_CASES:

            def peer(function=function, flip=flip):
                on_host = [t.cpu().numpy() for t in (inputs[0] if flip else inputs[0][:1])]
                return peer_decode(function, *on_host, **({"order": order} if flip else {}))

            try:
                times = []
                for _ in range(2):  # takes seconds; the first call warms up caches and threads
                    device.synchronize()
                    start = time.perf_counter()
                    peer()
                    times.append(time.perf_counter() - start)
            except ImportError as error:
                results.add("skipped", {"case": f"decode {label} {function} peer", "reason": short(error)})
                continue
            results.add("decode_heatmaps", {
                "shape": str(shape), "dtype": "float32", "function": function,
                "rival": "peer on the CPU, copy included",
                "median_ms": times[-1] * 1e3, "spread_ms": [min(times) * 1e3, max(times) * 1e3],
                "prepared": "wall clock", "copies": 1,
                "times_of_ours": times[-1] / statistics.median(turns["ours"]) if "ours" in turns else None,
            })  # fmt: skip
