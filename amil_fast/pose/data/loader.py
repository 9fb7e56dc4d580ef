"""Sampling, loading and throughput of pose data sets."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch


class PoseSampler(torch.utils.data.Sampler):
    """Keys ``(epoch, index)`` for :class:`~amil_fast.pose.data.PoseDataset`, in an order that depends on (seed, epoch)
    only.

    Args:
        size: number of samples.
        shuffle: permute the samples; otherwise 0, 1, 2, ...
        seed: seed of the permutation.
        rank, world: index and number of processes; each gets every ``world``-th key. With ``shuffle``, keys from the
            beginning are repeated until ``world`` divides their number, so that all processes run equally many steps.
        start: number of this process's keys to skip, to resume in the middle of an epoch.
    """

    def __init__(
        self, size: int, *, shuffle: bool = True, seed: int = 0, rank: int = 0, world: int = 1, start: int = 0
    ):
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 <= rank < world, got {rank} of {world}")
        self.size, self.shuffle, self.seed, self.rank, self.world, self.start = size, shuffle, seed, rank, world, start
        self.epoch = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Sets the epoch, and the number of keys to skip, of the next iteration."""
        self.epoch, self.start = epoch, start

    def _indices(self):
        if not self.shuffle:
            return range(self.rank, self.size, self.world)
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        return np.resize(order, self.size + -self.size % self.world)[self.rank :: self.world].tolist()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in self._indices()[self.start :]:
            yield self.epoch, index

    def __len__(self) -> int:
        share = -(-self.size // self.world) if self.shuffle else len(range(self.rank, self.size, self.world))
        return max(0, share - self.start)


class PoseLoader(torch.utils.data.DataLoader):
    """DataLoader with a :class:`PoseSampler` that measures its throughput.

    Args:
        dataset: a :class:`~amil_fast.pose.data.PoseDataset`, or a data set with keys ``(epoch, index)``.
        batch_size: samples per batch.
        shuffle, seed, rank, world: arguments of the sampler.
        workers: number of worker processes; by default the number of cores available to this process, at most 16.
        options: arguments of ``torch.utils.data.DataLoader`` (``drop_last``, ``pin_memory``, ...).

    Attributes:
        images_per_second: rate of the current or last iteration, including the consumer's time; NaN before the first
            batch.
        waited: seconds the consumer waited for batches.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset,
        batch_size: int = 32,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int | None = None,
        **options: Any,
    ):
        workers = min(16, cores()) if workers is None else workers
        super().__init__(
            dataset,
            batch_size,
            sampler=PoseSampler(len(dataset), shuffle=shuffle, seed=seed, rank=rank, world=world),  # type: ignore[arg-type]
            num_workers=workers,
            worker_init_fn=_start_worker if workers else None,
            persistent_workers=workers > 0,
            **options,
        )
        self._reset_clock()

    def _reset_clock(self):
        self._images, self._began, self._now, self.waited = 0, None, None, 0.0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Sets the epoch of the next iteration; see :meth:`PoseSampler.set_epoch`."""
        self.sampler.set_epoch(epoch, start)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Shuts the workers down.

        Required on errors: at interpreter exit multiprocessing sends SIGTERM to the workers, which ignore it, and waits
        for them forever.
        """
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    @property
    def images_per_second(self) -> float:
        """Images delivered per second since the iteration began; NaN before the first batch."""
        return self._images / (self._now - self._began) if self._images else float("nan")

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._reset_clock()
        self._began = requested = time.perf_counter()
        for batch in super().__iter__():
            self._now = time.perf_counter()
            self.waited += self._now - requested
            self._images += len(batch["index"])
            yield batch
            requested = time.perf_counter()


def cores() -> int:
    """Number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(_):
    # One worker per core: more threads would oversubscribe the cores.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl-C, and SIGTERM from some launchers, reach the whole process group; the main process handles them. A worker
    # ends when PoseLoader.close shuts it down or the main process exits.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
