"""CUDA backend on a GPU: equality with the C++ backend, streams, graphs, large offsets."""

import pytest
import torch

from amil_fast import decode_heatmaps
from tests.ops.helpers import CONVENTIONS, DTYPES, KINDS, LAYOUTS, REFINEMENTS, lay_out, make_maps, make_transform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a torch built without CUDA"),
]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fills uninitialized memory with NaN, which exposes elements that the kernel does not write."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def on_gpu(arguments):
    """Copies of the tensors on the GPU, with the same strides and alignment."""

    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        storage = torch.empty(value.untyped_storage().nbytes() // value.itemsize, dtype=value.dtype, device="cuda")
        return storage.as_strided(value.shape, value.stride(), value.storage_offset()).copy_(value)

    return {name: move(value) for name, value in arguments.items()}


def compare(maps, **arguments):
    expected = decode_heatmaps(maps, **arguments, backend="cpp")
    actual = decode_heatmaps(**on_gpu({"heatmaps": maps, **arguments}), backend="cuda")
    for a, e in zip(actual, expected, strict=True):
        assert a.device.type == "cuda"
        assert torch.equal(a.cpu().nan_to_num(-7.0), e.nan_to_num(-7.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("refine", REFINEMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_cpu(kind, refine, dtype):
    for i, (H, W) in enumerate(((64, 48), (20, 24), (97, 101), (1, 1), (5, 3))):
        maps = make_maps(kind, (4, 17, H, W), i, dtype)
        compare(maps, refine=refine, convention=CONVENTIONS[i % 3], blur_kernel=(11, 3, 17, 255, 11)[i])


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
@pytest.mark.parametrize("flip", ["no", "plain", "shift"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_flips_and_transforms(layout, flip, dtype):
    for refine, transform in (("dark", "box"), ("dark_udp", "affine"), ("quarter", "box"), ("none", "none")):
        maps = lay_out(make_maps("noisy", (3, 5, 40, 32), 1, dtype), layout)
        arguments = {"refine": refine, **make_transform(transform, 3)}
        if flip != "no":
            flipped = lay_out(make_maps("noisy", (3, 5, 40, 32), 2, dtype), layout)
            arguments |= {"flipped": flipped, "flip_pairs": [(1, 4)], "shift_flipped": flip == "shift"}
        compare(maps, **arguments)


def call():
    arguments = {"heatmaps": make_maps("noisy", (8, 17, 64, 48)), "flipped": make_maps("noisy", (8, 17, 64, 48), 1)}
    arguments = on_gpu({**arguments, **make_transform("box", 8)})
    return {**arguments, "flip_pairs": [(1, 2), (3, 4)], "refine": "dark", "convention": "darkpose"}


@pytest.mark.parametrize("refine", REFINEMENTS)
def test_reference_on_the_gpu(refine):
    maps = make_maps("noisy", (3, 5, 40, 32), 4)
    expected = decode_heatmaps(maps, refine=refine, backend="reference")
    actual = decode_heatmaps(maps.cuda(), refine=refine, backend="reference")
    assert torch.equal(actual[1].cpu(), expected[1])
    assert (actual[0].cpu() - expected[0]).abs().max() < 1e-4


def test_bit_equal_repeats():
    """Many maps, so that the order of blocks varies between runs."""
    maps = make_maps("noisy", (256, 17, 64, 48)).cuda()
    expected = decode_heatmaps(maps, refine="dark_udp")
    for _ in range(20):
        actual = decode_heatmaps(maps, refine="dark_udp")
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_autocast():
    """Coordinates and scores are float32 and unchanged under autocast."""
    maps = make_maps("noisy", (3, 5, 40, 32)).cuda()
    expected = decode_heatmaps(maps, refine="dark")
    with torch.autocast("cuda", torch.bfloat16):
        actual = decode_heatmaps(maps, refine="dark")
    assert all(a.dtype == torch.float32 and torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_auto_is_cuda():
    maps = make_maps("noisy", (3, 5, 40, 32)).cuda()
    for a, e in zip(decode_heatmaps(maps), decode_heatmaps(maps, backend="cuda"), strict=True):
        assert torch.equal(a, e)


def test_no_synchronization():
    arguments = call()
    decode_heatmaps(**arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_heatmaps(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph():
    arguments = call()
    decode_heatmaps(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        coords, scores = decode_heatmaps(**arguments)
    arguments["heatmaps"].copy_(make_maps("noisy", (8, 17, 64, 48), 7))
    graph.replay()
    torch.cuda.synchronize()
    expected = decode_heatmaps(**arguments)
    assert torch.equal(coords, expected[0]) and torch.equal(scores, expected[1])


def test_runs_on_the_current_stream():
    maps = torch.zeros(64, 17, 64, 48, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # pending work on this stream; on any other one the maps would still be zero
        maps[:, :, 20, 30] = 1.0
        coords, scores = decode_heatmaps(maps)
    stream.synchronize()
    assert (scores == 1).all() and (coords == torch.tensor([30.0, 20.0], device="cuda")).all()


def test_offsets_beyond_32_bits():
    joints, pixels = 17, 256 * 256
    batch = 2**31 // (joints * pixels) + 2
    if torch.cuda.mem_get_info()[0] < 2 * batch * joints * pixels + 2**30:
        pytest.skip("less than 6 GB of free GPU memory")
    maps = torch.zeros(batch, joints, 256, 256, device="cuda", dtype=torch.float16)
    maps[-1, -1, 200, 100] = 1.0
    coords, scores = decode_heatmaps(maps, refine="quarter")
    assert coords[-1, -1].tolist() == [100, 200] and scores[-1, -1] == 1 and scores.sum() == 1


def test_other_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    maps = make_maps("noisy", (2, 3, 20, 20))
    expected = decode_heatmaps(maps, refine="dark")
    actual = decode_heatmaps(maps.to("cuda:1"), refine="dark")
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True))


def test_compiles():
    arguments = call()
    expected = decode_heatmaps(**arguments)
    actual = torch.compile(decode_heatmaps, fullgraph=True)(**arguments)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
