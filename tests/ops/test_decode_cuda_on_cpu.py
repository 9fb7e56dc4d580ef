"""Compares decode_heatmaps.cu, compiled for the CPU against tests/ops/cuda_on_cpu, with the C++ backend, bit for bit.

These tests execute every line of the kernel on machines without a GPU: vectorized and scalar loads, reductions over
warps and blocks, windows at the border, and the tiled blur of the whole map. Races and memory spaces can be tested on a
GPU only (test_decode_gpu.py).
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from amil_fast import decode_heatmaps
from amil_fast.ops.backends import native
from amil_fast.ops.bags import DTYPE_CODES
from amil_fast.ops.decode_heatmaps_native import CONVENTIONS as CONVENTION_CODES
from amil_fast.ops.decode_heatmaps_native import REFINEMENTS as REFINE_CODES
from amil_fast.ops.flip import check_pairs
from tests.ops.helpers import CONVENTIONS, DTYPES, LAYOUTS, REFINEMENTS, lay_out, make_maps, make_transform

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (CXX, g++)")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "decode_heatmaps.so"
    folder = ROOT / "tests" / "ops" / "cuda_on_cpu"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-fvisibility=hidden", "-w"]
    command = [COMPILER, *flags, f"-I{folder}", f"-I{ROOT / 'csrc'}", folder / "decode_heatmaps.cpp", "-o", library]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).decode_heatmaps
    function.restype = ctypes.c_char_p
    return function


def decode(
    kernel,
    maps,
    refine="none",
    convention="hrnet",
    blur_kernel=11,
    flipped=None,
    flip_pairs=(),
    shift_flipped=False,
    center=None,
    scale=None,
    affine=None,
):
    B, K, H, W = maps.shape
    coords, scores = torch.full((B, K, 2), -99.0), torch.full((B, K), -99.0)
    swap = torch.tensor(check_pairs(flip_pairs, K))

    def tensor_arguments(tensor):
        return (0, 0, 0, 0, 0) if tensor is None else (tensor.data_ptr(), *tensor.stride())

    def address(tensor):
        return 0 if tensor is None else tensor.data_ptr()

    call = [*tensor_arguments(maps), *tensor_arguments(flipped), swap.data_ptr(), shift_flipped]
    call += [DTYPE_CODES[maps.dtype], B, K, H, W]
    call += [REFINE_CODES[refine], CONVENTION_CODES[convention], blur_kernel]
    call += [*map(address, (center, scale, affine, coords, scores))]
    weights = native().blur_weights(blur_kernel)
    error = kernel((ctypes.c_int64 * len(call))(*call), (ctypes.c_double * len(weights))(*weights))
    assert not error, error.decode()
    return coords, scores


def compare(kernel, maps, **arguments):
    actual = decode(kernel, maps, **arguments)
    if arguments.get("flipped") is None:
        arguments.pop("flip_pairs", None)
    expected = decode_heatmaps(maps, **arguments, backend="cpp")
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.nan_to_num(-7.0), e.nan_to_num(-7.0)) and torch.equal(a.isnan(), e.isnan())


@pytest.mark.parametrize(
    "kind", ["noisy", "integers", "noise", "constant", "negative", "edge", "tiny", "large", "spike"]
)
@pytest.mark.parametrize("refine", REFINEMENTS)
def test_kinds_of_maps(kernel, kind, refine):
    for i, (H, W) in enumerate(((64, 48), (20, 24), (97, 101))):  # 128 threads, a warp, 256 threads per map
        convention = CONVENTIONS[i]
        compare(
            kernel, make_maps(kind, (1, 3, H, W), i), refine=refine, convention=convention, blur_kernel=(11, 3, 17)[i]
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flip", ["no", "plain", "shift"])
def test_layouts(kernel, dtype, layout, flip):
    for refine, (H, W) in (("dark", (40, 32)), ("quarter", (19, 13)), ("none", (8, 1)), ("dark_udp", (1, 40))):
        maps = lay_out(make_maps("noisy", (2, 5, H, W), 1, dtype), layout)
        arguments = {"refine": refine}
        if flip != "no":
            flipped = lay_out(make_maps("noisy", (2, 5, H, W), 2, dtype), layout)
            arguments |= {"flipped": flipped, "flip_pairs": [(1, 4)], "shift_flipped": flip == "shift"}
        compare(kernel, maps, **arguments)


@pytest.mark.parametrize("where", ["first", "last", "tail", "middle"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.0])
def test_every_thread_contributes(kernel, where, value):
    for H, W in ((64, 48), (20, 24), (97, 101), (1, 7)):
        maps = make_maps("constant", (1, 2, H, W))
        pixel = {"first": 0, "last": -1, "tail": H * W - 2, "middle": H * W // 2}[where]
        maps.view(2, -1)[1, pixel] = value
        for dtype in (torch.float32, torch.float16):
            compare(kernel, maps.to(dtype), refine="quarter")


@pytest.mark.parametrize("blur_kernel", [1, 5, 31, 127, 255])
@pytest.mark.parametrize("refine", ["dark", "dark_udp"])
def test_blurs(kernel, blur_kernel, refine):
    """Covers maps whose clamp requires the blur of the whole map, over several tiles in both directions."""
    for dtype in (torch.float32, torch.float64):
        for H, W in ((12, 9), (30, 30), (70, 50)):
            compare(kernel, make_maps("tiny", (1, 2, H, W), 3, dtype), refine=refine, blur_kernel=blur_kernel)
            compare(kernel, make_maps("noise", (1, 2, H, W), 4, dtype), refine=refine, blur_kernel=blur_kernel)


@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
def test_the_blurred_maximum_may_be_in_any_corner(kernel, corner):
    for H, W in ((12, 9), (70, 50)):
        maps = make_maps("constant", (1, 1, H, W)) * 1e-3
        maps[0, 0, corner[0], corner[1]] = 2e-3
        compare(kernel, maps, refine="dark_udp", blur_kernel=1)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("transform", ["box", "affine"])
def test_transforms(kernel, convention, transform):
    for refine in REFINEMENTS:
        compare(
            kernel,
            make_maps("edge", (3, 4, 24, 18)),
            refine=refine,
            convention=convention,
            **make_transform(transform, 3),
        )


def test_more_joints_than_one_launch_processes(kernel):
    maps, flipped = (make_maps("noise", (2, 1100, 3, 4), seed) for seed in (1, 2))
    pairs = [(k, 1099 - k) for k in range(0, 500, 3)]
    compare(kernel, maps, flipped=flipped, flip_pairs=pairs)
