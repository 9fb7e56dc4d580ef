"""Targets of the GPU kernels, compared with the results of operators.py, and the tables that it prints."""

import statistics

from decode_suite import SHAPES
from harness import print_table


def goals(data):
    """Rows (goal, target, measured, met); ``met`` is None for goals without a measurement."""
    rows = []

    def add(goal, target, measured, met, form):
        if data["dry_run"]:
            measured = None
        text = form.format(measured) if measured is not None else "not measured"
        rows.append(
            {"goal": goal, "target": target, "measured": text, "met": None if measured is None else met(measured)}
        )

    pool = {(r["case"], r["dtype"], r["pass"], r["rival"]): r for r in data.get("adjust_pool", [])}

    def share(case, which, key):
        row = pool.get((case, "bfloat16", which, "ours"))
        return row and row[key]

    for case in ("(4096, 64, 128)", "(4096, 256, 128)"):
        for which, least in (("forward", 0.85), ("backward", 0.80)):
            value = share(case, which, "share_of_single_pass")
            add(f"{case} on chip, {which}", f">= {least:.0%}", value, lambda v, least=least: v >= least, "{:.1%}")
    for which in ("forward", "backward"):
        value = share("(32, 4096, 128)", which, "share_of_single_pass")
        add(f"(32, 4096, 128) {which}, one pass over the input", ">= 70%", value, lambda v: v >= 0.7, "{:.1%}")
    value = share("(1, 100000, 512)", "forward", "share_of_roofline")
    add("(1, 100000, 512) forward, T passes over the input", ">= 85%", value, lambda v: v >= 0.85, "{:.1%}")
    shares = [
        r["share_of_roofline"]
        for r in data.get("decode_heatmaps", [])
        if r["rival"] == "ours" and r["shape"] == str(SHAPES[0]) and r["dtype"] == "float32"
    ]
    add("decode (1024, 17, 96, 72), worst", ">= 80%", min(shares, default=None), lambda v: v >= 0.8, "{:.1%}")
    for rival, least in (("eager", 15), ("compile", 4), ("attention", 3)):
        times = [r["times_of_ours"] for r in pool.values()
                 if r["rival"] == rival and r["pass"] == "both" and r["times_of_ours"]]  # fmt: skip
        mean = statistics.geometric_mean(times) if times else None
        add(f"forward + backward against {rival}, {len(times)} cases", f">= {least} x", mean,
            lambda v, least=least: v >= least, "{:.1f} x")  # fmt: skip
    tiny = {(r["rival"], r["pass"]): r for r in data.get("overhead", [])}
    for which in ("forward", "both"):
        row = tiny.get(("ours", which), {})
        add(f"(16, 8, 32) {which}, host time", "<= 30 us", row.get("eager_host_us"), lambda v: v <= 30, "{:.1f} us")
        add(f"(16, 8, 32) {which}, in a CUDA graph", "<= 5 us", row.get("in_graph_us"), lambda v: v <= 5, "{:.1f} us")
    extra = [r["extra_share_of_input"] for r in pool.values() if r["rival"] == "ours"]
    add("memory besides inputs and outputs, worst", "<= 1%", max(extra, default=None), lambda v: v <= 0.01, "{:.2%}")
    return rows


def print_results(data):
    """Prints the tables of all results."""
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
        "roofline": lambda r: f"{r['share_of_roofline']:.0%}",
        "one pass": lambda r: f"{r['share_of_single_pass']:.0%}",
        "extra": lambda r: f"{r['extra_share_of_input']:.2%}",
        "eager x": against("eager"),
        "compile x": against("compile"),
        "autotune x": against("max-autotune"),
        "attention x": against("attention"),
    }
    if ours:
        print_table(ours, columns, "adjust_pool: share of the copy-bandwidth roofline; rivals relative to ours")
    decode = data.get("decode_heatmaps", [])
    columns = {
        "shape": lambda r: r["shape"],
        "dtype": lambda r: r["dtype"],
        "function": lambda r: r["function"],
        "rival": lambda r: r["rival"],
        "ms": lambda r: f"{r['median_ms']:.4f}",
        "roofline": lambda r: f"{r['share_of_roofline']:.0%}" if "share_of_roofline" in r else "-",
        "x ours": lambda r: f"{r['times_of_ours']:.2f}" if r["times_of_ours"] else "-",
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
        "target": lambda r: r["target"],
        "measured": lambda r: r["measured"],
        "met": lambda r: {True: "yes", False: "NO", None: "-"}[r["met"]],
    }
    title = "DRY RUN ON A CPU: the figures are not measurements" if data["dry_run"] else "goals"
    print_table(data["goals"], columns, f"{title} (copy bandwidth {data['copy_bandwidth_gb_per_s']:.0f} GB/s)")
