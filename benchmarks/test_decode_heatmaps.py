"""decode_heatmaps against a read of the maps (amax), plain PyTorch, and the pose projects' way in NumPy and OpenCV.

The figure of merit is the time in units of ``h.flatten(2).amax(-1)`` on the same maps, taken in turns in one process
and printed at the end. Bytes that must move: each map read once (both of a pair with mirror averaging), 12 bytes per
joint written. ``pytest benchmarks/test_decode_heatmaps.py --benchmark-only``
"""

import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from amil_fast import decode_heatmaps
from amil_fast.ops import encode_heatmaps
from amil_fast.ops.backends import native

SHAPES = [(64, 17, 64, 48), (64, 133, 64, 48), (1, 17, 64, 48)]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FUNCTIONS = {
    "argmax": {},
    "quarter": {"refine": "quarter"},
    "dark": {"refine": "dark", "convention": "darkpose"},
    "dark_udp": {"refine": "dark_udp", "convention": "mmpose"},
    "mirror+dark": {"refine": "dark", "convention": "darkpose", "mirror": True},
}
VECTORS = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "decode_public.npz"


# ---- the peers' algorithms: the same steps in the same libraries, map by map where they go map by map ----


def peer_argmax(maps):
    """HRNet, DarkPose: maximum and its place; (0, 0) where it is not positive."""
    B, K, H, W = maps.shape
    flat = maps.reshape(B, K, H * W)
    index, scores = flat.argmax(2), flat.max(2)
    coords = np.stack([index % W, index // W], -1).astype(np.float32)
    coords[scores <= 0] = 0
    return coords, scores


def peer_quarter(maps):
    """HRNet: each joint's two differences."""
    coords, scores = peer_argmax(maps)
    B, K, H, W = maps.shape
    for b in range(B):
        for k in range(K):
            h = maps[b, k]
            x, y = int(np.floor(coords[b, k, 0] + 0.5)), int(np.floor(coords[b, k, 1] + 0.5))
            if 1 < x < W - 1 and 1 < y < H - 1:
                difference = np.array([h[y, x + 1] - h[y, x - 1], h[y + 1, x] - h[y - 1, x]])
                coords[b, k] += 0.25 * np.sign(difference)
    return coords, scores


def peer_blur(h, blur_kernel, dtype):
    """Zero padding, OpenCV's Gaussian, the old maximum restored; for one map."""
    import cv2

    border = blur_kernel // 2
    padded = cv2.GaussianBlur(np.pad(h.astype(dtype), border), (blur_kernel, blur_kernel), 0)
    blurred = padded[border:-border, border:-border].astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):  # maps that are all zero
        return blurred * (h.max() / blurred.max())


def peer_dark(maps):
    """DarkPose: whole maps blurred in float64 one by one, logarithm, then a Taylor step per joint."""
    coords, scores = peer_argmax(maps)
    B, K, H, W = maps.shape
    for b in range(B):
        for k in range(K):
            L = np.log(np.maximum(peer_blur(maps[b, k], 11, np.float64), 1e-10))
            x, y = int(coords[b, k, 0]), int(coords[b, k, 1])
            if not (1 < x < W - 2 and 1 < y < H - 2):
                continue
            gradient = np.array([[L[y, x + 1] - L[y, x - 1]], [L[y + 1, x] - L[y - 1, x]]]) / 2
            d_xx = (L[y, x + 2] - 2 * L[y, x] + L[y, x - 2]) / 4
            d_yy = (L[y + 2, x] - 2 * L[y, x] + L[y - 2, x]) / 4
            d_xy = (L[y + 1, x + 1] - L[y - 1, x + 1] - L[y + 1, x - 1] + L[y - 1, x - 1]) / 4
            if d_xx * d_yy - d_xy**2 != 0:
                coords[b, k] -= (np.linalg.inv(np.array([[d_xx, d_xy], [d_xy, d_yy]])) @ gradient)[:, 0]
    return coords, scores


def peer_dark_udp(maps):
    """mmpose: per sample, whole maps blurred in float32 one by one, logarithm, Taylor steps of all joints at once."""
    coords, scores = peer_argmax(maps)
    coords[scores <= 0] = -1
    B, K, _, _ = maps.shape
    joints = np.arange(K)
    for b in range(B):
        blurred = np.stack([peer_blur(h, 11, np.float32) for h in maps[b]])
        L = np.pad(np.log(np.clip(blurred, 1e-3, 50)), ((0, 0), (1, 1), (1, 1)), mode="edge")
        x, y = coords[b].astype(int).T + 1
        c, right, left, down, up = (L[joints, y + j, x + i] for i, j in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)))
        gradient = np.stack([right - left, down - up], 1)[:, :, None] / 2
        d_xy = (L[joints, y + 1, x + 1] - right - down + 2 * c - left - up + L[joints, y - 1, x - 1]) / 2
        hessian = np.stack([right - 2 * c + left, d_xy, d_xy, down - 2 * c + up], 1).reshape(K, 2, 2)
        hessian += np.finfo(np.float32).eps * np.eye(2)
        step = (np.linalg.inv(hessian) @ gradient)[:, :, 0]
        coords[b] -= np.where((scores[b] > 0)[:, None], step, 0)
    return coords, scores


def peer_mirror_dark(maps, flipped, order):
    """HRNet's test-time flip, then DarkPose."""
    mirrored = flipped[:, order, :, ::-1]
    return peer_dark((maps + mirrored) * 0.5)


PEERS = {"argmax": peer_argmax, "quarter": peer_quarter, "dark": peer_dark, "dark_udp": peer_dark_udp}
STORED = {  # what the repositories themselves made of the stored maps
    "argmax": ("hrnet_max_coords", 0),
    "quarter": ("hrnet_quarter_coords", 1e-5),
    "dark": ("darkpose_dark_coords", 1e-3),
    "dark_udp": ("mmpose_dark_udp_k11_coords", 2e-3),
}


@pytest.fixture(scope="module")
def peers():
    """The functions above, after they have reproduced the stored outputs (where those are there)."""
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    if VECTORS.exists():
        with np.load(VECTORS) as vectors:
            for name, (stored, tolerance) in STORED.items():
                for prefix in "ab":
                    coords, scores = PEERS[name](vectors[f"{prefix}_heatmaps"])
                    difference = np.abs(coords - vectors[f"{prefix}_{stored}"]).max(-1)
                    assert np.array_equal(scores, vectors[f"{prefix}_mmpose_max_vals"])
                    assert (difference <= tolerance)[(scores > 0) | (name != "dark_udp")].all(), name
    return PEERS


# ---- data and measurement ----


def make_data(shape, device):
    """Noisy Gaussian maps, those of the mirrored crop, and which joints swap (1 and 2, 3 and 4, ...): pairs, order."""
    B, K, H, W = shape
    g = torch.Generator().manual_seed(0)
    coords = torch.rand(B, K, 2, generator=g) * torch.tensor([W - 1.0, H - 1.0])
    maps, _ = encode_heatmaps(coords, H, W)
    height = torch.rand(B, K, 1, 1, generator=g) * 0.7 + 0.3
    pairs = [(k, k + 1) for k in range(1, K - 1, 2)]
    order = [0, *(j for pair in pairs for j in reversed(pair)), *range(1 + 2 * len(pairs), K)]
    maps, flipped = (maps * height + 0.01 * torch.randn(shape, generator=g) for _ in range(2))
    return maps.to(device), flipped[:, order].flip(-1).contiguous().to(device), pairs, order


@pytest.fixture(scope="module")
def ratios(request):
    """Rows (what, shape, device, median s, times of amax), printed when the module is done."""
    rows = []
    yield rows
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        reporter.write_line("")
        reporter.write_line("decode_heatmaps: median time, and in units of h.flatten(2).amax(-1) on the same maps")
        for shape, device, function, who, seconds, ratio in sorted(rows):
            line = f"  {shape!s:<18} {device:<5} {function:<12} {who:<10} {seconds * 1e3:10.3f} ms {ratio:9.2f}"
            reporter.write_line(line)


def measure(benchmark, ratios, who, function, shape, device, run, amax, read_bytes):
    """Times `run`: its median into the benchmark's table, and against amax in turns into `ratios` and extra_info."""

    def timed(call):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once = min(timed(run) for _ in range(2))
    turns = []
    for _ in range(7):  # each in a block of its own: a slow rival leaves cold caches and sleeping threads behind
        medians = []
        for call, seconds in ((run, once), (amax, 1e-3)):
            block = [timed(call) for _ in range(int(min(30, max(2, 0.03 / seconds))))]
            medians.append(statistics.median(block[len(block) // 4 :]))
        turns.append(medians[0] / medians[1])
    ratio = statistics.median(turns)
    benchmark.group = f"decode_heatmaps {function} {shape} {device}"
    benchmark.pedantic(lambda: timed(run), rounds=int(min(100, max(3, 0.3 / once))), warmup_rounds=2)
    median = benchmark.stats.stats.median
    bytes_moved = read_bytes + 12 * shape[0] * shape[1]
    benchmark.extra_info.update(
        bytes=bytes_moved,
        bytes_formula="4 B K H W per set of maps read + 12 B K written",
        gb_per_s=round(bytes_moved / median / 1e9, 2),
        times_of_amax=round(ratio, 3),
        times_of_amax_spread=[round(min(turns), 3), round(max(turns), 3)],
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        instruction_set=native().instruction_set(),
    )
    ratios.append((shape, device, function, who, median, ratio))


def case(shape, function, device):
    """Arguments of decode_heatmaps for one of FUNCTIONS, the amax to compare with, and the bytes that must be read."""
    maps, flipped, pairs, order = make_data(shape, device)
    arguments = dict(FUNCTIONS[function])
    mirror = arguments.pop("mirror", False)
    if mirror:
        arguments |= {"flipped": flipped, "flip_pairs": pairs}
    read_bytes = maps.nbytes * (2 if mirror else 1)
    return maps, arguments, order, lambda: maps.flatten(2).amax(-1), read_bytes


cases = pytest.mark.parametrize("function", FUNCTIONS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
devices = pytest.mark.parametrize("device", DEVICES)


@devices
@shapes
def test_amax(benchmark, ratios, shape, device):
    """The plain read that everything is compared with; its own ratio shows the noise."""
    _, _, _, amax, read_bytes = case(shape, "argmax", device)
    measure(benchmark, ratios, "amax", "argmax", shape, device, amax, amax, read_bytes)


@devices
@cases
@shapes
def test_amil_fast(benchmark, ratios, shape, function, device):
    maps, arguments, _, amax, read_bytes = case(shape, function, device)
    expected = decode_heatmaps(maps, **arguments, backend="reference")
    actual = decode_heatmaps(maps, **arguments)
    assert torch.equal(actual[1], expected[1])
    assert (actual[0] - expected[0]).abs().max() < 1e-3

    def run():
        decode_heatmaps(maps, **arguments)

    measure(benchmark, ratios, "amil_fast", function, shape, device, run, amax, read_bytes)


@devices
@cases
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=lambda s: "x".join(map(str, s)))
def test_reference(benchmark, ratios, shape, function, device):
    """Vectorized PyTorch; refines in float64."""
    maps, arguments, _, amax, read_bytes = case(shape, function, device)

    def run():
        decode_heatmaps(maps, **arguments, backend="reference")

    measure(benchmark, ratios, "torch", function, shape, device, run, amax, read_bytes)


@cases
@shapes
def test_peer(benchmark, ratios, peers, shape, function):
    maps, arguments, order, amax, read_bytes = case(shape, function, "cpu")
    flipped = arguments["flipped"].numpy() if "flipped" in arguments else None
    array = maps.numpy()

    def run():
        return peer_mirror_dark(array, flipped, order) if function == "mirror+dark" else peers[function](array)

    coords, scores = run()
    expected = decode_heatmaps(maps, **arguments)
    assert np.array_equal(scores, expected[1].numpy())
    assert np.abs(coords - expected[0].numpy()).max() < 1e-3
    measure(benchmark, ratios, "peer", function, shape, "cpu", run, amax, read_bytes)
