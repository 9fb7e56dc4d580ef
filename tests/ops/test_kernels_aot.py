"""Ahead-of-time compilation without a GPU (``make kernels``), on a representative subset."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def run_aot(*arguments):
    # The interpreter does not compile.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "amil_fast.kernels.aot", "--no-cuda", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_compiles_without_spills(tmp_path):
    result = run_aot("--some", "--arch", "90", "--json", str(tmp_path / "table.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert {row["name"] for row in table} == {
        "adjust_pool_forward_on_chip_kernel",
        "adjust_pool_forward_chunks_kernel",
        "adjust_pool_forward_weights_kernel",
        "adjust_pool_backward_on_chip_kernel",
        "adjust_pool_backward_chunks_kernel",
        "adjust_pool_backward_write_kernel",
        "adjust_pool_backward_detached_kernel",
    }
    assert all(0 < row["registers"] <= 255 and row["spills"] == 0 for row in table)
    # The on-chip and the chunk kernels reduce through shared memory.
    assert any(row["shared"] > 0 for row in table)


def test_spills_fail():
    """Spilled registers are reported and make the exit status nonzero."""
    result = run_aot("--arch", "90", "--match", "forward_on_chip.*bf16 .*lengths D=16 ", "--registers", "64")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "SPILLS" in result.stdout


def test_every_kernel_is_compiled():
    """The full list of calls covers every kernel."""
    program = """
from amil_fast.kernels import adjust_pool_backward, adjust_pool_forward, aot
names = [*vars(adjust_pool_forward), *vars(adjust_pool_backward)]
defined = {name for name in names if name.endswith("_kernel")}
compiled = {c.name for c in aot.triton_compilations(aot.CALLS, (90,))}
assert defined == compiled and len(defined) == 7, defined ^ compiled
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
