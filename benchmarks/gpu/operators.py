"""The machine's two ceilings, then both operators as a share of them, beside their rivals; equality is asserted first.

    python benchmarks/gpu/operators.py --out DIR [--minutes 8] [--only SECTION,...] [--dtypes bf16,...]

Rivals of adjust_pool: the reference with autograd ("eager"), torch.compile of it, the same with max-autotune (without
its own CUDA graphs: everything here is captured), and T calls of scaled_dot_product_attention. Of decode_heatmaps:
vectorized PyTorch on the GPU in float32, torch.compile of it, and the peers' NumPy and OpenCV on the CPU with the copy
to the host.

Bytes that must move at least, F the instances, dF their gradient:

    forward                F once where every bag fits on chip, else T times
    backward               F once, or T - 1 times; dF once
    decode                 the maps once, both of a pair with mirror averaging; 12 bytes per joint

Sections in the order of importance: ceilings, main (ours, eager, attention in bfloat16), overhead, decode, compile,
dtypes, autotune. What was not reached in time is listed at the end.
"""

import functools
import itertools
import math
import statistics
import sys
import time
from dataclasses import dataclass

from harness import ROOT, TURNS, Budget, Results, in_turns, machine, open_device, parse, print_table, ratio, short

SECTIONS = ("ceilings", "main", "overhead", "decode", "compile", "dtypes", "autotune")
T = 3
ON_CHIP_BYTES = 228 * 1024  # a multiprocessor's shared memory, and about its registers (H100, H200)
PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Case:
    """Bags to pool: ``B`` of ``N`` instances, or packed ones with these lengths."""

    B: int
    N: int
    D: int
    lengths: tuple = ()

    @property
    def name(self):
        if self.lengths:
            return f"ragged {self.B} bags {min(self.lengths)}-{max(self.lengths)} x {self.D}"
        return f"({self.B}, {self.N}, {self.D})"

    @property
    def elements(self):
        return (sum(self.lengths) if self.lengths else self.B * self.N) * self.D

    def floor_bytes(self, which, itemsize, reads=None):
        """Bytes that must move, by the table above; with ``reads=1`` as if every bag fitted on chip."""
        total = 0
        for m in self.lengths or (self.N,) * self.B:
            size = m * self.D * itemsize
            fits = size <= ON_CHIP_BYTES or reads == 1
            forward = size * (1 if fits else T)
            backward = size * (1 if fits else T - 1) + size
            total += {"forward": forward, "backward": backward, "both": forward + backward}[which]
        return total


def ragged(low, high, bags, D):
    """Lengths spread evenly in their logarithm, in an order that mixes long and short."""
    lengths = [round(low * (high / low) ** (i / (bags - 1))) for i in range(bags)]
    return Case(bags, 0, D, tuple(lengths[(i * 37) % bags] for i in range(bags)))


CASES = (
    Case(4096, 64, 128),
    Case(32, 4096, 128),
    Case(1, 100_000, 512),
    Case(4096, 256, 128),
    ragged(200, 200_000, 64, 1024),
    Case(256, 1024, 512),
    Case(1, 100_000, 1024),
    Case(8, 1_000_000, 64),
)
DRY_CASES = (Case(3, 6, 8), ragged(1, 40, 3, 5))
DECODE_SHAPES = ((1024, 17, 96, 72), (64, 17, 64, 48), (64, 133, 64, 48))
DRY_SHAPES = ((2, 5, 20, 16),)


# ---- adjust_pool ----


def make_inputs(case, dtype, device, seed):
    """``(x, upstream gradient)``, random."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    shape = (sum(case.lengths), case.D) if case.lengths else (case.B, case.N, case.D)
    x = torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(2 / case.D**0.5)
    return x, torch.randn(case.B, case.D, generator=generator, device=device, dtype=dtype)


def make_rivals(case, device, names, dry_run):
    """name -> function of the instances."""
    import torch
    from test_adjust_pool import attention_formulation

    import amil_fast
    from amil_fast.ops.adjust_pool_reference import adjust_pool_reference

    cu_seqlens = None
    if case.lengths:
        cu_seqlens = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32, device=device)

    def eager(x):
        return adjust_pool_reference(x, cu_seqlens=cu_seqlens, num_iters=T)[0]

    backend = {"backend": "aot_eager"} if dry_run else {}
    rivals = {
        "ours": lambda x: amil_fast.adjust_pool(x, cu_seqlens=cu_seqlens, num_iters=T, backend="triton"),
        "eager": eager,
        "attention": attention_formulation,
        "compile": torch.compile(eager, dynamic=False, **backend),
        "max-autotune": torch.compile(
            eager, dynamic=False, **(backend or {"mode": "max-autotune-no-cudagraphs"})
        ),
    }  # fmt: skip
    if case.lengths:
        del rivals["attention"]  # no packed form for this many features
    return {name: rivals[name] for name in names if name in rivals}


def make_passes(function, x, upstream):
    """pass -> a call that returns its tensors; "forget" frees what the backward pass, recorded once, keeps alive."""
    import torch

    leaf = x.detach().requires_grad_()

    def forward():
        with torch.no_grad():
            return (function(x),)

    def both():
        bag = function(leaf)
        return bag.detach(), torch.autograd.grad(bag, leaf, upstream)[0]

    @functools.cache
    def recorded():
        return function(leaf)

    def backward():
        return torch.autograd.grad(recorded(), leaf, upstream, retain_graph=True)

    return {"forward": forward, "backward": backward, "both": both, "forget": recorded.cache_clear}


def slices(case, elements=1 << 26):
    """The case in pieces of whole bags: ``(first row, last row, first bag, last bag)``, rows of the flat instances."""
    if case.lengths:
        starts = [0, *itertools.accumulate(case.lengths)]
        for b in range(case.B):
            yield starts[b], starts[b + 1], b, b + 1
    else:
        step = max(1, elements // (case.N * case.D))
        for b in range(0, case.B, step):
            last = min(case.B, b + step)
            yield b * case.N, last * case.N, b, last


def errors(case, x, upstream, results):
    """Relative errors against float64 of each ``(bag, gradient)`` in ``results``, and of eager in x's dtype ("plain").

    Slice by slice, since a float64 autograd of the whole would not fit. Returns name -> (error of bag, of gradient).
    """
    import torch

    from amil_fast.ops.adjust_pool_reference import adjust_pool_reference

    def reference(first, last, a, b, dtype):
        f = x.view(-1, case.D)[first:last].view(b - a, -1, case.D).to(dtype).requires_grad_()
        bag = adjust_pool_reference(f, num_iters=T)[0]
        grad = torch.autograd.grad(bag, f, upstream[a:b].to(dtype))[0]
        return bag.detach(), grad.view(-1, case.D)

    names = [*results, "plain"]
    sums = {name: [0.0, 0.0] for name in names}
    sizes = [0.0, 0.0]
    for first, last, a, b in slices(case):
        truth = reference(first, last, a, b, torch.float64)
        for i, t in enumerate(truth):
            sizes[i] += t.square().sum().item()
        for name in names:
            if name == "plain":
                actual = reference(first, last, a, b, x.dtype)
            else:
                bag, grad = results[name]
                actual = bag[a:b], grad.view(-1, case.D)[first:last]
            for i, (t, y) in enumerate(zip(truth, actual, strict=True)):
                sums[name][i] += (y.double() - t).square().sum().item()
    return {
        name: tuple(math.sqrt(s / size) if s == s else math.inf for s, size in zip(sums[name], sizes, strict=True))
        for name in names
    }


def right(name, error, plain, dtype):
    """Ours: as accurate as eager in the same dtype, within a factor of 3. A rival: not wrong."""
    import torch

    eps = torch.finfo(dtype).eps
    return all(e <= (3 * p + 8 * eps if name == "ours" else 4 * eps**0.5) for e, p in zip(error, plain, strict=True))


def measure_case(device, case, dtype, names, bandwidth, results, dry_run):
    """One case: checks every rival, then times them in turns, pass by pass. Adds rows to ``results``."""
    import torch

    label = f"{case.name} {str(dtype).removeprefix('torch.')}"
    size = case.elements * dtype.itemsize
    free = device.free_bytes()
    if 4 * size > free:
        results.add("skipped", {"case": label, "reason": f"4 x {size / 1e9:.1f} GB do not fit {free / 1e9:.0f} GB"})
        return
    copies = device.copies(size)
    inputs = [make_inputs(case, dtype, device.device, seed) for seed in range(copies)]
    rivals = make_rivals(case, device.device, names, dry_run)
    passes, checked = {}, {}
    for name, function in rivals.items():
        try:
            calls = [make_passes(function, *pair) for pair in inputs]
            bag, grad = calls[0]["both"]()
            found = errors(case, *inputs[0], {name: (bag, grad)})
            del bag, grad
            if not right(name, found[name], found["plain"], dtype):
                raise ValueError(f"relative errors {found[name]} of bag and gradient, eager's {found['plain']}")
            extra = {which: device.peak(calls[0][which]) for which in PASSES}
            calls[0]["forget"]()
        except Exception as error:  # a rival out of memory is a result, not the end
            kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else short(error)
            results.add("failed", {"case": label, "rival": name, "pass": "all", "reason": kind})
            device.free_bytes()
            continue
        passes[name], checked[name] = calls, (found[name], extra)
    for which in PASSES:
        y = torch.empty_like(inputs[0][0])
        works = {"copy": device.prepare([functools.partial(y.copy_, x) for x, _ in inputs])}
        for name, calls in passes.items():
            try:
                works[name] = device.prepare([call[which] for call in calls])
            except Exception as error:
                kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else short(error)
                results.add("failed", {"case": label, "rival": name, "pass": which, "reason": kind})
                device.free_bytes()
        turns = in_turns(device, works)
        for name in works:
            if name == "copy":
                continue
            seconds = statistics.median(turns[name])
            floor, one_read = (case.floor_bytes(which, dtype.itemsize, reads) for reads in (None, 1))
            results.add("adjust_pool", {
                "case": case.name,
                "dtype": str(dtype).removeprefix("torch."),
                "pass": which,
                "rival": name,
                "median_ms": seconds * 1e3,
                "spread_ms": [min(turns[name]) * 1e3, max(turns[name]) * 1e3],
                "prepared": works[name].how,
                "copies": works[name].count,
                "times_of_ours": ratio(turns, name, "ours") if "ours" in works else None,
                "floor_bytes": floor,
                "one_read_bytes": one_read,
                "gb_per_s": floor / seconds / 1e9,
                "share_of_floor": floor / seconds / bandwidth,
                "share_of_one_read": one_read / seconds / bandwidth,
                "share_of_copy_in_turns": floor / (2 * size) * ratio(turns, "copy", name),
                "relative_error": checked[name][0],
                "extra_bytes": checked[name][1][which],
                "extra_share_of_input": checked[name][1][which] / size,
            })  # fmt: skip
        del works
        for call in itertools.chain(*passes.values()):
            call["forget"]()


# ---- the machine ----


def ceilings(device, results, dry_run):
    """Copy, read and write bandwidth by size; what a launch costs. Returns the copy bandwidth in bytes/s."""
    import torch
    from null_kernel import null_kernel

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
            if factor == 2 and size >= sizes[-1] // 4:  # the plateau: the two largest sizes
                best = max(best, factor * size / seconds)
        del x, y, moves
        device.free_bytes()
    results.data["copy_bandwidth_gb_per_s"] = best / 1e9

    x = torch.zeros(1, device=device.device)
    launches = {"torch add_": lambda: x.add_(1), "Triton kernel": lambda: null_kernel[(1,)](x)}
    for name, call in launches.items():
        results.add("launch", {"what": name, **overhead_of(device, call)})
    return best


def overhead_of(device, call):
    """Microseconds per call: the host's in a row of calls, in a CUDA graph of many calls, and of graphs of one call."""
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


def overhead(device, results):
    """Tiny bags (16, 8, 32): what a call costs whatever it computes; beside it one softmax and one bmm, and eager."""
    import torch

    from amil_fast.ops.adjust_pool_reference import adjust_pool_reference

    import amil_fast  # isort: skip

    weights = torch.randn(16, 1, 8, device=device.device)
    x = torch.randn(16, 8, 32, device=device.device)
    functions = {
        "ours": (lambda x: amil_fast.adjust_pool(x, backend="triton"), torch.randn_like(x[:, 0])),
        "softmax + bmm": (lambda x: torch.bmm(torch.softmax(weights, -1), x), torch.randn_like(x[:, :1])),
        "eager": (lambda x: adjust_pool_reference(x)[0], torch.randn_like(x[:, 0])),
    }
    for name, (function, upstream) in functions.items():
        passes = make_passes(function, x, upstream)
        for which in ("forward", "both"):
            results.add("overhead", {"rival": name, "pass": which, **overhead_of(device, passes[which])})


# ---- decode_heatmaps ----


def decode_functions():
    """name -> arguments; "mirror" in them asks for mirror averaging."""
    from test_decode_heatmaps import FUNCTIONS

    return {**FUNCTIONS, "mirror": {"mirror": True}}


def torch_decode(maps, refine="none", convention="hrnet", flipped=None, order=None):
    """Vectorized PyTorch as one would write it: whole maps averaged, blurred and logged, a few gathers; float32."""
    import torch
    import torch.nn.functional as F

    from amil_fast.ops import decode_heatmaps_reference as small  # the few values around the peak

    h = maps.float()
    if flipped is not None:
        h = (h + flipped[:, order].flip(-1).float()) * 0.5
    B, K, H, W = h.shape
    scores, index = h.flatten(2).max(-1)
    x, y = index % W, index // W
    coords = torch.stack([x, y], -1).float()
    if refine == "quarter":
        coords = coords + small._quarter(h, x, y, convention)
    elif refine != "none":
        w = torch.tensor(small.blur_weights(11), device=h.device)
        blurred = F.conv2d(h.view(B * K, 1, H, W), w.view(1, 1, 11, 1), padding=(5, 0))
        blurred = F.conv2d(blurred, w.view(1, 1, 1, 11), padding=(0, 5)).view(B, K, H, W)
        L = blurred * (scores / blurred.amax((2, 3)))[..., None, None]
        L = (L.clamp(min=1e-10) if refine == "dark" else L.clamp(1e-3, 50)).log()
        coords = coords + (small._dark if refine == "dark" else small._dark_udp)(L, x, y)
    marker = -1.0 if convention == "mmpose" else 0.0
    return torch.where((scores > 0)[..., None], coords, marker).float(), scores


def measure_decode(device, shape, dtype, names, bandwidth, results, budget, dry_run):
    """One shape: every function, ours against torch on the GPU (``names``) and, in float32, the peers on the CPU."""
    import torch
    from test_decode_heatmaps import PEERS, make_data, peer_mirror_dark

    from amil_fast import decode_heatmaps

    maps, flipped, pairs, order = make_data(shape, "cpu")
    maps, flipped = (t.to(device.device, dtype) for t in (maps, flipped))
    copies = device.copies(maps.nbytes)
    inputs = [(maps.clone(), flipped.clone()) for _ in range(copies)]
    order_there = torch.tensor(order, device=device.device)
    label = f"{shape} {str(dtype).removeprefix('torch.')}"
    backend = "cpp" if dry_run else "cuda"
    for function, arguments in decode_functions().items():
        if budget.over():
            results.add("not_reached", f"decode {label} {function}")
            continue
        settings = dict(arguments)
        mirror = settings.pop("mirror", False)

        def ours(h, m, settings=settings, mirror=mirror, backend=backend):
            more = {"flipped": m, "flip_pairs": pairs} if mirror else {}
            return decode_heatmaps(h, **settings, **more, backend=backend)

        def plain(h, m, settings=settings, mirror=mirror):
            more = {"flipped": m, "order": order_there} if mirror else {}
            return torch_decode(h, **settings, **more)

        functions = {"ours": ours, "torch": plain}
        if "compile" in names:
            functions["compile"] = torch.compile(plain, dynamic=False, **({"backend": "eager"} if dry_run else {}))
        few = [t[:8] for t in inputs[0]]
        more = {"flipped": few[1], "flip_pairs": pairs} if mirror else {}
        expected = decode_heatmaps(few[0], **settings, **more, backend="reference")
        works = {"amax": device.prepare([lambda h=h: h.flatten(2).amax(-1) for h, _ in inputs])}
        for name, call in functions.items():
            try:
                coords, scores = (t[:8] for t in call(*inputs[0]))
                difference = (coords - expected[0]).abs().max().item()
                if not (torch.equal(scores, expected[1]) and difference < (1e-3 if name == "ours" else 1e-2)):
                    raise ValueError(f"{name} is wrong: coordinates differ by {difference}")
                works[name] = device.prepare([functools.partial(call, *pair) for pair in inputs])
            except Exception as error:
                kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else short(error)
                results.add("failed", {"case": f"decode {label} {function}", "rival": name, "reason": kind})
                device.free_bytes()
        turns = in_turns(device, works)
        read = maps.nbytes * (2 if mirror else 1)
        floor = read + 12 * shape[0] * shape[1]
        for name, medians in turns.items():
            seconds = statistics.median(medians)
            results.add("decode_heatmaps", {
                "shape": str(shape), "dtype": str(dtype).removeprefix("torch."), "function": function, "rival": name,
                "median_ms": seconds * 1e3, "spread_ms": [min(medians) * 1e3, max(medians) * 1e3],
                "prepared": works[name].how, "copies": works[name].count,
                "times_of_ours": ratio(turns, name, "ours") if "ours" in turns else None,
                "times_of_amax": ratio(turns, name, "amax"),
                "floor_bytes": read if name == "amax" else floor,
                "share_of_floor": (maps.nbytes if name == "amax" else floor) / seconds / bandwidth,
            })  # fmt: skip
        if dtype == torch.float32 and "peer" in names and (function in PEERS or function == "mirror+dark"):

            def peer(function=function):
                on_host = [t.cpu().numpy() for t in (inputs[0] if function == "mirror+dark" else inputs[0][:1])]
                return peer_mirror_dark(*on_host, order) if len(on_host) == 2 else PEERS[function](*on_host)

            try:
                times = []
                for _ in range(2):  # seconds long; the first warms caches and threads up
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


# ---- goals and tables ----


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def goals(data):
    """Rows (goal, wanted, measured, met) out of the results; a goal whose figure was not measured says so."""
    rows = []

    def add(goal, wanted, measured, met, form):
        if data["dry_run"]:
            measured = None
        text = form.format(measured) if measured is not None else "not measured"
        rows.append(
            {"goal": goal, "wanted": wanted, "measured": text, "met": None if measured is None else met(measured)}
        )

    pool = {(r["case"], r["dtype"], r["pass"], r["rival"]): r for r in data.get("adjust_pool", [])}

    def share(case, which, key):
        row = pool.get((case, "bfloat16", which, "ours"))
        return row and row[key]

    for case in ("(4096, 64, 128)", "(4096, 256, 128)"):
        for which, least in (("forward", 0.85), ("backward", 0.80)):
            value = share(case, which, "share_of_one_read")
            add(f"{case} on chip, {which}", f">= {least:.0%}", value, lambda v, least=least: v >= least, "{:.1%}")
    for which in ("forward", "backward"):
        value = share("(32, 4096, 128)", which, "share_of_one_read")
        add(f"(32, 4096, 128) {which}, one read", ">= 70%", value, lambda v: v >= 0.7, "{:.1%}")
    value = share("(1, 100000, 512)", "forward", "share_of_floor")
    add("(1, 100000, 512) forward, T reads", ">= 85%", value, lambda v: v >= 0.85, "{:.1%}")
    shares = [
        r["share_of_floor"]
        for r in data.get("decode_heatmaps", [])
        if r["rival"] == "ours" and r["shape"] == str(DECODE_SHAPES[0]) and r["dtype"] == "float32"
    ]
    add("decode (1024, 17, 96, 72), worst", ">= 80%", min(shares, default=None), lambda v: v >= 0.8, "{:.1%}")
    for rival, least in (("eager", 15), ("compile", 4), ("attention", 3)):
        times = [r["times_of_ours"] for r in pool.values()
                 if r["rival"] == rival and r["pass"] == "both" and r["times_of_ours"]]  # fmt: skip
        mean = geometric_mean(times) if times else None
        add(f"forward + backward against {rival}, {len(times)} cases", f">= {least} x", mean,
            lambda v, least=least: v >= least, "{:.1f} x")  # fmt: skip
    tiny = {(r["rival"], r["pass"]): r for r in data.get("overhead", [])}
    for which in ("forward", "both"):
        row = tiny.get(("ours", which), {})
        add(f"(16, 8, 32) {which}, host", "<= 30 us", row.get("eager_host_us"), lambda v: v <= 30, "{:.1f} us")
        add(f"(16, 8, 32) {which}, in a graph", "<= 5 us", row.get("in_graph_us"), lambda v: v <= 5, "{:.1f} us")
    extra = [r["extra_share_of_input"] for r in pool.values() if r["rival"] == "ours"]
    add("memory beyond in- and output, worst", "<= 1%", max(extra, default=None), lambda v: v <= 0.01, "{:.2%}")
    return rows


def print_results(data):
    ours = [r for r in data.get("adjust_pool", []) if r["rival"] == "ours"]
    rivals = {(r["case"], r["dtype"], r["pass"], r["rival"]): r for r in data.get("adjust_pool", [])}

    def against(rival):
        def cell(row):
            other = rivals.get((row["case"], row["dtype"], row["pass"], rival))
            return f"{other['times_of_ours']:.1f}" if other and other["times_of_ours"] else "-"

        return cell

    columns = {
        "case": lambda r: r["case"],
        "dtype": lambda r: r["dtype"],
        "pass": lambda r: r["pass"],
        "ms": lambda r: f"{r['median_ms']:.4f}",
        "floor": lambda r: f"{r['share_of_floor']:.0%}",
        "one read": lambda r: f"{r['share_of_one_read']:.0%}",
        "extra": lambda r: f"{r['extra_share_of_input']:.2%}",
        "eager x": against("eager"),
        "compile x": against("compile"),
        "autotune x": against("max-autotune"),
        "attention x": against("attention"),
    }
    if ours:
        print_table(ours, columns, "adjust_pool: share of the copy bandwidth over the floor; rivals in times of ours")
    decode = data.get("decode_heatmaps", [])
    columns = {
        "shape": lambda r: r["shape"],
        "dtype": lambda r: r["dtype"],
        "function": lambda r: r["function"],
        "rival": lambda r: r["rival"],
        "ms": lambda r: f"{r['median_ms']:.4f}",
        "floor": lambda r: f"{r['share_of_floor']:.0%}" if "share_of_floor" in r else "-",
        "of ours": lambda r: f"{r['times_of_ours']:.2f}" if r["times_of_ours"] else "-",
    }
    if decode:
        print_table(decode, columns, "decode_heatmaps")
    for row in data.get("overhead", []) + data.get("launch", []):
        print("  ".join(f"{k}: {v:.2f}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items()))
    for row in data.get("failed", []) + data.get("skipped", []):
        print("not measured:", ", ".join(f"{v}" for v in row.values()))
    for what in data.get("not_reached", []):
        print("not reached in time:", what)
    columns = {
        "goal": lambda r: r["goal"],
        "wanted": lambda r: r["wanted"],
        "measured": lambda r: r["measured"],
        "met": lambda r: {True: "yes", False: "NO", None: "-"}[r["met"]],
    }
    title = "DRY RUN ON A CPU: not one of these figures is a measurement" if data["dry_run"] else "goals"
    print_table(data["goals"], columns, f"{title} (copy bandwidth {data['copy_bandwidth_gb_per_s']:.0f} GB/s)")


def main():
    def extend(parser):
        parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma between")
        parser.add_argument("--dtypes", default="bf16,fp32,fp16", help="the first one for the main section")

    options = parse(__doc__.splitlines()[0], extend=extend)
    sections = options.only.split(",")
    if not set(sections) <= set(SECTIONS):
        raise SystemExit(f"--only: expected some of {', '.join(SECTIONS)}, got {options.only!r}")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import torch
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # a backward pass of compiled code that can be repeated
    torch._dynamo.config.recompile_limit = 256
    torch.backends.cudnn.allow_tf32 = False  # the blur of torch_decode; products in float32 are exact by default
    dtypes = [
        {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[d] for d in options.dtypes.split(",")
    ]

    budget = Budget(options.minutes)
    device = open_device(options)
    results = Results(options, "operators", {"machine": machine(device), "T": T, "minutes": options.minutes})
    cases = DRY_CASES if options.dry_run else CASES
    shapes = DRY_SHAPES if options.dry_run else DECODE_SHAPES
    bandwidth = ceilings(device, results, options.dry_run)

    def pool(case, dtype, names):
        return (f"{case.name} {dtype} {', '.join(names[1:])}",
                lambda: measure_case(device, case, dtype, names, bandwidth, results, options.dry_run))  # fmt: skip

    def decode(shape, dtype, names):
        return (f"decode {shape} {dtype}",
                lambda: measure_decode(device, shape, dtype, names, bandwidth, results, budget,
                                       options.dry_run))  # fmt: skip

    first, others = dtypes[0], dtypes[1:]
    work = {
        "ceilings": [],
        "main": [pool(case, first, ("ours", "eager", "attention")) for case in cases],
        "overhead": [("overhead", lambda: overhead(device, results))],
        "decode": [decode(shape, torch.float32, ("ours", "torch", "peer")) for shape in shapes],
        "compile": [pool(case, first, ("ours", "compile")) for case in cases],
        "dtypes": [pool(case, dtype, ("ours", "eager", "attention", "compile")) for dtype in others for case in cases]
        + [decode(shape, torch.bfloat16, ("ours", "torch", "compile")) for shape in shapes],
        "autotune": [pool(case, first, ("ours", "max-autotune")) for case in cases],
    }
    for section in SECTIONS:
        for label, do in work[section] if section in sections else []:
            if budget.over():
                results.add("not_reached", label)
                continue
            start = time.monotonic()
            try:
                do()
            except Exception as error:  # the other cases are worth having all the same
                results.add("failed", {"case": label, "rival": "", "reason": short(error)})
            torch._dynamo.reset()
            device.free_bytes()
            print(f"{section}: {label} ({time.monotonic() - start:.0f} s)", flush=True)
    results.data["goals"] = goals(results.data)
    results.write()
    print_results(results.data)
    wrong = [r for r in results.data.get("failed", []) if r["rival"] in ("ours", "")]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
