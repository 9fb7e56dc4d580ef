"""Crop archives: the crops of a data set in one file, for fast and portable training.

``NAME`` holds the crops: 8 bytes ``AMILPACK``, format version and a reserved zero as little-endian uint32, then the
concatenated JPEGs. ``NAME.index`` is a safetensors file with the offset of every JPEG, the annotations and the matrix
from every crop to its image; its metadata holds, as JSON, names and settings with the size and SHA-256 of ``NAME``.
Equal data and settings give equal bytes.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import save

from amil_fast.pose.codec import compose, crop_matrix
from amil_fast.pose.data.annotations import Annotations
from amil_fast.pose.data.augment import Augmentation, color_matrix, cut_out_batch, warp_batch, warp_crop
from amil_fast.pose.data.dataset import PoseDataset
from amil_fast.pose.data.files import decode_image
from amil_fast.pose.data.loader import cores
from amil_fast.pose.skeletons import SKELETONS
from amil_fast.utils.files import DataError, atomic_path, brief, open_regular, parse_json
from amil_fast.utils.limits import MAX_CROP
from amil_fast.utils.tensor_files import read_tensors

VERSION = 1
_MAGIC = b"AMILPACK"
_HEADER = struct.Struct("<8sII")
MAX_STORED = 2 * MAX_CROP  # side of a stored crop in pixels
# Settings in the index, and their types.
_SETTINGS = {
    **dict.fromkeys(("images", "ids", "left_out"), list),
    **dict.fromkeys(("skeleton", "source", "sha256"), str),
    **dict.fromkeys(("size", "stored", "quality", "bytes"), int),
    "margin": (int, float),
}
_INTEGERS, _FLOATS = (torch.int64, torch.int32, torch.uint8), (torch.float64, torch.float32)


def pack(
    annotations: Annotations,
    path: str | os.PathLike,
    size: int = 192,
    *,
    quality: int = 76,
    room: float | None = None,
    progress: Callable[[int], object] | None = None,
) -> int:
    """Writes the crops of all people to the archive ``path`` with its index ``path.index``, atomically.

    Args:
        annotations: the people, with a skeleton of :data:`amil_fast.pose.SKELETONS`.
        path: the file to write.
        size: side in pixels of an unaugmented training crop.
        quality: JPEG quality, 1 to 100 (LSPET at 192 px and quality 76: 57 MB).
        room: side of the stored crop in units of ``size``. Values above 1 store context, so that rotated and shrunken
            crops do not reach the border. By default 1 if crops cover whole images, else 1.3.
        progress: called with the number of crops written so far.

    Returns:
        Total size of both files in bytes.

    Raises:
        ValueError: settings out of range.
        DataError: no people, or an image that cannot be read.
    """
    path = Path(path)
    if not len(annotations):
        raise DataError(f"{annotations.source}: no people to write to a crop archive")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality: expected 1 to 100, got {quality}")
    if room is None:
        room = 1.0 if np.isnan(annotations.boxes).all() else 1.3
    if not room >= 1:
        raise ValueError(f"room: expected at least 1, got {room}")
    if SKELETONS.get(annotations.skeleton.name) is not annotations.skeleton:
        raise ValueError(f"skeleton: expected a built-in skeleton, got the custom one {annotations.skeleton.name!r}")
    if not size * room <= MAX_STORED:
        raise ValueError(f"room: expected crops of at most {MAX_STORED} px, got {size} px x {room:g}")
    stored = round(size * room)
    crops = PoseDataset(annotations, stored, margin=annotations.margin * stored / size)

    def encode(index):
        image, matrix = crops._crop(index, {}, None)
        crop = np.ascontiguousarray(image.transpose(1, 2, 0)[:, :, ::-1])
        options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
        return cv2.imencode(".jpg", crop, options)[1].tobytes(), matrix

    offsets, matrices, digest = [_HEADER.size], [], hashlib.sha256()
    # The index is renamed last: it vouches for the crops.
    with atomic_path(_index_path(path)) as partial_index, atomic_path(path) as partial:
        with open(partial, "wb") as file, ThreadPoolExecutor(cores()) as threads:

            def write(data):
                file.write(data)
                digest.update(data)

            write(_HEADER.pack(_MAGIC, VERSION, 0))
            for number, (data, matrix) in enumerate(threads.map(encode, range(len(crops))), 1):
                write(data)
                offsets.append(offsets[-1] + len(data))
                matrices.append(matrix)
                if progress:
                    progress(number)
        index = _index(annotations, size, stored, quality, offsets, matrices, digest.hexdigest())
        partial_index.write_bytes(index)
    return offsets[-1] + len(index)


def _index_path(path):
    return path.with_name(f"{path.name}.index")


def _index(annotations, size, stored, quality, offsets, matrices, digest):
    settings = {
        "format": "amil-pack",
        "version": VERSION,
        "bytes": offsets[-1],
        "sha256": digest,
        "skeleton": annotations.skeleton.name,
        "size": size,
        "stored": stored,
        "quality": quality,
        "margin": annotations.margin,
        "source": Path(annotations.source).name,
        "images": list(annotations.images),
        "ids": list(annotations.ids),
        "left_out": [str(problem.entry) + ": " + problem.reason for problem in annotations.left_out],
    }
    arrays = {
        "offsets": np.array(offsets, np.int64),
        "matrices": np.array(matrices, np.float64),
        "joints": np.nan_to_num(annotations.joints).astype(np.float32),
        "visibility": annotations.visibility,
        "boxes": annotations.boxes,
        "head_sizes": annotations.head_sizes,
    }
    # A single entry: safetensors does not preserve the order of several.
    return save(arrays, metadata={"amil": json.dumps(settings, sort_keys=True)})


class CropArchive(PoseDataset):
    """Crops of an archive written by :func:`pack`, memory-mapped; otherwise a
    :class:`~amil_fast.pose.data.PoseDataset`.

    Args:
        path: the archive.
        size: side of the crops in pixels; by default the ``size`` given to :func:`pack`.
        augmentation, seed: as for :class:`~amil_fast.pose.data.PoseDataset`.
        indices: subset of the people: indices, or a bool mask as from
            :meth:`~amil_fast.pose.data.Annotations.fold_mask`.
        on_device: defer the warp to :meth:`augment` on the training device. Samples then contain the stored crop as
            ``image (3, P, P)``, and ``warp (2, 3)``, ``color (3, 4)`` and ``cutouts (n, 4)``; joints already refer to
            the warped crop.

    Attributes:
        settings: ``size``, ``stored`` (P), ``quality``, ``source``, ``sha256`` and ``left_out`` of the archive.

    Raises:
        DataError: missing files, another format or version, or the index of another archive.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        size: int | None = None,
        *,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        indices: ArrayLike | None = None,
        on_device: bool = False,
    ):
        self.path, self.on_device = Path(path), on_device
        settings, arrays = _read_index(self.path)
        skeleton = SKELETONS[settings["skeleton"]]
        people = Annotations(
            source=self.path,
            root=self.path.parent,
            skeleton=skeleton,
            images=settings["images"],
            joints=arrays["joints"].astype(np.float64),
            visibility=arrays["visibility"],
            boxes=arrays["boxes"],
            margin=settings["margin"],
            head_sizes=arrays["head_sizes"],
            ids=settings["ids"],
        )
        self.settings = {name: settings[name] for name in ("size", "stored", "quality", "source", "sha256", "left_out")}
        self._rows = np.arange(len(people)) if indices is None else np.arange(len(people))[np.asarray(indices)]
        self._offsets, self._matrices = arrays["offsets"], arrays["matrices"]
        self._bytes: NDArray[np.uint8] | None = None
        super().__init__(
            people if indices is None else people.subset(self._rows),
            size or settings["size"],
            augmentation=augmentation,
            seed=seed,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None}  # every worker maps the file itself

    def stored(self, index: int) -> NDArray[np.uint8]:
        """Stored crop of a sample, ``(P, P, 3)`` uint8 BGR."""
        if self._bytes is None:
            self._bytes = np.memmap(self.path, np.uint8, "r")
        row = self._rows[index]
        crop = decode_image(self._bytes[self._offsets[row] : self._offsets[row + 1]])
        side = self.settings["stored"]
        if crop is None or crop.shape != (side, side, 3):
            raise DataError(f"{self.path}: crop {row} is damaged")
        return crop

    def verify(self) -> None:
        """Verifies the SHA-256 of the archive; raises DataError if it does not match the index."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != self.settings["sha256"]:
            raise DataError(
                f"{self.path}: expected the content that {_index_path(self.path)} describes (SHA-256 differs)"
            )

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        if not self.on_device:
            return super().__getitem__(key)
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = self._index(index)
        geometry, color = self._draw(epoch, index)
        warp, matrix = self._matrices_of(index, geometry)
        crop = np.ascontiguousarray(self.stored(index).transpose(2, 0, 1)[::-1])
        cutouts = (self.augmentation or Augmentation()).draw_cutouts(self.seed, epoch, index)
        return {
            "image": torch.from_numpy(crop),
            "warp": torch.from_numpy(warp.astype(np.float32)),
            "color": torch.from_numpy(color_matrix() if color is None else color),
            "cutouts": torch.from_numpy(cutouts),
            **self._ground_truth(index, matrix, geometry.get("flip", False)),
        }

    def augment(
        self, batch: dict[str, torch.Tensor], device: torch.device | str | None = None
    ) -> dict[str, torch.Tensor]:
        """Moves a batch of an ``on_device`` archive to a device and warps its crops there in one ``grid_sample``.

        Args:
            batch: collated samples.
            device: target device; None keeps each tensor's.

        Returns:
            The batch with ``image (B, 3, size, size)`` float32 in [0, 1], without ``warp``, ``color`` and ``cutouts``.
        """
        batch = {name: value.to(device or value.device, non_blocking=True) for name, value in batch.items()}
        crops = warp_batch(batch["image"], batch.pop("warp"), self.size, batch.pop("color"))
        batch["image"] = cut_out_batch(crops, batch.pop("cutouts"))
        return batch

    def _crop(self, index, geometry, color):
        warp, matrix = self._matrices_of(index, geometry)
        return warp_crop(self.stored(index), warp, self.size, color), matrix

    def _matrices_of(self, index, geometry):
        """Matrices from crop pixels to the stored crop, and to the image."""
        side = self.settings["stored"]
        box = (0, 0, side, side)
        warp = crop_matrix(box, self.size, margin=self.settings["size"] / side, **geometry)
        return warp, compose(self._matrices[self._rows[index]], warp)


def _read_index(path):
    index = _index_path(path)
    for file in (path, index):
        if not file.is_file():
            raise DataError(f"{file}: no such file (a crop archive consists of {path.name} and {index.name})")
    with open_regular(path) as file:
        header, length = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    magic, version, _ = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0)
    if magic != _MAGIC:
        raise DataError(f"{path}: expected a crop archive (written by `amil pack`)")
    if version != VERSION:
        raise DataError(f"{path}: expected format version {VERSION}, got {version}; run `amil pack` again")
    what = "the index of a crop archive"
    tensors, metadata = read_tensors(index, what)
    settings = parse_json(metadata.get("amil", "null"), index, dict, what)
    for name, kind in _SETTINGS.items():
        if not isinstance(settings.get(name), kind) or isinstance(settings[name], bool):
            raise DataError(f"{index}: expected {what}: {name}: got {brief(settings.get(name))}")
    S, skeleton = len(settings["images"]), SKELETONS.get(settings["skeleton"])
    if skeleton is None or not 1 <= settings["size"] <= settings["stored"] <= MAX_STORED or len(settings["ids"]) != S:
        raise DataError(f"{index}: expected {what}: inconsistent settings")
    K = skeleton.num_joints
    shapes = {"offsets": (S + 1,), "matrices": (S, 2, 3), "joints": (S, K, 2), "visibility": (S, K)}
    shapes |= {"boxes": (S, 4), "head_sizes": (S,)}
    for name, shape in shapes.items():
        dtypes = _INTEGERS if name in ("offsets", "visibility") else _FLOATS
        if name not in tensors or tensors[name].shape != shape or tensors[name].dtype not in dtypes:
            raise DataError(f"{index}: expected {what}: {name}: expected shape {shape}")
    arrays = {name: tensors[name].numpy() for name in shapes}
    offsets, bytes_ = arrays["offsets"], settings["bytes"]
    if offsets[0] != _HEADER.size or offsets[-1] != bytes_ or (offsets[1:] <= offsets[:-1]).any():
        raise DataError(f"{index}: expected {what}: offsets that increase from {_HEADER.size} to {bytes_}")
    if not np.isfinite(arrays["matrices"]).all():
        raise DataError(f"{index}: expected {what}: matrices: expected finite values")
    if length != bytes_:
        raise DataError(f"{path}: expected {bytes_} bytes as in the index, got {length}")
    return settings, arrays
