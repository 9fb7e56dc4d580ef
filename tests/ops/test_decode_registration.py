"""decode_heatmaps as a registered operator: opcheck, fake tensors, torch.compile, tracing, missing CUDA."""

import pytest
import torch

import amil_fast
from amil_fast import decode_heatmaps
from amil_fast.ops.backends import native
from amil_fast.ops.decode_heatmaps_native import _prepare
from tests.ops.helpers import (
    DTYPES,
    lay_out,
    make_maps,
    make_transform,
)

on_both = pytest.mark.parametrize("backend", ("reference", "cpp"))


OPERATOR_CALLS = [
    {},
    {"refine": "dark", "convention": "mmpose", "flipped": make_maps("noisy", (2, 3, 12, 10), 1), "swap": [1, 0, 2]},
    {"refine": "dark_udp", "blur_kernel": 17, **make_transform("box", 2)},
    {"refine": "quarter", "convention": "darkpose", **make_transform("affine", 2)},
]


@on_both
@pytest.mark.parametrize("call", range(len(OPERATOR_CALLS)))
def test_opcheck(backend, call):
    values = {"flipped": None, "swap": [], "shift_flipped": False, "center": None, "scale": None, "affine": None}
    values |= {"refine": "none", "convention": "hrnet", "blur_kernel": 11, **OPERATOR_CALLS[call]}
    maps = lay_out(make_maps("noisy", (2, 3, 12, 10)), "channels_last")
    torch.library.opcheck(torch.ops.amil_fast.decode_heatmaps.default, (maps, *values.values(), backend))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_metadata_matches_real(dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    maps = make_maps("noisy", (2, 3, 12, 10), dtype=dtype)
    real = decode_heatmaps(maps)
    with FakeTensorMode() as mode:
        fake = decode_heatmaps(mode.from_tensor(maps))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)
    on_meta = decode_heatmaps(maps.to("meta"), refine="dark")
    assert on_meta[0].shape == real[0].shape and on_meta[0].device.type == "meta"


@on_both
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend, dynamic):
    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def decode(maps, flipped, center, scale):
        coords, scores = decode_heatmaps(
            maps * 2, refine="dark", flipped=flipped, flip_pairs=[(0, 1)], center=center, scale=scale, backend=backend
        )
        return coords + 1, scores

    for H in (12, 13):
        maps, flipped = make_maps("noisy", (2, 3, H, 10)), make_maps("noisy", (2, 3, H, 10), 1)
        box = make_transform("box", 2)
        coords, scores = decode(maps.requires_grad_(), flipped, box["center"], box["scale"])
        arguments = {"refine": "dark", "flipped": flipped, "flip_pairs": [(0, 1)], "backend": backend, **box}
        expected, expected_scores = decode_heatmaps(maps.detach() * 2, **arguments)
        assert torch.equal(coords, expected + 1) and torch.equal(scores, expected_scores)
        assert not coords.requires_grad


def test_tracers_record_the_operator():
    """The path that bypasses the dispatcher is not taken during tracing."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda maps: decode_heatmaps(maps, refine="quarter"))(make_maps("noisy", (2, 3, 12, 10)))
    assert "amil_fast.decode_heatmaps" in graph.code
    other = make_maps("noisy", (2, 3, 12, 10), 9)
    expected = decode_heatmaps(other, refine="quarter")
    assert all(torch.equal(a, b) for a, b in zip(graph(other), expected, strict=True))


@pytest.mark.skipif(not native().with_cuda, reason="the extension was built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="covered by tests/ops/test_decode_gpu.py on CUDA devices")
def test_cuda_backend_without_device_raises():
    _, _, call, _kept_alive = _prepare(torch.zeros(2, 3, 8, 6), None, [], False, None, None, None, "none", "hrnet", 11)
    with pytest.raises(RuntimeError, match=r"decode_heatmaps on CUDA: .*(driver|device)"):
        native().decode_heatmaps_cuda(call, 0, 0)


def test_public_names_refer_to_one_function():
    assert amil_fast.decode_heatmaps is decode_heatmaps is amil_fast.ops.decode_heatmaps
