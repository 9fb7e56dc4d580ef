"""Markdown tables from benchmark results.

    python benchmarks/report.py RESULTS.json ... [--write docs/benchmarks.md]

Reads the JSON of pytest-benchmark and the ``operators.json`` of benchmarks/gpu/operators.py. ``--write`` replaces the
text between ``<!-- benchmarks -->`` and ``<!-- /benchmarks -->`` in a file.
"""

import argparse
import statistics
from pathlib import Path

from amil_fast.utils.files import read_json, write_text

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
TARGET_CASES = ("(256, 64, 128)", "(32, 1024, 128)", "(8, 4096, 128)", "(2, 20000, 512)")


def adjust_pool_table(rows):
    """Table of one device; ``rows``: extra_info of the adjust_pool benchmarks."""
    by = {(r["case"], r["which"], r["rival"]): r for r in rows if "times_of_ours" in r}
    cases = list(dict.fromkeys(case for case, _, _ in by))
    lines = [
        "| bags, instances, features | forward | × the time of one pass over the input | forward + backward"
        " | speedup over eager | over `torch.compile` | over attention calls | saved activations, ours / eager |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def times(case, rival):
        row = by.get((case, "forward+backward", rival))
        return f"{row['times_of_ours']:.1f} ×" if row else "–"

    for case in cases:
        forward, both = by[case, "forward", "amil_fast"], by[case, "forward+backward", "amil_fast"]
        saved = [by[case, "forward", rival]["saved_activation_bytes"] / 2**20 for rival in ("amil_fast", "eager")]
        lines.append(
            f"| {case} | {forward['median_ms']:.2f} ms | {forward['times_of_amax']:.2f} | {both['median_ms']:.2f} ms"
            f" | {times(case, 'eager')} | {times(case, 'compile')} | {times(case, 'attention')}"
            f" | {saved[0]:.2f} / {saved[1]:.0f} MiB |"
        )
    present = [case for case in TARGET_CASES if case in cases]
    if present:
        means = [
            statistics.geometric_mean([by[case, "forward+backward", rival]["times_of_ours"] for case in present])
            for rival in ("eager", "compile", "attention")
        ]
        passes = statistics.geometric_mean([by[case, "forward", "amil_fast"]["times_of_amax"] for case in present])
        lines.append(
            f"| geometric mean of the first {len(present)} | | {passes:.2f} | | {means[0]:.1f} × | {means[1]:.1f} ×"
            f" | {means[2]:.1f} × | |"
        )
    return lines


def overhead_lines(rows):
    return [
        f"Launch overhead, (16, 8, 32), {r['which']}: {r['median_us']:.1f} µs per call,"
        f" {r['times_of_softmax_bmm']:.1f} × that of one `softmax` and one `bmm`."
        for r in rows
        if r["rival"] == "amil_fast" and "times_of_softmax_bmm" in r
    ]


def decode_table(benchmarks):
    """Table of the groups 'decode_heatmaps FUNCTION SHAPE DEVICE', tests test_amil_fast, test_reference, test_peer."""
    who = {"test_amil_fast": "ours", "test_reference": "torch", "test_peer": "peer"}
    cells = {}
    for b in benchmarks:
        name = b["name"].split("[")[0]
        if (b.get("group") or "").startswith("decode_heatmaps") and name in who:
            cells.setdefault(b["group"].removeprefix("decode_heatmaps "), {})[who[name]] = b
    if not cells:
        return []
    lines = [
        "| refinement, maps (B, K, H, W), device | ours | ours, × the time of one pass over the maps"
        " | PyTorch reference, × one pass | pose projects' NumPy/OpenCV, × one pass |",
        "| --- | --- | --- | --- | --- |",
    ]
    for group, row in cells.items():
        if "ours" not in row:
            continue
        passes = {k: f"{v['extra_info']['times_of_amax']:.2f}" for k, v in row.items()}
        lines.append(
            f"| {group} | {row['ours']['stats']['median'] * 1e3:.3f} ms | {passes['ours']} | {passes.get('torch', '–')}"
            f" | {passes.get('peer', '–')} |"
        )
    return lines


def predict_table(rows):
    lines = [
        "| device, precision, threads, batch size | images/s | network | decoding | reading, cropping, rest |",
        "| --- | --- | --- | --- | --- |",
    ]
    return lines + [
        f"| {r['device']}, {r['precision']}, {r['threads']}, {r['batch']} | {r['images_per_second']:.0f}"
        f" | {r['share_network']:.0%} | {r['share_decoder']:.1%} | {r['share_rest']:.0%} |"
        for r in rows
    ]


def cpu_report(results):
    """Tables of a pytest-benchmark JSON."""
    machine = results["machine_info"]
    commit = (results.get("commit_info") or {}).get("id", "unknown")[:10]
    place = f"{machine['gpu']}, " if machine.get("gpu") else ""
    lines = [
        f"Measured on {place}{machine['cpu']}, {machine['torch_threads']} threads, torch {machine['torch']},"
        f" commit {commit}.",
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
        size, flip_test = predict[0]["size"], "flip test" if predict[0]["flip_test"] else "no flip test"
        lines += [f"Image files to joints with the shipped generator ({size} px crops, {flip_test}, DARK):", ""]
        lines += [*predict_table(predict), ""]
    return "\n".join(lines)


def gpu_pool_table(rows):
    """One line per case and dtype, with the share of the roofline: minimum bytes moved at the copy bandwidth."""
    by = {(r["case"], r["dtype"], r["pass"], r["rival"]): r for r in rows}
    lines = [
        "| bags, instances, features | forward | of the roofline | backward | of the roofline | both"
        " | speedup over eager | over `torch.compile` | over max-autotune | over attention calls"
        " | memory besides inputs and outputs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in rows):
        ours = {which: by.get((case, dtype, which, "ours")) for which in ("forward", "backward", "both")}
        cells = []
        for which in ("forward", "backward"):
            row = ours[which]
            cells += [f"{row['median_ms']:.3f} ms", f"{row['share_of_roofline']:.0%}"] if row else ["–", "–"]
        cells.append(f"{ours['both']['median_ms']:.3f} ms" if ours["both"] else "–")
        for rival in ("eager", "compile", "max-autotune", "attention"):
            row = by.get((case, dtype, "both", rival))
            cells.append(f"{row['times_of_ours']:.1f} ×" if row and row["times_of_ours"] else "–")
        cells.append(f"{ours['both']['extra_share_of_input']:.2%}" if ours["both"] else "–")
        lines.append(f"| {case} {dtype} | {' | '.join(cells)} |")
    return lines


def gpu_decode_table(rows):
    """One line per shape, dtype and case."""
    by = {(r["shape"], r["dtype"], r["function"], r["rival"]): r for r in rows}
    lines = [
        "| refinement, maps (B, K, H, W) | ours | of the roofline | speedup over vectorized PyTorch"
        " | over `torch.compile` of it | over the pose projects on the CPU, copy included |",
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
            f"| {function} {shape} {dtype} | {ours['median_ms'] * 1e3:.1f} µs | {ours['share_of_roofline']:.0%}"
            f" | {' | '.join(cells)} |"
        )
    return lines


def gpu_report(results):
    """Tables of the results of benchmarks/gpu/operators.py."""
    machine = results["machine"]
    if results["dry_run"]:
        lines = ["DRY RUN ON A CPU: the figures are not measurements.", ""]
    else:
        lines = [
            f"Measured on {machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}, commit"
            f" {machine['commit']}{' with local changes' if machine['modified'] else ''}, with `{results['command']}`;"
            " medians over the turns.",
            "",
        ]
    lines += [f"Copy bandwidth {results['copy_bandwidth_gb_per_s']:.0f} GB/s, counting bytes read and written.", ""]
    rows = results.get("adjust_pool", [])
    if rows:
        lines += [
            "`adjust_pool`, T = 3. Minimum bytes moved: F once if a bag fits on chip, else T times (backward T − 1); dF"
            " once."
        ]
        lines += ["", *gpu_pool_table(rows), ""]
    rows = [r for r in results.get("decode_heatmaps", []) if r["rival"] != "amax"]
    if rows:
        lines += ["`decode_heatmaps`:", "", *gpu_decode_table(rows), ""]
    for row in results.get("overhead", []):
        if row["rival"] == "ours":
            lines.append(
                f"Tiny bags (16, 8, 32), {row['pass']}: {row['eager_host_us']:.1f} µs of host time per call,"
                f" {row['in_graph_us']:.1f} µs in a CUDA graph."
            )
    lines += ["", "| goal | target | measured | met |", "| --- | --- | --- | --- |"]
    for row in results.get("goals", []):
        met = {True: "yes", False: "no", None: "–"}[row["met"]]
        lines.append(f"| {row['goal']} | {row['target']} | {row['measured']} | {met} |")
    missing = results.get("failed", []) + results.get("skipped", [])
    lines += ["", *(f"Not measured: {', '.join(str(v) for v in row.values() if v)}." for row in missing)]
    lines += [f"Not reached within the time limit: {what}." for what in results.get("not_reached", [])]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, nargs="+", help="result files")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the tables in this Markdown file")
    arguments = parser.parse_args()
    parts = []
    for path in arguments.json:
        results = read_json(path)
        if arguments.write and results.get("dry_run"):
            parser.error(f"{path}: results of a dry run are not written")
        is_gpu = str(results.get("format", "")).startswith("amil_fast gpu operators")
        parts.append((gpu_report if is_gpu else cpu_report)(results).strip())
    text = "\n\n".join(parts)
    print(text)
    if arguments.write:
        before, rest = arguments.write.read_text().split(BEGIN)
        after = rest.split(END)[1]
        write_text(arguments.write, f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
