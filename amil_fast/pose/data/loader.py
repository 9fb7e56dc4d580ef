"""Batches from a pose data set: order, workers, speed."""

import os
import signal
import time

import cv2
import numpy as np
import torch


class PoseSampler(torch.utils.data.Sampler):
    """Keys ``(epoch, index)`` for :class:`PoseDataset`: a permutation that depends on (seed, epoch) only.

    Args:
        size: number of samples.
        shuffle: otherwise 0, 1, 2, ...
        seed: of the permutation.
        rank, world: this process's place among ``world``: it gets every ``world``-th key. The last keys are repeated
        from
            the beginning where ``world`` doesn't divide ``size`` (no process may wait for another), unless not
            shuffled.
        start: leave out so many of this process's keys, once: a run that goes on in the middle of an epoch.
    """

    def __init__(self, size, *, shuffle=True, seed=0, rank=0, world=1, start=0):
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 <= rank < world, got {rank} of {world}")
        self.size, self.shuffle, self.seed, self.rank, self.world, self.start = size, shuffle, seed, rank, world, start
        self.epoch = 0

    def set_epoch(self, epoch, start=0):
        """To be called before the loader's ``iter``."""
        self.epoch, self.start = epoch, start

    def _indices(self):
        if not self.shuffle:
            return range(self.rank, self.size, self.world)
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        return np.resize(order, self.size + -self.size % self.world)[self.rank :: self.world].tolist()

    def __iter__(self):
        for index in self._indices()[self.start :]:
            yield self.epoch, index

    def __len__(self):
        share = -(-self.size // self.world) if self.shuffle else len(range(self.rank, self.size, self.world))
        return max(0, share - self.start)


class PoseLoader(torch.utils.data.DataLoader):
    """A DataLoader over a pose data set, with :class:`PoseSampler` inside, that knows its own speed.

    Args:
        dataset: a :class:`PoseDataset`, or what takes keys ``(epoch, index)`` as it does.
        batch_size: samples in a batch.
        shuffle, seed, rank, world: of the sampler.
        workers: number of processes that read; by default one for each core this process may use, at most 16.
        options: for ``torch.utils.data.DataLoader`` (``drop_last``, ``pin_memory``, ...).

    ``images_per_second`` is the rate of the last iteration over the loader, or of the running one, the time of whoever
    consumes the batches included; ``waited`` the seconds the consumer waited for them.
    """

    def __init__(self, dataset, batch_size=32, *, shuffle=True, seed=0, rank=0, world=1, workers=None, **options):
        workers = min(16, cores()) if workers is None else workers
        super().__init__(
            dataset,
            batch_size,
            sampler=PoseSampler(len(dataset), shuffle=shuffle, seed=seed, rank=rank, world=world),
            num_workers=workers,
            worker_init_fn=_start_worker if workers else None,
            persistent_workers=workers > 0,
            **options,
        )
        self._forget()

    def _forget(self):
        self._images, self._began, self._now, self.waited = 0, None, None, 0.0

    def set_epoch(self, epoch, start=0):
        """Which epoch the next ``iter`` is."""
        self.sampler.set_epoch(epoch, start)

    def close(self):
        """Ends the workers. Without it an interpreter that exits on an error waits for them for ever: it sends SIGTERM,
        which they leave to the main process."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()

    @property
    def images_per_second(self):
        """Images delivered per second since the iteration began; NaN before the first batch."""
        return self._images / (self._now - self._began) if self._images else float("nan")

    def __iter__(self):
        self._forget()
        self._began = asked = time.perf_counter()
        for batch in super().__iter__():
            self._now = time.perf_counter()
            self.waited += self._now - asked
            self._images += len(batch["index"])
            yield batch
            asked = time.perf_counter()


def cores():
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(_):
    # One process per core reads: threads of their own would only get in each other's way.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl-C, and SIGTERM from some launchers, reach the whole process group; the main process decides what to do. A
    # worker ends when that tells it to (PoseLoader.close), or is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
