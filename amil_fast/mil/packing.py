"""Packed batches of bags: bounded by instances, read ahead by worker processes."""

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from amil_fast.mil.bag_sources import BagSource

_M_MMAP_THRESHOLD = -3  # malloc.h


class PackedBags(NamedTuple):
    """Bags of a packed batch.

    Attributes:
        features: ``(total, D)``.
        cu_seqlens: int64 ``(B + 1,)``.
        indices: int64 ``(B,)``, numbers of the bags in the source.
    """

    features: torch.Tensor
    cu_seqlens: torch.Tensor
    indices: torch.Tensor

    def to(self, device: torch.device | str) -> "PackedBags":
        """The batch on another device; asynchronously from pinned memory."""
        return PackedBags(*(tensor.to(device, non_blocking=True) for tensor in self))

    def pin_memory(self) -> "PackedBags":
        """The batch in pinned memory; called by DataLoader."""
        return PackedBags(*(tensor.pin_memory() for tensor in self))


def packed_collate(items: Sequence[Any]) -> Any:
    """Collate function for DataLoaders whose items are bags: instances are packed instead of padded.

    Args:
        items: tuples ``(features, *others)`` with features ``(n, D)``; or mappings with the features under ``"X"``, as
            those of torchmil.

    Returns:
        For tuples ``(features, cu_seqlens, *others)`` with features ``(total, D)``, int64 ``cu_seqlens (B + 1,)`` and
        the others as by ``torch.utils.data.default_collate``. For mappings a dict: entries with a row per instance
        (such as ``"X"``, ``"y_inst"`` and ``"coords"``) are packed, others stacked, and ``"cu_seqlens"`` is added;
        sparse entries (``"adj"``) are left out, since they have no packed form.

    Raises:
        ValueError: features that are not two-dimensional, or of different width or dtype.
    """
    mappings = isinstance(items[0], Mapping) or hasattr(items[0], "keys")  # a TensorDict is not a Mapping
    features = [torch.as_tensor(item["X"] if mappings else item[0]) for item in items]
    first = features[0]
    for x in features:
        if x.dim() != 2 or x.shape[1] != first.shape[1] or x.dtype != first.dtype:
            raise ValueError(
                f"features: expected shape (n, {first.shape[-1]}) and dtype {first.dtype} as in the first bag, got "
                f"{tuple(x.shape)} and {x.dtype}"
            )
    sizes = [len(x) for x in features]
    cu_seqlens = torch.tensor([0, *np.cumsum(sizes).tolist()])
    if not mappings:
        others = default_collate([tuple(item[1:]) for item in items]) if len(items[0]) > 1 else ()
        return (torch.cat(features), cu_seqlens, *others)
    result = {"X": torch.cat(features), "cu_seqlens": cu_seqlens}
    for key in items[0].keys():  # noqa: SIM118
        values = [torch.as_tensor(item[key]) for item in items]
        if key == "X" or values[0].layout != torch.strided:
            continue
        per_instance = all(v.dim() and len(v) == n for v, n in zip(values, sizes, strict=True)) and key != "Y"
        result[key] = torch.cat(values) if per_instance else torch.stack(values)
    return result


class TorchmilDataset(Dataset):
    """Bags of a torchmil dataset as ``(features, label)``, for a DataLoader with :func:`packed_collate`.

    Args:
        dataset: any dataset whose items are mappings with ``"X" (n, D)`` and ``"Y"``, such as torchmil's
            ``ProcessedMILDataset``. Folders in its layout are also read by :func:`amil_fast.mil.open_bags`.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        item = self.dataset[index]
        label = torch.as_tensor(item["Y"])
        if label.numel() != 1:
            raise ValueError(f"Y: expected one label per bag, got shape {tuple(label.shape)}")
        return torch.as_tensor(item["X"]), label.reshape(())


def pack_by_size(bag_indices: Sequence[int], sizes: np.ndarray, max_instances: int) -> list[list[int]]:
    """Groups bags into batches of at most ``max_instances`` instances: the largest bag beside the smallest ones.

    A bag that is larger by itself is a batch of its own. Takes O(n log n) for n bags, deterministic.
    """
    order = sorted(bag_indices, key=lambda i: (-sizes[i], i))
    batches = []
    begin, end = 0, len(order)
    while begin < end:
        batch, total = [order[begin]], int(sizes[order[begin]])
        begin += 1
        while begin < end and total + sizes[order[begin]] <= max_instances:
            batch.append(order[begin])
            total += int(sizes[order[begin]])
            begin += 1
        while begin < end and total + sizes[order[end - 1]] <= max_instances:
            end -= 1
            batch.append(order[end])
            total += int(sizes[order[end]])
        batches.append(batch)
    return batches


def share_by_size(bag_indices: Sequence[int], sizes: np.ndarray, processes: int) -> list[list[int]]:
    """Distributes bags over processes with about equally many instances each, deterministic.

    The largest remaining bag goes to the process with the fewest instances; some processes may get none.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    totals = [0] * processes
    for i in sorted(bag_indices, key=lambda i: (-sizes[i], i)):
        least = min(range(processes), key=lambda p: (totals[p], len(shares[p]), p))
        shares[least].append(int(i))
        totals[least] += int(sizes[i])
    return shares


class _Bags(Dataset):
    """Dataset whose index is a list of bags, so that a worker reads a whole batch."""

    def __init__(self, source, keep):
        self.source = source
        self._kept: dict[int, torch.Tensor] | None = {} if keep else None

    def _features(self, index):
        if self._kept is None:
            return self.source.features(index)
        if index not in self._kept:
            self._kept[index] = self.source.features(index)
        return self._kept[index]

    def __getitem__(self, bag_indices):
        if not bag_indices:  # a share without bags still takes part in the step of all processes
            nothing = torch.zeros(0, self.source.num_features)
            return PackedBags(nothing, torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
        features, cu_seqlens, indices = packed_collate([(self._features(i), i) for i in bag_indices])
        return PackedBags(features, cu_seqlens, indices)


class _Batches:
    """Sampler of a list of batches that can be replaced between epochs."""

    def __init__(self):
        self.batches: list[list[int]] = []

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


class PackedLoader:
    """Reads lists of batches of a source; worker processes read ahead and live as long as the loader.

    Bags of small sets (under 256 MB as float32) are kept in memory if there are no workers.

    Args:
        source: the bags.
        workers: number of worker processes; None: :func:`default_workers`.
        pin_memory: copy batches to pinned memory, for a GPU.
    """

    def __init__(self, source: BagSource, workers: int | None = None, *, pin_memory: bool = False):
        workers = default_workers(source) if workers is None else workers
        self._sampler = _Batches()
        self._loader: DataLoader = DataLoader(
            _Bags(source, keep=workers == 0 and _is_small(source)),
            batch_size=None,  # an item is a batch
            sampler=self._sampler,  # type: ignore[arg-type]  # a re-iterable without a length of its own suffices
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=2 if workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_unmap_freed_blocks,
            generator=torch.Generator(),  # the loader draws seeds for its workers, not from the global generator
        )

    def read(self, batches: Iterable[Sequence[int]]) -> Iterator[PackedBags]:
        """Yields the bags of every batch, in this order."""
        self._sampler.batches = [[int(i) for i in batch] for batch in batches]
        return iter(self._loader)


def _unmap_freed_blocks(_worker: int) -> None:
    """Fixes glibc's mmap threshold at 1 MiB, so that freed bags return to the system; no effect with other C libraries.

    By default the threshold rises to the size of the largest freed block, up to 32 MiB. Bags then come from the heap,
    which cannot shrink below a small block allocated after them: one worker held 13 bags on a busy machine, and holds
    at most 3 with a fixed threshold. Mapping every bag makes reading up to a quarter slower.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def default_workers(source: BagSource, processes: int = 1) -> int:
    """Worker processes to read ahead: none for small sets (under 256 MB as float32), otherwise up to 4."""
    if _is_small(source):
        return 0
    return max(1, min(4, (os.cpu_count() or 1) // processes))


def _is_small(source):
    return int(source.sizes.sum()) * source.num_features * 4 < 256e6
