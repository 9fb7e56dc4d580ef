"""Summary of a sweep: best configurations, effect of each parameter, tables."""

import statistics

from harness import print_table


def normalized(plan):
    """(strategy, parameter) -> value, in the terms of ``PlanLimits``."""
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
        for parameter in ("num_warps", "num_stages", "registers", "chunk_rows", "group"):
            found[strategy, parameter] = c[parameter]
    return found


def best_rows(configurations):
    """Per case, dtype and pass: the best configuration and its margins over the current one and the second best."""
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
            "spread": noise,  # margins below it are run-to-run noise
        })  # fmt: skip
    return rows


def proposals(configurations):
    """Per strategy, pass and parameter: geometric mean of the time relative to the current choice, for each value."""
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
        for strategy, parameter in changed:
            where = ratios.setdefault((strategy, row["pass"], parameter), {})
            where.setdefault(ours[strategy, parameter], []).append(row["median_us"] / base["median_us"])
    found = []
    for (strategy, which, parameter), values in sorted(ratios.items()):
        means = {v: statistics.geometric_mean(r) for v, r in values.items()}
        found.append({
            "strategy": strategy, "pass": which, "parameter": parameter, "best": min(means, key=means.get),
            "times_of_current": {str(v): round(means[v], 4) for v in sorted(means)},
            "cases": {str(v): len(values[v]) for v in sorted(means)},
        })  # fmt: skip
    return found


def summarize(results, dry_run):
    """Adds ``best`` and ``proposals`` to the results and prints the tables."""
    configurations = results.data.get("configurations", [])
    results.data["best"] = best_rows(configurations)
    results.data["proposals"] = proposals(configurations)
    results.write()
    bad = [r for r in configurations if r.get("error") or r.get("spills")]
    columns = {
        "case": lambda r: r["case"],
        "dtype": lambda r: r["dtype"],
        "pass": lambda r: r["pass"],
        "configuration": lambda r: r["name"],
        "reason": lambda r: "spills registers" if r.get("spills") else r["error"][:60],
    }
    if bad:
        print_table(bad[:40], columns, f"{len(bad)} configurations that spill, fail or are incorrect")
    columns = {
        "strategy": lambda r: r["strategy"],
        "pass": lambda r: r["pass"],
        "parameter": lambda r: r["parameter"],
        "time relative to the current value": lambda r: "  ".join(
            f"{v}: {t:.3f}" for v, t in r["times_of_current"].items()
        ),
    }
    print_table(results.data["proposals"], columns, "parameters")
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
    title = "DRY RUN ON A CPU: the figures are not measurements" if dry_run else "best configurations"
    print_table(results.data["best"], columns, title)
    for what in results.data.get("not_reached", []):
        print("not reached within the time limit:", what)
