"""Any network that returns heatmaps, from crops to joints in the image."""

import importlib
from pathlib import Path

import torch

from amil_fast.ops import decode_heatmaps
from amil_fast.pose import PoseGenerator
from amil_fast.pose.codec import heatmap_to_image
from amil_fast.pose.skeletons import get_skeleton

# The generator that comes with the package; its README.md says what it was trained on and what it can't do.
SHIPPED = Path(__file__).resolve().parents[1] / "weights"
_PICKLES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".pt2", ".tar"})


class Predictor:
    """Crops in, joints out.

    Args:
        model: maps ``(B, 3, S, S)`` float to heatmaps ``(B, K, H, H)``; of a list, tuple or dict of them (a stack of
            supervised blocks) the last one counts. It is put into evaluation mode.
        skeleton: its joints; by default ``model.skeleton``.
        size: side S of the crops; by default ``model.input_size``.
        mean, std: what crops in [0, 1] are normalized with; by default ``model.mean`` and ``model.std``, else
        ImageNet's. flip_test: average with the heatmaps of the flipped crop.
        refine: of :func:`amil_fast.decode_heatmaps`.
        device, dtype: where and in what the network runs; by default where its parameters are.

    Raises:
        ValueError: skeleton or size are neither given nor known to the model.
    """

    def __init__(
        self,
        model,
        *,
        skeleton=None,
        size=None,
        mean=None,
        std=None,
        flip_test=True,
        refine="dark",
        device=None,
        dtype=None,
    ):
        parameter = next(model.parameters(), torch.zeros(()))
        self.device = torch.device(device) if device is not None else parameter.device
        self.dtype = dtype or parameter.dtype
        self.model = model.to(self.device, self.dtype).eval()
        skeleton = getattr(model, "skeleton", None) if skeleton is None else skeleton
        self.size = int(getattr(model, "input_size", 0) if size is None else size)
        if skeleton is None:
            raise ValueError("skeleton: the model doesn't say which joints it finds; name their skeleton (--skeleton)")
        if self.size < 1:
            raise ValueError("size: the model doesn't say how large its crops are; give their side in pixels (--size)")
        self.skeleton = get_skeleton(skeleton)
        mean = getattr(model, "mean", PoseGenerator.mean) if mean is None else mean
        std = getattr(model, "std", PoseGenerator.std) if std is None else std
        self._mean, self._std = (
            torch.as_tensor(value, dtype=torch.float32, device=self.device).reshape(-1, 1, 1) for value in (mean, std)
        )
        self.flip_test, self.refine = flip_test, refine

    @torch.inference_mode()
    def __call__(self, images, to_image):
        """Joints of a batch of crops.

        Args:
            images: ``(B, 3, S, S)`` RGB, uint8 or float in [0, 1].
            to_image: ``(B, 2, 3)`` floating point, crop pixels to the image's.

        Returns:
            ``coords (B, K, 2)`` float32 in image pixels and ``scores (B, K)`` float32, on the CPU.
        """
        images = images.to(self.device, non_blocking=True)
        images = (
            (images.float() / 255 if images.dtype == torch.uint8 else images.float()).sub(self._mean).div(self._std)
        )
        images = images.to(self.dtype)
        heatmaps = self._heatmaps(images)
        flipped = self._heatmaps(images.flip(-1)) if self.flip_test else None
        stride = images.shape[-1] / heatmaps.shape[-1]
        affine = heatmap_to_image(to_image.to(self.device, torch.float32), stride)
        coords, scores = decode_heatmaps(
            heatmaps,
            refine=self.refine,
            flipped=flipped,
            flip_pairs=self.skeleton.flip_pairs if self.flip_test else None,
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
                f"model: expected heatmaps ({len(images)}, {K}, H, W) for {self.skeleton.name} in the proportions of "
                f"the crop, got {shape or type(found).__name__}"
            )
        return found


def load_model(checkpoint=None, factory=None):
    """A network for :class:`Predictor`. No file is ever unpickled.

    Args:
        checkpoint: what ``PoseGenerator.save_pretrained`` wrote, by default the shipped weights; with ``factory`` a
            ``.safetensors`` file of weights.
        factory: ``"package.module:function"`` that returns any ``torch.nn.Module`` from crops to heatmaps; attributes
            ``skeleton``, ``input_size``, ``mean`` and ``std`` of it are respected. It is imported and called.

    Raises:
        ValueError: a file that would have to be unpickled, weights that don't fit, an unknown factory.
    """
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        if path.suffix.lower() in _PICKLES:
            raise ValueError(
                f"{path}: files of this kind hold pickles, which run code when they are loaded; save the weights with "
                "safetensors.torch.save_file and name the network that they belong to (--model package.module:function)"
            )
        if not path.exists():
            raise ValueError(f"{path}: there is no such checkpoint")
    if factory is not None:
        return _from_factory(factory, path)
    return PoseGenerator.from_pretrained(SHIPPED if path is None else path).to(memory_format=torch.channels_last)


def _from_factory(factory, path):
    module, _, name = factory.partition(":")
    try:
        build = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model: expected package.module:function, got {factory!r} ({error})") from None
    model = build()
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model: expected {factory} to return a torch.nn.Module, got {type(model).__name__}")
    if path is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            model.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError, OSError) as error:
            raise ValueError(f"{path}: the weights don't fit {factory}: {error}") from None
    return model
