"""Compiled backends of heatmap decoding: pass tensors to ``csrc`` as addresses, sizes and strides."""

import torch

from amil_fast.ops.backends import native
from amil_fast.ops.bags import DTYPE_CODES

# Name -> code in csrc/decode_heatmaps/decode_heatmaps.h.
REFINEMENTS = {"none": 0, "quarter": 1, "dark": 2, "dark_udp": 3}
CONVENTIONS = {"hrnet": 0, "darkpose": 1, "mmpose": 2}
_NO_STRIDES = (0, 0, 0, 0)


def _prepare(heatmaps, flipped, swap, shift_flipped, center, scale, affine, refine, convention, blur_kernel):
    """Outputs, C++ description of the call, and the tensors whose memory it refers to."""
    B, K, H, W = heatmaps.shape
    coords = torch.empty((B, K, 2), dtype=torch.float32, device=heatmaps.device)
    scores = torch.empty((B, K), dtype=torch.float32, device=heatmaps.device)
    center, scale, affine = _float32(center), _float32(scale), _float32(affine)
    call = native().DecodeCall(
        heatmaps.data_ptr(),
        heatmaps.stride(),
        0 if flipped is None else flipped.data_ptr(),
        _NO_STRIDES if flipped is None else flipped.stride(),
        swap,
        shift_flipped,
        DTYPE_CODES[heatmaps.dtype],
        (B, K, H, W),
        REFINEMENTS[refine],
        CONVENTIONS[convention],
        blur_kernel,
        _address(center),
        _address(scale),
        _address(affine),
        coords.data_ptr(),
        scores.data_ptr(),
    )
    return coords, scores, call, (center, scale, affine)


def decode_cpp(heatmaps, *arguments):
    """Returns ``(coords, scores)`` of the registered operator ``amil_fast::decode_heatmaps``."""
    coords, scores, call, kept_alive = _prepare(heatmaps, *arguments)
    native().decode_heatmaps_cpu(call, torch.get_num_threads())
    del kept_alive
    return coords, scores


def decode_cuda(heatmaps, *arguments):
    """Like :func:`decode_cpp`, on the current stream of the heatmaps' device.

    ``kept_alive`` can be freed before the kernel runs, since the allocator reuses its memory on the same stream only.
    """
    if not native().with_cuda:
        raise RuntimeError(
            "decode_heatmaps: the extension was built without CUDA (see amil_fast.info()). Install the package "
            "where nvcc is available, or pass backend='reference'"
        )
    coords, scores, call, kept_alive = _prepare(heatmaps, *arguments)
    device = heatmaps.device.index
    with torch.cuda.device(device):  # afterwards returns to the caller's device without creating a context there
        native().decode_heatmaps_cuda(call, device, torch.cuda.current_stream(device).cuda_stream)
    del kept_alive
    return coords, scores


def _float32(tensor):
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()
