"""adjust_pool on a GPU: cases, verification and timing beside its rivals.

Rivals: the reference with autograd ("eager"), torch.compile of it, the same with max-autotune (without CUDA graphs of
its own: everything is captured here), and T calls of scaled_dot_product_attention.

Minimum bytes moved, with F the instances and dF their gradient:

    forward     F once for bags that fit on chip, else T times
    backward    F once, or T - 1 times; dF once
"""

import functools
import itertools
import math
import statistics
from dataclasses import dataclass

import torch
from ceilings import launch_overhead
from harness import dtype_name, in_turns, reason

import amil_fast
from benchmarks.rivals import NUM_ITERS, attention_pool, eager_pool
from benchmarks.timing import ratio

ON_CHIP_BYTES = 228 * 1024  # shared memory of a multiprocessor, about the size of its registers (H100, H200)
PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class PoolCase:
    """Bags to pool: B bags of N instances with D features, or packed bags of the given lengths."""

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

    def min_bytes(self, which, itemsize, single_pass=False):
        """Minimum bytes moved (see the module docstring); ``single_pass``: as if every bag fit on chip."""
        total = 0
        for m in self.lengths or (self.N,) * self.B:
            size = m * self.D * itemsize
            fits = size <= ON_CHIP_BYTES or single_pass
            forward = size * (1 if fits else NUM_ITERS)
            backward = size * (1 if fits else NUM_ITERS - 1) + size
            total += {"forward": forward, "backward": backward, "both": forward + backward}[which]
        return total


def ragged(low, high, bags, D):
    """Packed bags with log-uniformly spaced lengths, long and short ones interleaved."""
    lengths = [round(low * (high / low) ** (i / (bags - 1))) for i in range(bags)]
    return PoolCase(bags, 0, D, tuple(lengths[(i * 37) % bags] for i in range(bags)))


CASES = (
    PoolCase(4096, 64, 128),
    PoolCase(32, 4096, 128),
    PoolCase(1, 100_000, 512),
    PoolCase(4096, 256, 128),
    ragged(200, 200_000, 64, 1024),
    PoolCase(256, 1024, 512),
    PoolCase(1, 100_000, 1024),
    PoolCase(8, 1_000_000, 64),
    PoolCase(32, 1024, 128),
    PoolCase(2, 20_000, 512),
    ragged(200, 20_000, 64, 512),
    *(PoolCase(64, 20_000, D) for D in (200, 256, 384, 768)),
)
DRY_CASES = (PoolCase(3, 6, 8), ragged(1, 40, 3, 5))


def make_inputs(case, dtype, device, seed):
    """Random ``(x, upstream gradient)``."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (sum(case.lengths), case.D) if case.lengths else (case.B, case.N, case.D)
    x = torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(2 / case.D**0.5)
    return x, torch.randn(case.B, case.D, generator=generator, device=device, dtype=dtype)


def make_rivals(case, device, names, dry_run):
    """Rivals: name -> function of the instances."""
    cu_seqlens = None
    if case.lengths:
        cu_seqlens = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32, device=device)

    eager = functools.partial(eager_pool, cu_seqlens=cu_seqlens)
    backend = {"backend": "aot_eager"} if dry_run else {}
    rivals = {
        "ours": lambda x: amil_fast.adjust_pool(x, cu_seqlens=cu_seqlens, num_iters=NUM_ITERS, backend="triton"),
        "eager": eager,
        "attention": attention_pool,
        "compile": torch.compile(eager, dynamic=False, **backend),
        "max-autotune": torch.compile(
            eager, dynamic=False, **(backend or {"mode": "max-autotune-no-cudagraphs"})
        ),
    }  # fmt: skip
    if case.lengths:
        del rivals["attention"]  # no packed form for this number of features
    return {name: rivals[name] for name in names if name in rivals}


def make_passes(function, x, upstream):
    """Pass -> call that returns its tensors; "forget" releases the graph recorded for the backward pass."""
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
    """Yields slices of whole bags: ``(first row, last row, first bag, last bag)``, rows of the flattened instances."""
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
    """Relative errors of ``results``, name -> ``(bag, gradient)``, and of eager in that dtype ("plain"), to float64.

    Slice by slice, since float64 autograd of a whole case does not fit. Returns name -> (error of bag, of gradient).
    """

    def reference(first, last, a, b, dtype):
        f = x.view(-1, case.D)[first:last].view(b - a, -1, case.D).to(dtype).requires_grad_()
        bag = eager_pool(f)
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


def accurate(name, error, plain, dtype):
    """Ours: at most 3 times the error of eager in the same dtype. Rivals: within a loose bound."""
    eps = torch.finfo(dtype).eps
    return all(e <= (3 * p + 8 * eps if name == "ours" else 4 * eps**0.5) for e, p in zip(error, plain, strict=True))


def measure_case(device, case, dtype, names, bandwidth, results, dry_run):
    """Verifies all rivals of a case, then times them in turns, pass by pass. Adds rows to ``results``."""
    label = f"{case.name} {dtype_name(dtype)}"
    size = case.elements * dtype.itemsize
    free = device.free_bytes()
    if 4 * size > free:
        results.add("skipped", {"case": label, "reason": f"4 x {size / 1e9:.1f} GB exceed {free / 1e9:.0f} GB"})
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
            if not accurate(name, found[name], found["plain"], dtype):
                raise ValueError(f"relative errors of bag and gradient: {found[name]}; eager: {found['plain']}")
            extra = {which: device.peak(calls[0][which]) for which in PASSES}
            calls[0]["forget"]()
        except Exception as error:  # recorded; the other rivals are still measured
            results.add("failed", {"case": label, "rival": name, "pass": "all", "reason": reason(error)})
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
                results.add("failed", {"case": label, "rival": name, "pass": which, "reason": reason(error)})
                device.free_bytes()
        turns = in_turns(device, works)
        for name in works:
            if name == "copy":
                continue
            seconds = statistics.median(turns[name])
            minimum, single_pass = (case.min_bytes(which, dtype.itemsize, single) for single in (False, True))
            results.add("adjust_pool", {
                "case": case.name,
                "dtype": dtype_name(dtype),
                "pass": which,
                "rival": name,
                "median_ms": seconds * 1e3,
                "spread_ms": [min(turns[name]) * 1e3, max(turns[name]) * 1e3],
                "prepared": works[name].how,
                "copies": works[name].count,
                "times_of_ours": ratio(turns, name, "ours") if "ours" in works else None,
                "min_bytes": minimum,
                "single_pass_bytes": single_pass,
                "gb_per_s": minimum / seconds / 1e9,
                "share_of_roofline": minimum / seconds / bandwidth,
                "share_of_single_pass": single_pass / seconds / bandwidth,
                "share_of_copy_in_turns": minimum / (2 * size) * ratio(turns, "copy", name),
                "relative_error": checked[name][0],
                "extra_bytes": checked[name][1][which],
                "extra_share_of_input": checked[name][1][which] / size,
            })  # fmt: skip
        del works
        for call in itertools.chain(*passes.values()):
            call["forget"]()


def overhead(device, results):
    """Overhead of a call on tiny bags (16, 8, 32), compared with one softmax and one bmm, and with eager."""
    weights = torch.randn(16, 1, 8, device=device.device)
    x = torch.randn(16, 8, 32, device=device.device)
    functions = {
        "ours": (lambda x: amil_fast.adjust_pool(x, backend="triton"), torch.randn_like(x[:, 0])),
        "softmax + bmm": (lambda x: torch.bmm(torch.softmax(weights, -1), x), torch.randn_like(x[:, :1])),
        "eager": (eager_pool, torch.randn_like(x[:, 0])),
    }
    for name, (function, upstream) in functions.items():
        passes = make_passes(function, x, upstream)
        for which in ("forward", "both"):
            results.add("overhead", {"rival": name, "pass": which, **launch_overhead(device, passes[which])})
