"""Heatmap decoding: the public function and its registration as ``torch.ops.amil_fast.decode_heatmaps``."""

import functools

import torch

from amil_fast.ops import backends
from amil_fast.ops.bags import FLOAT_DTYPES
from amil_fast.ops.flip import check_pairs

REFINEMENTS = ("none", "quarter", "dark", "dark_udp")  # in the order of csrc/decode_heatmaps/decode_heatmaps.h
CONVENTIONS = ("hrnet", "darkpose", "mmpose")
MAX_BLUR_KERNEL = 255


def _why_not_cuda(device):
    if device != "cuda":
        return f"it runs on CUDA tensors, got a tensor on {device!r}"
    if (reason := backends.why_not_native()) is not None:
        return reason
    return None if backends.native().with_cuda else "the extension was built without CUDA (see amil_fast.info())"


_SUPPORTED = {
    "auto": lambda device: {"cpu": "cpp", "cuda": "cuda"}.get(device, "reference"),
    "reference": lambda device: None,
    "cpp": lambda device: None if device == "cpu" else f"it runs on CPU tensors, got a tensor on {device!r}",
    "cuda": _why_not_cuda,
}


def decode_heatmaps(
    heatmaps,
    *,
    refine="none",
    convention="hrnet",
    blur_kernel=11,
    flipped=None,
    flip_pairs=None,
    shift_flipped=False,
    center=None,
    scale=None,
    affine=None,
    backend="auto",
):
    r"""Finds each joint's position in its heatmap, to a fraction of a pixel, and takes it back to the image.

    ``convention="hrnet"``, ``refine="none"`` without a transform equals ``heatmaps.flatten(2).argmax(-1)`` written as
    (x, y), with ``heatmaps.amax((2, 3))`` as scores. The other settings reproduce what HRNet, DarkPose and mmpose do
    in NumPy and OpenCV.

    Args:
        heatmaps: ``(B, K, H, W)``, float16, bfloat16, float32 or float64, CPU or CUDA, any strides. Unit stride along
            W is read fastest.
        refine: what is added to the position of the maximum:

            - ``"none"``: nothing;
            - ``"quarter"``: 0.25 px toward the greater neighbor in x and in y;
            - ``"dark"``: the Newton step on the logarithm of the Gaussian-blurred map, second derivatives over ±2 px
              (DarkPose, mmpose's ``refine_keypoints_dark``); none within 2 px of the edge;
            - ``"dark_udp"``: the same over ±1 px with the map continued past its edge (mmpose's
              ``refine_keypoints_dark_udp``).
        convention: the project whose rules are followed:

            - near the edge, ``"quarter"`` moves both coordinates or none (``"hrnet"``, ``"darkpose"``), or decides
              for each (``"mmpose"``);
            - where a map's maximum is not positive, the joint is at (0, 0) (``"hrnet"``, ``"darkpose"``) or (-1, -1)
              (``"mmpose"``) in heatmap pixels, unrefined, and like any other point taken to the image;
            - ``center`` and ``scale`` map to the image by its formula (below).
        blur_kernel: size in pixels of the blur of ``"dark"`` and ``"dark_udp"``, odd, 1 to 255: OpenCV's Gaussian of
            that size, standard deviation ``0.3 ((k - 1) / 2 - 1) + 0.8`` (for k <= 9 OpenCV's table). 1 doesn't blur.
        flipped: ``(B, K, H, W)``, the heatmaps of the mirrored crop, dtype and device of ``heatmaps``: they are
            mirrored back and averaged in on the fly, ``(heatmaps + mirrored back) / 2``.
        flip_pairs: the pairs of joints that swap places in the mirror, such as ``[(1, 2), (3, 4)]``; needed with
            ``flipped``, ``()`` where no joints swap.
        shift_flipped: shift the mirrored-back maps by one pixel to the right, as HRNet does (its ``SHIFT_HEATMAP``).
            Wrong for models trained with UDP's or DARK's unbiased mirror.
        center, scale: ``(B, 2)``, floating: center of the crop in image pixels and its size in units of 200 px
            (HRNet's). With p = heatmap pixels, c = center, s = 200 scale: ``"hrnet"``
            :math:`(p - [W, H] / 2) \, s_x / W + c`; ``"darkpose"``
            :math:`(p - [W - 1, H - 1] / 2) \, (s_x - 1) / (W - 1) + c`; ``"mmpose"`` :math:`p / [W, H] \, s + c - s /
            2`, and for ``"dark_udp"`` :math:`p / [W - 1, H - 1] \, s + c - s / 2`. A map one pixel wide (high) counts
            as W - 1 (H - 1) = 1.
        affine: ``(B, 2, 3)``, floating, maps heatmap pixels (x, y, 1) to the image; instead of ``center`` and
            ``scale``.
        backend: ``"auto"`` (``"cpp"`` on a CPU, ``"cuda"`` on CUDA, else ``"reference"``), ``"reference"`` (plain
            PyTorch), ``"cpp"`` (CPU) or ``"cuda"``.

    Returns:
        ``coords (B, K, 2)`` float32, (x, y) in image pixels, or heatmap pixels without a transform; ``scores (B, K)``
        float32, the maps' maxima.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that don't fit together, maps without pixels, an unknown name, an even or too
            large kernel, ``flipped`` without ``flip_pairs``, a joint out of range or in two pairs, ``center`` without
            ``scale`` or the reverse, both transforms, a backend that can't serve the call.
        RuntimeError: on ``backward()`` through the result. Decoding has no derivative; see
            :func:`amil_fast.soft_argmax`. (Under ``torch.compile`` the result is a constant.)

    Notes:
        Of equal maxima the first in row-major order wins. A NaN anywhere in a map, or in the one averaged into it,
        makes its coordinates and its score NaN. An infinite maximum is found but not refined by ``"dark"`` and
        ``"dark_udp"``; neither is one where the Hessian is singular. Averages and blur are taken in float32 (float64
        for float64); results are bit-equal from run to run, for any number of threads, any batch around a map and
        any CPU, and CUDA does the same operations in the same order. On CUDA nothing waits for the device, so the
        call can be captured in a CUDA graph. ``B = 0`` and ``K = 0`` are legal.

    Sources: Sun et al., HRNet, CVPR 2019; Zhang et al., DARK, CVPR 2020; Huang et al., UDP, CVPR 2020.
    """
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
    swap = []
    if flipped is not None:
        _check_maps(flipped, "flipped")
        if flipped.shape != heatmaps.shape:
            raise ValueError(f"flipped: expected shape {tuple(heatmaps.shape)} of heatmaps, got {tuple(flipped.shape)}")
        if flipped.dtype != heatmaps.dtype:
            raise TypeError(f"flipped: expected dtype {heatmaps.dtype} of heatmaps, got {flipped.dtype}")
        _check_device(flipped, "flipped", heatmaps)
        if flip_pairs is None:
            raise ValueError("flip_pairs: expected pairs of joints with flipped (() where no joints swap), got None")
        swap = check_pairs(flip_pairs, heatmaps.shape[1])
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
    backend = backends.choose(backend, heatmaps.device.type, _SUPPORTED)

    settings = (refine, convention, blur_kernel, backend)
    arguments = (heatmaps, flipped, swap, shift_flipped, center, scale, affine, *settings)
    tensors = [t for t in (heatmaps, flipped, center, scale, affine) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        if not torch.compiler.is_compiling():
            return _Refusal.apply(*arguments)
        arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    if backends.dispatcher_has_work(*tensors):
        return torch.ops.amil_fast.decode_heatmaps.default(*arguments)
    return _decode(*arguments)


def _check_maps(tensor, name):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected dtype float16, bfloat16, float32 or float64, got {tensor.dtype}")
    shape = tensor.shape
    if len(shape) != 4:
        raise ValueError(f"{name}: expected shape (B, K, H, W), got {tuple(shape)}")
    if not 0 < shape[2] * shape[3] < 2**31:
        raise ValueError(f"{name}: expected maps of 1 to 2**31 - 1 pixels, got shape {tuple(shape)}")


def _check_transform(tensor, name, shape, letters, heatmaps):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} {letters}, got {tuple(tensor.shape)}")
    _check_device(tensor, name, heatmaps)


def _check_device(tensor, name, heatmaps):
    if tensor.device != heatmaps.device:
        raise ValueError(f"{name}: expected device {heatmaps.device} of heatmaps, got {tensor.device}")


class _Refusal(torch.autograd.Function):
    """The operator where a gradient might be asked for: refuses when it is."""

    @staticmethod
    def forward(ctx, *arguments):
        return torch.ops.amil_fast.decode_heatmaps.default(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "decode_heatmaps can't be differentiated: the position of a maximum has no derivative. For a loss on "
            "coordinates use amil_fast.soft_argmax; else pass heatmaps.detach() or call it under torch.no_grad()"
        )


# The registered operator; `swap[k]` is the joint of `flipped` that is averaged with joint k, empty without `flipped`.
_library = torch.library.Library("amil_fast", "FRAGMENT")
_library.define(
    "decode_heatmaps(Tensor heatmaps, Tensor? flipped, int[] swap, bool shift_flipped, Tensor? center, Tensor? scale,"
    " Tensor? affine, str refine, str convention, int blur_kernel, str backend) -> (Tensor coords, Tensor scores)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@functools.cache
def _implementation(backend):
    if backend == "reference":
        from amil_fast.ops.decode_heatmaps_reference import decode_heatmaps_reference

        return decode_heatmaps_reference
    from amil_fast.ops import decode_heatmaps_native

    return {"cpp": decode_heatmaps_native.decode_cpp, "cuda": decode_heatmaps_native.decode_cuda}[backend]


def _decode(heatmaps, flipped, swap, shift_flipped, center, scale, affine, refine, convention, blur_kernel, backend):
    return _implementation(backend)(
        heatmaps, flipped, swap, shift_flipped, center, scale, affine, refine, convention, blur_kernel
    )


_library.impl("decode_heatmaps", _decode, "CompositeExplicitAutograd")


@torch.library.register_fake("amil_fast::decode_heatmaps", lib=_library)
def _decode_fake(
    heatmaps, flipped, swap, shift_flipped, center, scale, affine, refine, convention, blur_kernel, backend
):
    B, K = heatmaps.shape[:2]
    return heatmaps.new_empty(B, K, 2, dtype=torch.float32), heatmaps.new_empty(B, K, dtype=torch.float32)
