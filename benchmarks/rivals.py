"""Baselines and data shared by the pytest benchmarks and the GPU scripts.

Adjust pooling: the reference with autograd, and T calls of scaled_dot_product_attention. Heatmap decoding: vectorized
PyTorch, and the algorithms of the pose projects in NumPy and OpenCV (the same steps in the same libraries, map by map
where the projects go map by map).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from amil_fast.ops import encode_heatmaps
from amil_fast.ops.adjust_pool_reference import adjust_pool_reference, squash

NUM_ITERS = 3

# Decoding cases: name -> arguments of decode_heatmaps; "flip" stands for flip averaging.
DECODE_CASES = {
    "argmax": {},
    "quarter": {"refine": "quarter"},
    "dark": {"refine": "dark", "convention": "darkpose"},
    "dark_udp": {"refine": "dark_udp", "convention": "mmpose"},
    "flip+dark": {"refine": "dark", "convention": "darkpose", "flip": True},
}
# Outputs of the pose projects on stored heatmaps, next to the checkout if available.
VECTORS = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "decode_public.npz"


# ---- adjust pooling ----


def eager_pool(x, cu_seqlens=None):
    """Bag vectors computed by the reference, differentiable by autograd."""
    return adjust_pool_reference(x, cu_seqlens=cu_seqlens, num_iters=NUM_ITERS)[0]


def attention_pool(x):
    """Adjust pooling of padded bags ``(B, N, D)`` as T single-query attention calls with K = V = instances."""
    f = x[:, None]
    s_sum = torch.zeros_like(f[:, :, :1])
    for _ in range(NUM_ITERS):
        sigma = F.scaled_dot_product_attention(s_sum, f, f, scale=1.0)
        s = squash(sigma)
        s_sum = s_sum + s
    return s[:, 0, 0]


# ---- heatmap decoding ----


def decode_data(shape, device):
    """Noisy Gaussian maps, those of the flipped crop, the flip pairs (1 and 2, 3 and 4, ...) and the joint order.

    Returns ``(maps, flipped, flip_pairs, order)``; ``flipped[:, order].flip(-1)`` is aligned with ``maps``.
    """
    B, K, H, W = shape
    g = torch.Generator().manual_seed(0)
    coords = torch.rand(B, K, 2, generator=g) * torch.tensor([W - 1.0, H - 1.0])
    maps, _ = encode_heatmaps(coords, H, W)
    height = torch.rand(B, K, 1, 1, generator=g) * 0.7 + 0.3
    pairs = [(k, k + 1) for k in range(1, K - 1, 2)]
    order = [0, *(j for pair in pairs for j in reversed(pair)), *range(1 + 2 * len(pairs), K)]
    maps, flipped = (maps * height + 0.01 * torch.randn(shape, generator=g) for _ in range(2))
    return maps.to(device), flipped[:, order].flip(-1).contiguous().to(device), pairs, order


def torch_decode(maps, refine="none", convention="hrnet", flipped=None, order=None):
    """Vectorized PyTorch in float32: averages, blurs and takes the logarithm of whole maps, then a few gathers."""
    h = maps.float()
    if flipped is not None:
        h = (h + flipped[:, order].flip(-1).float()) * 0.5
    B, K, H, W = h.shape
    scores, index = h.flatten(2).max(-1)
    x, y = index % W, index // W
    coords = torch.stack([x, y], -1).float()

    def at(values, dx, dy):
        near = (y + dy).clamp(0, H - 1) * W + (x + dx).clamp(0, W - 1)
        return values.flatten(2).gather(2, near[..., None])[..., 0]

    if refine == "quarter":  # HRNet's border rule
        inner = (x > 1) & (x < W - 1) & (y > 1) & (y < H - 1)
        difference = torch.stack([at(h, 1, 0) - at(h, -1, 0), at(h, 0, 1) - at(h, 0, -1)], -1)
        coords = coords + torch.where(inner[..., None], 0.25 * difference.sign(), 0)
    elif refine != "none":
        w = torch.exp(-torch.arange(-5, 6, device=h.device).square() / 8)  # 11 taps, standard deviation 2
        w = w / w.sum()
        blurred = F.conv2d(h.view(B * K, 1, H, W), w.view(1, 1, 11, 1), padding=(5, 0))
        blurred = F.conv2d(blurred, w.view(1, 1, 1, 11), padding=(0, 5)).view(B, K, H, W)
        L = blurred * (scores / blurred.amax((2, 3)))[..., None, None]
        L = (L.clamp(min=1e-10) if refine == "dark" else L.clamp(1e-3, 50)).log()
        d_x, d_y = (at(L, 1, 0) - at(L, -1, 0)) / 2, (at(L, 0, 1) - at(L, 0, -1)) / 2
        center = at(L, 0, 0)
        if refine == "dark":
            d_xx = (at(L, 2, 0) - 2 * center + at(L, -2, 0)) / 4
            d_yy = (at(L, 0, 2) - 2 * center + at(L, 0, -2)) / 4
            d_xy = (at(L, 1, 1) - at(L, 1, -1) - at(L, -1, 1) + at(L, -1, -1)) / 4
            inner = (x > 1) & (x < W - 2) & (y > 1) & (y < H - 2)
        else:
            eps = torch.finfo(torch.float32).eps
            d_xx = at(L, 1, 0) - 2 * center + at(L, -1, 0) + eps
            d_yy = at(L, 0, 1) - 2 * center + at(L, 0, -1) + eps
            sides = at(L, 1, 0) + at(L, 0, 1) + at(L, -1, 0) + at(L, 0, -1)
            d_xy = (at(L, 1, 1) - sides + 2 * center + at(L, -1, -1)) / 2
            inner = torch.ones_like(x, dtype=torch.bool)
        determinant = d_xx * d_yy - d_xy * d_xy
        step = torch.stack([d_xy * d_y - d_yy * d_x, d_xy * d_x - d_xx * d_y], -1) / determinant[..., None]
        coords = coords + torch.where((inner & (determinant != 0))[..., None], step, 0)
    marker = -1.0 if convention == "mmpose" else 0.0
    return torch.where((scores > 0)[..., None], coords, marker), scores


def peer_argmax(maps):
    """HRNet, DarkPose: the maximum and its location; (0, 0) where it is not positive."""
    B, K, H, W = maps.shape
    flat = maps.reshape(B, K, H * W)
    index, scores = flat.argmax(2), flat.max(2)
    coords = np.stack([index % W, index // W], -1).astype(np.float32)
    coords[scores <= 0] = 0
    return coords, scores


def peer_quarter(maps):
    """HRNet: a quarter of a pixel toward the greater neighbor, joint by joint."""
    coords, scores = peer_argmax(maps)
    B, K, H, W = maps.shape
    for b in range(B):
        for k in range(K):
            h = maps[b, k]
            x, y = int(np.floor(coords[b, k, 0] + 0.5)), int(np.floor(coords[b, k, 1] + 0.5))
            if 1 < x < W - 1 and 1 < y < H - 1:
                difference = np.array([h[y, x + 1] - h[y, x - 1], h[y + 1, x] - h[y - 1, x]])
                coords[b, k] += 0.25 * np.sign(difference)
    return coords, scores


def peer_blur(h, blur_kernel, dtype):
    """Blurs one map: zero padding, OpenCV's Gaussian, then rescaling to the original maximum."""
    import cv2

    border = blur_kernel // 2
    padded = cv2.GaussianBlur(np.pad(h.astype(dtype), border), (blur_kernel, blur_kernel), 0)
    blurred = padded[border:-border, border:-border].astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):  # all-zero maps
        return blurred * (h.max() / blurred.max())


def peer_dark(maps):
    """DarkPose: blurs whole maps one by one in float64, takes the logarithm, then one Taylor step per joint."""
    coords, scores = peer_argmax(maps)
    B, K, H, W = maps.shape
    for b in range(B):
        for k in range(K):
            L = np.log(np.maximum(peer_blur(maps[b, k], 11, np.float64), 1e-10))
            x, y = int(coords[b, k, 0]), int(coords[b, k, 1])
            if not (1 < x < W - 2 and 1 < y < H - 2):
                continue
            gradient = np.array([[L[y, x + 1] - L[y, x - 1]], [L[y + 1, x] - L[y - 1, x]]]) / 2
            d_xx = (L[y, x + 2] - 2 * L[y, x] + L[y, x - 2]) / 4
            d_yy = (L[y + 2, x] - 2 * L[y, x] + L[y - 2, x]) / 4
            d_xy = (L[y + 1, x + 1] - L[y - 1, x + 1] - L[y + 1, x - 1] + L[y - 1, x - 1]) / 4
            if d_xx * d_yy - d_xy**2 != 0:
                coords[b, k] -= (np.linalg.inv(np.array([[d_xx, d_xy], [d_xy, d_yy]])) @ gradient)[:, 0]
    return coords, scores


def peer_dark_udp(maps):
    """mmpose: per sample, blurs whole maps one by one in float32, then Taylor steps of all joints of the logarithm."""
    coords, scores = peer_argmax(maps)
    coords[scores <= 0] = -1
    B, K, _, _ = maps.shape
    joints = np.arange(K)
    for b in range(B):
        blurred = np.stack([peer_blur(h, 11, np.float32) for h in maps[b]])
        L = np.pad(np.log(np.clip(blurred, 1e-3, 50)), ((0, 0), (1, 1), (1, 1)), mode="edge")
        x, y = coords[b].astype(int).T + 1
        c, right, left, down, up = (L[joints, y + j, x + i] for i, j in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)))
        gradient = np.stack([right - left, down - up], 1)[:, :, None] / 2
        d_xy = (L[joints, y + 1, x + 1] - right - down + 2 * c - left - up + L[joints, y - 1, x - 1]) / 2
        hessian = np.stack([right - 2 * c + left, d_xy, d_xy, down - 2 * c + up], 1).reshape(K, 2, 2)
        hessian += np.finfo(np.float32).eps * np.eye(2)
        step = (np.linalg.inv(hessian) @ gradient)[:, :, 0]
        coords[b] -= np.where((scores[b] > 0)[:, None], step, 0)
    return coords, scores


def peer_flip_dark(maps, flipped, order):
    """HRNet's flip test, then DarkPose."""
    return peer_dark((maps + flipped[:, order, :, ::-1]) * 0.5)


PEERS = {"argmax": peer_argmax, "quarter": peer_quarter, "dark": peer_dark, "dark_udp": peer_dark_udp}


def peer_decode(name, maps, flipped=None, order=None):
    """Decodes NumPy heatmaps by the peer algorithm of one of DECODE_CASES."""
    return peer_flip_dark(maps, flipped, order) if name == "flip+dark" else PEERS[name](maps)


def check_peers():
    """Asserts that the peer algorithms reproduce the stored outputs of the projects, if these are available."""
    if not VECTORS.exists():
        return
    stored = {
        "argmax": ("hrnet_max_coords", 0),
        "quarter": ("hrnet_quarter_coords", 1e-5),
        "dark": ("darkpose_dark_coords", 1e-3),
        "dark_udp": ("mmpose_dark_udp_k11_coords", 2e-3),
    }
    with np.load(VECTORS) as vectors:
        for name, (key, tolerance) in stored.items():
            for prefix in "ab":
                coords, scores = PEERS[name](vectors[f"{prefix}_heatmaps"])
                difference = np.abs(coords - vectors[f"{prefix}_{key}"]).max(-1)
                assert np.array_equal(scores, vectors[f"{prefix}_mmpose_max_vals"])
                assert (difference <= tolerance)[(scores > 0) | (name != "dark_udp")].all(), name
