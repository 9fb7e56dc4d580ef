"""Both operators as a share of the machine's copy bandwidth, beside their rivals; results are verified before timing.

    python benchmarks/gpu/operators.py --out DIR [--minutes 8] [--only SECTION,...] [--dtypes bf16,...]

Sections by priority: ceilings, main (ours, eager and attention in the first dtype), overhead, decode, compile, dtypes,
autotune. Items not reached within the time limit are listed at the end. Rivals and minimum bytes moved are described in
adjust_pool_suite.py and decode_suite.py.
"""

import sys
import time

import adjust_pool_suite
import decode_suite
import torch
import torch._functorch.config
from adjust_pool_suite import measure_case, overhead
from ceilings import ceilings
from decode_suite import measure_decode
from goals import goals, print_results
from harness import Budget, Results, machine, open_device, parse, short

from benchmarks.rivals import NUM_ITERS

SECTIONS = ("ceilings", "main", "overhead", "decode", "compile", "dtypes", "autotune")


def main():
    def extend(parser):
        parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
        parser.add_argument(
            "--dtypes", default="bf16,fp32,fp16", help="comma-separated; the first is that of section main"
        )

    options = parse(__doc__.splitlines()[0], extend=extend)
    sections = options.only.split(",")
    if not set(sections) <= set(SECTIONS):
        raise SystemExit(f"--only: expected a subset of {', '.join(SECTIONS)}, got {options.only!r}")
    torch._functorch.config.donated_buffer = False  # allows repeated backward passes of compiled code
    torch._dynamo.config.recompile_limit = 256
    torch.backends.cudnn.allow_tf32 = False  # the blur of torch_decode in full float32
    dtypes = [
        {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[d] for d in options.dtypes.split(",")
    ]

    budget = Budget(options.minutes)
    device = open_device(options)
    results = Results(options, "operators", {"machine": machine(device), "T": NUM_ITERS, "minutes": options.minutes})
    cases = adjust_pool_suite.DRY_CASES if options.dry_run else adjust_pool_suite.CASES
    shapes = decode_suite.DRY_SHAPES if options.dry_run else decode_suite.SHAPES
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
            except Exception as error:  # recorded; the other cases are still measured
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
