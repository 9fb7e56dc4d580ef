"""The compiled backends of heatmap decoding: hand tensors to ``csrc`` as addresses, sizes and strides."""

import torch

from amil_fast.ops.backends import native
from amil_fast.ops.decode_heatmaps import CONVENTIONS, REFINEMENTS

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # csrc/runtime/dtype.h
_REFINE_CODES = {name: code for code, name in enumerate(REFINEMENTS)}
_CONVENTION_CODES = {name: code for code, name in enumerate(CONVENTIONS)}
_NO_STRIDES = (0, 0, 0, 0)


def _prepare(heatmaps, flipped, swap, shift_flipped, center, scale, affine, refine, convention, blur_kernel):
    """The outputs, the C++ description of the call, and the tensors it points into."""
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
        _DTYPE_CODES[heatmaps.dtype],
        (B, K, H, W),
        _REFINE_CODES[refine],
        _CONVENTION_CODES[convention],
        blur_kernel,
        _address(center),
        _address(scale),
        _address(affine),
        coords.data_ptr(),
        scores.data_ptr(),
    )
    return coords, scores, call, (center, scale, affine)


def decode_cpp(heatmaps, *arguments):
    """Returns ``(coords, scores)`` as the registered operator ``amil_fast::decode_heatmaps`` does."""
    coords, scores, call, kept_alive = _prepare(heatmaps, *arguments)
    native().decode_heatmaps_cpu(call, torch.get_num_threads())
    del kept_alive
    return coords, scores


def decode_cuda(heatmaps, *arguments):
    """The same on the current stream of the maps' device.

    ``kept_alive`` may go before the kernel has run: its memory is reused for work on the same stream only.
    """
    if not native().with_cuda:
        raise RuntimeError(
            "decode_heatmaps: the extension was built without CUDA (amil_fast.info() says why). Install the package "
            "where nvcc is found, or pass backend='reference'"
        )
    coords, scores, call, kept_alive = _prepare(heatmaps, *arguments)
    device = heatmaps.device.index
    native().decode_heatmaps_cuda(call, device, torch.cuda.current_stream(device).cuda_stream)
    del kept_alive
    return coords, scores


def _float32(tensor):
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()
