"""Packed data sets: crops in one file, for fast and portable training.

``NAME`` holds the crops: 8 bytes ``AMILPACK``, the format's version and a reserved zero as little-endian uint32, then
one JPEG after the other. ``NAME.index`` is a safetensors file: where each JPEG begins, the annotations, the matrix from
every crop to its image, and (as JSON in its metadata) names and settings with the size and SHA-256 of ``NAME``. The
same data and settings give the same bytes.
"""

import hashlib
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from amil_fast.pose.codec import compose, crop_matrix
from amil_fast.pose.data.annotations import Annotations
from amil_fast.pose.data.augment import color_matrix, warp_batch, warp_crop
from amil_fast.pose.data.dataset import PoseDataset
from amil_fast.pose.data.errors import DataError
from amil_fast.pose.data.files import decode_image
from amil_fast.pose.data.loader import cores
from amil_fast.pose.skeletons import SKELETONS

VERSION = 1
_MAGIC = b"AMILPACK"
_HEADER = struct.Struct("<8sII")


def pack(annotations, path, size=192, *, quality=76, room=None, progress=None):
    """Writes the crops of all people to ``path`` and ``path.index``.

    Args:
        annotations: an :class:`~amil_fast.pose.data.annotations.Annotations`.
        path: the file to write.
        size: side in pixels of the crop that training will see unaugmented.
        quality: of the JPEGs, 1 to 100 (LSPET at 192 px and 76: 57 MB).
        room: the stored picture's side is ``room`` x ``size`` and shows so much more, so that turning and shrinking the
            person doesn't run into its edge. By default 1 where crops cover whole images (there is no more), else 1.3.
        progress: called with the number of crops done so far.

    Returns:
        Size of both files in bytes. They appear under their names only when whole.
    """
    path = Path(path)
    if not len(annotations):
        raise DataError(f"{annotations.source}: nobody to pack")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality: expected 1 to 100, got {quality}")
    if room is None:
        room = 1.0 if np.isnan(annotations.boxes).all() else 1.3
    if room < 1:
        raise ValueError(f"room: expected at least 1, got {room}")
    if annotations.skeleton.name not in SKELETONS:
        raise ValueError(f"skeleton: expected one of SKELETONS, got {annotations.skeleton.name!r}")
    stored = round(size * room)
    crops = PoseDataset(annotations, stored, margin=annotations.margin * stored / size)

    def encode(index):
        image, matrix = crops._crop(index, {}, None)
        picture = np.ascontiguousarray(image.transpose(1, 2, 0)[:, :, ::-1])
        options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
        return cv2.imencode(".jpg", picture, options)[1].tobytes(), matrix

    partial = path.with_name(f".{path.name}.partial")
    offsets, matrices, digest = [_HEADER.size], [], hashlib.sha256()
    try:
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
        partial_index = path.with_name(f".{path.name}.index.partial")
        partial_index.write_bytes(index)
        os.replace(partial, path)
        os.replace(partial_index, _index_path(path))
    finally:
        for leftover in (partial, path.with_name(f".{path.name}.index.partial")):
            leftover.unlink(missing_ok=True)
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
    # One entry only: safetensors doesn't keep the order of several.
    return save(arrays, metadata={"amil": json.dumps(settings, sort_keys=True)})


class CropArchive(PoseDataset):
    """The crops of a packed file, memory-mapped; otherwise a :class:`~amil_fast.pose.data.dataset.PoseDataset`.

    Args:
        path: what :func:`pack` wrote.
        size: side of the crops in pixels; by default what they were packed for.
        augmentation, seed: as for PoseDataset.
        indices: use only these people (numbers, or a mask such as ``annotations.fold_mask`` returns).
        on_device: leave the warp to :meth:`augment`, on the training device. ``image`` is then the stored picture
            ``(3, P, P)``, and the samples have ``warp (2, 3)`` and ``color (3, 4)`` besides; the joints are already
            those of the crop to come.

    Raises:
        DataError: no such file, another format or version, or an index of another file.
    """

    def __init__(self, path, size=None, *, augmentation=None, seed=0, indices=None, on_device=False):
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
        self._bytes = None
        super().__init__(
            people if indices is None else people.subset(self._rows),
            size or settings["size"],
            augmentation=augmentation,
            seed=seed,
        )

    def __getstate__(self):
        return {**self.__dict__, "_bytes": None}  # workers map the file for themselves

    def stored(self, index):
        """The stored picture of a sample, ``(P, P, 3)`` uint8 BGR."""
        if self._bytes is None:
            self._bytes = np.memmap(self.path, np.uint8, "r")
        row = self._rows[index]
        picture = decode_image(self._bytes[self._offsets[row] : self._offsets[row + 1]])
        side = self.settings["stored"]
        if picture is None or picture.shape != (side, side, 3):
            raise DataError(f"{self.path}: crop {row} is damaged")
        return picture

    def verify(self):
        """Compares the file with the SHA-256 in its index; DataError where they differ."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != self.settings["sha256"]:
            raise DataError(f"{self.path}: its content is not what {_index_path(self.path)} was written for")

    def __getitem__(self, key):
        if not self.on_device:
            return super().__getitem__(key)
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = self._index(index)
        geometry, color = self._draw(epoch, index)
        warp, matrix = self._matrices_of(index, geometry)
        picture = np.ascontiguousarray(self.stored(index).transpose(2, 0, 1)[::-1])
        return {
            "image": torch.from_numpy(picture),
            "warp": torch.from_numpy(warp.astype(np.float32)),
            "color": torch.from_numpy(color_matrix() if color is None else color),
            **self._ground_truth(index, matrix, geometry.get("flip", False)),
        }

    def augment(self, batch, device=None):
        """A batch of an ``on_device`` data set with its crops made: ``image (B, 3, size, size)`` float32 in [0, 1].

        Moves the whole batch to ``device`` (by default the images' own) and warps it there in one ``grid_sample``.
        """
        batch = {name: value.to(device or value.device, non_blocking=True) for name, value in batch.items()}
        batch["image"] = warp_batch(batch["image"], batch.pop("warp"), self.size, batch.pop("color"))
        return batch

    def _crop(self, index, geometry, color):
        warp, matrix = self._matrices_of(index, geometry)
        return warp_crop(self.stored(index), warp, self.size, color), matrix

    def _matrices_of(self, index, geometry):
        """Crop pixels to those of the stored picture, and to the image's."""
        side = self.settings["stored"]
        box = (0, 0, side, side)
        warp = crop_matrix(box, self.size, margin=self.settings["size"] / side, **geometry)
        return warp, compose(self._matrices[self._rows[index]], warp)


def _read_index(path):
    index = _index_path(path)
    for file in (path, index):
        if not file.is_file():
            raise DataError(f"{file}: there is no such file (a packed data set is {path.name} and {index.name})")
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
    magic, version, _ = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0)
    if magic != _MAGIC:
        raise DataError(f"{path}: expected a packed data set (made by `amil pack`)")
    if version != VERSION:
        raise DataError(f"{path}: packed in format {version}, this program reads {VERSION}; pack the data again")
    try:
        with safe_open(index, "numpy") as file:
            settings = json.loads((file.metadata() or {})["amil"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        offsets, bytes_ = arrays["offsets"], settings["bytes"]
        S = len(settings["images"])
        whole = offsets.shape == (S + 1,) and offsets[0] == _HEADER.size and (np.diff(offsets) > 0).all()
        whole = whole and offsets[-1] == bytes_ and arrays["matrices"].shape == (S, 2, 3)
        if not whole or settings["skeleton"] not in SKELETONS or settings["stored"] < settings["size"]:
            raise ValueError("its tables don't fit together")
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(f"{index}: expected the index of a packed data set: {error}") from None
    if path.stat().st_size != bytes_:
        raise DataError(f"{path}: {path.stat().st_size} bytes, but its index was written for {bytes_}")
    return settings, arrays
