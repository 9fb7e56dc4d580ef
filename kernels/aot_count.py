"""Instruction counts of compiled kernels and what they allow, for ``amil_fast.kernels.aot``.

A multiprocessor issues at most 4 warp instructions per cycle, so that a kernel moves at most ``4 * bytes /
instructions`` bytes per cycle and multiprocessor, whatever its memory accesses do. A copy moves about 16.5 on an H200
(4.8 TB/s, of which 90 %, by 132 multiprocessors at 1.98 GHz). Counted are the instructions in the SASS, loops times
their trips, branches as taken.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton

BUDGET = Path(__file__).with_name("budget.json")
ISSUE_SLOTS = 4  # warp instructions per cycle and multiprocessor
# Per multiprocessor: registers, warps, and KB of shared memory by architecture, of which each program takes one more.
REGISTERS, WARPS = 65536, 64
SHARED_KB = {80: 164, 90: 228, 100: 228}
# A count may exceed the committed one by this fraction.
TOLERANCE = 0.02


def instructions_and_loops(cubin):
    """Instructions of a cubin with one kernel, and its loops as (first, last) index, outer ones first."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    while instructions and instructions[-1].startswith("NOP"):  # padding
        instructions.pop()
    loops = []
    for i, instruction in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*?(\.L_\w+)", instruction)
        if branch and labels.get(branch[1], i) < i:
            loops.append((labels[branch[1]], i))
    return instructions, sorted(loops, key=lambda loop: (loop[0], -loop[1]))


def warp_instructions(cubin, num_warps, on_chip, trips):
    """Warp instructions per program of an on-chip kernel, or per tile of a kernel that streams.

    ``trips``: iterations of a loop that is not in another one, half as many of an inner one. A tile is an iteration of
    the longest innermost loop.
    """
    instructions, loops = instructions_and_loops(cubin)

    def length(loop):
        return loop[1] - loop[0] + 1

    if not on_chip:
        inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in loops)]
        return max(map(length, inner), default=0) * num_warps
    total = len(instructions)
    for loop in loops:
        nested = any(a[0] <= loop[0] and loop[1] <= a[1] and a != loop for a in loops)
        total += length(loop) * (trips * (trips - 1) // 2 if nested else trips - 1)
    return total * num_warps


def programs_per_multiprocessor(arch, registers, shared, num_warps):
    """Programs that fit on a multiprocessor."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * num_warps)
    return min(by_registers, WARPS // num_warps, SHARED_KB.get(arch, 228) * 1024 // (shared + 1024))


def check_budget(usages):
    """Complaints: kernels above the limits of budget.json, or above its counts if made with this Triton version."""
    budget = json.loads(BUDGET.read_text())
    usages = [usage for usage in usages if not usage.error]
    bad = [line for rule in budget["widths"] for line in check_widths(rule, usages)]
    for usage in usages:
        for limit in budget["limits"]:
            if usage.arch != limit["arch"] or not re.search(limit["kernel"], f"{usage.name} {usage.config}"):
                continue
            if usage.instructions > limit.get("instructions", usage.instructions):
                most = limit["instructions"]
                bad.append(f"{limit['what']}: {usage.instructions} warp instructions, at most {most}")
            if usage.registers > limit.get("registers", usage.registers):
                bad.append(f"{limit['what']}: {usage.registers} registers, at most {limit['registers']}")
            if usage.rate < limit.get("rate", 0):
                bad.append(f"{limit['what']}: {usage.rate:.1f} bytes per cycle, at least {limit['rate']}")
        known = budget["counts"].get(f"{usage.name} sm_{usage.arch} {usage.config}")
        if budget["triton"] == triton.__version__ and known is not None:
            instructions, programs = known
            if usage.instructions > instructions * (1 + TOLERANCE) or usage.programs < programs:
                now = f"{usage.instructions} warp instructions, {usage.programs} programs per multiprocessor"
                bad.append(f"{usage.name} sm_{usage.arch} {usage.config}: {now}; was {instructions}, {programs}")
    return bad


def check_widths(rule, usages):
    """Complaints: numbers of features at which a kernel's rate is below that at the next ones by more than a factor.

    ``rule``: ``features``, in ascending order; ``kernel``, a regular expression that captures the number of features.
    """
    rates = {}
    for usage in usages:
        match = re.search(rule["kernel"], f"{usage.name} {usage.config}")
        if match and usage.arch == rule["arch"]:
            rates[int(match[1])] = usage.rate
    features = [None, *rule["features"], None]
    for below, D, above in zip(features, features[1:], features[2:], strict=False):
        best = max(rates.get(below, 0), rates.get(above, 0))
        if best > rule["factor"] * rates.get(D, best):
            yield f"{rule['what']}, D = {D}: {rates[D]:.1f} bytes per cycle, {best:.1f} at the next width"


def update_budget(usages):
    """Updates the counts of budget.json by those of ``usages``; drops those of another Triton version."""
    budget = json.loads(BUDGET.read_text())
    known = budget["counts"] if budget["triton"] == triton.__version__ else {}
    counts = dict(known)
    for usage in usages:
        if usage.instructions:
            counts[f"{usage.name} sm_{usage.arch} {usage.config}"] = [usage.instructions, usage.programs]
    budget |= {"triton": triton.__version__, "counts": dict(sorted(counts.items()))}
    limits, widths = (",\n  ".join(map(json.dumps, budget[key])) for key in ("limits", "widths"))
    lines = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in budget["counts"].items())
    head = f'"triton": {json.dumps(budget["triton"])},\n "limits": [\n  {limits}\n ],\n "widths": [\n  {widths}\n ],\n'
    BUDGET.write_text(f'{{{head} "counts": {{\n  {lines}\n }}\n}}\n')
