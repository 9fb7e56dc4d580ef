"""Launch configurations of adjust_pool, measured: what the constants in kernels/adjust_pool_config.py should be.

    python benchmarks/gpu/sweep.py --out DIR [--minutes 9] [--dtypes bf16,fp32] [--match TEXT]

For every case and pass: the configuration that ``pick_plan`` chooses, each of its knobs changed alone, the other
strategies that could serve the case, then the gains combined. All compilations are started at once, in processes of
their own; a configuration that spills registers, does not fit or does not compile is recorded as such. Every
configuration's results are compared with those of the current one, in memory that held NaN, before it is timed, and
all of a case are timed in turns.

sweep.json: ``configurations``, one row each; ``best``, per case and pass the best with its margin over the current
choice and over the second best; ``proposals``, per strategy, pass and knob the time of every value in units of the
present one (geometric mean over the cases), from which :class:`Limits` is to be set.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import statistics
import sys

from harness import Budget, Results, in_turns, machine, open_device, parse, print_table, short

T = 3
PADDED = [
    (4096, 64, 128), (32, 4096, 128), (1, 100_000, 512), (4096, 256, 128), (100_000, 8, 32), (256, 1024, 512),
    (1024, 1000, 128), (4096, 16, 64), (1, 100_000, 1024), (8, 1_000_000, 64), (4096, 128, 128),
]  # fmt: skip
DRY_PADDED = [(2, 6, 8), (1, 700, 128)]


def cases(dry_run):
    """(name, cu_seqlens as a tuple or None, B, N, D): N rows per bag, or in all where packed."""
    for B, N, D in DRY_PADDED if dry_run else PADDED:
        yield f"({B}, {N}, {D})", None, B, N, D
    short_bags = [1 + (i * 37) % 128 for i in range(3 if dry_run else 4096)]
    long_bags = [round(200 * 1000 ** (((i * 37) % 64) / 63)) for i in range(1 if dry_run else 64)]
    for name, lengths, D in (("packed 1-128", short_bags, 128), ("packed 200-200000", long_bags, 1024)):
        D = 8 if dry_run else D
        yield f"{name} x {D}", tuple(itertools.accumulate(lengths, initial=0)), len(lengths), sum(lengths), D


# ---- candidates ----


def variations(config, N, backward):
    """Configurations that differ from ``config`` in one knob: (knob, value, configuration)."""
    from amil_fast.kernels.adjust_pool_config import OnChip

    def changed(knob, values):
        for value in values:
            if value != getattr(config, knob):
                yield knob, value, dataclasses.replace(config, **{knob: value})

    if isinstance(config, OnChip):
        yield from changed("num_warps", [w for w in (1, 2, 4, 8, 16) if w <= 4 * config.num_warps])
        yield from changed("bags", [b for b in (1, 2, 4, 8, 16) if b <= 4 * config.bags])
        return
    yield from changed("block_n", [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)
                                   if config.block_n // 4 <= n <= 4 * config.block_n])  # fmt: skip
    yield from changed("num_warps", [4, 8, 16])
    yield from changed("num_stages", [1, 2, 3, 4, 5])
    yield from changed("registers", [80, 128, 168, 255])
    if config.split:
        yield from changed("group", [8, 16, 32, 64])
    rows = [config.chunk_rows * k // 4 for k in (1, 2, 8, 16) if 16 <= config.chunk_rows * k // 4 < N]
    for value in rows:
        yield "chunk_rows", value, dataclasses.replace(config, chunk_rows=value, split=True)
    if config.min_rows >= 0:
        yield from changed("own_bags", [2, 4, 8, 16, 32])


def candidates(packed, B, N, D, itemsize, backward, multiprocessors):
    """name -> plan. First the present choice, then one knob changed, then the other strategies."""
    from amil_fast.kernels.adjust_pool_config import Limits, Plan, pick_plan

    plan = pick_plan(packed, B, N, D, itemsize, backward, multiprocessors)
    found = {"current": plan}
    if plan.on_chip is not None:
        for knob, value, config in variations(plan.on_chip, N, backward):
            found[f"on chip {knob}={value}"] = dataclasses.replace(plan, on_chip=config)
    if plan.chunks is not None:
        for knob, value, config in variations(plan.chunks, N, backward):
            if config.registers * 32 * config.num_warps <= 65536:  # more don't fit on a multiprocessor
                found[f"chunks {knob}={value}"] = dataclasses.replace(plan, chunks=config)
    for name, change in {
        "on chip, twice as large": {"on_chip_forward": 128, "on_chip_backward": 32},
        "nothing on chip": {"on_chip_forward": 0, "on_chip_backward": 0},
        "one program per bag": {"stream_bags_per_multiprocessor": 0, "on_chip_forward": 0, "on_chip_backward": 0},
        "always split": {"stream_bags_per_multiprocessor": 1 << 30, "on_chip_forward": 0, "on_chip_backward": 0},
    }.items():
        limits = dataclasses.replace(Limits(), **change)
        other = pick_plan(packed, B, N, D, itemsize, backward, multiprocessors, limits)
        if other != plan and other not in found.values():
            found[f"strategy: {name}"] = other
    if packed and plan.on_chip is not None and plan.chunks is not None:
        found["strategy: chunks only"] = Plan(None, dataclasses.replace(plan.chunks, min_rows=-1, own_bags=1))
    return found


def combined(plan, times, found):
    """The knobs whose change gained most, applied one after the other: name -> plan."""
    gains = []
    for name, seconds in times.items():
        if "=" in name and seconds < 0.99 * times["current"]:
            part, knob = name.split("=")[0].rsplit(" ", 1)
            gains.append((seconds, "on_chip" if part == "on chip" else "chunks", knob, found[name]))
    plans, done = {}, set()
    for _, part, knob, source in sorted(gains, key=lambda gain: gain[0]):
        if (part, knob) in done:
            continue
        done.add((part, knob))
        change = {knob: getattr(getattr(source, part), knob)}
        if knob == "chunk_rows":
            change["split"] = source.chunks.split
        plan = dataclasses.replace(plan, **{part: dataclasses.replace(getattr(plan, part), **change)})
        if len(done) > 1:
            plans["combined " + ", ".join(f"{k}={getattr(getattr(plan, p), k)}" for p, k in sorted(done))] = plan
    return plans


# ---- compiling, in other processes ----


def compile_plan(packed, B, N, D, dtype, backward, plan, dry_run):
    """Compiles what a plan launches, into Triton's cache; returns registers, spills, shared bytes, or the error."""
    os.environ.pop("TRITON_INTERPRET", None)  # a dry run compiles for sm_90 without a device
    import torch

    from amil_fast.kernels import adjust_pool_launch as launch
    from amil_fast.kernels import aot

    try:
        dtype = getattr(torch, dtype)
        f = torch.empty((N, D) if packed else (B, N, D), dtype=dtype, device="meta")
        cu_seqlens = torch.empty(B + 1, dtype=torch.int32, device="meta") if packed else None
        bags = (f, None, None, cu_seqlens)
        (bag, _w, sigma, lse), launches = launch.forward_launches(*bags, T, False, None if backward else plan)
        if backward:
            _, launches = launch.backward_launches(bag, None, *bags, sigma, lse, False, plan)
        usage = {}
        for one in launches:
            name = one.kernel.fn.__name__
            if dry_run:
                job = aot.Job(name, "", 90, one.kernel.fn.__module__, aot.signature(one), one.options)
                (found,) = aot.compile_job(job)
                if found.error:
                    raise RuntimeError(found.error)
                usage[name] = {"registers": found.registers, "spills": found.spills, "shared": found.shared}
            else:
                usage[name] = warm_up(one)
        return {"kernels": usage, "spills": any(kernel["spills"] for kernel in usage.values())}
    except Exception as error:  # whatever the compiler raises belongs into the table
        return {"error": short(error)}


def warm_up(launch):
    compiled = launch.kernel.warmup(**launch.arguments, **launch.options, grid=(launch.grid,))
    compiled._init_handles()
    return {"registers": compiled.n_regs, "spills": compiled.n_spills, "shared": compiled.metadata.shared}


# ---- measuring ----


class Problem:
    """One case in one dtype: inputs, enough of them to be fresh each time, and what the backward pass starts from."""

    def __init__(self, device, case, dtype):
        import torch

        from amil_fast.kernels import adjust_pool_launch

        self.name, cu_seqlens, self.B, self.N, self.D = case
        self.packed = cu_seqlens is not None
        shape = (self.N, self.D) if self.packed else (self.B, self.N, self.D)
        self.size = math.prod(shape) * dtype.itemsize
        if 5 * self.size > device.free_bytes():
            raise MemoryError(f"5 x {self.size / 1e9:.1f} GB do not fit")
        self.where = (None, None, torch.tensor(cu_seqlens, dtype=torch.int32, device=device.device)
                      if self.packed else None)  # fmt: skip
        self.launch = adjust_pool_launch
        self.inputs = []
        for seed in range(device.copies(self.size)):
            generator = torch.Generator(device.device).manual_seed(seed)
            f = torch.randn(shape, generator=generator, device=device.device, dtype=dtype).mul_(2 / self.D**0.5)
            g = torch.randn(self.B, self.D, generator=generator, device=device.device, dtype=dtype)
            _bag, _w, sigma, lse = self.launch.forward(f, *self.where, T, False)
            self.inputs.append((f, g, sigma, lse))

    def calls(self, backward, plan):
        def forward(f, g, sigma, lse):
            return self.launch.forward(f, *self.where, T, False, plan)[0]

        def back(f, g, sigma, lse):
            return self.launch.backward(g, None, f, *self.where, sigma, lse, False, plan)

        return [functools.partial(back if backward else forward, *pair) for pair in self.inputs]

    def one_read(self, backward):
        """The floor of a bag on chip, in bytes."""
        return self.size * (2 if backward else 1)


def poisoned(call):
    """The result of a call while uninitialized memory holds NaN."""
    import torch

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
                raise ValueError(f"wrong: relative error {error.item():.1e}")
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


# ---- what follows ----


def normalized(plan):
    """(strategy, knob) -> value, in the terms of :class:`Limits`."""
    found = {}
    if plan["on_chip"] is not None:
        c = plan["on_chip"]
        tile = c["bags"] * c["block_n"] * c["block_d"]
        found["on chip", "elements per thread"] = tile // (32 * c["num_warps"])
        found["on chip", "elements per program"] = tile
    if plan["chunks"] is not None:
        c = plan["chunks"]
        strategy = "split" if c["split"] else "stream"
        found[strategy, "elements per thread"] = c["block_n"] * c["block_d"] // (32 * c["num_warps"])
        for knob in ("num_warps", "num_stages", "registers", "chunk_rows", "group", "own_bags"):
            found[strategy, knob] = c[knob]
    return found


def best_rows(configurations):
    """Per case, dtype and pass: the best configuration, its margin over the current one and over the second best."""
    rows = []
    groups = {}
    for row in configurations:
        groups.setdefault((row["case"], row["dtype"], row["pass"]), []).append(row)
    for (case, dtype, which), group in groups.items():
        timed = sorted((r for r in group if "median_us" in r), key=lambda r: r["median_us"])
        current = next((r for r in timed if r["name"] == "current"), None)
        if current is None:
            continue
        best = timed[0]
        noise = max((r["spread_us"][1] - r["spread_us"][0]) / r["median_us"] for r in timed[:2])
        rows.append({
            "case": case, "dtype": dtype, "pass": which, "best": best["name"], "plan": best["plan"],
            "median_us": best["median_us"], "current_us": current["median_us"],
            "gain_over_current": current["median_us"] / best["median_us"] - 1,
            "second": timed[1]["name"] if len(timed) > 1 else None,
            "margin_over_second": timed[1]["median_us"] / best["median_us"] - 1 if len(timed) > 1 else None,
            "spread": noise,  # margins below it are noise
        })  # fmt: skip
    return rows


def proposals(configurations):
    """Per strategy, pass and knob: value -> geometric mean of time over that of the current choice, and on how many."""
    current = {(r["case"], r["dtype"], r["pass"]): r for r in configurations if r["name"] == "current"}
    ratios = {}
    for row in configurations:
        base = current.get((row["case"], row["dtype"], row["pass"]))
        if "median_us" not in row or base is None or "median_us" not in base:
            continue
        ours, theirs = normalized(row["plan"]), normalized(base["plan"])
        changed = [key for key in ours if key in theirs and ours[key] != theirs[key]]
        if row is base:
            changed = list(ours)
        elif row["name"].startswith(("strategy", "combined")):
            continue
        for strategy, knob in changed:
            where = ratios.setdefault((strategy, row["pass"], knob), {})
            where.setdefault(ours[strategy, knob], []).append(row["median_us"] / base["median_us"])
    found = []
    for (strategy, which, knob), values in sorted(ratios.items()):
        means = {v: math.exp(statistics.fmean(map(math.log, r))) for v, r in values.items()}
        found.append({
            "strategy": strategy, "pass": which, "knob": knob, "best": min(means, key=means.get),
            "times_of_current": {str(v): round(means[v], 4) for v in sorted(means)},
            "cases": {str(v): len(values[v]) for v in sorted(means)},
        })  # fmt: skip
    return found


def main():
    def extend(parser):
        parser.add_argument("--dtypes", default="bf16,fp32", help="in the order of importance")
        parser.add_argument("--match", default="", help="only cases whose name contains this text")
        parser.add_argument(
            "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="compilers at a time"
        )

    options = parse(__doc__.splitlines()[0], minutes=9.0, extend=extend)
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    budget = Budget(options.minutes)
    device = open_device(options)
    results = Results(options, "sweep", {"machine": machine(device), "T": T, "minutes": options.minutes})
    chosen = [case for case in cases(options.dry_run) if options.match in case[0]]
    names = options.dtypes.split(",")
    if options.dry_run:
        names, options.workers = names[:1], 2
    work = [(case, dtypes[d], backward) for d in names for case in chosen for backward in (False, True)]

    # "spawn": a CUDA context does not survive a fork, and a worker of a dry run must not have seen the interpreter
    with concurrent.futures.ProcessPoolExecutor(
        options.workers, mp_context=multiprocessing.get_context("spawn")
    ) as pool:

        def submit(case, dtype, backward, plans):
            _, cu_seqlens, B, N, D = case
            text = str(dtype).removeprefix("torch.")
            arguments = (cu_seqlens is not None, B, N, D, text, backward)
            return {name: pool.submit(compile_plan, *arguments, plan, options.dry_run) for name, plan in plans.items()}

        def take(problem, case, dtype, backward, plans, futures):
            """Waits for the compilers, measures, records; returns name -> seconds."""
            usable, compiled = {}, {}
            for name, plan in plans.items():
                compiled[name] = futures[name].result(timeout=max(1, budget.left())) if name in futures else {}
                if "error" not in compiled[name]:
                    usable[name] = plan
            rows = measure(device, problem, backward, usable, 2e-2 if dtype.itemsize == 2 else 1e-5)
            for name, plan in plans.items():
                row = {
                    "case": case[0],
                    "dtype": str(dtype).removeprefix("torch."),
                    "pass": "backward" if backward else "forward",
                    "name": name,
                    "plan": dataclasses.asdict(plan),
                    **compiled[name],
                    **rows.get(name, {}),
                }
                if "median_us" in row:
                    row["one_read_gb_per_s"] = problem.one_read(backward) / row["median_us"] * 1e-3
                results.data.setdefault("configurations", []).append(row)
            results.write()
            return {name: row["median_us"] for name, row in rows.items() if "median_us" in row}

        queue = []
        for case, dtype, backward in work:
            _, cu_seqlens, B, N, D = case
            plans = candidates(
                cu_seqlens is not None, B, N, D, dtype.itemsize, backward, getattr(device, "multiprocessors", 132)
            )
            if options.dry_run:
                keep = [*list(plans)[:4], *(name for name in plans if name.startswith("strategy"))]
                plans = {name: plans[name] for name in keep}
            queue.append([case, dtype, backward, plans, None])
        for item in queue:
            if not options.dry_run or not item[2]:  # half of them are enough to see that it works
                item[4] = submit(*item[:4])
        problem = None
        for case, dtype, backward, plans, futures in queue:
            label = f"{case[0]} {str(dtype).removeprefix('torch.')} {'backward' if backward else 'forward'}"
            if budget.over():
                results.add("not_reached", label)
                continue
            try:
                if problem is None or problem.key != (case[0], dtype):
                    problem = None
                    device.free_bytes()
                    problem = Problem(device, case, dtype)
                    problem.key = (case[0], dtype)
                times = take(problem, case, dtype, backward, plans, futures or {})
                more = combined(plans["current"], times, plans) if "current" in times else {}
                if more and not budget.over():
                    more = {"current": plans["current"], **more}
                    fresh = {name: plan for name, plan in more.items() if name != "current"}
                    waiting = {} if options.dry_run else submit(case, dtype, backward, fresh)
                    rows = len(results.data["configurations"])
                    take(problem, case, dtype, backward, more, waiting)
                    del results.data["configurations"][rows]  # the current one, timed again only to compare with
                print(f"{label}: {len(plans) + max(0, len(more) - 1)} configurations", flush=True)
            except Exception as error:  # the other cases are worth having all the same
                results.add("failed", {"case": label, "reason": short(error)})
                print(f"{label}: {short(error)}", flush=True)
        for item in queue:
            for future in (item[4] or {}).values():
                future.cancel()

    configurations = results.data.get("configurations", [])
    results.data["best"] = best_rows(configurations)
    results.data["proposals"] = proposals(configurations)
    results.write()
    bad = [r for r in configurations if r.get("error") or r.get("spills")]
    columns = {
        "case": lambda r: r["case"],
        "dtype": lambda r: r["dtype"],
        "pass": lambda r: r["pass"],
        "what": lambda r: r["name"],
        "why": lambda r: "spills registers" if r.get("spills") else r["error"][:60],
    }
    if bad:
        print_table(bad[:40], columns, f"{len(bad)} configurations that spill, fail or are wrong")
    columns = {
        "strategy": lambda r: r["strategy"],
        "pass": lambda r: r["pass"],
        "knob": lambda r: r["knob"],
        "time of each value / time now": lambda r: "  ".join(f"{v}: {t:.3f}" for v, t in r["times_of_current"].items()),
    }
    print_table(results.data["proposals"], columns, "knobs")
    columns = {
        "case": lambda r: r["case"],
        "dtype": lambda r: r["dtype"],
        "pass": lambda r: r["pass"],
        "us": lambda r: f"{r['median_us']:.1f}",
        "gain": lambda r: f"{r['gain_over_current']:.1%}",
        "over 2nd": lambda r: "-" if r["margin_over_second"] is None else f"{r['margin_over_second']:.1%}",
        "spread": lambda r: f"{r['spread']:.1%}",
        "best": lambda r: r["best"],
    }
    title = "DRY RUN ON A CPU: not one of these figures is a measurement" if options.dry_run else "best configurations"
    print_table(results.data["best"], columns, title)
    for what in results.data.get("not_reached", []):
        print("not reached in time:", what)
    return 0


if __name__ == "__main__":
    sys.exit(main())
