"""The pose discriminator: an autoencoder of heatmaps that learns what plausible bodies look like (PAPER §6)."""

import torch
from torch import nn
from torch.nn import functional as F

from amil_fast.pose.models.backbones import Hourglass, Residual
from amil_fast.pose.models.regions import RegionStack, probability
from amil_fast.pose.skeletons import get_skeleton
from amil_fast.utils import pretrained


class PoseDiscriminator(nn.Module):
    """Heatmaps in, the same heatmaps out as far as they show a plausible body.

    The heatmaps, joined with the image averaged to their resolution, go through an hourglass without skip connections
    (all that comes out has passed its coarsest map, a copy would be no reconstruction) and through the generator's
    blocks (:class:`~amil_fast.pose.models.regions.RegionBlock`).

    Args:
        skeleton: name of the joints.
        use_image: look at the image; otherwise at the heatmaps alone.
        features: width of all layers.
        levels: halvings in the hourglass; h and w are multiples of 2^levels.
        blocks, depth, pooling, num_iters, residual, bag_scale, mil_scale, backend: as for
            :class:`~amil_fast.pose.PoseGenerator`; ``blocks=0``: a 1 × 1 convolution.

    The call ``discriminator(heatmaps (B, K, h, w), images (B, 3, H, W))`` returns ``(B, K, h, w)`` float32; ``images``
    is not looked at and may be None without ``use_image``.

    Source: Chou et al., Self adversarial training for human pose estimation, 2017; Berthelot et al., BEGAN, 2017.
    """

    def __init__(
        self,
        skeleton="lsp14",
        *,
        use_image=True,
        features=64,
        levels=3,
        blocks=1,
        depth=3,
        pooling="adjust",
        num_iters=3,
        residual=True,
        bag_scale=1.0,
        mil_scale=1.0,
        backend="auto",
    ):
        super().__init__()
        pretrained.check_sizes(features=(features, 1), levels=(levels, 1), blocks=(blocks, 0), depth=(depth, 1))
        self.skeleton = get_skeleton(skeleton)
        self.use_image, self.levels, self.mil_scale = use_image, levels, mil_scale
        self.config = {
            "skeleton": self.skeleton.name,
            "use_image": use_image,
            "features": features,
            "levels": levels,
            "blocks": blocks,
            "depth": depth,
            "pooling": pooling,
            "num_iters": num_iters,
            "residual": residual,
            "bag_scale": bag_scale,
            "mil_scale": mil_scale,
        }
        K = self.skeleton.num_joints
        self.autoencoder = nn.Sequential(
            nn.Conv2d(K + 3 * use_image, features, 3, padding=1),
            Hourglass(features, levels, skip=False),
            Residual(features, features),
            nn.BatchNorm2d(features),
            nn.ReLU(),
        )
        self.blocks = RegionStack(
            blocks,
            features,
            K,
            depth=depth,
            pooling=pooling,
            num_iters=num_iters,
            residual=residual,
            bag_scale=bag_scale,
            backend=backend,
        )
        self.heatmaps = None if blocks else nn.Conv2d(features, K, 1)

    def forward(self, heatmaps, images=None):
        factor = 1 << self.levels
        if heatmaps.dim() != 4 or heatmaps.shape[2] % factor or heatmaps.shape[3] % factor:
            raise ValueError(
                f"heatmaps: expected shape (B, K, h, w) with h and w multiples of {factor}, got {tuple(heatmaps.shape)}"
            )
        if self.use_image:
            if images is None:
                raise ValueError("images: expected (B, 3, H, W), as use_image is on, got None")
            small = F.adaptive_avg_pool2d(images, heatmaps.shape[2:])
            heatmaps = torch.cat([heatmaps, small.to(heatmaps.dtype)], 1)
        Y = self.autoencoder(heatmaps)
        if self.heatmaps is not None:
            return self.heatmaps(Y).float()
        return probability(self.blocks(Y)[-1], self.mil_scale)

    def save_pretrained(self, folder, *, dtype=None, notes=None):
        """Writes ``config.json`` and ``model.safetensors`` into ``folder``."""
        pretrained.save(self, folder, "amil-pose-discriminator", dtype=dtype, notes=notes)

    @classmethod
    def from_pretrained(cls, path, **options):
        """The discriminator in a folder that :meth:`save_pretrained` wrote, float32, in evaluation mode."""
        return pretrained.load(lambda **arguments: cls(**{**arguments, **options}), path, "amil-pose-discriminator")


@torch.no_grad()
def error_map(discriminator, heatmaps, images=None):
    """Where a pose doesn't look like one: ``Σ_k (Ŝ_k − D(Ŝ)_k)²`` per heatmap pixel, ``(B, h, w)`` float32.

    Args:
        discriminator: a :class:`PoseDiscriminator` in evaluation mode.
        heatmaps: ``(B, K, h, w)``.
        images: ``(B, 3, H, W)``, normalized, or None where it looks at heatmaps alone.
    """
    return (heatmaps.float() - discriminator(heatmaps, images)).square().sum(1)
