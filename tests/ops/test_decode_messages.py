"""decode_heatmaps: error messages."""

import pytest
import torch

from amil_fast import decode_heatmaps

MAPS = torch.zeros(2, 3, 8, 6)
BOX = {"center": torch.zeros(2, 2), "scale": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    ("error", "message", "maps", "arguments"),
    [
        (TypeError, "heatmaps: expected a torch.Tensor, got ndarray", MAPS.numpy(), {}),
        (TypeError, "heatmaps: expected dtype float16, .* got torch.int64", MAPS.long(), {}),
        (ValueError, r"heatmaps: expected shape \(B, K, H, W\), got \(3, 8, 6\)", MAPS[0], {}),
        (ValueError, r"heatmaps: expected maps of 1 to .* pixels, got shape \(2, 3, 0, 6\)", MAPS[:, :, :0], {}),
        (ValueError, r"heatmaps: expected maps of 1 to .*, got shape",
         MAPS[:1, :1, :1, :1].expand(1, 1, 2**16, 2**15), {}),
        (ValueError, r"heatmaps: expected maps of 1 to 2\*\*30 pixels, got shape",
         MAPS[:1, :1, :1, :1].expand(1, 1, 1, 2**31 - 1), {}),
        (ValueError, r"heatmaps: expected maps of 1 to 2\*\*30 pixels, got shape",
         MAPS[:1, :1, :1, :1].expand(1, 1, 2**31 - 1, 1), {}),
        (TypeError, "heatmaps: expected a dense tensor, got layout torch.sparse_coo", MAPS.to_sparse(), {}),
        (TypeError, "center: expected a dense tensor", MAPS, {**BOX, "center": torch.zeros(2, 2).to_sparse()}),
        (ValueError, "refine: expected one of 'none', 'quarter', 'dark', 'dark_udp', got 'udp'",
         MAPS, {"refine": "udp"}),
        (ValueError, "convention: expected one of 'hrnet', .*, got 'coco'", MAPS, {"convention": "coco"}),
        (TypeError, "blur_kernel: expected an int, got float", MAPS, {"blur_kernel": 11.0}),
        (TypeError, "blur_kernel: expected an int, got bool", MAPS, {"blur_kernel": True}),
        (ValueError, "blur_kernel: expected an odd number from 1 to 255, got 10", MAPS, {"blur_kernel": 10}),
        (ValueError, "blur_kernel: expected an odd number from 1 to 255, got -1", MAPS, {"blur_kernel": -1}),
        (ValueError, "blur_kernel: expected an odd number from 1 to 255, got 257", MAPS, {"blur_kernel": 257}),
        (TypeError, "flipped: expected a torch.Tensor, got list", MAPS, {"flipped": [1]}),
        (ValueError, r"flipped: expected shape \(2, 3, 8, 6\) of heatmaps, got \(2, 2, 8, 6\)",
         MAPS, {"flipped": MAPS[:, 1:]}),
        (TypeError, "flipped: expected dtype torch.float32 of heatmaps, got torch.float16",
         MAPS, {"flipped": MAPS.half()}),
        (ValueError, "flipped: expected device cpu of heatmaps, got meta", MAPS, {"flipped": MAPS.to("meta")}),
        (ValueError, r"flip_pairs: expected pairs of joints with flipped, .* got None", MAPS, {"flipped": MAPS}),
        (ValueError, r"flip_pairs: expected joints in 0..2, got the pair \(1, 3\)",
         MAPS, {"flipped": MAPS, "flip_pairs": [(1, 3)]}),
        (ValueError, r"flip_pairs: expected joints in 0..2, got the pair \(-1, 1\)",
         MAPS, {"flipped": MAPS, "flip_pairs": [(-1, 1)]}),
        (ValueError, "flip_pairs: .* at most once, .* pair .1, 2.",
         MAPS, {"flipped": MAPS, "flip_pairs": [(0, 1), (1, 2)]}),
        (ValueError, "flip_pairs: .* at most once, .* pair .1, 1.", MAPS, {"flipped": MAPS, "flip_pairs": [(1, 1)]}),
        (TypeError, "flip_pairs: expected a sequence of pairs", MAPS, {"flipped": MAPS, "flip_pairs": [(0, 1, 2)]}),
        (TypeError, "flip_pairs: expected a sequence of pairs", MAPS, {"flipped": MAPS, "flip_pairs": [0, 1]}),
        (TypeError, "flip_pairs: expected a sequence of pairs", MAPS, {"flipped": MAPS, "flip_pairs": 5}),
        (TypeError, "flip_pairs: .* got a torch.Tensor", MAPS, {"flipped": MAPS, "flip_pairs": torch.zeros(1, 2)}),
        (TypeError, "shift_flipped: expected a bool, got int", MAPS, {"shift_flipped": 1}),
        (ValueError, "scale: expected together with center, got None", MAPS, {"center": torch.zeros(2, 2)}),
        (ValueError, "center: expected together with scale, got None", MAPS, {"scale": torch.zeros(2, 2)}),
        (ValueError, "affine: .* got both", MAPS, {"affine": torch.zeros(2, 2, 3), **BOX}),
        (ValueError, r"center: expected shape \(2, 2\) \(B, 2\), got \(3, 2\)",
         MAPS, {**BOX, "center": torch.zeros(3, 2)}),
        (TypeError, "scale: expected a floating dtype, got torch.int64",
         MAPS, {**BOX, "scale": torch.ones(2, 2).long()}),
        (TypeError, "scale: expected a torch.Tensor, got float", MAPS, {**BOX, "scale": 1.0}),
        (ValueError, r"affine: expected shape \(2, 2, 3\) \(B, 2, 3\), got \(2, 3\)",
         MAPS, {"affine": torch.zeros(2, 3)}),
        (ValueError, "affine: expected device cpu of heatmaps, got meta",
         MAPS, {"affine": torch.zeros(2, 2, 3).to("meta")}),
        (ValueError, "backend: expected one of 'auto', .*, got 'triton'", MAPS, {"backend": "triton"}),
        (ValueError, "backend 'cuda' cannot serve this call: expected CUDA tensors, got .* 'cpu'",
         MAPS, {"backend": "cuda"}),
        (ValueError, "backend 'cpp' cannot serve this call: expected CPU tensors, got .* 'meta'",
         MAPS.to("meta"), {"backend": "cpp"}),
    ],
)  # fmt: skip
def test_error_messages(error, message, maps, arguments):
    with pytest.raises(error, match=message):
        decode_heatmaps(maps, **arguments)
