"""Models of torchmil, an optional dependency, trained like the recipe of ``amil mil cv``."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from amil_fast.mil.bag_files import BagData
from amil_fast.mil.classifiers import cosine_factor
from amil_fast.mil.settings import MilSettings
from amil_fast.nn.feature_normalization import soft_clip

_RECIPE = MilSettings()


def torchmil_model(name: str, **options: Any) -> Callable[[BagData, np.ndarray, int], np.ndarray]:
    """Method that trains ``torchmil.models.NAME`` on the embeddings of one layer with ReLU.

    Features, optimizer, schedule and number of epochs are those of the recipe, the loss is the model's own. A batch
    has bags of one size only: some of torchmil's models ignore the mask of padded bags.

    Args:
        name: class in ``torchmil.models`` that takes ``in_shape`` and ``feat_ext``.
        options: further arguments of the class.
    """

    def run(data: BagData, train: np.ndarray, seed: int) -> np.ndarray:
        model_class = getattr(importlib.import_module("torchmil.models"), name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer = nn.Sequential(nn.Linear(data.features.shape[1], _RECIPE.hidden), nn.ReLU())
            model = model_class(in_shape=(data.features.shape[1],), feat_ext=layer, **options)
            return _train_and_predict(model, data, train, np.random.default_rng(seed))

    return run


def _train_and_predict(model, data, train, rng):
    mean, inverse_std = data.standardization(train)
    x = soft_clip((torch.from_numpy(data.features) - mean) * inverse_std, _RECIPE.soft_clip)
    labels = torch.from_numpy(data.labels).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=_RECIPE.lr, weight_decay=_RECIPE.weight_decay, fused=True)
    epochs = [_batches(data, np.flatnonzero(train), rng) for _ in range(_RECIPE.epochs)]
    batches = [batch for epoch in epochs for batch in epoch]
    model.train()
    for step, bags in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = _RECIPE.lr * cosine_factor(step / len(batches))
        optimizer.zero_grad()
        _, losses = model.compute_loss(labels[torch.from_numpy(bags)], _instances(x, data, bags))
        sum(losses.values()).backward()
        optimizer.step()
    model.eval()
    result = np.full(train.shape, np.nan)
    with torch.no_grad():
        for bags in _batches(data, np.flatnonzero(~train), rng):
            result[bags] = model(_instances(x, data, bags)).sigmoid().numpy()
    return result


def _batches(data, bags, rng):
    """Batches of bags of equal size in random order, at most ``batch_size`` each."""
    bags = rng.permutation(bags)
    sizes = data.sizes[bags]
    batches = []
    for size in np.unique(sizes):
        equal = bags[sizes == size]
        batches += np.array_split(equal, -(-len(equal) // _RECIPE.batch_size))
    return [batches[index] for index in rng.permutation(len(batches))]


def _instances(x, data, bags):
    """``(B, N, D)`` of bags of one size N."""
    rows, _ = data.rows(bags)
    return x[torch.from_numpy(rows)].view(len(bags), -1, x.shape[1])
