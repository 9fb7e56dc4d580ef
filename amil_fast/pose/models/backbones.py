"""Backbones: feature maps at a quarter of the image resolution."""

import os
import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


def make_backbone(name: str, features: int) -> nn.Module:
    """Creates a backbone.

    Args:
        name: ``"resnet18"``, ``"resnet18s"``, ``"resnet34"``, ``"resnet50"`` (:class:`ResNetBackbone`),
            ``"patchresnetWxD"``, such as ``"patchresnet32x2"`` or ``"patchresnet32x2-2-6-3"``, with W channels in the
            first stage and D blocks per stage (:class:`PatchResNetBackbone`), or ``"hourglassS"`` with S stacks
            (:class:`HourglassBackbone`).
        features: output channels.
    """
    if name in _RESNETS:
        return ResNetBackbone(name, features)
    if match := re.fullmatch(r"hourglass([1-9]\d?)", str(name)):
        return HourglassBackbone(int(match[1]), features)
    if match := re.fullmatch(r"patchresnet([1-9]\d{0,3})x([1-9]\d?(?:(?:-[1-9]\d?){3})?)", str(name)):
        depths = [int(depth) for depth in match[2].split("-")]
        return PatchResNetBackbone(int(match[1]), depths * 4 if len(depths) == 1 else depths, features)
    raise ValueError(
        f"backbone: expected one of {', '.join(map(repr, _RESNETS))}, 'hourglass1', ..., 'patchresnet32x2', "
        f"'patchresnet32x2-2-6-3', ..., got {name!r}"
    )


class _Pyramid(nn.Module):
    """Four stages, ``layer1`` to ``layer4``, and the top-down path of a feature pyramid network.

    The stages are merged from coarse to fine: the coarser map is upsampled by 2 (nearest), added to the stage's 1 × 1
    projection and smoothed by a 3 × 3 convolution.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def _build(self, block, width, depths, channels_of, features):
        """Creates all layers after the stem, which the subclass creates before: optimizer states are in this order."""
        widths = []
        for stage, (depth, channels) in enumerate(zip(depths, channels_of, strict=True)):
            blocks = []
            for number in range(depth):
                blocks.append(block(width, channels, stride=2 if stage and not number else 1))
                width = channels * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            widths.append(width)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, features, 1) for channels in widths)
        self.smooth = nn.ModuleList(_conv_norm_relu(features, features) for _ in widths[:-1])

    def _merge(self, x):
        """Feature map at the resolution of ``x``, the output of the stem."""
        stages = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            stages.append(x)
        y = self.lateral[-1](stages[-1])
        for level in (2, 1, 0):
            y = self.smooth[level](_upsample(y) + self.lateral[level](stages[level]))
        return y


class ResNetBackbone(_Pyramid):
    """ResNet with the top-down path of a feature pyramid network.

    Parameters of the ResNet have torchvision's names, see :meth:`load_resnet`.

    Args:
        name: ``"resnet18"``, ``"resnet34"``, ``"resnet50"``, or ``"resnet18s"``: a ResNet-18 whose last stage has 256
            channels like its third. In a ResNet-18 that stage holds three quarters of the parameters, for maps of 4 × 4
            pixels at a crop size of 128. No ImageNet weights exist for ``"resnet18s"``.
        features: output channels.

    Sources: He et al., CVPR 2016; Lin et al., FPN, CVPR 2017; Xiao et al., Simple Baselines, ECCV 2018.
    """

    def __init__(self, name: str, features: int):
        block, depths, channels_of = _RESNETS[name]
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self._build(block, 64, depths, channels_of, features)
        _initialize(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``(B, 3, H, W)`` -> ``(B, features, H/4, W/4)``; H and W are multiples of 32."""
        _check_multiple(images, 32)
        return self._merge(F.max_pool2d(F.relu(self.bn1(self.conv1(images)), inplace=True), 3, stride=2, padding=1))

    def load_resnet(self, path: str | os.PathLike) -> None:
        """Loads ImageNet weights of the same ResNet.

        Args:
            path: a safetensors file with torchvision's parameter names; the classifier ``fc.*`` is ignored.

        Raises:
            ValueError: not a safetensors file, or the weights of another network.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            stored = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: expected a safetensors file of ResNet weights ({error})") from None
        weights = {name: value for name, value in stored.items() if not name.startswith("fc.")}
        own = {name: v for name, v in self.state_dict().items() if not name.startswith(("lateral.", "smooth."))}
        optional = {name for name in own if name.endswith(".num_batches_tracked")}
        wrong = (own.keys() ^ weights.keys()) - optional
        wrong |= {name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape}
        if wrong:
            raise ValueError(
                f"{path}: expected the weights of this ResNet; {len(wrong)} parameters differ, first {min(wrong)}"
            )
        self.load_state_dict(weights, strict=False)


class _BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, width, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(width, channels, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y)) + (x if self.downsample is None else self.downsample(x))
        return F.relu(y, inplace=True)


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, width, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.downsample = _shortcut(width, channels * self.expansion, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x))
        return F.relu(y, inplace=True)


_RESNETS: dict[str, tuple[type[_BasicBlock] | type[_Bottleneck], tuple[int, ...], tuple[int, ...]]] = {
    "resnet18": (_BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet18s": (_BasicBlock, (2, 2, 2, 2), (64, 128, 256, 256)),
    "resnet34": (_BasicBlock, (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet50": (_Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512)),
}


class PatchResNetBackbone(_Pyramid):
    """Residual network with a patchify stem and the top-down path of a feature pyramid network.

    The stem is one convolution of 4 × 4 with stride 4. A ResNet's stem computes its 64 channels at half the resolution
    of the crop, where the activations of a narrow network would be largest. Each stage has basic blocks and doubles the
    channels.

    Args:
        width: channels of the first stage.
        depths: number of blocks of the four stages.
        features: output channels.

    Sources: He et al., CVPR 2016; Lin et al., FPN, CVPR 2017; Liu et al., ConvNeXt (patchify stem), CVPR 2022.
    """

    def __init__(self, width: int, depths: Sequence[int], features: int):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self._build(_BasicBlock, width, depths, [width << stage for stage in range(4)], features)
        _initialize(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``(B, 3, H, W)`` -> ``(B, features, H/4, W/4)``; H and W are multiples of 32."""
        _check_multiple(images, 32)
        return self._merge(F.relu(self.norm(self.stem(images)), inplace=True))


class HourglassBackbone(nn.Module):
    """Stacked hourglasses without heatmap heads: supervision is applied to the generator's blocks.

    Args:
        stacks: number of hourglasses.
        features: output channels.

    Source: Newell et al., ECCV 2016.
    """

    def __init__(self, stacks: int, features: int):
        super().__init__()
        self.stem = nn.Sequential(
            _conv_norm_relu(3, 64, 7, stride=2),
            Residual(64, features // 2),
            nn.MaxPool2d(2),
            Residual(features // 2, features),
        )
        self.stacks = nn.ModuleList(
            nn.Sequential(Hourglass(features, 4), Residual(features, features)) for _ in range(stacks)
        )
        _initialize(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``(B, 3, H, W)`` -> ``(B, features, H/4, W/4)``; H and W are multiples of 64."""
        _check_multiple(images, 64)
        y = self.stem(images)
        for stack in self.stacks:
            y = y + stack(y)
        return y


class Hourglass(nn.Module):
    """One hourglass: ``depth`` downsampling steps by 2, then as many upsampling steps.

    Args:
        features: input and output channels.
        depth: number of downsampling steps.
        skip: skip connection at every resolution, as in Newell et al. Without, the coarsest map is a bottleneck.
    """

    def __init__(self, features: int, depth: int, skip: bool = True):
        super().__init__()
        self.skip = Residual(features, features) if skip else None
        self.down = Residual(features, features)
        self.inner = Hourglass(features, depth - 1, skip) if depth > 1 else Residual(features, features)
        self.up = Residual(features, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _upsample(self.up(self.inner(self.down(F.max_pool2d(x, 2)))))
        return y if self.skip is None else y + self.skip(x)


class Residual(nn.Module):
    """Pre-activation bottleneck of Newell et al.: 1 × 1 to half the width, 3 × 3, 1 × 1, plus the input (projected by
    1 × 1 if the width changes).

    Args:
        width: input channels.
        features: output channels.
    """

    def __init__(self, width: int, features: int):
        super().__init__()
        half = max(1, features // 2)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, features, 1),
        )
        self.projection = nn.Conv2d(width, features, 1) if width != features else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) + (x if self.projection is None else self.projection(x))


def _shortcut(width, channels, stride):
    if stride == 1 and width == channels:
        return None
    return nn.Sequential(nn.Conv2d(width, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))


def _conv_norm_relu(width, features, size=3, stride=1):
    convolution = nn.Conv2d(width, features, size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(features), nn.ReLU(inplace=True))


def _initialize(module):
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _upsample(x):
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _check_multiple(images, factor):
    if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
        raise ValueError(
            f"images: expected shape (B, 3, H, W) with H and W multiples of {factor}, got {tuple(images.shape)}"
        )
