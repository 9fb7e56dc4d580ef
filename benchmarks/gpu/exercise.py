"""Runs every kernel on small inputs and compares with the reference: the program watched by compute-sanitizer.

    python benchmarks/gpu/exercise.py split,mixed,stream,on_chip,tiny,decode [--dry-run]

Inputs are generated and results compared on the CPU, so that hardly any kernels but ours run on the device.
"""

import dataclasses
import sys

import harness  # noqa: F401 - interpreter mode of dry runs, path of `tests`
import torch
from amil_fast.kernels.adjust_pool_config import ChunkConfig, OnChipConfig, TritonPlan

from amil_fast import decode_heatmaps
from amil_fast.kernels import adjust_pool_launch
from amil_fast.ops.adjust_pool_reference import adjust_pool_reference
from tests.helpers import relative_error
from tests.ops.helpers import REFINEMENTS, make_maps


def strategies():
    """Strategy -> list of (lengths or (B, N), D, input form, forward plan, backward plan), for small inputs."""

    def chunks(D, chunk_rows, split, min_rows=-1, warps=8, stages=3, block_n=32):
        return ChunkConfig(block_n, D, chunk_rows, min_rows, split, 4, warps, stages, 128)

    def same(plan):
        return plan, plan

    split = same(TritonPlan(None, chunks(128, 64, True)))  # 11 chunks in 3 groups of at most 4
    mixed = OnChipConfig(2, 32, 64, 4), chunks(64, 128, True, min_rows=32, block_n=64)
    lengths = [20, 0, 1, 300, 5, 32, 33, 17, 900, 2, 64]
    return {
        "tiny": [((21, 6), 16, "mask", *same(TritonPlan(OnChipConfig(4, 8, 16, 1), None)))],
        "on_chip": [
            (
                (5, 64),
                128,
                "full",
                TritonPlan(OnChipConfig(1, 64, 128, 8), None),
                TritonPlan(OnChipConfig(1, 64, 128, 16), None),
            ),
            (
                (5, 50),
                96,
                "mask",
                TritonPlan(OnChipConfig(1, 64, 128, 8), None),
                TritonPlan(OnChipConfig(1, 64, 128, 16), None),
            ),
        ],
        "stream": [((4, 300), 128, "lengths", *same(TritonPlan(None, chunks(128, 300, False))))],
        "split": [
            ((2, 700), 128, "lengths", *split),
            ((2, 650), 100, "mask", *split),
            (lengths, 128, "packed", *split),
        ],
        "mixed": [(lengths, 64, "packed", *same(TritonPlan(*mixed)))],
    }


def with_tensor_cores(plan, on_chip=True):
    """The same strategy with products on tensor cores, for 16-bit instances."""
    parts = {}
    if on_chip and plan.on_chip is not None:
        block_n = max(plan.on_chip.block_n, 16)
        parts["on_chip"] = dataclasses.replace(plan.on_chip, bags=1, block_n=block_n, num_warps=4, dot=True)
    if plan.chunks is not None:
        parts["chunks"] = dataclasses.replace(plan.chunks, num_warps=4, num_stages=1, registers=255, dot=True)
        if plan.on_chip is not None:
            parts["chunks"] = dataclasses.replace(parts["chunks"], min_rows=plan.on_chip.block_n)
    return dataclasses.replace(plan, **parts)


def exercise_adjust_pool(name, device):
    """Runs one strategy forward and backward, compares with float64; yields a line per configuration."""
    for i, (bags, D, how, plan, backward_plan) in enumerate(strategies()[name]):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
            for detach in (False, True):
                generator = torch.Generator().manual_seed(i)
                where = dict.fromkeys(("mask", "lengths", "cu_seqlens"))
                if how == "packed":
                    f = torch.randn(sum(bags), D, generator=generator)
                    where["cu_seqlens"] = torch.tensor([0, *bags]).cumsum(0)
                    B = len(bags)
                else:
                    (B, N), f = bags, torch.randn(*bags, D, generator=generator)
                    if how == "mask":
                        where["mask"] = torch.rand(B, N, generator=generator) < 0.7
                    elif how == "lengths":
                        where["lengths"] = torch.linspace(N, 0, B).long()
                f = (f / D**0.25).to(dtype)
                g = torch.randn(B, D, generator=generator).to(dtype)
                v = None if detach else torch.randn(f.shape[:-1], generator=generator)

                plans = plan, backward_plan
                if dtype != torch.float32:
                    plans = with_tensor_cores(plan), with_tensor_cores(backward_plan, on_chip=not detach)
                on_device = [None if x is None else x.to(device) for x in (f, *where.values(), g, v)]
                bag, w, sigma, stats = adjust_pool_launch.forward(*on_device[:4], 3, True, plan=plans[0])
                saved = (*on_device[:4], sigma, stats)
                grad = adjust_pool_launch.backward(*on_device[4:6], *saved, detach, plan=plans[1])

                leaf = f.double().requires_grad_()
                truth = adjust_pool_reference(leaf, **where, detach_routing=detach)
                outputs, grads = (truth, (g.double(), v.double())) if v is not None else (truth[:1], (g.double(),))
                expected = (*truth, torch.autograd.grad(outputs, leaf, grads)[0])
                pairs = zip((bag, w, grad), expected, strict=True)
                errors = [relative_error(actual.cpu(), expected) for actual, expected in pairs]
                assert max(errors) < tolerance, f"{name} {how} {dtype}: relative errors {errors}"
                yield f"{name} {how} {tuple(f.shape)} {dtype} detach={detach}: ok"


def exercise_decode(device):
    """Runs the decoder in all refinements, compares with the C++ backend; yields a line per shape."""
    backend = "cuda" if device == "cuda" else "cpp"
    # A warp, a block of 128 and a block of 256 threads per map; "tiny" maps use the maximum of the whole blurred map.
    for (H, W), kind in (((20, 24), "noisy"), ((64, 48), "tiny"), ((97, 101), "noisy"), ((5, 3), "noise")):
        for dtype in (torch.float32, torch.float16):
            for refine in REFINEMENTS:
                for flip in (False, True):
                    maps = make_maps(kind, (2, 3, H, W), 1, dtype)
                    arguments = {"refine": refine}
                    on_device = {"refine": refine}
                    if flip:
                        flipped = make_maps(kind, (2, 3, H, W), 2, dtype)
                        arguments |= {"flipped": flipped, "flip_pairs": [(0, 2)]}
                        on_device |= {"flipped": flipped.to(device), "flip_pairs": [(0, 2)]}
                    actual = decode_heatmaps(maps.to(device), **on_device, backend=backend)
                    expected = decode_heatmaps(maps, **arguments, backend="cpp")
                    assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True)), (H, W, refine)
        yield f"decode {H} x {W} {kind}: ok"


def main():
    """Exercises the strategies named in the first argument."""
    device = "cpu" if "--dry-run" in sys.argv else "cuda"
    for name in sys.argv[1].split(","):
        for line in exercise_decode(device) if name == "decode" else exercise_adjust_pool(name, device):
            print(line, flush=True)


if __name__ == "__main__":
    main()
