"""Cross-validation on bags on disk: one training run per fold, resumable, groups never split."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from amil_fast.mil.labels import LabeledBags, Targets, split_groups
from amil_fast.mil.prediction import BagPredictions, predict_bags
from amil_fast.mil.reports import PREDICTIONS, write_evaluation, write_predictions
from amil_fast.mil.settings import TrainSettings
from amil_fast.mil.training import BagTraining
from amil_fast.nn import MIRNet
from amil_fast.utils.files import DataError, read_json, write_json

FOLDS, RESULT = "cv.json", "fold.json"


def fold_assignment(bags: LabeledBags, targets: Targets, folds: int, repetitions: int, seed: int) -> list[np.ndarray]:
    """Fold of every bag, one array per repetition; the column ``fold`` of the CSV file takes precedence."""
    if bags.folds is not None:
        return [bags.folds]
    return [split_groups(targets.values, bags.groups, folds, seed + r) for r in range(repetitions)]


def cross_validate_bags(
    bags: LabeledBags,
    targets: Targets,
    settings: TrainSettings,
    out: str | Path,
    *,
    folds: int = 5,
    repetitions: int = 1,
    resamples: int = 1000,
    resume: bool = False,
    on_progress: Callable[[str, int, int], object] | None = None,
    on_message: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Trains a model per fold and predicts the bags of its test part.

    Epoch and threshold of a model are chosen on an inner part of its training part. A fold whose result exists is not
    repeated; an interrupted fold is resumed.

    Args:
        bags: labeled bags; all must have labels.
        targets: their targets.
        settings: architecture and training.
        out: folder for ``cv.json``, ``predictions.csv``, ``evaluation.json``, ``evaluation.png`` and a folder with
            the model per fold.
        folds: number of folds, unless the bags have some.
        repetitions: number of partitions; the scores of a bag are averaged over them.
        resamples: bootstrap resamples.
        resume: continue in a folder that contains results.
        on_progress: as for :class:`BagTraining`.
        on_message: as for :class:`BagTraining`.

    Returns:
        :func:`evaluate_scores` of all test predictions, with ``per_fold``.

    Raises:
        ValueError: ``out`` contains results and ``resume`` is False, or those of other settings or folds.
    """
    out = Path(out)
    assignment = fold_assignment(bags, targets, folds, repetitions, settings.seed)
    facts = json.loads(
        json.dumps(
            {
                "settings": settings.fixed(),
                "folds": [[int(f) for f in fold_of] for fold_of in assignment],
                "bags": bags.source.names,
            }
        )
    )
    _check_resumable(out, facts, resume)
    num_bags = len(bags.labels)
    shape = (num_bags,) if targets.task == "regression" or len(targets.names) == 2 else (num_bags, len(targets.names))
    scores, thresholds = np.zeros(shape), np.zeros(num_bags)
    effective = np.zeros(num_bags)
    per_fold = []
    for repetition, fold_of in enumerate(assignment):
        for number, fold in enumerate(np.unique(fold_of)):
            folder = out / f"repetition-{repetition + 1}-fold-{number + 1}"
            test = np.flatnonzero(fold_of == fold)
            if on_message is not None:
                on_message(f"repetition {repetition + 1}, fold {number + 1}: {len(test)} test bags")
            result = _fold_result(bags, targets, settings, folder, fold_of != fold, test, on_progress, on_message)
            scores[test] += np.array(result["scores"]) / len(assignment)
            thresholds[test] += result["threshold"] / len(assignment)
            if result["effective"] is not None:
                effective[test] += np.array(result["effective"]) / len(assignment)
            per_fold.append({"repetition": repetition + 1, "fold": number + 1, "bags": len(test), **result["training"]})
    threshold: float | np.ndarray = thresholds if targets.task == "classification" and scores.ndim == 1 else 0.5
    evaluation = write_evaluation(
        out,
        targets.task,
        targets.names,
        scores,
        targets.values,
        threshold=threshold,
        groups=bags.groups,
        resamples=resamples,
        title=f"cross-validation, {len(per_fold)} models",
    )
    predictions = BagPredictions(bags.source.names, bags.source.sizes, scores, effective if effective.any() else None)
    columns: dict[str, Any] = {"fold": assignment[0].tolist()} if len(assignment) == 1 else {}
    write_predictions(
        out / PREDICTIONS,
        predictions,
        targets.task,
        targets.names,
        threshold=threshold,
        labels=bags.labels,
        columns=columns,
    )
    return {**evaluation, "per_fold": per_fold}


def _check_resumable(out, facts, resume):
    file = out / FOLDS
    if file.exists():
        if not resume:
            raise ValueError(f"{out}: already contains a cross-validation; pass --resume, or choose another --out")
        if read_json(file) != facts:
            raise ValueError(f"{file}: expected the settings, bags and folds of the results to resume, got others")
        return
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, facts)


def _fold_result(bags, targets, settings, folder, train, test, on_progress, on_message):
    """Content of ``fold.json``: scores of the test bags, threshold, epochs."""
    if (folder / RESULT).exists():
        result = read_json(folder / RESULT)
        if len(result.get("scores", ())) != len(test):
            raise DataError(f"{folder / RESULT}: expected {len(test)} scores")
        return result
    run = BagTraining(
        bags,
        targets,
        np.flatnonzero(train),
        folder,
        settings,
        resume=True,
        on_progress=on_progress,
        on_message=on_message,
    )
    summary = run.run()
    net = MIRNet.from_pretrained(folder).to(run.accelerator.device)
    found = predict_bags(
        net,
        bags.source,
        test,
        max_instances=settings.max_instances,
        workers=settings.workers,
        accelerator=run.accelerator,
    )
    result = {
        "scores": found.scores.tolist(),
        "effective": None if found.effective is None else found.effective.tolist(),
        "threshold": summary["threshold"],
        "training": summary,
    }
    if run.main:
        write_json(folder / RESULT, result)
    run.accelerator.wait_for_everyone()
    return result
