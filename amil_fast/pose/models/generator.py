"""The pose generator: a backbone, and blocks that score every region of its feature map for every joint (PAPER §5)."""

from typing import NamedTuple

import torch
from torch import nn

from amil_fast.pose.codec import STRIDE
from amil_fast.pose.models.backbones import make_backbone
from amil_fast.pose.models.regions import RegionStack, probability
from amil_fast.pose.skeletons import get_skeleton
from amil_fast.utils import pretrained


class PoseOutput(NamedTuple):
    """What every block found.

    Attributes:
        heatmaps: ``(L, B, K, h, w)`` float32, one set per block; L = 1 without blocks.
        scores: ``(L, B, K, h, w)``, the regions' scores z the maps were made from, for
            :func:`amil_fast.pose.region_loss`; None without blocks.
    """

    heatmaps: torch.Tensor
    scores: torch.Tensor | None


class PoseGenerator(nn.Module):
    r"""Person crops in, one heatmap per joint out.

    A backbone makes feature maps Y at a quarter of the crop's resolution. On them stand N blocks, each an MI-RNet over
    all regions (:class:`~amil_fast.pose.models.regions.RegionBlock`): :math:`X_1 = G_1(Y)`,
    :math:`X_n = G_n(Y, X_{n-1})`, and the bag vector is handed on as well. A heatmap value is the probability that this
    region holds this joint, :math:`1 - e^{-\lambda h}` with :math:`h = \log(1 + e^z) \ge 0` of the region's score z.

    Args:
        skeleton: name of the joints to find (:data:`amil_fast.pose.skeletons.SKELETONS`).
        input_size: side of the square crops in pixels that the network is meant for; others work too.
        backbone: ``"resnet18"``, ``"resnet18s"`` (its last stage halved in width), ``"resnet34"``, ``"resnet50"``, or
            ``"hourglassS"`` with S stacks.
        features: width of feature maps, regions and bag vectors.
        blocks: N. 0: no MI-RNet, heatmaps are a 1 × 1 convolution of Y, not limited to [0, 1].
        depth: fully connected levels in a block, each followed by the pooling.
        pooling: ``"adjust"``, ``"mean"``, ``"max"``, any other of :data:`amil_fast.nn.POOLINGS`, or ``"none"``.
        num_iters: T of adjust pooling.
        residual: bag vectors add up over the levels.
        bag_scale: factor on the poolings' vectors; 1 in the paper.
        mil_scale: λ.
        backend: of adjust pooling.

    The call ``generator(images)`` with ``images (B, 3, H, W)`` floating point, normalized by ``mean`` and ``std``, H
    and W multiples of 32 (hourglass: 64), returns the last block's heatmaps ``(B, K, H/4, W/4)`` float32.
    ``generator(images, all_blocks=True)`` returns a :class:`PoseOutput`.

    Attributes: ``skeleton``, ``input_size``, ``stride`` (4), ``mean``, ``std`` (ImageNet's), ``config``.
    """

    stride = STRIDE
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(
        self,
        skeleton="lsp14",
        input_size=256,
        *,
        backbone="resnet18",
        features=128,
        blocks=2,
        depth=3,
        pooling="adjust",
        num_iters=3,
        residual=True,
        bag_scale=1.0,
        mil_scale=1.0,
        backend="auto",
    ):
        super().__init__()
        pretrained.check_sizes(
            input_size=(input_size, 32), features=(features, 1), blocks=(blocks, 0), depth=(depth, 1)
        )
        if not mil_scale > 0:
            raise ValueError(f"mil_scale: expected a positive number, got {mil_scale}")
        self.skeleton = get_skeleton(skeleton)
        self.input_size, self.mil_scale = input_size, mil_scale
        # What from_pretrained builds it from; where it runs (backend) is not part of what it is.
        self.config = {
            "skeleton": self.skeleton.name,
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
            nn.init.zeros_(self.heatmaps.bias)

    def forward(self, images, all_blocks=False):
        Y = self.backbone(images)
        if self.heatmaps is not None:
            heatmaps = self.heatmaps(Y).float()
            return PoseOutput(heatmaps[None], None) if all_blocks else heatmaps
        scores = self.blocks(Y)
        if not all_blocks:
            return probability(scores[-1], self.mil_scale)
        scores = torch.stack(scores)
        return PoseOutput(probability(scores, self.mil_scale), scores)

    def save_pretrained(self, folder, *, dtype=None, notes=None):
        """Writes ``config.json`` and ``model.safetensors`` into ``folder``.

        Args:
            dtype: of the stored values, such as ``torch.float16``; by default as they are.
            notes: JSON-able (scores, data, ...), kept in ``config.json``.
        """
        pretrained.save(self, folder, "amil-pose-generator", dtype=dtype, notes=notes)

    @classmethod
    def from_pretrained(cls, path, **options):
        """The generator in a folder that :meth:`save_pretrained` wrote (or its ``model.safetensors``), float32, in
        evaluation mode. Nothing is unpickled.

        Args:
            options: arguments that replace the stored ones: those that change no parameter (``backend``,
                ``input_size``, ...).

        Raises:
            ValueError: no such files, damaged ones, or what isn't a generator.
        """
        return pretrained.load(lambda **arguments: cls(**{**arguments, **options}), path, "amil-pose-generator")
