"""Ahead-of-time compilation without a GPU (``make kernels``), on a representative subset."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def environment():
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # the interpreter does not compile


def run_aot(*arguments):
    command = [sys.executable, "-m", "amil_fast.kernels.aot", "--no-cuda", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def test_compiles_without_spills(tmp_path):
    result = run_aot("--some", "--arch", "90", "--json", str(tmp_path / "table.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert {row["name"] for row in table} == {
        "adjust_pool_forward_on_chip_kernel",
        "adjust_pool_forward_on_chip_dot_kernel",
        "adjust_pool_forward_chunks_kernel",
        "adjust_pool_forward_weights_kernel",
        "adjust_pool_backward_on_chip_kernel",
        "adjust_pool_backward_on_chip_dot_kernel",
        "adjust_pool_backward_chunks_kernel",
        "adjust_pool_backward_write_kernel",
        "adjust_pool_backward_detached_kernel",
    }
    assert all(0 < row["registers"] <= 255 and row["spills"] == 0 for row in table)
    # The on-chip and the chunk kernels reduce through shared memory.
    assert any(row["shared"] > 0 for row in table)
    assert all(row["instructions"] > 0 and row["programs"] > 0 for row in table)


def test_counts_above_the_budget_fail():
    """More instructions than committed, fewer programs, or a limit exceeded: each is reported."""
    program = """
import json
from dataclasses import replace
from amil_fast.kernels import aot_count
from amil_fast.kernels.aot import KernelUsage
import triton
budget = json.loads(aot_count.BUDGET.read_text())
assert len(budget["counts"]) > 100
(key, (instructions, programs)) = next((k, v) for k, v in budget["counts"].items() if v[0] and v[1] > 1)
name, arch, config = key.split(" ", 2)
usage = KernelUsage(name, config, int(arch[3:]), instructions=instructions, programs=programs, rate=1e9)
assert not aot_count.check_budget([usage])
if budget["triton"] == triton.__version__:
    assert len(aot_count.check_budget([replace(usage, instructions=int(instructions * 1.03) + 1)])) == 1
    assert len(aot_count.check_budget([replace(usage, programs=programs - 1)])) == 1
kernel = "adjust_pool_forward_chunks_kernel", "bf16 warps=4 stages=1 D=128 ", 90
(message,) = aot_count.check_budget([KernelUsage(*kernel, rate=49.0)])
assert message == "forward stream, D = 128: 49.0 bytes per cycle, at least 50", message
demangled, mangled = "void decode_kernel<(amil::Refine)0, false, float>()", "_ZN13decode_kernelILNS_6RefineE0ELb0EffEEv"
for function in demangled, mangled:
    (message,) = aot_count.check_budget([KernelUsage("decode_heatmaps.cu", function, 90, registers=48, rate=1e9)])
    assert message == "decoder, argmax and quarter: 48 registers, at most 40", message
# A width much slower than the next one; those that are not next to each other are not compared.
config = "bf16 warps=4 stages=1 D={} UNIT=8 SPLIT=True"
rates = {256: 100.0, 384: 62.0, 768: 39.0}
usages = [KernelUsage(kernel[0], config.format(D), 90, rate=rate) for D, rate in rates.items()]
(message,) = aot_count.check_budget(usages)
assert message == "forward stream, width, D = 384: 62.0 bytes per cycle, 100.0 at the next width", message
"""
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True)


def test_spills_fail():
    """Spilled registers are reported and make the exit status nonzero."""
    result = run_aot("--arch", "90", "--match", "forward_on_chip.*bf16 .*lengths D=16 ", "--registers", "64")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "SPILLS" in result.stdout


def test_every_kernel_is_compiled():
    """The full list of calls covers every kernel."""
    program = """
from amil_fast.kernels import adjust_pool_backward, adjust_pool_forward, adjust_pool_on_chip_dot, aot
modules = adjust_pool_backward, adjust_pool_forward, adjust_pool_on_chip_dot
names = [name for module in modules for name in vars(module)]
defined = {name for name in names if name.endswith("_kernel")}
compiled = {c.name for c in aot.triton_compilations(aot.CALLS, (90,))}
assert defined == compiled and len(defined) == 9, defined ^ compiled
"""
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True)
