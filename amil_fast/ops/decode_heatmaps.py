"""Heatmap decoding: the public function and its registration as ``torch.ops.amil_fast.decode_heatmaps``."""

from collections.abc import Sequence

import torch

from amil_fast.ops import backends
from amil_fast.ops.bags import FLOAT_DTYPES, check_strided
from amil_fast.ops.decode_heatmaps_native import CONVENTIONS, REFINEMENTS, decode_cpp, decode_cuda
from amil_fast.ops.decode_heatmaps_reference import decode_heatmaps_reference
from amil_fast.ops.flip import check_pairs
from amil_fast.ops.registration import batch_first, fold_batch, non_differentiable, register_function

MAX_BLUR_KERNEL = 255
# Positions within a map are 32-bit integers, with room for the steps of loops and the halo of the blur.
MAX_PIXELS = 2**30


def _why_not_cuda(device):
    if device != "cuda":
        return f"expected CUDA tensors, got a tensor on {device!r}"
    if (reason := backends.why_not_native()) is not None:
        return reason
    return None if backends.native().with_cuda else "the extension was built without CUDA (see amil_fast.info())"


_SUPPORTED = {
    "auto": lambda device: {"cpu": "cpp", "cuda": "cuda"}.get(device, "reference"),
    "reference": lambda device: None,
    "cpp": lambda device: None if device == "cpu" else f"expected CPU tensors, got a tensor on {device!r}",
    "cuda": _why_not_cuda,
}


def decode_heatmaps(
    heatmaps: torch.Tensor,
    *,
    refine: str = "none",
    convention: str = "hrnet",
    blur_kernel: int = 11,
    flipped: torch.Tensor | None = None,
    flip_pairs: Sequence[tuple[int, int]] | None = None,
    shift_flipped: bool = False,
    center: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    affine: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Decodes heatmaps to joint coordinates: arg-max, sub-pixel refinement, flip test and transform to the image.

    ``convention="hrnet"``, ``refine="none"`` without a transform equals ``heatmaps.flatten(2).argmax(-1)`` converted to
    (x, y), with ``heatmaps.amax((2, 3))`` as scores. The other settings reproduce the NumPy and OpenCV post-processing
    of HRNet, DarkPose and mmpose.

    Args:
        heatmaps: ``(B, K, H, W)``, float16, bfloat16, float32 or float64, CPU or CUDA, any strides; fastest with unit
            stride along W. Up to 2³⁰ pixels per map.
        refine: refinement of the position of the maximum:

            - ``"none"``: none;
            - ``"quarter"``: 0.25 px toward the larger neighbor in x and in y;
            - ``"dark"``: a Newton step on the logarithm of the Gaussian-blurred map, second derivatives over ±2 px
              (DarkPose, mmpose's ``refine_keypoints_dark``); none within 2 px of the edge;
            - ``"dark_udp"``: the same over ±1 px with edge padding (mmpose's ``refine_keypoints_dark_udp``).

        convention: project whose rules are reproduced:

            - near the edge, ``"quarter"`` shifts both coordinates or none (``"hrnet"``, ``"darkpose"``), or each
              coordinate separately (``"mmpose"``);
            - a map without a positive maximum gives (0, 0) (``"hrnet"``, ``"darkpose"``) or (-1, -1) (``"mmpose"``) in
              heatmap pixels, unrefined, which is transformed to the image like any other point;
            - the formula of the transform by ``center`` and ``scale``, see below.

        blur_kernel: size k in pixels of the blur of ``"dark"`` and ``"dark_udp"``, odd, 1 to 255: OpenCV's Gaussian of
            that size with standard deviation ``0.3 ((k - 1) / 2 - 1) + 0.8`` (OpenCV's table for k <= 9). 1: no blur.
        flipped: ``(B, K, H, W)``, heatmaps of the flipped crop, with dtype and device of ``heatmaps``. They are flipped
            back and averaged with ``heatmaps`` without an intermediate tensor (flip test).
        flip_pairs: pairs of joints that change places in a flip, such as ``[(1, 2), (3, 4)]``; required with
            ``flipped``, ``()`` for none.
        shift_flipped: shift the flipped-back heatmaps one pixel to the right, as HRNet does (``SHIFT_HEATMAP``). Not
            for models trained with unbiased coordinates (UDP, DARK).
        center: ``(B, 2)``, floating point, center of the crop in image pixels.
        scale: ``(B, 2)``, floating point, size of the crop in units of 200 px (HRNet). With p = heatmap pixels, c =
            center, s = 200 scale: ``"hrnet"`` :math:`(p - [W, H] / 2) \, s_x / W + c`; ``"darkpose"``
            :math:`(p - [W - 1, H - 1] / 2) \, (s_x - 1) / (W - 1) + c`; ``"mmpose"``
            :math:`p / [W, H] \, s + c - s / 2`, and for ``"dark_udp"`` :math:`p / [W - 1, H - 1] \, s + c - s / 2`.
            For maps of width (height) 1, W - 1 (H - 1) is replaced by 1.
        affine: ``(B, 2, 3)``, floating point, maps heatmap pixels (x, y, 1) to the image; instead of ``center`` and
            ``scale``.
        backend: ``"auto"`` (``"cpp"`` on a CPU, ``"cuda"`` on CUDA, otherwise ``"reference"``), ``"reference"`` (plain
            PyTorch), ``"cpp"`` or ``"cuda"``.

    Returns:
        ``coords (B, K, 2)`` float32, (x, y) in image pixels, or in heatmap pixels without a transform, and
        ``scores (B, K)`` float32, the maxima.

    Raises:
        TypeError: an argument of the wrong type or dtype, or a sparse tensor.
        ValueError: shapes or devices do not match; maps without pixels or too large; an unknown name; an even or too
            large kernel; ``flipped`` without ``flip_pairs``; a joint out of range or in two pairs; ``center`` without
            ``scale`` or vice versa; both transforms; a backend that cannot serve the call.
        RuntimeError: ``backward()`` through the result, or forward-mode AD of the arguments. Decoding is not
            differentiable, see :func:`soft_argmax`; under ``torch.compile`` the result is a constant.

    Notes:
        Ties go to the first maximum in row-major order. NaN in a map, or in the flipped map averaged with it, gives NaN
        coordinates and a NaN score. ``"dark"`` and ``"dark_udp"`` do not refine infinite maxima and maxima with a
        singular Hessian. Averages and blur are computed in float32 (float64 for float64). Results are deterministic
        and independent of the number of threads, the rest of the batch and the CPU; CUDA performs the same operations
        in the same order, without synchronization, so the call can be captured in a CUDA graph. ``B = 0`` and
        ``K = 0`` are supported.

    Sources: Sun et al., HRNet, CVPR 2019; Zhang et al., DARK, CVPR 2020; Huang et al., UDP, CVPR 2020.
    """
    settings = (refine, convention, blur_kernel, backend)
    _check_arguments(heatmaps, flipped, shift_flipped, center, scale, affine, *settings)
    swap = []
    if flipped is not None:
        if flip_pairs is None:
            raise ValueError("flip_pairs: expected pairs of joints with flipped, () for none, got None")
        swap = check_pairs(flip_pairs, heatmaps.shape[1])
    backend = backends.choose(backend, heatmaps.device.type, _SUPPORTED)

    arguments: tuple = (heatmaps, flipped, swap, shift_flipped, center, scale, affine, *settings[:-1], backend)
    tensors = (heatmaps, flipped, center, scale, affine)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if needs_grad and torch.compiler.is_compiling():
        arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    if needs_grad or backends.dispatcher_has_work(*tensors):
        return torch.ops.amil_fast.decode_heatmaps.default(*arguments)
    return _decode(*arguments)


def _check_arguments(heatmaps, flipped, shift_flipped, center, scale, affine, refine, convention, blur_kernel, backend):
    _check_maps(heatmaps, "heatmaps")
    if refine not in REFINEMENTS:
        raise ValueError(f"refine: expected one of {', '.join(map(repr, REFINEMENTS))}, got {refine!r}")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected one of {', '.join(map(repr, CONVENTIONS))}, got {convention!r}")
    if not isinstance(blur_kernel, int) or isinstance(blur_kernel, bool):
        raise TypeError(f"blur_kernel: expected an int, got {type(blur_kernel).__name__}")
    if not 1 <= blur_kernel <= MAX_BLUR_KERNEL or blur_kernel % 2 == 0:
        raise ValueError(f"blur_kernel: expected an odd number from 1 to {MAX_BLUR_KERNEL}, got {blur_kernel}")
    if not isinstance(shift_flipped, bool):
        raise TypeError(f"shift_flipped: expected a bool, got {type(shift_flipped).__name__}")
    if flipped is not None:
        _check_maps(flipped, "flipped")
        if flipped.shape != heatmaps.shape:
            raise ValueError(f"flipped: expected shape {tuple(heatmaps.shape)} of heatmaps, got {tuple(flipped.shape)}")
        if flipped.dtype != heatmaps.dtype:
            raise TypeError(f"flipped: expected dtype {heatmaps.dtype} of heatmaps, got {flipped.dtype}")
        _check_device(flipped, "flipped", heatmaps)
    if center is not None or scale is not None:
        if affine is not None:
            raise ValueError("affine: expected affine, or center and scale, got both")
        if scale is None or center is None:
            given, missing = ("center", "scale") if scale is None else ("scale", "center")
            raise ValueError(f"{missing}: expected together with {given}, got None")
        _check_transform(center, "center", (heatmaps.shape[0], 2), "(B, 2)", heatmaps)
        _check_transform(scale, "scale", (heatmaps.shape[0], 2), "(B, 2)", heatmaps)
    elif affine is not None:
        _check_transform(affine, "affine", (heatmaps.shape[0], 2, 3), "(B, 2, 3)", heatmaps)
    backends.check_name(backend, _SUPPORTED)


def _check_maps(tensor, name):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected dtype float16, bfloat16, float32 or float64, got {tensor.dtype}")
    shape = tensor.shape
    if len(shape) != 4:
        raise ValueError(f"{name}: expected shape (B, K, H, W), got {tuple(shape)}")
    if not 0 < shape[2] * shape[3] <= MAX_PIXELS:
        raise ValueError(f"{name}: expected maps of 1 to 2**30 pixels, got shape {tuple(shape)}")
    check_strided(tensor, name)


def _check_transform(tensor, name, shape, letters, heatmaps):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} {letters}, got {tuple(tensor.shape)}")
    check_strided(tensor, name)
    _check_device(tensor, name, heatmaps)


def _check_device(tensor, name, heatmaps):
    if tensor.device != heatmaps.device:
        raise ValueError(f"{name}: expected device {heatmaps.device} of heatmaps, got {tensor.device}")


# The registered operator; `swap[k]` is the joint of `flipped` averaged with joint k. Empty without `flipped`.
_library = torch.library.Library("amil_fast", "FRAGMENT")
_library.define(
    "decode_heatmaps(Tensor heatmaps, Tensor? flipped, int[] swap, bool shift_flipped, Tensor? center, Tensor? scale,"
    " Tensor? affine, str refine, str convention, int blur_kernel, str backend) -> (Tensor coords, Tensor scores)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


_IMPLEMENTATIONS = {"reference": decode_heatmaps_reference, "cpp": decode_cpp, "cuda": decode_cuda}


def _decode(heatmaps, flipped, swap, shift_flipped, center, scale, affine, refine, convention, blur_kernel, backend):
    return _IMPLEMENTATIONS[backend](
        heatmaps, flipped, swap, shift_flipped, center, scale, affine, refine, convention, blur_kernel
    )


def _check_registered(
    heatmaps, flipped, swap, shift_flipped, center, scale, affine, refine, convention, blur_kernel, backend
):
    """Checks what :func:`decode_heatmaps` checks, for calls of the registered operator."""
    _check_arguments(heatmaps, flipped, shift_flipped, center, scale, affine, refine, convention, blur_kernel, backend)
    K = heatmaps.shape[1]
    if flipped is not None and (len(swap) != K or not all(0 <= k < K for k in swap)):
        raise ValueError(f"swap: expected {K} joints in 0..{K - 1}, got {swap}")
    if backend == "auto":
        raise ValueError("backend: expected the name of an implementation, got 'auto'")


def _decode_registered(*arguments):
    _check_registered(*arguments)
    backends.choose(arguments[-1], arguments[0].device.type, _SUPPORTED)
    return _decode(*arguments)


_library.impl("decode_heatmaps", _decode_registered, "CompositeExplicitAutograd")


@torch.library.register_fake("amil_fast::decode_heatmaps", lib=_library)
def _decode_fake(heatmaps, *others):
    _check_registered(heatmaps, *others)
    B, K = heatmaps.shape[:2]
    return heatmaps.new_empty(B, K, 2, dtype=torch.float32), heatmaps.new_empty(B, K, dtype=torch.float32)


def _decode_vmap(info, in_dims, heatmaps, flipped, swap, shift_flipped, center, scale, affine, *settings):
    tensor_dims = (in_dims[0], in_dims[1], *in_dims[4:7])
    tensors = batch_first(info, tensor_dims, (heatmaps, flipped, center, scale, affine))
    folded = fold_batch(tensors)
    coords, scores = torch.ops.amil_fast.decode_heatmaps.default(
        *folded[:2], swap, shift_flipped, *folded[2:], *settings
    )
    sizes = tensors[0].shape[:2]
    return (coords.unflatten(0, sizes), scores.unflatten(0, sizes)), (0, 0)


_message = (
    "decode_heatmaps is not differentiable: the position of a maximum has no derivative. For a loss on coordinates use "
    "amil_fast.soft_argmax; otherwise pass heatmaps.detach() or use torch.no_grad()"
)
_DecodeHeatmaps = non_differentiable(torch.ops.amil_fast.decode_heatmaps.default, _message, _decode_vmap)
register_function(_library, "decode_heatmaps", _DecodeHeatmaps)
