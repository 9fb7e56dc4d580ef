"""Helpers of the operator tests: random bags and heatmaps, memory layouts, and error bounds for decoding."""

import itertools

import torch

from amil_fast import adjust_pool
from amil_fast.ops.decode_heatmaps_reference import blur, log_blurred
from amil_fast.ops.flip import flip_maps

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
REFINEMENTS = ("none", "quarter", "dark", "dark_udp")
CONVENTIONS = ("hrnet", "darkpose", "mmpose")
KINDS = ("gaussian", "noisy", "integers", "noise", "constant", "zero", "negative", "edge", "tiny", "large", "spike")
LAYOUTS = ("contiguous", "channels_last", "row_gaps", "every_second_column", "transposed", "flipped_view", "expanded")


def random_bags(B, N, D, seed=0, dtype=torch.float64):
    """Returns instances whose logits span a few units, so that the weights are neither uniform nor one-hot."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(B, N, D, generator=generator, dtype=torch.float64) * 2 / D**0.5).to(dtype)


def random_lengths(B, N, seed=0):
    """Returns random lengths that include N (first) and 0 (last)."""
    lengths = torch.randint(0, N + 1, (B,), generator=torch.Generator().manual_seed(seed))
    lengths[0], lengths[-1] = N, 0
    return lengths


def pool_and_grad(x, seed=1, with_weights=True, **kwargs):
    """Returns ``[bag, weights, gradient of x]`` for random upstream gradients of all outputs."""
    x = x.clone().requires_grad_()
    outputs = adjust_pool(x, return_weights=with_weights, **kwargs)
    outputs = outputs if with_weights else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    (grad,) = torch.autograd.grad([o for o, _ in pairs], x, [g for _, g in pairs])
    return [o.detach() for o in outputs] + [grad]


def make_maps(kind, shape, seed=0, dtype=torch.float32):
    """Returns heatmaps ``(B, K, H, W)`` of one of the ``KINDS``."""
    B, K, H, W = shape
    g = torch.Generator().manual_seed(seed)
    random = torch.rand(shape, generator=g)
    if kind == "integers":  # ties
        return (random * 4).floor().to(dtype)
    if kind == "noise":
        return (random - 0.5).to(dtype)
    if kind == "constant":
        return torch.full(shape, 0.7, dtype=dtype)
    if kind == "zero":
        return torch.zeros(shape, dtype=dtype)
    if kind == "negative":
        return (-random - 0.1).to(dtype)
    if kind == "spike":  # a single pixel: its surroundings are 0, and most remain 0 after a small blur
        maps = torch.zeros(B, K, H * W)
        index = torch.randint(H * W, (B, K, 1), generator=g)
        return maps.scatter(2, index, 1.0).reshape(shape).to(dtype)
    size = torch.tensor([W - 1.0, H - 1.0])
    center = torch.rand(B, K, 2, generator=g) * size
    if kind == "edge":
        center = (center / size.clamp(min=1)).round() * size + torch.rand(B, K, 2, generator=g) * 3 - 1.5
    d_x, d_y = (torch.arange(n) - center[..., i, None] for i, n in ((0, W), (1, H)))
    maps = torch.exp(-(d_y.square()[..., :, None] + d_x.square()[..., None, :]) / 8)
    if kind == "noisy":
        maps = maps + 0.1 * (random - 0.5)
    low, high = {"tiny": (3e-4, 3e-3), "large": (20, 300)}.get(kind, (0.3, 1))  # close to UDP's clamping bounds
    return (maps * torch.empty(B, K, 1, 1).uniform_(low, high, generator=g)).to(dtype)


def lay_out(maps, layout):
    """Returns the values of ``maps`` in the given memory layout."""
    B, K, H, W = maps.shape
    if layout == "channels_last":
        return maps.contiguous(memory_format=torch.channels_last)
    if layout == "row_gaps":
        wide = maps.new_full((B, K, H, W + 3), torch.nan)
        wide[..., 2:-1] = maps
        return wide[..., 2:-1]
    if layout == "every_second_column":
        wide = maps.new_full((B, K, H, 2 * W), torch.nan)
        wide[..., ::2] = maps
        return wide[..., ::2]
    if layout == "transposed":
        return maps.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    if layout == "flipped_view":  # an odd storage offset, hence no 16-byte alignment
        return torch.cat([maps.new_full((1,), torch.nan), maps.flatten()])[1:].view(maps.shape)
    if layout == "expanded":  # all joints share the memory of the first
        return maps[:, :1].expand(B, K, H, W)
    return maps.contiguous()


def make_transform(name, B, seed=0):
    """Returns the transform arguments of ``decode_heatmaps`` for "none", "box" or "affine"."""
    g = torch.Generator().manual_seed(seed)
    if name == "box":
        center, scale = torch.rand(B, 2, generator=g) * 500, torch.rand(B, 2, generator=g) + 0.5
        return {"center": center, "scale": scale}
    if name == "affine":
        return {"affine": torch.randn(B, 2, 3, generator=g)}
    return {}


def averaged(maps, flipped=None, swap=None, shift_flipped=False):
    """Returns the maps to be decoded: float32 or float64, averaged with ``flipped`` if given."""
    maps = maps if maps.dtype == torch.float64 else maps.float()
    if flipped is None:
        return maps
    return (maps + flip_maps(flipped.to(maps.dtype), swap, shift_flipped)) * 0.5


def allowed_error(maps, refine, blur_kernel):
    """Bounds the error of refined positions against float64, in heatmap pixels: ``(B, K)``.

    The blur accumulates ``blur(|h|)`` with a relative error of a few eps, so that the error of log B is about
    eps blur(|h|) / B; a Newton step -H⁻¹ g turns an error d of the logarithms into about ‖H⁻¹‖ (1 + 4 ‖step‖) d.
    Clamped values have no error. The bound is infinite for flat peaks, whose position is ill-conditioned.
    """
    B, K, H, W = maps.shape
    if refine not in ("dark", "dark_udp"):
        return torch.full((B, K), 1e-5)
    eps = torch.finfo(maps.dtype).eps
    low, high = (1e-10, torch.inf) if refine == "dark" else (1e-3, 50.0)
    L = log_blurred(maps, blur_kernel, low, high)
    blurred = blur(maps.double(), blur_kernel)
    factor = maps.double().amax((2, 3), keepdim=True) / blurred.amax((2, 3), keepdim=True)
    error = 4 * eps * (blur(maps.double().abs(), blur_kernel) * factor.abs() / L.exp() + 1)

    rescaled = blurred * factor
    error = torch.where((rescaled < low * (1 - 1e-5)) | (rescaled > high * (1 + 1e-5)), 0.0, error)

    index = maps.flatten(2).argmax(-1)
    x, y = index % W, index // W

    def read(values, dx, dy):
        near = (y + dy).clamp(0, H - 1) * W + (x + dx).clamp(0, W - 1)
        return values.flatten(2).gather(2, near[..., None])[..., 0]

    error = torch.stack([read(error, dx, dy) for dx, dy in itertools.product(range(-2, 3), repeat=2)]).amax(0)
    reach = 2 if refine == "dark" else 1
    curve = [read(L, dx, dy) - 2 * read(L, 0, 0) + read(L, -dx, -dy) for dx, dy in ((reach, 0), (0, reach), (1, 1))]
    scale = 0.25 if refine == "dark" else 1.0
    d_xx, d_yy = scale * curve[0], scale * curve[1]
    if refine == "dark":
        d_xy = 0.25 * (read(L, 1, 1) - read(L, 1, -1) - read(L, -1, 1) + read(L, -1, -1))
    else:
        d_xy = 0.5 * (curve[2] - curve[0] - curve[1])
    hessian = torch.stack([d_xx, d_xy, d_xy, d_yy], -1).unflatten(-1, (2, 2)).nan_to_num(0.0)
    smallest = torch.linalg.eigvalsh(hessian).abs().amin(-1)
    gradient = 0.5 * torch.stack([read(L, 1, 0) - read(L, -1, 0), read(L, 0, 1) - read(L, 0, -1)], -1).norm(dim=-1)
    step = gradient / smallest
    allowed = 1e-5 + 4 * error / smallest * (1 + 4 * step)
    allowed = torch.where((8 * error < 0.1 * smallest) & allowed.isfinite(), allowed, torch.inf)
    unrefined = error == 0
    if refine == "dark":
        unrefined |= (x < 2) | (x > W - 3) | (y < 2) | (y > H - 3)
    return torch.where(unrefined, 1e-5, allowed)


def allowed_in_image(allowed, arguments, shape):
    """``allowed_error`` in image coordinates; ``arguments`` of ``decode_heatmaps``, ``shape`` of the maps."""
    if "scale" in arguments:
        return allowed * (200 * arguments["scale"] / (min(shape[2:]) - 1 or 1)).amax(1, keepdim=True) + 1e-3
    if "affine" in arguments:
        return allowed * 2 * arguments["affine"].abs().amax((1, 2))[:, None] + 1e-4
    return allowed


def assert_same(actual, expected, allowed, what=""):
    """Asserts equal scores, coordinates within ``allowed (B, K)``, and NaN in the same positions."""
    (coords, scores), (expected_coords, expected_scores) = actual, expected
    assert coords.dtype == scores.dtype == torch.float32
    assert coords.is_contiguous() and scores.is_contiguous()
    assert torch.equal(scores.nan_to_num(-7.0), expected_scores.nan_to_num(-7.0)), f"{what}: scores"
    assert torch.equal(coords.isnan(), expected_coords.isnan()), f"{what}: NaN"
    difference = (coords - expected_coords).double().abs().amax(-1).nan_to_num(0.0)
    difference = torch.where(allowed.isinf(), 0.0, difference)
    bad = difference > allowed + 4e-7 * expected_coords.abs().amax(-1).nan_to_num(0.0)
    assert not bad.any(), f"{what}: {difference[bad].tolist()} allowed {allowed[bad].tolist()}"
