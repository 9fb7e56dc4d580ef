"""Repeated k-fold cross-validation of bag classifiers."""

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import torch

from amil_fast.mil.bag_files import BagData
from amil_fast.mil.bag_methods import BAG_METHODS
from amil_fast.mil.classifiers import BagClassifiers
from amil_fast.mil.settings import MilSettings


def cross_validate(
    data: BagData,
    settings: MilSettings,
    *,
    at_once: int = 10,
    on_progress: Callable[[int, int], object] | None = None,
) -> dict:
    """Repeated k-fold cross-validation on the folds of ``data``.

    The model of each fold is fitted to the training part, which also determines the standardization, and applied once
    to the test part with threshold 0.5. A network is trained for a fixed number of epochs.

    Args:
        data: bags and folds.
        settings: architecture and training.
        at_once: number of folds trained side by side.
        on_progress: called with (done, total): epochs over all folds, or folds for a method without epochs.

    Returns:
        A dict for JSON: ``accuracy_mean`` and ``accuracy_std`` (mean and sample standard deviation over repetitions of
        the mean accuracy over folds; the deviation is None for a single repetition), ``auc_mean`` (over the folds whose
        test part contains both classes, None if there is none), ``per_repetition``, ``per_fold``, ``seconds``,
        ``settings``, ``data``.
    """
    begin = time.perf_counter()
    repetitions, folds, num_bags = data.folds.shape
    parts = data.folds.reshape(-1, num_bags)
    if settings.method == "network":
        probabilities = _network_probabilities(data, settings, parts, at_once, on_progress)
    else:
        probabilities = _method_probabilities(data, settings, parts, on_progress)

    per_fold = []
    for fold, (part, probability) in enumerate(zip(parts, probabilities, strict=True)):
        test = ~part
        per_fold.append(
            {
                "repetition": fold // folds,
                "fold": fold % folds,
                "bags": int(test.sum()),
                "accuracy": float(((probability[test] >= 0.5) == data.labels[test]).mean()),
                "auc": area_under_roc(probability[test], data.labels[test]),
            }
        )
    accuracy = np.array([f["accuracy"] for f in per_fold]).reshape(repetitions, folds).mean(1)
    aucs = [f["auc"] for f in per_fold if f["auc"] is not None]
    return {
        "accuracy_mean": float(accuracy.mean()),
        "accuracy_std": float(accuracy.std(ddof=1)) if repetitions > 1 else None,
        "auc_mean": float(np.mean(aucs)) if aucs else None,
        "per_repetition": accuracy.tolist(),
        "per_fold": per_fold,
        "seconds": time.perf_counter() - begin,
        "settings": dataclasses.asdict(settings),
        "data": {
            "bags": num_bags,
            "positive": int(data.labels.sum()),
            "instances": int(data.features.shape[0]),
            "features": int(data.features.shape[1]),
            "repetitions": repetitions,
            "folds": folds,
        },
    }


def _network_probabilities(data, settings, parts, at_once, on_progress):
    probabilities = np.zeros(parts.shape, dtype=np.float32)
    # (network, fold): the folds of one network number are trained side by side.
    tasks = [(network, fold) for network in range(settings.ensemble) for fold in range(len(parts))]
    done, total = 0, len(tasks) * settings.epochs
    for start in range(0, len(tasks), at_once):
        some = tasks[start : start + at_once]
        seeds = [(settings.seed, fold, network) for network, fold in some]
        train = parts[[fold for _, fold in some]]
        members = len(train)
        models = BagClassifiers(data, settings, train, seeds)

        def on_epoch(epoch, before=done, members=members):
            if on_progress is not None:
                on_progress(before + (epoch + 1) * members, total)

        for (_, fold), probability in zip(some, models.fit(on_epoch).predict(~train), strict=True):
            probabilities[fold] += probability / settings.ensemble
        done += members * settings.epochs
    return probabilities


def _method_probabilities(data, settings, parts, on_progress):
    probabilities = []
    for fold, part in enumerate(parts):
        probabilities.append(BAG_METHODS[settings.method](data, part, settings.seed + fold))
        if on_progress is not None:
            on_progress(fold + 1, len(parts))
    return probabilities


def area_under_roc(scores: np.ndarray | torch.Tensor, labels: np.ndarray | torch.Tensor) -> float | None:
    """Area under the ROC curve; ties count half; None if one class is missing."""
    if len(np.unique(labels)) < 2:
        return None
    from torchmetrics.functional.classification import binary_auroc

    return float(binary_auroc(torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(labels)))


def format_accuracy(result: dict) -> str:
    """Accuracy of :func:`cross_validate` as text; includes the standard deviation only for several repetitions."""
    if len(result["per_repetition"]) < 2:  # files of earlier versions have accuracy_std 0.0 here instead of None
        return f"{result['accuracy_mean']:.3f}"
    return f"{result['accuracy_mean']:.3f} ± {result['accuracy_std']:.3f}"
