"""What the networks learn to draw."""

from amil_fast.ops.heatmaps import encode_heatmaps
from amil_fast.pose.backbones import STRIDE


def target_heatmaps(joints, size, *, heatmap_std, visible):
    """Heatmaps of joints in a crop, at the generator's resolution.

    Args:
        joints: ``(B, K, 2)`` in crop pixels.
        size: side of the crop in pixels.
        heatmap_std: standard deviation of the Gaussians in heatmap pixels.
        visible: ``(B, K)`` bool; maps of other joints are 0.

    Returns:
        ``(B, K, size / 4, size / 4)`` float32.
    """
    # The centre of heatmap pixel 0 lies between the crop pixels it covers.
    coords = (joints.float() - (STRIDE - 1) / 2) / STRIDE
    return encode_heatmaps(coords, size // STRIDE, size // STRIDE, heatmap_std=heatmap_std, visible=visible)[0]
