"""From crops to joints in image coordinates, with any network that returns heatmaps."""

import copy
import importlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from amil_fast.ops import decode_heatmaps, flip_back
from amil_fast.pose import PoseGenerator
from amil_fast.pose.codec import heatmap_to_image
from amil_fast.pose.inference.sides import separate_sides
from amil_fast.pose.skeletons import Skeleton, get_skeleton
from amil_fast.utils.files import DataError
from amil_fast.utils.limits import MAX_CROP
from amil_fast.utils.tensor_files import read_tensors

# The generator shipped with the package; its model card is the README.md in this folder.
SHIPPED = Path(__file__).resolve().parents[1] / "weights"
_PICKLES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".pt2", ".tar"})


class Predictor:
    """Predicts joints in image coordinates from crops.

    Args:
        model: maps ``(B, 3, S, S)`` float to heatmaps ``(B, K, H, W)``; of a list, tuple or dict the last entry is
            used. It is set to evaluation mode; a :class:`~amil_fast.pose.PoseGenerator` is copied, with its batch
            normalization merged into the convolutions.
        skeleton: the joints; by default ``model.skeleton``.
        size: side S of the crops in pixels; by default ``model.input_size``.
        mean: mean of the normalization of crops in [0, 1]; by default ``model.mean``, else ImageNet's.
        std: standard deviation of the normalization; by default ``model.std``, else ImageNet's.
        flip_test: average with the heatmaps of the flipped crop, which takes twice as long; by default
            ``model.flip_test``, else True.
        refine: refinement of :func:`amil_fast.ops.decode_heatmaps`.
        separate_sides: decode the joints of each pair together, for heatmaps that are proportional to probabilities
            (:func:`~amil_fast.pose.inference.separate_sides`); by default for a
            :class:`~amil_fast.pose.PoseGenerator` with ``softmax_std``.
        device: of the network; by default that of its parameters.
        dtype: of the network; by default that of its parameters.

    Raises:
        ValueError: ``skeleton`` or ``size`` is neither given nor an attribute of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        skeleton: str | Skeleton | None = None,
        size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        flip_test: bool | None = None,
        refine: str = "dark",
        separate_sides: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        parameter = next(model.parameters(), torch.zeros(()))
        self.device = torch.device(device) if device is not None else parameter.device
        self.dtype = dtype or parameter.dtype
        self.model = model.eval()
        if isinstance(model, PoseGenerator):
            self.model = _merge_batch_norm(model)
        self.model = self.model.to(self.device, self.dtype)
        skeleton = getattr(model, "skeleton", None) if skeleton is None else skeleton
        self.size = int(getattr(model, "input_size", 0) if size is None else size)
        if skeleton is None:
            raise ValueError("skeleton: expected a skeleton (--skeleton), the model has no attribute skeleton")
        if self.size < 1:
            raise ValueError("size: expected the side of the crops (--size), the model has no attribute input_size")
        if self.size > MAX_CROP:
            raise ValueError(f"size: expected at most {MAX_CROP}, got {self.size}")
        self.skeleton = get_skeleton(skeleton)
        mean = getattr(model, "mean", PoseGenerator.mean) if mean is None else mean
        std = getattr(model, "std", PoseGenerator.std) if std is None else std
        self._mean, self._std = (
            torch.as_tensor(value, dtype=torch.float32, device=self.device).reshape(-1, 1, 1) for value in (mean, std)
        )
        self.flip_test = bool(getattr(model, "flip_test", True)) if flip_test is None else flip_test
        self.refine = refine
        self.separate_sides = bool(getattr(model, "softmax_std", 0)) if separate_sides is None else separate_sides

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, to_image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicts the joints of a batch of crops.

        Args:
            images: ``(B, 3, S, S)`` RGB, uint8 or float in [0, 1].
            to_image: ``(B, 2, 3)`` floating point, maps crop pixels to image pixels.

        Returns:
            ``coords (B, K, 2)`` float32 in image pixels and ``scores (B, K)`` float32, on the CPU.

        Raises:
            ValueError: the model returns anything but heatmaps of this skeleton.
        """
        images = images.to(self.device, non_blocking=True)
        images = (
            (images.float() / 255 if images.dtype == torch.uint8 else images.float()).sub(self._mean).div(self._std)
        )
        images = images.to(self.dtype)
        heatmaps = self._heatmaps(images)
        flipped = self._heatmaps(images.flip(-1)) if self.flip_test else None
        if self.separate_sides:
            if flipped is not None:
                heatmaps = (heatmaps + flip_back(flipped, self.skeleton.flip_pairs)) / 2
                flipped = None
            heatmaps = separate_sides(heatmaps, self.skeleton.flip_pairs)
        stride = images.shape[-1] / heatmaps.shape[-1]
        affine = heatmap_to_image(to_image.to(self.device, torch.float32), stride)
        coords, scores = decode_heatmaps(
            heatmaps,
            refine=self.refine,
            flipped=flipped,
            flip_pairs=None if flipped is None else self.skeleton.flip_pairs,
            affine=affine,
        )
        return coords.cpu(), scores.cpu()

    def _heatmaps(self, images):
        found = self.model(images)
        if isinstance(found, dict):
            found = list(found.values())
        if isinstance(found, list | tuple):
            found = found[-1]
        K = self.skeleton.num_joints
        shape = tuple(getattr(found, "shape", ()))
        if len(shape) != 4 or shape[1] != K or shape[2] * images.shape[3] != shape[3] * images.shape[2]:
            raise ValueError(
                f"model: expected heatmaps ({len(images)}, {K}, H, W) for {self.skeleton.name} with the crop's "
                f"aspect ratio, got {shape or type(found).__name__}"
            )
        return found


def _merge_batch_norm(generator):
    """Returns a copy without batch normalization: its scale and shift become part of the convolution before it."""
    generator = copy.deepcopy(generator)
    for module in generator.modules():
        # In the backbones of PoseGenerator, layers are registered in the order of their application.
        children = list(module.named_children())
        for (name, layer), (next_name, next_layer) in itertools.pairwise(children):
            if isinstance(layer, nn.Conv2d) and isinstance(next_layer, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(layer, next_layer))
                setattr(module, next_name, nn.Identity())
    return generator


def load_model(checkpoint: str | os.PathLike | None = None, factory: str | None = None) -> nn.Module:
    """Loads a network for :class:`Predictor`. Nothing is unpickled.

    Args:
        checkpoint: folder written by ``PoseGenerator.save_pretrained``, by default the shipped weights; with
            ``factory`` a ``.safetensors`` file of weights.
        factory: ``"package.module:function"``, imported and called; returns a ``torch.nn.Module`` that maps crops to
            heatmaps. Its attributes ``skeleton``, ``input_size``, ``mean`` and ``std`` are used.

    Raises:
        ValueError: a pickled or missing file, weights that do not fit, an unknown factory.
    """
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        if path.suffix.lower() in _PICKLES:
            raise ValueError(
                f"{path}: files of this type hold pickles, which run code when they are loaded; save the weights with "
                "safetensors.torch.save_file and name their network (--model package.module:function)"
            )
        if not path.exists():
            raise ValueError(f"{path}: no such checkpoint")
    if factory is not None:
        return _from_factory(factory, path)
    generator: Any = PoseGenerator.from_pretrained(SHIPPED if path is None else path)
    return generator.to(memory_format=torch.channels_last)  # absent from the type stubs of nn.Module


def _from_factory(factory, path):
    module, _, name = factory.partition(":")
    try:
        build = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model: expected package.module:function, got {factory!r} ({error})") from None
    try:
        model = build()
    except Exception as error:  # the user's function, with whatever it raises
        raise ValueError(f"model: {factory}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected {factory} to return a torch.nn.Module, got {type(model).__name__}")
    if path is not None:
        try:
            model.load_state_dict(read_tensors(path)[0])
        except RuntimeError as error:
            raise DataError(f"{path}: the weights do not fit {factory}: {error}") from None
    return model
