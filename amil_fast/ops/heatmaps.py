"""Heatmaps around decoding: drawing them from coordinates, mirroring them back, and the differentiable soft-argmax."""

import torch

from amil_fast.ops.bags import FLOAT_DTYPES, accumulation_dtype
from amil_fast.ops.flip import check_float_maps, check_pairs, flip_maps


def encode_heatmaps(coords, height, width, *, heatmap_std=2.0, unbiased=True, visible=None, dtype=None):
    r"""Draws a Gaussian per joint, :math:`\exp(-\|p - c\|^2 / (2 \cdot \text{heatmap\_std}^2))`, p pixel, c center.

    Args:
        coords: ``(..., K, 2)``, (x, y) in heatmap pixels: 0-based, an integer is the center of a pixel. Any floating
            dtype.
        height, width: size of the maps in pixels, at least 1.
        heatmap_std: standard deviation of the Gaussian in heatmap pixels, > 0.
        unbiased: True draws the Gaussian around the exact coordinates over the whole map (DarkPose). False rounds the
            center to the nearest pixel (halves up) and cuts the Gaussian to a square of 3 ``heatmap_std`` to each
            side (HRNet): decoding then can't recover the fraction of a pixel.
        visible: ``(..., K)``, nonzero = there is such a joint; None: all are there.
        dtype: floating dtype of the maps; None: that of ``coords``.

    Returns:
        ``(heatmaps, weights)``: ``(..., K, height, width)`` and ``(..., K)``, 1.0 where a Gaussian was drawn and 0.0
        where the map is all zero: joints that aren't visible, aren't finite, or whose square of 3 ``heatmap_std`` lies
        outside the map altogether.

    Raises:
        TypeError: ``coords`` or ``visible`` that is no tensor, or a dtype that isn't floating.
        ValueError: shapes that don't fit, a size below 1, ``heatmap_std`` that isn't positive.

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
    # Comparisons are false for NaN, so such joints drop out here.
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


def soft_argmax(heatmaps, *, beta=1.0, window=None):
    r"""The mean pixel of each map under :math:`\mathrm{softmax}(\text{beta} \cdot h)`: differentiable decoding.

    Args:
        heatmaps: ``(..., H, W)``, floating.
        beta: inverse temperature, > 0; the larger, the closer to the argmax. Gaussian maps of height 1 want 10 to
            100: with 1 the zeros around the peak outweigh it.
        window: None takes the mean over the whole map; an odd number of pixels takes it over the square of that size
            around the maximum (the first, if there are several), cut at the map's edge. The gradient is that of the
            window held where it is.

    Returns:
        ``(..., 2)`` (x, y) in heatmap pixels, in the dtype of ``heatmaps`` and differentiable. NaN where a map holds
        NaN.

    Raises:
        TypeError: no tensor, or a dtype that isn't floating.
        ValueError: fewer than two axes, empty maps, ``beta`` that isn't positive, an even or non-positive ``window``.

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


def flip_back(heatmaps, flip_pairs, *, shift=False):
    """Turns the heatmaps of a mirrored crop into those of the crop: mirrored along x, paired joints swapped.

    Args:
        heatmaps: ``(..., K, H, W)``.
        flip_pairs: pairs of joints that swap places in the mirror, such as left and right wrist; ``()`` for none.
        shift: move the result one pixel to the right, column 0 staying where it is, as HRNet does for maps that were
            trained with its misaligned mirror (its ``SHIFT_HEATMAP``).

    Returns:
        A tensor of the same shape and dtype, differentiable.

    Raises:
        TypeError: no tensor, or a dtype that isn't floating; pairs that aren't pairs of ints.
        ValueError: fewer than three axes, empty maps, a joint out of range or in two pairs.
    """
    check_float_maps(heatmaps, "heatmaps", axes=3)
    return flip_maps(heatmaps, check_pairs(flip_pairs, heatmaps.shape[-3]), shift)
