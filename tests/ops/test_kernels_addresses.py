"""No 32-bit product of a number of rows in the compiled kernels: such a product overflows from 2^31 elements on."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Names of arguments that count rows of all bags or slots; products with them must be 64-bit.
ROWS = ("num_rows", "num_slots", "stride_n", "stride_b")
PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from amil_fast.kernels import adjust_pool_forward, adjust_pool_backward, adjust_pool_on_chip_dot, aot
modules = (adjust_pool_forward, adjust_pool_backward, adjust_pool_on_chip_dot)
calls = [
    aot.PoolCall(4096, 64, 128, dtypes=("bf16",)),
    aot.PoolCall(2, 100_000, 128, "mask", weights=True, T=7, dtypes=("fp32", "bf16")),
    aot.PoolCall(64, 3_000_000, 128, "packed", detach=True, dtypes=("bf16",)),
]
for job in aot.triton_compilations(calls, (90,)):
    kernel = next(getattr(module, job.name) for module in modules if hasattr(module, job.name))
    compiled = triton.compile(ASTSource(kernel, *job.signature), target=GPUTarget("cuda", 90, 32), options=job.options)
    print("kernel", job.name)
    print(compiled.asm["ttir"])
"""


def narrow_products(ttir):
    """Lines of ``ttir`` that multiply a value derived from an argument in ROWS, without 64-bit conversion before."""
    names = dict(re.findall(r'(#loc\d+) = loc\("(\w+)"', ttir))
    arguments = re.findall(r"(%\w+): i32 loc\((?:\"(\w+)\"|(#loc\d+))", ttir.split("{", 1)[0] + ttir)
    tainted = {ssa for ssa, name, loc in arguments if (name or names.get(loc)) in ROWS}
    found = []
    for line in ttir.splitlines():
        match = re.match(r"\s*(%[\w#]+) = (arith\.muli|arith\.addi|arith\.subi|tt\.splat|tt\.broadcast) (.*)", line)
        if not match or "i64" in line.split(" loc(")[0]:
            continue
        used = set(re.findall(r"%[\w#]+", match[3].split(" : ")[0]))
        if used & tainted:
            tainted.add(match[1])
            if match[2] == "arith.muli":
                found.append(line.strip())
    return tainted, found


def test_products_of_row_counts_are_64_bit():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # the interpreter does not compile
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, check=True, capture_output=True, text=True
    )
    kernels = output.stdout.split("kernel ")[1:]
    assert len(kernels) >= 6
    for text in kernels:
        name, ttir = text.split("\n", 1)
        tainted, found = narrow_products(ttir)
        if "weights_kernel" not in name and "detached" not in name:
            assert tainted, f"{name}: no argument among {ROWS} found"
        assert not found, f"{name}: {found}"
