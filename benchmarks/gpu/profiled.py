"""Launches each of six kernels a few times at its main size: the program watched by ``ncu`` in first.py.

ncu --kernel-name regex:"adjust_pool|decode" ... python benchmarks/gpu/profiled.py [--dry-run]
"""

import sys

import harness  # noqa: F401 - interpreter mode of dry runs
import torch

import amil_fast


def main():
    dry_run = "--dry-run" in sys.argv
    device = "cpu" if dry_run else "cuda"
    pool = {"backend": "triton"}
    # forward and backward on chip, then streamed; two refinements of the decoder
    for shape in ((3, 64, 128), (2, 70, 64)) if dry_run else ((4096, 64, 128), (32, 4096, 128)):
        x = torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(2 / shape[-1] ** 0.5).requires_grad_()
        for _ in range(1 if dry_run else 3):
            amil_fast.adjust_pool(x, **pool).square().sum().backward()
    maps = torch.rand((2, 3, 24, 18) if dry_run else (1024, 17, 96, 72), device=device)
    for refine in ("none", "dark"):
        amil_fast.decode_heatmaps(maps, refine=refine, backend="cpp" if dry_run else "cuda")
    if not dry_run:
        torch.cuda.synchronize()
    print("profiled: ok")


if __name__ == "__main__":
    main()
