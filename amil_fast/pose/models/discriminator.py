"""Pose discriminator: an autoencoder of heatmaps in the sense of BEGAN (Eq. 19-20)."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from amil_fast.pose.models.backbones import Hourglass, Residual
from amil_fast.pose.models.regions import RegionStack, check_sizes, probability
from amil_fast.pose.skeletons import Skeleton, get_skeleton
from amil_fast.utils import pretrained

_FORMAT = "amil-pose-discriminator"


class PoseDiscriminator(nn.Module):
    """Autoencoder of heatmaps that reconstructs plausible poses better than implausible ones.

    The heatmaps, concatenated with the image averaged to their resolution, pass through an hourglass without skip
    connections (the coarsest map is a bottleneck, so the identity is not a solution) and then through region blocks as
    in the generator (:class:`~amil_fast.pose.models.regions.RegionBlock`).

    Args:
        skeleton: joints, as for :class:`~amil_fast.pose.PoseGenerator`.
        use_image: condition on the image; otherwise on the heatmaps alone.
        features: channels of all layers.
        levels: halvings in the hourglass; h and w must be multiples of 2^levels.
        blocks, depth, pooling, num_iters, residual, bag_scale, mil_scale, backend: as for
            :class:`~amil_fast.pose.PoseGenerator`; ``blocks=0`` is a 1 × 1 convolution.

    Attributes:
        skeleton: the :class:`~amil_fast.pose.Skeleton`.
        config: JSON-serializable constructor arguments, without ``backend``.

    Sources: Chou et al., Self adversarial training for human pose estimation, 2017; Berthelot et al., BEGAN, 2017.
    """

    def __init__(
        self,
        skeleton: str | Skeleton | Mapping[str, Any] = "lsp14",
        *,
        use_image: bool = True,
        features: int = 64,
        levels: int = 3,
        blocks: int = 1,
        depth: int = 3,
        pooling: str = "adjust",
        num_iters: int = 3,
        residual: bool = True,
        bag_scale: float = 1.0,
        mil_scale: float = 1.0,
        backend: str = "auto",
    ):
        super().__init__()
        check_sizes(features=(features, 1), levels=(levels, 1), blocks=(blocks, 0), depth=(depth, 1))
        self.skeleton = get_skeleton(skeleton)
        self.use_image, self.levels, self.mil_scale = use_image, levels, mil_scale
        self.config = {
            "skeleton": self.skeleton.to_config(),
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

    def forward(self, heatmaps: torch.Tensor, images: torch.Tensor | None = None) -> torch.Tensor:
        """Reconstructs heatmaps.

        Args:
            heatmaps: ``(B, K, h, w)``, h and w multiples of 2^levels.
            images: ``(B, 3, H, W)``, normalized; ignored and optional without ``use_image``.

        Returns:
            ``(B, K, h, w)`` float32.
        """
        factor = 1 << self.levels
        if heatmaps.dim() != 4 or heatmaps.shape[2] % factor or heatmaps.shape[3] % factor:
            raise ValueError(
                f"heatmaps: expected shape (B, K, h, w) with h and w multiples of {factor}, got {tuple(heatmaps.shape)}"
            )
        if self.use_image:
            if images is None:
                raise ValueError("images: expected (B, 3, H, W) because of use_image=True, got None")
            small = F.adaptive_avg_pool2d(images, heatmaps.shape[2:])  # type: ignore[arg-type]
            heatmaps = torch.cat([heatmaps, small.to(heatmaps.dtype)], 1)
        Y = self.autoencoder(heatmaps)
        if self.heatmaps is not None:
            return self.heatmaps(Y).float()
        return probability(self.blocks(Y)[-1], self.mil_scale)

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes ``config.json`` and ``model.safetensors`` to ``folder``; arguments as for
        :meth:`amil_fast.pose.PoseGenerator.save_pretrained`."""
        pretrained.save(self, folder, _FORMAT, dtype=dtype, notes=notes)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **options: Any) -> "PoseDiscriminator":
        """Loads a discriminator written by :meth:`save_pretrained`, float32, in evaluation mode; arguments and errors
        as for :meth:`amil_fast.pose.PoseGenerator.from_pretrained`."""
        return pretrained.load(lambda **arguments: cls(**{**arguments, **options}), path, _FORMAT)


@torch.no_grad()
def error_map(
    discriminator: Callable[..., torch.Tensor], heatmaps: torch.Tensor, images: torch.Tensor | None = None
) -> torch.Tensor:
    """Reconstruction error per heatmap pixel, ``Σ_k (Ŝ_k − D(Ŝ)_k)²``; large where a pose is implausible.

    Args:
        discriminator: a :class:`PoseDiscriminator` in evaluation mode.
        heatmaps: ``(B, K, h, w)``.
        images: ``(B, 3, H, W)``, normalized; None for a discriminator without ``use_image``.

    Returns:
        ``(B, h, w)`` float32.
    """
    return (heatmaps.float() - discriminator(heatmaps, images)).square().sum(1)
