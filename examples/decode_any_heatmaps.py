"""Decoding the heatmaps of any network: sub-pixel refinement, flip test, and coordinates in the original image.

The "network" here renders a Gaussian around known joints, so that the error can be printed:

    python examples/decode_any_heatmaps.py
"""

import torch

import amil_fast
from amil_fast.ops import encode_heatmaps

FLIP_PAIRS = [(1, 2), (3, 4)]  # joints that change places in a horizontal flip: left and right shoulder, elbow
HEIGHT, WIDTH = 64, 48


def network(joints, flip=False):
    """Heatmaps ``(B, K, 64, 48)`` of the crop, or of the flipped crop, with some noise."""
    if flip:
        order = [0, 2, 1, 4, 3]
        joints = torch.stack([WIDTH - 1 - joints[..., 0], joints[..., 1]], -1)[:, order]
    heatmaps, _ = encode_heatmaps(joints, HEIGHT, WIDTH, heatmap_std=2.0)
    return heatmaps + 0.02 * torch.randn(heatmaps.shape)


def main():
    torch.manual_seed(0)
    joints = torch.rand(8, 5, 2) * torch.tensor([WIDTH - 9.0, HEIGHT - 9.0]) + 4  # heatmap pixels
    heatmaps, flipped = network(joints), network(joints, flip=True)

    # Heatmap pixel -> image pixel: the crop's corner and its scale, one 2 x 3 matrix per crop.
    corner, scale = torch.tensor([120.0, 40.0]), 5.0
    affine = torch.tensor([[scale, 0, corner[0]], [0, scale, corner[1]]]).expand(8, 2, 3)
    in_image = scale * joints + corner

    for refine in ("none", "quarter", "dark"):
        coords, scores = amil_fast.decode_heatmaps(
            heatmaps, refine=refine, flipped=flipped, flip_pairs=FLIP_PAIRS, affine=affine
        )
        error = torch.linalg.vector_norm(coords - in_image, dim=-1).mean()
        print(f"refine={refine!r}: mean error {error:.2f} image pixels, mean score {scores.mean():.2f}")


if __name__ == "__main__":
    main()
