"""Encoding of coordinates as heatmaps, flipping of heatmaps, and the differentiable soft-argmax."""

from collections.abc import Sequence

import torch

from amil_fast.ops.bags import FLOAT_DTYPES, accumulation_dtype
from amil_fast.ops.flip import check_float_maps, check_pairs, flip_maps


def encode_heatmaps(
    coords: torch.Tensor,
    height: int,
    width: int,
    *,
    heatmap_std: float = 2.0,
    unbiased: bool = True,
    visible: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Encodes joints as Gaussian heatmaps :math:`\exp(-\|p - c\|^2 / (2 \cdot \text{heatmap\_std}^2))`.

    p are the pixels, c is the joint.

    Args:
        coords: ``(..., K, 2)``, (x, y) in heatmap pixels, floating point; integers are pixel centers.
        height: of the heatmaps in pixels, at least 1.
        width: of the heatmaps in pixels, at least 1.
        heatmap_std: standard deviation of the Gaussian in heatmap pixels, > 0.
        unbiased: True: Gaussian around the exact coordinates over the whole map (DarkPose). False: the center is
            rounded to the nearest pixel (halves up) and the Gaussian truncated to a square of 3 ``heatmap_std`` to each
            side (HRNet), so that decoding cannot recover fractions of a pixel.
        visible: ``(..., K)``, nonzero for existing joints; None: all.
        dtype: floating dtype of the heatmaps; None: that of ``coords``.

    Returns:
        ``(heatmaps, weights)`` of shapes ``(..., K, height, width)`` and ``(..., K)``. Weights are 0.0 for zero
        heatmaps, otherwise 1.0; heatmaps are zero for joints that are not visible, not finite, or whose square of 3
        ``heatmap_std`` lies outside the map.

    Raises:
        TypeError: ``coords`` or ``visible`` is not a tensor, or a dtype is not floating.
        ValueError: shapes do not match, a size is below 1, or ``heatmap_std`` is not positive.

    Sources: Sun et al., HRNet, CVPR 2019; Zhang et al., DARK, CVPR 2020.
    """
    if not isinstance(coords, torch.Tensor):
        raise TypeError(f"coords: expected a torch.Tensor, got {type(coords).__name__}")
    if not coords.is_floating_point():
        raise TypeError(f"coords: expected a floating dtype, got {coords.dtype}")
    if coords.dim() < 2 or coords.shape[-1] != 2:
        raise ValueError(f"coords: expected shape (..., K, 2), got {tuple(coords.shape)}")
    if height < 1 or width < 1:
        raise ValueError(f"height, width: expected at least 1, got {height}, {width}")
    if not heatmap_std > 0:
        raise ValueError(f"heatmap_std: expected a positive number of pixels, got {heatmap_std}")
    dtype = coords.dtype if dtype is None else dtype
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    if visible is not None:
        if not isinstance(visible, torch.Tensor):
            raise TypeError(f"visible: expected a torch.Tensor, got {type(visible).__name__}")
        if visible.shape != coords.shape[:-1]:
            raise ValueError(f"visible: expected shape {tuple(coords.shape[:-1])} (..., K), got {tuple(visible.shape)}")

    center = coords.to(accumulation_dtype(coords.dtype))
    nearest = torch.floor(center + 0.5)
    radius = 3 * heatmap_std
    size = torch.tensor([width, height], device=coords.device)
    # Comparisons with NaN are false, which excludes such joints.
    drawn = ((nearest + radius >= 0) & (nearest - radius < size) & center.isfinite()).all(-1)
    if visible is not None:
        drawn = drawn & (visible != 0)
    center = torch.where(drawn[..., None], center if unbiased else nearest, 0)
    x = torch.arange(width, device=coords.device) - center[..., 0, None]  # (..., K, width)
    y = torch.arange(height, device=coords.device) - center[..., 1, None]  # (..., K, height)
    row, column = (torch.exp(d.square() / (-2 * heatmap_std**2)) for d in (x, y))
    if not unbiased:
        row, column = row * (x.abs() <= radius), column * (y.abs() <= radius)
    heatmaps = (column * drawn[..., None])[..., :, None] * row[..., None, :]
    return heatmaps.to(dtype), drawn.to(dtype)


def soft_argmax(heatmaps: torch.Tensor, *, beta: float = 1.0, window: int | None = None) -> torch.Tensor:
    r"""Differentiable decoding: expected position under :math:`\mathrm{softmax}(\text{beta} \cdot h)`.

    Args:
        heatmaps: ``(..., H, W)``, floating point.
        beta: inverse temperature, > 0; the result approaches the arg-max as it grows. Gaussian heatmaps of height 1
            need 10 to 100; with 1 the zeros around the peak dominate.
        window: None: expectation over the whole map; an odd number of pixels: over the square of that size around the
            first maximum, clipped to the map. The gradient treats the window as fixed.

    Returns:
        ``(..., 2)``, (x, y) in heatmap pixels, in the dtype of ``heatmaps``, differentiable. NaN for maps with NaN.

    Raises:
        TypeError: not a tensor, or not of a floating dtype.
        ValueError: fewer than two axes, empty maps, ``beta`` not positive, ``window`` even or not positive.

    Sources: Sun et al., Integral Human Pose Regression, ECCV 2018; Luvizon et al., CVPR 2018.
    """
    check_float_maps(heatmaps, "heatmaps")
    if not beta > 0:
        raise ValueError(f"beta: expected a positive number, got {beta}")
    if window is not None and (not isinstance(window, int) or window < 1 or window % 2 == 0):
        raise ValueError(f"window: expected None or an odd number of pixels, got {window}")
    H, W = heatmaps.shape[-2:]
    x = torch.arange(W, device=heatmaps.device)
    y = torch.arange(H, device=heatmaps.device)
    logits = beta * heatmaps.to(accumulation_dtype(heatmaps.dtype))
    if window is not None:
        index = heatmaps.flatten(-2).argmax(-1)[..., None]
        near_x, near_y = (x - index % W).abs() <= window // 2, (y - index // W).abs() <= window // 2
        logits = logits.masked_fill(~(near_y[..., :, None] & near_x[..., None, :]), -torch.inf)
    weights = logits.flatten(-2).softmax(-1).unflatten(-1, (H, W))
    coords = torch.stack([(weights.sum(-2) * x).sum(-1), (weights.sum(-1) * y).sum(-1)], -1)
    return coords.to(heatmaps.dtype)


def flip_back(heatmaps: torch.Tensor, flip_pairs: Sequence[tuple[int, int]], *, shift: bool = False) -> torch.Tensor:
    """Converts the heatmaps of a flipped crop to those of the crop: flipped along x, paired joints exchanged.

    Args:
        heatmaps: ``(..., K, H, W)``.
        flip_pairs: pairs of joints that change places in a flip, such as left and right wrist; ``()`` for none.
        shift: shift the result one pixel to the right, keeping column 0, as HRNet does for its misaligned flip
            (``SHIFT_HEATMAP``).

    Returns:
        A tensor of the same shape and dtype, differentiable.

    Raises:
        TypeError: not a tensor, or not of a floating dtype; pairs that are not pairs of ints.
        ValueError: fewer than three axes, empty maps, a joint out of range or in two pairs.
    """
    check_float_maps(heatmaps, "heatmaps", axes=3)
    return flip_maps(heatmaps, check_pairs(flip_pairs, heatmaps.shape[-3]), shift)
