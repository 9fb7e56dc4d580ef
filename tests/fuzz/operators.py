"""Fuzzer of the operators on a CPU: ``python -m tests.fuzz.operators --calls 20000 --seed 0``.

Every call has random shapes, dtypes, memory layouts, options, numbers of threads and instruction sets. One in eight has
an invalid argument and must raise TypeError or ValueError. The results of the others are compared with the reference
where rounding errors can be bounded. Equal seeds give equal calls; a failure prints the number of its call, and
``--first NUMBER --calls 1`` repeats it. ``make sanitize`` runs it against an extension built with sanitizers.
"""

import argparse
import sys
import time
import traceback

import numpy as np
import torch

from amil_fast import adjust_pool, decode_heatmaps
from amil_fast.ops.backends import native
from amil_fast.ops.flip import check_pairs
from tests.helpers import relative_error
from tests.ops.helpers import (
    CONVENTIONS,
    DTYPES,
    KINDS,
    LAYOUTS,
    REFINEMENTS,
    allowed_error,
    allowed_in_image,
    assert_same,
    averaged,
    lay_out,
    make_maps,
    make_transform,
)


def pool_call(rng):
    """One forward and backward pass of adjust pooling, compared with the reference."""
    dtype = DTYPES[rng.integers(len(DTYPES))]
    form = rng.choice(["dense", "mask", "lengths", "packed", "rest"])
    B, N, D = int(rng.integers(0, 7)), int(rng.choice([rng.integers(0, 20), rng.integers(0, 300)])), _features(rng)
    if rng.random() < 0.02:
        B, N = int(rng.integers(1, 4)), int(rng.integers(1000, 6000))
    scale = float(rng.choice([1.0, 10.0 ** rng.uniform(-6, 4)], p=[0.7, 0.3]))
    x = torch.from_numpy(rng.standard_normal((B, N, D))) * (2 * scale / D**0.5)
    if rng.random() < 0.05 and x.numel():
        x.view(-1)[int(rng.integers(x.numel()))] = float(rng.choice([np.nan, np.inf, -np.inf]))
    where = {}
    if form == "mask":
        mask = torch.from_numpy(rng.random((B, N)) < rng.choice([0.1, 0.6, 0.95, 1.0]))
        where["mask"] = _strided(mask.to([torch.bool, torch.uint8, torch.float32][rng.integers(3)]), rng)
    elif form == "lengths":
        where["lengths"] = _index(rng.integers(0, N + 1, B), rng)
    elif form in ("packed", "rest"):
        x = x.flatten(0, 1)
        end = len(x) if form == "packed" else int(rng.integers(0, len(x) + 1))
        cuts = np.sort(rng.integers(0, end + 1, max(B - 1, 0)))
        where["cu_seqlens"] = _index(np.concatenate([[0], cuts, [end]]) if B else np.array([0]), rng)
        if B == 0:
            x = x[:0]
        if rng.random() < 0.3:
            where["max_seqlen"] = int(where["cu_seqlens"].diff().max()) if B else 0
    x = _strided(x.to(dtype), rng)
    options = {
        "num_iters": int(rng.choice([1, 2, 3, 3, 5, 8])),
        "return_weights": bool(rng.random() < 0.5),
        "detach_routing": bool(rng.random() < 0.3),
    }
    if rng.random() < 1 / 8:
        return _expect_error(adjust_pool, *_spoil_pool(x, {**where, **options}, rng))
    upstream_seed = int(rng.integers(2**31))
    finite = bool(x.double().isfinite().all())

    def passes(x, backend):
        leaf = x.detach().requires_grad_()
        outputs = adjust_pool(leaf, **where, **options, backend=backend)
        outputs = outputs if options["return_weights"] else (outputs,)
        generator = np.random.default_rng(upstream_seed)
        pairs = []
        for out in outputs:
            upstream = torch.from_numpy(generator.standard_normal(out.shape)).to(out.dtype)
            upstream = _strided(upstream, generator)
            if out.requires_grad:
                pairs.append((out, upstream))
        (grad,) = torch.autograd.grad([o for o, _ in pairs], leaf, [u for _, u in pairs])
        return [*(o.detach() for o in outputs), grad]

    found = passes(x, "cpp")
    if finite and scale <= 1 and x.numel() <= 200_000:
        truth, plain = passes(x.double(), "reference"), passes(x, "reference")
        for what, a, b, c in zip(("bag", "weights", "gradient")[-len(found) :], found, plain, truth, strict=True):
            allowed = 8 * relative_error(b, c) + 256 * torch.finfo(a.dtype).eps
            error = relative_error(a, c)
            assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"
    return None


def decode_call(rng):
    """One call of heatmap decoding, compared with the reference."""
    sides = [int(rng.choice([rng.integers(1, 9), rng.integers(9, 70)])) for _ in range(2)]
    shape = (int(rng.integers(1, 4)), int(rng.integers(1, 6)), *sides)
    kind, dtype = str(rng.choice(KINDS)), DTYPES[rng.integers(len(DTYPES))]
    seed = int(rng.integers(2**31 - 1))
    maps = lay_out(make_maps(kind, shape, seed, dtype), str(rng.choice(LAYOUTS)))
    refine, convention = str(rng.choice(REFINEMENTS)), str(rng.choice(CONVENTIONS))
    arguments = {"refine": refine, "convention": convention}
    arguments["blur_kernel"] = int(rng.choice([1, 3, 5, 7, 9, 11, 17, 31, 255]))
    arguments |= make_transform(str(rng.choice(["none", "none", "box", "affine"])), shape[0], seed)
    decoded = averaged(maps)
    if rng.random() < 0.4:
        flipped = lay_out(make_maps(kind, shape, seed + 1, dtype).flip(-1), str(rng.choice(LAYOUTS)))
        pairs, shift = [(0, shape[1] - 1)] if shape[1] > 1 else [], bool(rng.random() < 0.5)
        arguments |= {"flipped": flipped, "flip_pairs": pairs, "shift_flipped": shift}
        decoded = averaged(maps, flipped, check_pairs(pairs, shape[1]), shift)
    if rng.random() < 1 / 8:
        return _expect_error(decode_heatmaps, *_spoil_decoding(maps, arguments, rng))
    if rng.random() < 0.05:  # NaN and infinities: no comparison beyond the absence of a crash
        spoiled = maps.contiguous().clone()
        spoiled.view(-1)[int(rng.integers(spoiled.numel()))] = float(rng.choice([np.nan, np.inf, -np.inf]))
        return decode_heatmaps(spoiled, **arguments, backend="cpp")
    allowed = allowed_in_image(allowed_error(decoded, refine, arguments["blur_kernel"]), arguments, shape)
    expected = decode_heatmaps(maps, **arguments, backend="reference")
    return assert_same(decode_heatmaps(maps, **arguments, backend="cpp"), expected, allowed)


def _features(rng):
    return int(
        rng.choice(
            [rng.integers(1, 20), rng.integers(1, 140), 16 * rng.integers(1, 20), 1030], p=[0.4, 0.3, 0.28, 0.02]
        )
    )


def _index(values, rng):
    dtype = torch.int32 if rng.random() < 0.5 else torch.int64
    return _strided(torch.from_numpy(np.asarray(values, np.int64)).to(dtype), rng)


def _strided(tensor, rng):
    """The values of a tensor in another memory layout, or as they are."""
    how = rng.integers(5)
    if how == 0 and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == 1:  # every other entry of the last axis
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if how == 2 and tensor.dim() > 1:  # rows with gaps
        return torch.cat([tensor, tensor[..., :1]], -1)[..., :-1]
    if how == 3:  # no 16-byte alignment
        return torch.cat([tensor.flatten()[:1], tensor.flatten()])[min(1, tensor.numel()) :].view(tensor.shape)
    return tensor


def _spoil_pool(x, options, rng):
    """Positional and keyword arguments, one of which is invalid."""
    choices = [
        {"num_iters": int(rng.choice([0, -1, 10_001, 2**40]))},
        {"num_iters": 2.5},
        {"return_weights": "no"},
        {"backend": "fast"},
    ]
    rows = len(x)
    if "lengths" in options and rows:
        bad = options["lengths"].clone()
        bad[int(rng.integers(rows))] = int(rng.choice([-1, x.shape[1] + 1, 2**31 - 1, -(2**31)]))
        choices += [{"lengths": bad}] * 3 + [{"lengths": options["lengths"][1:]}]
    elif "mask" in options:
        choices += [
            {"mask": options["mask"][:, :-1] if x.shape[1] else torch.ones(rows, 1)},
            {"lengths": torch.zeros(rows, dtype=torch.int64)},
        ]
    elif "cu_seqlens" in options:
        bad = options["cu_seqlens"].clone()
        bad[-1] = int(rng.choice([rows + 1, 2**31 - 1, -1]))
        choices += [{"cu_seqlens": bad}] * 2
        if len(bad) > 2:
            bad = options["cu_seqlens"].clone()
            bad[1:3] = torch.tensor([2**31 - 1, -2])
            choices += [{"cu_seqlens": bad}] * 3
    else:
        choices += [{"mask": torch.ones(rows + 1, x.shape[1])}, {"max_seqlen": 3}]
    return (x,), {**options, **choices[rng.integers(len(choices))]}


def _spoil_decoding(maps, arguments, rng):
    choices = [
        {"refine": "best"},
        {"convention": "openpose"},
        {"blur_kernel": int(rng.choice([0, 2, -3, 257, 9_999_999]))},
        {"flipped": maps[..., :-1], "flip_pairs": []},
        {"flipped": maps, "flip_pairs": [(0, maps.shape[1])]},
        {"flipped": maps, "flip_pairs": None},
        {"affine": torch.zeros(len(maps), 3, 2)},
        {"center": torch.zeros(len(maps), 2), "scale": None, "affine": None},
    ]
    return (maps,), {**arguments, **choices[rng.integers(len(choices))]}


def _expect_error(function, positional, options):
    try:
        function(*positional, **options)
    except (TypeError, ValueError):
        return
    raise AssertionError(f"no error for {options}")


def run(first, calls, seed):
    """Makes calls ``first`` to ``first + calls - 1``; returns the number of failures."""
    failures, began = 0, time.monotonic()
    sets = native().usable_instruction_sets()
    before = native().instruction_set(), torch.get_num_threads()
    try:
        for number in range(first, first + calls):
            rng = np.random.default_rng((seed, number))
            native().set_instruction_set(str(rng.choice(sets)))
            torch.set_num_threads(int(rng.choice([1, 1, 2, 3])))
            try:
                (pool_call if rng.random() < 0.6 else decode_call)(rng)
            except Exception:
                failures += 1
                print(f"call {number}:\n{traceback.format_exc()}", flush=True)
            if (number + 1) % 5000 == 0:
                print(f"{number + 1 - first} calls, {time.monotonic() - began:.0f} s", flush=True)
    finally:
        native().set_instruction_set(before[0])
        torch.set_num_threads(before[1])
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    failures = run(arguments.first, arguments.calls, arguments.seed)
    print(f"{arguments.calls} calls of the operators: {failures} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
