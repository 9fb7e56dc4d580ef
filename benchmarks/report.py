"""Tables in Markdown from pytest-benchmark's JSON: ``python benchmarks/report.py benchmark.json [--write README.md]``.

Also from the ``operators.json`` of benchmarks/gpu/operators.py. ``--write`` replaces what stands between
``<!-- benchmarks -->`` and ``<!-- /benchmarks -->`` in a file.
"""

import argparse
import json
import math
from pathlib import Path

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
TARGET_CASES = ("(256, 64, 128)", "(32, 1024, 128)", "(8, 4096, 128)", "(2, 20000, 512)")


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def adjust_pool_table(rows):
    """Rows are the extra_info of the adjust_pool benchmarks of one device."""
    by = {(r["case"], r["which"], r["rival"]): r for r in rows if "times_of_ours" in r}
    cases = list(dict.fromkeys(case for case, _, _ in by))
    lines = [
        "| bags, instances, features | forward | in reads (`x.amax()`) | forward + backward"
        " | vs eager | vs `torch.compile` | vs attention calls | kept for backward, ours / eager |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def times(case, rival):
        row = by.get((case, "forward+backward", rival))
        return f"{row['times_of_ours']:.1f} ×" if row else "–"

    for case in cases:
        forward, both = by[case, "forward", "amil_fast"], by[case, "forward+backward", "amil_fast"]
        kept = [by[case, "forward", rival]["kept_for_backward_bytes"] / 2**20 for rival in ("amil_fast", "eager")]
        lines.append(
            f"| {case} | {forward['median_ms']:.2f} ms | {forward['times_of_amax']:.2f} | {both['median_ms']:.2f} ms"
            f" | {times(case, 'eager')} | {times(case, 'compile')} | {times(case, 'attention')}"
            f" | {kept[0]:.2f} / {kept[1]:.0f} MiB |"
        )
    present = [case for case in TARGET_CASES if case in cases]
    if present:
        means = [
            geometric_mean([by[case, "forward+backward", rival]["times_of_ours"] for case in present])
            for rival in ("eager", "compile", "attention")
        ]
        reads = geometric_mean([by[case, "forward", "amil_fast"]["times_of_amax"] for case in present])
        lines.append(
            f"| geometric mean of the first {len(present)} | | {reads:.2f} | | {means[0]:.1f} × | {means[1]:.1f} ×"
            f" | {means[2]:.1f} × | |"
        )
    return lines


def overhead_lines(rows):
    return [
        f"Host overhead, (16, 8, 32), {r['which']}: {r['median_us']:.1f} µs a call,"
        f" {r['times_of_softmax_bmm']:.1f} times one `softmax` and one `bmm`."
        for r in rows
        if r["rival"] == "amil_fast" and "times_of_softmax_bmm" in r
    ]


def decode_table(benchmarks):
    """Groups are 'decode_heatmaps FUNCTION SHAPE DEVICE', tests test_amil_fast, test_reference, test_peer."""
    who = {"test_amil_fast": "ours", "test_reference": "torch", "test_peer": "peer"}
    cells = {}
    for b in benchmarks:
        name = b["name"].split("[")[0]
        if (b.get("group") or "").startswith("decode_heatmaps") and name in who:
            cells.setdefault(b["group"].removeprefix("decode_heatmaps "), {})[who[name]] = b
    if not cells:
        return []
    lines = [
        "| refinement, maps | ours | in reads (`h.flatten(2).amax(-1)`) | plain PyTorch, in reads"
        " | peers' NumPy/OpenCV, in reads |",
        "| --- | --- | --- | --- | --- |",
    ]
    for group, row in cells.items():
        if "ours" not in row:
            continue
        reads = {k: f"{v['extra_info']['times_of_amax']:.2f}" for k, v in row.items()}
        lines.append(
            f"| {group} | {row['ours']['stats']['median'] * 1e3:.3f} ms | {reads['ours']} | {reads.get('torch', '–')}"
            f" | {reads.get('peer', '–')} |"
        )
    return lines


def predict_table(rows):
    lines = [
        "| device, precision, threads, batch | images/s | network (twice) | decoder | reading, cropping, the rest |",
        "| --- | --- | --- | --- | --- |",
    ]
    return lines + [
        f"| {r['device']}, {r['precision']}, {r['threads']}, {r['batch']} | {r['images_per_second']:.0f}"
        f" | {r['share_network']:.0%} | {r['share_decoder']:.1%} | {r['share_rest']:.0%} |"
        for r in rows
    ]


def report(results):
    machine = results["machine_info"]
    commit = (results.get("commit_info") or {}).get("id", "unknown")[:10]
    place = f"{machine['gpu']}, " if machine.get("gpu") else ""
    lines = [
        f"Measured on {place}{machine['cpu']}, {machine['torch_threads']} threads, torch {machine['torch']},"
        f" commit {commit}, with `make bench`; medians of interleaved turns.",
        "",
    ]
    extra = [b["extra_info"] for b in results["benchmarks"] if b["extra_info"].get("operator") == "adjust_pool"]
    for device in dict.fromkeys(r["device"] for r in extra):
        rows = [r for r in extra if r["device"] == device]
        lines += [f"`adjust_pool` on {device}, T = 3:", "", *adjust_pool_table(rows), "", *overhead_lines(rows), ""]
    decode = decode_table(results["benchmarks"])
    if decode:
        lines += ["`decode_heatmaps`:", "", *decode, ""]
    predict = [b["extra_info"] for b in results["benchmarks"] if b["extra_info"].get("operator") == "predict"]
    if predict:
        size = predict[0]["size"]
        lines += [f"Photos to joints with the shipped generator ({size} px crops, mirror averaging, DARK):", ""]
        lines += [*predict_table(predict), ""]
    return "\n".join(lines)


def gpu_pool_table(rows, floor):
    """One line per case and dtype; the rows of one pass, and the share of the copy bandwidth over ``floor``."""
    by = {(r["case"], r["dtype"], r["pass"], r["rival"]): r for r in rows}
    lines = [
        "| bags, instances, features | forward | of the floor | backward | of the floor | both | vs eager"
        " | vs `torch.compile` | vs max-autotune | vs attention calls | memory beyond in- and output |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in rows):
        ours = {which: by.get((case, dtype, which, "ours")) for which in ("forward", "backward", "both")}
        cells = []
        for which in ("forward", "backward"):
            row = ours[which]
            cells += [f"{row['median_ms']:.3f} ms", f"{row[floor]:.0%}"] if row else ["–", "–"]
        cells.append(f"{ours['both']['median_ms']:.3f} ms" if ours["both"] else "–")
        for rival in ("eager", "compile", "max-autotune", "attention"):
            row = by.get((case, dtype, "both", rival))
            cells.append(f"{row['times_of_ours']:.1f} ×" if row and row["times_of_ours"] else "–")
        cells.append(f"{ours['both']['extra_share_of_input']:.2%}" if ours["both"] else "–")
        lines.append(f"| {case} {dtype} | {' | '.join(cells)} |")
    return lines


def gpu_decode_table(rows):
    by = {(r["shape"], r["dtype"], r["function"], r["rival"]): r for r in rows}
    lines = [
        "| refinement, maps | ours | of one read | plain PyTorch | `torch.compile` of it"
        " | peers on the CPU, copy included |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for shape, dtype, function in dict.fromkeys((r["shape"], r["dtype"], r["function"]) for r in rows):
        ours = by.get((shape, dtype, function, "ours"))
        if ours is None:
            continue
        others = [
            by.get((shape, dtype, function, rival)) for rival in ("torch", "compile", "peer on the CPU, copy included")
        ]
        cells = [f"{r['times_of_ours']:.1f} ×" if r and r["times_of_ours"] else "–" for r in others]
        lines.append(
            f"| {function} {shape} {dtype} | {ours['median_ms'] * 1e3:.1f} µs | {ours['share_of_floor']:.0%}"
            f" | {' | '.join(cells)} |"
        )
    return lines


def gpu_report(results):
    """The results of benchmarks/gpu/operators.py."""
    machine = results["machine"]
    if results["dry_run"]:
        lines = ["DRY RUN ON A CPU: not one of these figures is a measurement.", ""]
    else:
        lines = [
            f"Measured on {machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}, commit"
            f" {machine['commit']}{' with changes' if machine['modified'] else ''}, with `{results['command']}`;"
            " medians of interleaved turns.",
            "",
        ]
    lines += [f"Copy bandwidth {results['copy_bandwidth_gb_per_s']:.0f} GB/s, read and written bytes counted.", ""]
    rows = results.get("adjust_pool", [])
    if rows:
        lines += [
            "`adjust_pool`, T = 3; floor: F once where a bag fits on chip, else T times (backward T − 1); dF once:"
        ]
        lines += ["", *gpu_pool_table(rows, "share_of_floor"), ""]
    rows = [r for r in results.get("decode_heatmaps", []) if r["rival"] != "amax"]
    if rows:
        lines += ["`decode_heatmaps`:", "", *gpu_decode_table(rows), ""]
    for row in results.get("overhead", []):
        if row["rival"] == "ours":
            lines.append(
                f"Tiny bags (16, 8, 32), {row['pass']}: {row['eager_host_us']:.1f} µs of host time a call,"
                f" {row['in_graph_us']:.1f} µs in a CUDA graph."
            )
    lines += ["", "| goal | wanted | measured | met |", "| --- | --- | --- | --- |"]
    for row in results.get("goals", []):
        met = {True: "yes", False: "no", None: "–"}[row["met"]]
        lines.append(f"| {row['goal']} | {row['wanted']} | {row['measured']} | {met} |")
    missing = results.get("failed", []) + results.get("skipped", [])
    lines += ["", *(f"Not measured: {', '.join(str(v) for v in row.values() if v)}." for row in missing)]
    lines += [f"Not reached in time: {what}." for what in results.get("not_reached", [])]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--write", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    results = json.loads(arguments.json.read_text())
    is_gpu = str(results.get("format", "")).startswith("amil_fast gpu operators")
    text = gpu_report(results) if is_gpu else report(results)
    if arguments.write and results.get("dry_run"):
        parser.error("these are the figures of a dry run; nothing is written")
    print(text)
    if arguments.write:
        old = arguments.write.read_text()
        before, rest = old.split(BEGIN)
        after = rest.split(END)[1]
        arguments.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
