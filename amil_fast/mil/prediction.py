"""Predictions of a trained model for bags on disk, and the effective number of instances behind them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from amil_fast.mil.bag_sources import BagSource
from amil_fast.mil.packing import PackedBags, PackedLoader, pack_by_size, share_by_size
from amil_fast.nn import MIRNet
from amil_fast.nn.pooling import BasePool

MAX_INSTANCES = 32768
_LARGE_ENOUGH = 8  # instances from which on a bag can show a collapse


@dataclass(frozen=True)
class BagPredictions:
    """Predictions for bags, in the order in which they were requested.

    Attributes:
        names: names of the bags.
        sizes: number of instances per bag.
        scores: float32: probability of the positive class ``(B,)``, probabilities ``(B, C)``, or values ``(B,)`` for
            regression.
        effective: effective number of instances per bag, ``1 / Σ w²`` with the weights of the last level; None for
            poolings without weights.
    """

    names: list[str]
    sizes: np.ndarray
    scores: np.ndarray
    effective: np.ndarray | None


def effective_instances(weights: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Effective number of instances ``1 / Σ w²``: n for n equal weights, 1 for a single one; ``(B,)``, 0 if empty.

    Args:
        weights: ``(total,)``, nonnegative, with sum 1 per bag.
        cu_seqlens: ``(B + 1,)``.
    """
    sizes = cu_seqlens.diff()
    bag = torch.repeat_interleave(torch.arange(len(sizes), device=weights.device), sizes, output_size=len(weights))
    squares = weights.new_zeros(len(sizes)).index_add_(0, bag, weights.square())
    return torch.where(sizes > 0, 1 / squares.clamp(min=torch.finfo(squares.dtype).tiny), 0)


def network_input(net: MIRNet, features: torch.Tensor) -> torch.Tensor:
    """Features in the dtype of the network's parameters; as they are if the network normalizes, which converts them."""
    return features if net.normalization is not None else features.to(next(net.parameters()).dtype)


def has_weights(net: MIRNet) -> bool:
    """True if the pooling of a network has a weight per instance: not for max and log-sum-exp."""
    pool: Any = net.pools[-1]
    return not isinstance(pool, BasePool) or pool._has_weights


def collapse_warning(effective: np.ndarray, sizes: np.ndarray, pooling: str) -> str | None:
    """A warning if nearly all bags are pooled to their mean or to one instance; None otherwise.

    Bags of fewer than 8 instances are not considered.
    """
    large = sizes >= _LARGE_ENOUGH
    if pooling == "mean" or large.sum() < 3:
        return None
    effective, sizes = effective[large], sizes[large]
    if np.median(effective / sizes) > 0.98:
        return (
            f"the model pools by the mean: the effective number of instances is {np.median(effective):.1f} of "
            f"{np.median(sizes):.0f} (medians over bags), so that the weights single out no instance; a larger "
            "instance_scale sharpens them"
        )
    if np.median(effective) < 1.05:
        return (
            f"the model relies on one instance per bag: the effective number of instances is {np.median(effective):.2f}"
            f" of {np.median(sizes):.0f} (medians over bags); a smaller instance_scale softens the weights"
        )
    return None


@torch.no_grad()
def predict_batch(net: MIRNet, batch: PackedBags) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(scores, effective)`` of a packed batch on the network's device."""
    weighted = has_weights(net)
    output = net(network_input(net, batch.features), cu_seqlens=batch.cu_seqlens, return_weights=weighted)
    effective = effective_instances(output.weights[-1], batch.cu_seqlens) if weighted else None
    return output.probabilities.float(), effective


def predict_bags(
    net: MIRNet,
    source: BagSource,
    bag_indices: Sequence[int] | np.ndarray | None = None,
    *,
    max_instances: int = MAX_INSTANCES,
    workers: int | None = None,
    loader: PackedLoader | None = None,
    accelerator: Any = None,
    on_batch: Callable[[int, int], object] | None = None,
) -> BagPredictions:
    """Predicts bags in packed batches of at most ``max_instances`` instances.

    Args:
        net: a network, on its device; it is used in evaluation mode and returned to its mode.
        source: the bags.
        bag_indices: the bags to predict; None: all.
        max_instances: bound of a batch. A larger bag is a batch of its own.
        workers: worker processes that read ahead; None: 0 to 4 by the size of the set.
        loader: used instead of a new one.
        accelerator: an ``accelerate.Accelerator``: bags are distributed over its processes by size, and every process
            returns all predictions.
        on_batch: called with (bags done, bags in total) of this process.
    """
    chosen = list(range(len(source))) if bag_indices is None else [int(i) for i in bag_indices]
    processes = 1 if accelerator is None else accelerator.num_processes
    rank = 0 if accelerator is None else accelerator.process_index
    device = next(net.parameters()).device
    if loader is None:
        loader = PackedLoader(source, workers, pin_memory=device.type == "cuda")
    share = share_by_size(chosen, source.sizes, processes)[rank]
    training, done = net.training, 0
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
    net.eval()
    try:
        for batch in loader.read(pack_by_size(share, source.sizes, max_instances)):
            scores, effective = predict_batch(net, batch.to(device))
            found.append(
                (batch.indices.numpy(), scores.cpu().numpy(), None if effective is None else effective.cpu().numpy())
            )
            done += len(batch.indices)
            if on_batch is not None:
                on_batch(done, len(share))
    finally:
        net.train(training)
    if processes > 1:
        from accelerate.utils import gather_object

        found = gather_object(found)
    shape = (len(source),) if net.num_classes == 1 else (len(source), net.num_classes)
    scores_of = np.zeros(shape, dtype=np.float32)
    effective_of = np.zeros(len(source), dtype=np.float32) if has_weights(net) else None
    for indices, scores_found, effective_found in found:
        scores_of[indices] = scores_found
        if effective_of is not None:
            effective_of[indices] = effective_found
    return BagPredictions(
        [source.names[i] for i in chosen],
        source.sizes[chosen],
        scores_of[chosen],
        None if effective_of is None else effective_of[chosen],
    )
