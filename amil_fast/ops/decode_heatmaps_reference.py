"""Heatmap decoding in plain PyTorch, structured as in the public pose repositories: the specification of all backends.

Whole maps are blurred, rescaled, clamped and log-transformed; then a few values are gathered around each maximum. The
maximum is computed in float32 (float64 for float64 maps), the refinement in float64.
"""

import math

import torch
import torch.nn.functional as F

from amil_fast.ops.bags import accumulation_dtype
from amil_fast.ops.flip import flip_maps


def decode_heatmaps_reference(
    heatmaps, flipped, swap, shift_flipped, center, scale, affine, refine, convention, blur_kernel
):
    """Returns ``(coords, scores)`` for arguments validated by :func:`amil_fast.ops.decode_heatmaps`."""
    H, W = heatmaps.shape[-2:]
    h = heatmaps.to(accumulation_dtype(heatmaps.dtype))
    if flipped is not None:
        h = (h + flip_maps(flipped.to(h.dtype), swap, shift_flipped)) * 0.5

    maximum, index = h.amax((2, 3)), h.flatten(2).argmax(-1)  # the first of equal values; NaN if there is one
    x, y = index % W, index // W
    position = torch.stack([x, y], -1).double()
    if refine == "quarter":
        step = _quarter(h, x, y, convention)
    elif refine == "dark":
        step = _dark(log_blurred(h, blur_kernel, 1e-10, math.inf), x, y)
    elif refine == "dark_udp":
        step = _dark_udp(log_blurred(h, blur_kernel, 1e-3, 50.0), x, y)
    else:
        step = torch.zeros_like(position)
    if refine in ("dark", "dark_udp"):
        step = torch.where(maximum.isfinite()[..., None], step, 0)

    marker = -1.0 if convention == "mmpose" else 0.0
    coords = torch.where((maximum > 0)[..., None], position + step, marker)
    coords = torch.where(maximum.isnan()[..., None], math.nan, coords)
    if affine is not None:
        matrix = affine.float().double()
        coords = torch.einsum("bij,bkj->bki", matrix[:, :, :2], coords) + matrix[:, None, :, 2]
    elif center is not None:
        center, scale = (t.float().double()[:, None] for t in (center, scale))
        coords = _to_image(coords, center, scale, H, W, refine, convention)
    return coords.float(), maximum.float()


def blur_weights(blur_kernel):
    """Taps of OpenCV's Gaussian of a kernel size, with its default standard deviation, as a list of floats.

    For up to 9 taps OpenCV uses tables of rounded values.
    """
    table = {
        1: [1],
        3: [1, 2, 1],
        5: [1, 4, 6, 4, 1],
        7: [2, 7, 14, 18, 14, 7, 2],
        9: [4, 13, 30, 51, 60, 51, 30, 13, 4],
    }
    w = table.get(blur_kernel)
    if w is None:
        radius = blur_kernel // 2
        std = 0.3 * (radius - 1) + 0.8
        w = [math.exp(-(d**2) / (2 * std**2)) for d in range(-radius, radius + 1)]
    return [v / sum(w) for v in w]


def blur(h, blur_kernel):
    """Blurs maps ``(B, K, H, W)`` with zero padding."""
    H, W = h.shape[-2:]
    w = blur_weights(blur_kernel)
    padded = F.pad(h, [blur_kernel // 2] * 4)
    rows = sum(v * padded[..., t : t + H, :] for t, v in enumerate(w))
    return sum(v * rows[..., t : t + W] for t, v in enumerate(w))


def log_blurred(h, blur_kernel, low, high):
    """Logarithm of the blurred map, rescaled to the original maximum and clamped to [low, high]; float64."""
    blurred = blur(h.double(), blur_kernel)
    rescaled = blurred * (h.double().amax((2, 3), keepdim=True) / blurred.amax((2, 3), keepdim=True))
    return torch.where(rescaled > low, rescaled, low).clamp(max=high).log()  # NaN becomes low


def _reader(maps, x, y):
    """Returns ``read(dx, dy)``: values at offset (dx, dy) from (x, y), ``(B, K)``, with edge padding."""
    H, W = maps.shape[-2:]

    def read(dx, dy):
        index = (y + dy).clamp(0, H - 1) * W + (x + dx).clamp(0, W - 1)
        return maps.flatten(2).gather(2, index[..., None])[..., 0]

    return read


def _quarter(h, x, y, convention):
    """Quarter of a pixel toward the larger neighbor, ``(B, K, 2)``."""
    H, W = h.shape[-2:]
    h = _reader(h, x, y)
    inner_x, inner_y = (x > 1) & (x < W - 1), (y > 1) & (y < H - 1)
    if convention == "mmpose":  # each coordinate separately
        inner = torch.stack([inner_x & (y > 0), inner_y & (x > 0)], -1)
    else:
        inner = (inner_x & inner_y)[..., None]
    difference = torch.stack([h(1, 0) - h(-1, 0), h(0, 1) - h(0, -1)], -1).double()
    return torch.where(inner, 0.25 * difference.nan_to_num(0.0).sign(), 0)


def _dark(L, x, y):
    """Newton step of DARK on log maps ``L``, ``(B, K, 2)``; 0 near the edge."""
    H, W = L.shape[-2:]
    L = _reader(L, x, y)
    dx, dy = 0.5 * (L(1, 0) - L(-1, 0)), 0.5 * (L(0, 1) - L(0, -1))
    dxx = 0.25 * (L(2, 0) - 2 * L(0, 0) + L(-2, 0))
    dyy = 0.25 * (L(0, 2) - 2 * L(0, 0) + L(0, -2))
    dxy = 0.25 * (L(1, 1) - L(1, -1) - L(-1, 1) + L(-1, -1))
    inner = (x > 1) & (x < W - 2) & (y > 1) & (y < H - 2)
    return torch.where(inner[..., None], _newton(dx, dy, dxx, dxy, dyy), 0)


def _dark_udp(L, x, y):
    """Newton step of UDP on log maps ``L``, ``(B, K, 2)``, also at the edge."""
    L = _reader(L, x, y)
    epsilon = torch.finfo(torch.float32).eps
    dx, dy = 0.5 * (L(1, 0) - L(-1, 0)), 0.5 * (L(0, 1) - L(0, -1))
    dxx = L(1, 0) - 2 * L(0, 0) + L(-1, 0) + epsilon
    dyy = L(0, 1) - 2 * L(0, 0) + L(0, -1) + epsilon
    dxy = 0.5 * (L(1, 1) - L(1, 0) - L(0, 1) + 2 * L(0, 0) - L(-1, 0) - L(0, -1) + L(-1, -1))
    return _newton(dx, dy, dxx, dxy, dyy)


def _newton(dx, dy, dxx, dxy, dyy):
    """``-H⁻¹ g``; 0 where H is singular or the step is not finite."""
    determinant = dxx * dyy - dxy * dxy
    step = torch.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy], -1) / determinant[..., None]
    return torch.where((determinant != 0)[..., None] & step.isfinite().all(-1, keepdim=True), step, 0)


def _to_image(coords, center, scale, H, W, refine, convention):
    """Maps heatmap pixels ``(B, K, 2)`` to image pixels; ``center``, ``scale`` are ``(B, 1, 2)``."""
    box = 200 * scale
    size = coords.new_tensor([W, H])
    last = (size - 1).clamp(min=1)
    if convention == "hrnet":
        return (coords - size / 2) * (box[..., :1] / W) + center
    if convention == "darkpose":
        return (coords - (size - 1) / 2) * ((box[..., :1] - 1) / last[0]) + center
    return coords / (last if refine == "dark_udp" else size) * box + center - box / 2
