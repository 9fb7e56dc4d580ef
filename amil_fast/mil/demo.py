"""The bag half of ``amil demo``: a synthetic multiple-instance problem, MI-RNet, and a figure of its weights."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from amil_fast.mil.cross_validation import area_under_roc
from amil_fast.nn import MIRNet, level_loss, margin_loss
from amil_fast.utils.files import atomic_path, write_json

FEATURES = 8
_KEY = np.array([2.5, -2.5])  # center of the key instances in the first two features


@dataclass(frozen=True)
class SyntheticBags:
    """Packed bags. ``key`` marks the instances that make a bag positive; the model does not see it."""

    features: torch.Tensor  # float32 (total, FEATURES)
    cu_seqlens: torch.Tensor  # int64 (num_bags + 1,)
    labels: torch.Tensor  # int64 (num_bags,)
    key: torch.Tensor  # bool (total,)


def make_synthetic_bags(num_bags: int, seed: int) -> SyntheticBags:
    """Samples bags of 5 to 40 instances with :data:`FEATURES` features, half of them positive.

    Background instances are normally distributed around 0 and around two decoy centers, in both classes. A positive bag
    has one to three key instances, normally distributed around a third center; negative bags have none.
    """
    rng = np.random.default_rng(seed)
    features, keys, sizes, labels = [], [], [], []
    for bag in range(num_bags):
        size, label = int(rng.integers(5, 41)), bag % 2
        x = rng.normal(size=(size, FEATURES))
        decoy = rng.random(size) < 0.3
        x[decoy, :2] = rng.normal(size=(decoy.sum(), 2), scale=0.5) + np.where(
            rng.random((decoy.sum(), 1)) < 0.5, _KEY * [1, -1], _KEY * [-1, 1]
        )
        key = np.zeros(size, dtype=bool)
        if label:
            key[rng.choice(size, int(rng.integers(1, 4)), replace=False)] = True
            x[key, :2] = rng.normal(size=(key.sum(), 2), scale=0.5) + _KEY
        features.append(x)
        keys.append(key)
        sizes.append(size)
        labels.append(label)
    return SyntheticBags(
        torch.from_numpy(np.concatenate(features).astype(np.float32)),
        torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)])),
        torch.tensor(labels),
        torch.from_numpy(np.concatenate(keys)),
    )


def _take(bags, bag_indices):
    """Packed features, ``cu_seqlens`` and labels of some bags."""
    starts, sizes = bags.cu_seqlens[:-1][bag_indices], bags.cu_seqlens.diff()[bag_indices]
    cu_seqlens = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    rows = torch.arange(int(cu_seqlens[-1])) + torch.repeat_interleave(starts - cu_seqlens[:-1], sizes)
    return bags.features[rows], cu_seqlens, bags.labels[bag_indices]


def train(
    bags: SyntheticBags,
    epochs: int,
    seed: int,
    on_epoch: Callable[[int, float], object] | None = None,
    backend: str = "auto",
) -> MIRNet:
    """Trains a small MI-RNet with adjust pooling on packed mini-batches of 32 bags and returns it.

    ``on_epoch(epoch, mean loss)`` is called after each epoch.
    """
    torch.manual_seed(seed)
    net = MIRNet(FEATURES, hidden=64, backend=backend)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for epoch in range(epochs):
        total = 0.0
        for bag_indices in torch.randperm(len(bags.labels)).split(32):
            features, cu_seqlens, labels = _take(bags, bag_indices)
            output = net(features, cu_seqlens=cu_seqlens)
            loss = level_loss(output.logits, labels)
            # Short vectors for negative bags, long ones for positive: without this term a level may learn to weight
            # instances that indicate a negative bag (seen for one of five seeds).
            loss = loss + 3 * margin_loss(output.pooled, labels.expand(output.pooled.shape[:2]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(bag_indices)
        if on_epoch is not None:
            on_epoch(epoch, total / len(bags.labels))
    return net.eval()


@torch.no_grad()
def evaluate(net: MIRNet, bags: SyntheticBags) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Accuracy and AUC over bags, and the agreement of the last level's weights with the key instances.

    ``pointing``: fraction of the true positive bags whose instance of largest weight is a key instance; ``by_chance``:
    its expectation for a random instance.

    Returns:
        scores: a dict for JSON.
        probabilities: ``(num_bags,)``.
        weights: ``(total,)``, those of the last level.
    """
    output = net(bags.features, cu_seqlens=bags.cu_seqlens, return_weights=True)
    found = output.probabilities >= 0.5
    weights = output.weights[-1]
    hits, chances = [], []
    for b in torch.nonzero(found & (bags.labels == 1))[:, 0].tolist():
        rows = slice(int(bags.cu_seqlens[b]), int(bags.cu_seqlens[b + 1]))
        hits.append(bool(bags.key[rows][weights[rows].argmax()]))
        chances.append(float(bags.key[rows].float().mean()))
    scores = {
        "bags": len(bags.labels),
        "accuracy": float((found == (bags.labels == 1)).float().mean()),
        "auc": area_under_roc(output.probabilities, bags.labels),
        "pointing": float(np.mean(hits)) if hits else None,
        "by_chance": float(np.mean(chances)) if chances else None,
    }
    return scores, output.probabilities, weights


def draw(path: str | os.PathLike, bags: SyntheticBags, probabilities: torch.Tensor, weights: torch.Tensor) -> None:
    """Plots eight test bags with their instance weights, and a histogram of the total weight of the key instances."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    sizes = bags.cu_seqlens.diff()
    relative = weights * torch.repeat_interleave(sizes, sizes)  # 1 = the weight in mean pooling
    top = max(float(relative.quantile(0.999)), 2.0)
    norm, colors = LogNorm(1 / top, top), "coolwarm"

    figure = Figure(figsize=(15, 8.4), layout="constrained")
    grid = figure.add_gridspec(2, 5, width_ratios=[1, 1, 1, 1, 1.25])
    figure.suptitle(
        "Instance weights of adjust pooling: a synthetic bag is positive if one of its instances is a key instance",
        fontsize=14,
    )
    for row, label in enumerate((1, 0)):
        chosen = torch.nonzero((bags.labels == label) & (sizes >= 12))[:4, 0].tolist()
        for column, b in enumerate(chosen):
            axes = figure.add_subplot(grid[row, column])
            rows = slice(int(bags.cu_seqlens[b]), int(bags.cu_seqlens[b + 1]))
            x, r, key = bags.features[rows, :2], relative[rows], bags.key[rows]
            axes.scatter(
                x[:, 0], x[:, 1], c=r.clamp(1 / top, top), s=25 + 60 * r, cmap=colors, norm=norm, alpha=0.9, lw=0
            )
            axes.scatter(x[key, 0], x[key, 1], s=40 + 60 * r[key], fc="none", ec="black", lw=1.8)
            axes.set(xlim=(-4.6, 4.6), ylim=(-4.6, 4.6), xticks=[], yticks=[], aspect="equal")
            kind = "positive" if label else "negative"
            axes.set_title(f"{kind} bag of {int(sizes[b])}: p = {probabilities[b]:.2f}", fontsize=11)
    axes = figure.add_subplot(grid[:, 4])
    bag_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    positive = bags.labels == 1
    bins = np.linspace(0, 1, 21).tolist()
    for weight, name, color in (
        (weights, "adjust pooling", "firebrick"),
        (1 / sizes[bag_of], "mean pooling", "steelblue"),
    ):
        on_key = torch.zeros(len(sizes)).index_add(0, bag_of, weight * bags.key)
        axes.hist(on_key[positive].numpy(), bins, histtype="stepfilled", alpha=0.6, color=color, label=name)
    axes.set(
        title=f"weight of the key instances,\n{int(positive.sum())} positive test bags",
        xlabel="total weight",
        ylabel="bags",
        xlim=(0, 1),
    )
    axes.legend()
    handle = Line2D([], [], marker="o", ls="", mfc="none", mec="black", ms=10, mew=1.8)
    figure.legend([handle], ["key instance (not an input of the model)"], loc="outside lower left", fontsize=11)
    scale = ScalarMappable(norm, colors)
    bar = figure.colorbar(scale, ax=figure.axes[:-1], location="bottom", shrink=0.5, aspect=50, pad=0.01)
    bar.set_label("instance weight x bag size (also the circle's area); axes: the two informative features of 8")
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=110)


def run(
    folder: str | os.PathLike,
    *,
    epochs: int = 30,
    seed: int = 0,
    on_epoch: Callable[[int, float], object] | None = None,
    backend: str = "auto",
) -> dict:
    """Trains on 600 synthetic bags, tests on 400 others; writes ``mil_weights.png``, ``mil_scores.json`` to ``folder``.

    Returns the scores of :func:`evaluate` with ``seconds``, ``epochs`` and ``seed``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    net = train(make_synthetic_bags(600, seed), epochs, seed, on_epoch, backend)
    test = make_synthetic_bags(400, seed + 10_000)
    scores, probabilities, weights = evaluate(net, test)
    scores |= {"seconds": time.perf_counter() - begin, "epochs": epochs, "seed": seed}
    draw(folder / "mil_weights.png", test, probabilities, weights)
    write_json(folder / "mil_scores.json", {"problem": "synthetic", **scores})
    return scores
