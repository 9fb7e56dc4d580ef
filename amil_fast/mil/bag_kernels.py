"""Kernels between bags, for the Gaussian process (:mod:`amil_fast.mil.gaussian_process`)."""

import numpy as np
import torch

from amil_fast.mil.bag_files import BagData

CLIP = 3.0  # standard deviations to which features are clipped: elephant and tiger have rare values of up to 37
WIDTHS = (0.5, 1.0)  # of the RBF kernels, × the median distance
_CHUNK = 64  # bags compared with all instances at a time; bounds the memory
_MEDIAN_SAMPLES = 2000  # evenly spaced instances from which the median distance is computed


def bag_kernels(data: BagData, train: np.ndarray) -> dict[str, np.ndarray]:
    r"""Gram matrices of 13 kernels between all bags of a data set.

    With the RBF similarity of instances :math:`r(x, z) = \exp(-\|x - z\|^2 / 2 c^2 m^2)`, m the median distance of
    training instances, for each c in :data:`WIDTHS`:

    - ``mean c``: mean of r over the pairs of an instance of A and one of B (the set kernel of Gärtner et al. 2002);
    - ``max c``: inner product of the vectors :math:`v_z = \max_{x \in A} r(x, z)` over all training instances z (the
      embedding of MILES, Chen et al. 2006);
    - ``match c``: :math:`\max_{x \in A} r(x, z)` averaged over z in B, symmetrized. It need not be positive definite.
    - ``bag mean c``, ``bag max c``, ``bag min c``: RBF kernel on a statistic of every feature over the bag.

    ``distance``: inner product of the vectors of mean minimum distances to the training bags (Cheplygina et al. 2015).

    Features are standardized and clipped to ±:data:`CLIP`. Every kernel is centered and scaled to a mean diagonal of 1.
    Means, deviations, medians, center and scale are those of the training bags; the similarity of two bags does not
    depend on any other bag that is not among them. An empty bag is represented by the mean of the features.

    Args:
        data: bags.
        train: bool ``(num_bags,)``, the training part.

    Returns:
        name -> float64 ``(num_bags, num_bags)``.
    """
    x, offsets = _standardized(data, train)
    grams = _instance_kernels(torch.from_numpy(x), offsets, train)
    for name, statistic in bag_statistics(x, offsets).items():
        points = torch.from_numpy(statistic)
        distances = torch.cdist(points, points).numpy()
        median = _median_distance(points[torch.from_numpy(train)])
        for c in WIDTHS:
            grams[f"bag {name} {c}"] = _similarity(distances, c * median)
    return {name: _normalized(gram, train) for name, gram in grams.items()}


def bag_statistics(x: np.ndarray, offsets: np.ndarray) -> dict[str, np.ndarray]:
    """Mean, maximum and minimum of every feature over each bag: ``(n, D)`` -> ``(num_bags, D)``; no bag is empty."""
    starts = offsets[:-1]
    return {
        "mean": np.add.reduceat(x, starts) / np.diff(offsets)[:, None],
        "max": np.maximum.reduceat(x, starts),
        "min": np.minimum.reduceat(x, starts),
    }


def filled_bags(x: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Instances and offsets with one instance of zeros in every empty bag."""
    sizes = np.diff(offsets)
    filled = np.insert(x, offsets[:-1][sizes == 0], 0, axis=0)
    return filled, np.concatenate([[0], np.cumsum(np.maximum(sizes, 1))])


def _standardized(data, train):
    mean, inverse_std = data.standardization(train)
    x = (data.features.astype(np.float64) - mean.numpy()) * inverse_std.numpy()
    return filled_bags(np.clip(x, -CLIP, CLIP), data.offsets)


def _instance_kernels(x, offsets, train):
    sizes, starts = np.diff(offsets), offsets[:-1]
    of_training = np.repeat(train, sizes)
    median = _median_distance(x[torch.from_numpy(of_training)])
    means: dict[float, list[np.ndarray]] = {c: [] for c in WIDTHS}
    chunks = []  # distance of the nearest instance of each bag to every instance
    for begin in range(0, len(sizes), _CHUNK):
        end = min(begin + _CHUNK, len(sizes))
        distances = torch.cdist(x[offsets[begin] : offsets[end]], x).numpy()
        rows = starts[begin:end] - offsets[begin]
        chunks.append(np.minimum.reduceat(distances, rows))
        for c in WIDTHS:
            sums = np.add.reduceat(_similarity(distances, c * median), rows)
            means[c].append(np.add.reduceat(sums, starts, axis=1) / sizes / sizes[begin:end, None])
    nearest = np.concatenate(chunks)  # (num_bags, n)
    grams = {}
    for c in WIDTHS:
        best = _similarity(nearest, c * median)
        match = np.add.reduceat(best, starts, axis=1) / sizes
        to_training = best[:, of_training]
        grams[f"mean {c}"] = np.concatenate(means[c])
        grams[f"max {c}"] = to_training @ to_training.T
        grams[f"match {c}"] = (match + match.T) / 2
    mean_distance = (np.add.reduceat(nearest, starts, axis=1) / sizes)[train]  # (training bags, num_bags)
    grams["distance"] = mean_distance.T @ mean_distance
    return grams


def _median_distance(points):
    some = points[:: max(1, -(-len(points) // _MEDIAN_SAMPLES))]
    return max(float(torch.pdist(some).median()), 1e-6) if len(some) > 1 else 1.0


def _similarity(distances, width):
    return np.exp(-0.5 * (distances / width) ** 2)


def _normalized(gram, train):
    """Centers a Gram matrix at the mean of the training bags in feature space; mean diagonal 1 over them."""
    columns = gram[train].mean(0)
    gram = gram - columns[:, None] - columns + columns[train].mean()
    return gram / max(gram.diagonal()[train].mean(), 1e-12)
