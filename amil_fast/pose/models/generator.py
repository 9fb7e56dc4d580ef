"""Pose generator: a backbone and stacked MI-RNet blocks that score every region of its feature map for every joint."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from amil_fast.pose.codec import STRIDE
from amil_fast.pose.models.backbones import make_backbone
from amil_fast.pose.models.regions import RegionStack, check_sizes, probability, softmax_heatmaps
from amil_fast.pose.skeletons import Skeleton, get_skeleton
from amil_fast.utils import pretrained

_FORMAT = "amil-pose-generator"


class PoseOutput(NamedTuple):
    """Heatmaps and scores of every block of a :class:`PoseGenerator`.

    Attributes:
        heatmaps: ``(L, B, K, h, w)`` float32, one set per block; L = 1 with ``blocks=0``.
        scores: ``(L, B, K, h, w)``, the region scores z behind the heatmaps, for the losses that need them; None if the
            heatmaps are a convolution of the feature map (``blocks=0`` without ``softmax_std``).
    """

    heatmaps: torch.Tensor
    scores: torch.Tensor | None


class PoseGenerator(nn.Module):
    r"""Heatmap network: one heatmap per joint from the crop of a person.

    A backbone computes a feature map Y at a quarter of the crop's resolution. N blocks follow, each an MI-RNet whose
    instances are the pixels of the feature map (:class:`~amil_fast.pose.models.regions.RegionBlock`):
    :math:`X_1 = G_1(Y)`, :math:`X_n = G_n(Y, X_{n-1})`; every block also receives the bag vector of the previous one. A
    heatmap value is the probability that the region contains the joint, :math:`1 - e^{-\lambda h}` (Eq. 12), with
    :math:`h = \log(1 + e^z) \ge 0` from the region's score z. With ``softmax_std``, exactly one region contains the
    joint: the heatmap is the softmax of z over all regions, scaled so that the training target has a maximum of 1
    (:func:`~amil_fast.pose.models.regions.softmax_heatmaps`).

    Args:
        skeleton: joints to predict: a name in :data:`amil_fast.pose.SKELETONS`, a :class:`~amil_fast.pose.Skeleton`, or
            the mapping that :meth:`~amil_fast.pose.Skeleton.to_config` returns.
        input_size: side in pixels of the square crops the network is trained for; other sizes are accepted.
        backbone: ``"resnet18"``, ``"resnet18s"`` (last stage half as wide), ``"resnet34"``, ``"resnet50"``,
            ``"patchresnetWxD"`` (width W, D blocks per stage, patchify stem), or ``"hourglassS"`` with S stacks.
        features: channels of feature maps, regions and bag vectors.
        blocks: N. With 0 the heatmaps are a 1 × 1 convolution of Y, not limited to [0, 1]; with ``softmax_std`` the
            scores are.
        depth: fully connected levels per block, each followed by the pooling.
        pooling: a name in :data:`amil_fast.nn.POOLINGS` (``"adjust"``, ``"mean"``, ``"max"``, ...), or ``"none"``.
        num_iters: iterations T of adjust pooling.
        residual: accumulate the bag vectors over the levels.
        bag_scale: factor on the pooled vectors; 1 in the publication.
        mil_scale: λ of Eq. 12.
        softmax_std: standard deviation in heatmap pixels of the targets of
            :func:`~amil_fast.pose.softmax_cross_entropy`; 0 for heatmaps of independent regions (Eq. 12).
        flip_test: whether :class:`~amil_fast.pose.inference.Predictor` averages with the heatmaps of the flipped crop
            by default; does not change ``forward``.
        backend: backend of adjust pooling, see :func:`amil_fast.adjust_pool`.

    Attributes:
        skeleton: the :class:`~amil_fast.pose.Skeleton`.
        input_size, flip_test: as given.
        stride: crop pixels per heatmap pixel, 4.
        mean, std: normalization of the RGB input, ImageNet's.
        config: JSON-serializable constructor arguments, without ``backend``.
    """

    stride = STRIDE
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(
        self,
        skeleton: str | Skeleton | Mapping[str, Any] = "lsp14",
        input_size: int = 256,
        *,
        backbone: str = "resnet18",
        features: int = 128,
        blocks: int = 2,
        depth: int = 3,
        pooling: str = "adjust",
        num_iters: int = 3,
        residual: bool = True,
        bag_scale: float = 1.0,
        mil_scale: float = 1.0,
        softmax_std: float = 0.0,
        flip_test: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        check_sizes(input_size=(input_size, 32), features=(features, 1), blocks=(blocks, 0), depth=(depth, 1))
        if not mil_scale > 0:
            raise ValueError(f"mil_scale: expected a positive number, got {mil_scale}")
        if not softmax_std >= 0:
            raise ValueError(f"softmax_std: expected at least 0, got {softmax_std}")
        self.skeleton = get_skeleton(skeleton)
        self.input_size, self.flip_test = input_size, flip_test
        self.mil_scale, self.softmax_std = mil_scale, softmax_std
        # Without the backend, which belongs to the machine and not to the model.
        self.config = {
            "skeleton": self.skeleton.to_config(),
            "input_size": input_size,
            "backbone": backbone,
            "features": features,
            "blocks": blocks,
            "depth": depth,
            "pooling": pooling,
            "num_iters": num_iters,
            "residual": residual,
            "bag_scale": bag_scale,
            "mil_scale": mil_scale,
            "softmax_std": softmax_std,
            "flip_test": flip_test,
        }
        K = self.skeleton.num_joints
        self.backbone = make_backbone(backbone, features)
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
        if self.heatmaps is not None:
            nn.init.normal_(self.heatmaps.weight, std=1e-3)
            nn.init.zeros_(self.heatmaps.bias)  # type: ignore[arg-type]

    def forward(self, images: torch.Tensor, all_blocks: bool = False) -> torch.Tensor | PoseOutput:
        """Predicts heatmaps.

        Args:
            images: ``(B, 3, H, W)`` floating point, RGB normalized by ``mean`` and ``std``; H and W multiples of 32
                (hourglass: 64).
            all_blocks: return the output of every block.

        Returns:
            Heatmaps ``(B, K, H/4, W/4)`` float32 of the last block, or a :class:`PoseOutput` with ``all_blocks``.
        """
        Y = self.backbone(images)
        if self.heatmaps is not None:
            maps = self.heatmaps(Y).float()
            if not self.softmax_std:
                return PoseOutput(maps[None], None) if all_blocks else maps
            scores = [maps]
        else:
            scores = self.blocks(Y)
        if not all_blocks:
            return self._heatmaps(scores[-1])
        stacked = torch.stack(scores)
        return PoseOutput(self._heatmaps(stacked), stacked)

    def _heatmaps(self, scores):
        if self.softmax_std:
            return softmax_heatmaps(scores, self.softmax_std)
        return probability(scores, self.mil_scale)

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes ``config.json`` and ``model.safetensors`` to ``folder``.

        Args:
            folder: created if necessary.
            dtype: dtype of the stored weights, such as ``torch.float16``; None keeps theirs.
            notes: JSON-serializable facts (scores, data, ...) for ``config.json``.
        """
        pretrained.save(self, folder, _FORMAT, dtype=dtype, notes=notes)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **options: Any) -> "PoseGenerator":
        """Loads a generator written by :meth:`save_pretrained`, without pickle.

        Args:
            path: the folder, or the file ``model.safetensors`` in it.
            options: constructor arguments that override the stored ones; only those that do not change parameters
                (``backend``, ``input_size``, ...).

        Returns:
            The generator, float32, in evaluation mode.

        Raises:
            ValueError: missing or damaged files, or the files of another model.
        """
        return pretrained.load(lambda **arguments: cls(**{**arguments, **options}), path, _FORMAT)
