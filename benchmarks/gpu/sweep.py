"""Sweep over launch configurations of adjust_pool, to set the constants in kernels/adjust_pool_config.py.

    python benchmarks/gpu/sweep.py --out DIR [--minutes 9] [--dtypes bf16,fp32] [--match TEXT]

For every case and pass: the configuration that ``pick_plan`` chooses, each of its parameters changed alone, the other
strategies that can serve the case, then the best changes combined. All compilations are started at once in worker
processes; configurations that spill registers, do not fit or do not compile are recorded as such. The results of every
configuration are compared with those of the current one, in memory filled with NaN, before it is timed; all
configurations of a case are timed in turns.

sweep.json: ``configurations``, one row each; ``best``, per case and pass the best configuration with its margins over
the current choice and the second best; ``proposals``, per strategy, pass and parameter the time of every value relative
to the current one (geometric mean over the cases), from which ``PlanLimits`` is to be set.
"""

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import sys

import torch
from harness import Budget, Results, dtype_name, machine, open_device, parse, short
from sweep_candidates import candidates, combined
from sweep_compile import NUM_ITERS, compile_plan
from sweep_summary import summarize

PADDED = [
    (4096, 64, 128), (32, 4096, 128), (1, 100_000, 512), (4096, 256, 128), (100_000, 8, 32), (256, 1024, 512),
    (1024, 1000, 128), (4096, 16, 64), (1, 100_000, 1024), (8, 1_000_000, 64), (4096, 128, 128),
]  # fmt: skip
DRY_PADDED = [(2, 6, 8), (1, 700, 128)]


def cases(dry_run):
    """Yields (name, cu_seqlens as a tuple or None, B, N, D): N rows per bag, or in total for packed bags."""
    for B, N, D in DRY_PADDED if dry_run else PADDED:
        yield f"({B}, {N}, {D})", None, B, N, D
    short_bags = [1 + (i * 37) % 128 for i in range(3 if dry_run else 4096)]
    long_bags = [round(200 * 1000 ** (((i * 37) % 64) / 63)) for i in range(1 if dry_run else 64)]
    for name, lengths, D in (("packed 1-128", short_bags, 128), ("packed 200-200000", long_bags, 1024)):
        D = 8 if dry_run else D
        yield f"{name} x {D}", tuple(itertools.accumulate(lengths, initial=0)), len(lengths), sum(lengths), D


def main():
    def extend(parser):
        parser.add_argument("--dtypes", default="bf16,fp32", help="comma-separated, by priority")
        parser.add_argument("--match", default="", help="only cases whose name contains this text")
        parser.add_argument(
            "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="concurrent compilations"
        )

    options = parse(__doc__.splitlines()[0], minutes=9.0, extend=extend)
    # Not at module level: workers import this module, and must not import Triton in interpreter mode.
    from sweep_measure import SweepProblem, measure

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    budget = Budget(options.minutes)
    device = open_device(options)
    results = Results(options, "sweep", {"machine": machine(device), "T": NUM_ITERS, "minutes": options.minutes})
    chosen = [case for case in cases(options.dry_run) if options.match in case[0]]
    names = options.dtypes.split(",")
    if options.dry_run:
        names, options.workers = names[:1], 2
    work = [(case, dtypes[d], backward) for d in names for case in chosen for backward in (False, True)]

    # "spawn": a CUDA context does not survive a fork, and workers of a dry run must not inherit interpreter mode.
    with concurrent.futures.ProcessPoolExecutor(
        options.workers, mp_context=multiprocessing.get_context("spawn")
    ) as pool:

        def submit(case, dtype, backward, plans):
            _, cu_seqlens, B, N, D = case
            arguments = (cu_seqlens is not None, B, N, D, dtype_name(dtype), backward)
            return {name: pool.submit(compile_plan, *arguments, plan, options.dry_run) for name, plan in plans.items()}

        def evaluate(problem, case, dtype, backward, plans, futures):
            """Waits for the compilations, measures and records; returns name -> microseconds."""
            usable, compiled = {}, {}
            for name, plan in plans.items():
                compiled[name] = futures[name].result(timeout=max(1, budget.left())) if name in futures else {}
                if "error" not in compiled[name]:
                    usable[name] = plan
            rows = measure(device, problem, backward, usable, 2e-2 if dtype.itemsize == 2 else 1e-5)
            for name, plan in plans.items():
                row = {
                    "case": case[0],
                    "dtype": dtype_name(dtype),
                    "pass": "backward" if backward else "forward",
                    "name": name,
                    "plan": dataclasses.asdict(plan),
                    **compiled[name],
                    **rows.get(name, {}),
                }
                if "median_us" in row:
                    row["single_pass_gb_per_s"] = problem.single_pass_bytes(backward) / row["median_us"] * 1e-3
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
            if not options.dry_run or not item[2]:  # forward only, to save time
                item[4] = submit(*item[:4])
        problem = None
        for case, dtype, backward, plans, futures in queue:
            label = f"{case[0]} {dtype_name(dtype)} {'backward' if backward else 'forward'}"
            if budget.over():
                results.add("not_reached", label)
                continue
            try:
                if problem is None or problem.key != (case[0], dtype):
                    problem = None
                    device.free_bytes()
                    problem = SweepProblem(device, case, dtype)
                    problem.key = (case[0], dtype)
                times = evaluate(problem, case, dtype, backward, plans, futures or {})
                more = combined(plans["current"], times, plans) if "current" in times else {}
                if more and not budget.over():
                    more = {"current": plans["current"], **more}
                    fresh = {name: plan for name, plan in more.items() if name != "current"}
                    waiting = {} if options.dry_run else submit(case, dtype, backward, fresh)
                    rows = len(results.data["configurations"])
                    evaluate(problem, case, dtype, backward, more, waiting)
                    del results.data["configurations"][rows]  # the current plan, timed again for comparison only
                print(f"{label}: {len(plans) + max(0, len(more) - 1)} configurations", flush=True)
            except Exception as error:  # recorded; the other cases are still measured
                results.add("failed", {"case": label, "reason": short(error)})
                print(f"{label}: {short(error)}", flush=True)
        for item in queue:
            for future in (item[4] or {}).values():
                future.cancel()

    summarize(results, options.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
