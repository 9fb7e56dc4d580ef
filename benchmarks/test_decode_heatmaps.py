"""decode_heatmaps against one pass over the maps (amax), vectorized PyTorch, and the NumPy/OpenCV code of the peers.

The figure of merit is the time relative to one pass over the input, ``h.flatten(2).amax(-1)`` on the same maps, timed
in turns in one process and printed at the end. Minimum bytes moved: every map is read once (both of a pair with flip
averaging), 12 bytes per joint are written. ``pytest benchmarks/test_decode_heatmaps.py --benchmark-only``
"""

import numpy as np
import pytest
import torch

from amil_fast import decode_heatmaps
from amil_fast.ops.backends import native
from benchmarks.rivals import DECODE_CASES, check_peers, decode_data, peer_decode
from benchmarks.timing import in_turns, ratio, timed

SHAPES = [(64, 17, 64, 48), (64, 133, 64, 48), (1, 17, 64, 48)]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def peers():
    """Requires OpenCV; verifies the peer algorithms against stored outputs."""
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    check_peers()


@pytest.fixture(scope="module")
def ratios(request):
    """Rows (shape, device, function, rival, median in s, ratio to amax), printed at the end of the module."""
    rows = []
    yield rows
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        reporter.write_line("")
        reporter.write_line(
            "decode_heatmaps: median time, and relative to one pass over the maps, h.flatten(2).amax(-1)"
        )
        for shape, device, function, who, seconds, relative in sorted(rows):
            line = f"  {shape!s:<18} {device:<5} {function:<12} {who:<10} {seconds * 1e3:10.3f} ms {relative:9.2f}"
            reporter.write_line(line)


def measure(benchmark, ratios, who, function, shape, device, run, amax, read_bytes):
    """Times ``run`` for pytest-benchmark, and in turns with ``amax`` for ``ratios`` and extra_info."""
    once = min(timed(run, device) for _ in range(2))
    turns = in_turns({"run": run, "amax": amax}, device, seconds=0.03, max_calls=30)
    of_turns = [a / b for a, b in zip(turns["run"], turns["amax"], strict=True)]
    relative = ratio(turns, "run", "amax")
    benchmark.group = f"decode_heatmaps {function} {shape} {device}"
    benchmark.pedantic(lambda: timed(run, device), rounds=int(min(100, max(3, 0.3 / once))), warmup_rounds=2)
    median = benchmark.stats.stats.median
    bytes_moved = read_bytes + 12 * shape[0] * shape[1]
    benchmark.extra_info.update(
        bytes=bytes_moved,
        bytes_formula="4 B K H W per set of maps read + 12 B K written",
        gb_per_s=round(bytes_moved / median / 1e9, 2),
        times_of_amax=round(relative, 3),
        times_of_amax_spread=[round(min(of_turns), 3), round(max(of_turns), 3)],
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        instruction_set=native().instruction_set(),
    )
    ratios.append((shape, device, function, who, median, relative))


def case(shape, function, device):
    """``(maps, arguments of decode_heatmaps, joint order, amax, bytes to read)`` of one of DECODE_CASES."""
    maps, flipped, pairs, order = decode_data(shape, device)
    arguments = dict(DECODE_CASES[function])
    flip = arguments.pop("flip", False)
    if flip:
        arguments |= {"flipped": flipped, "flip_pairs": pairs}
    read_bytes = maps.nbytes * (2 if flip else 1)
    return maps, arguments, order, lambda: maps.flatten(2).amax(-1), read_bytes


cases = pytest.mark.parametrize("function", DECODE_CASES)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
devices = pytest.mark.parametrize("device", DEVICES)


@devices
@shapes
def test_amax(benchmark, ratios, shape, device):
    """The baseline itself: one pass over the maps. Its ratio to itself shows the run-to-run noise."""
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
    """The reference backend: vectorized PyTorch, refinement in float64."""
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
        return peer_decode(function, array, flipped, order)

    coords, scores = run()
    expected = decode_heatmaps(maps, **arguments)
    assert np.array_equal(scores, expected[1].numpy())
    assert np.abs(coords - expected[0].numpy()).max() < 1e-3
    measure(benchmark, ratios, "peer", function, shape, "cpu", run, amax, read_bytes)
