"""Runs methods on the folds of data sets; every result is a file, so that an interrupted run can be continued."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from amil_fast.mil.bag_files import BagData
from amil_fast.mil.benchmark.methods import BenchmarkMethod, Predictions
from amil_fast.mil.benchmark.registry import METHODS
from amil_fast.utils.files import DataError, read_json, write_json
from amil_fast.utils.optional import require

_EXPECTED = "a result of the benchmark"

Results = dict[tuple[str, str], dict[int, Predictions]]  # (method, data set) -> repetition -> predictions


def run_benchmark(
    files: dict[str, BagData],
    methods: Sequence[BenchmarkMethod],
    out: str | os.PathLike,
    *,
    repetitions: int | None = None,
    seed: int = 0,
    on_result: Callable[[int, int, str], object] | None = None,
) -> Results:
    """Runs every method on every data set, skipping what ``out`` contains.

    The repetitions are the outer loop, so that a run that is stopped leaves few results of all methods.

    Args:
        files: name -> bags with folds.
        methods: of :data:`amil_fast.mil.benchmark.METHODS`.
        out: folder; ``results/DATA/METHOD/REPETITION.json`` is written there as soon as it is known.
        repetitions: number of repetitions of each file to use, from the first; None: all.
        seed: random seed.
        on_result: called with (number done, total number, label) before each method, data set and repetition.

    Returns:
        (method, data set) -> repetition -> predictions.

    Raises:
        DataError: an empty bag; a result in ``out`` of other bags, folds or another seed.
        MissingDependency: a method's package is not installed.
    """
    for method in methods:
        if method.package is not None:
            require(method.package, f"method {method.name!r}", extra="dev")
    for name, data in files.items():
        if not data.sizes.all():
            raise DataError(f"{name}: expected an instance in every bag, got bag {np.argmin(data.sizes)} without")
    count = {name: min(len(data.folds), repetitions or len(data.folds)) for name, data in files.items()}
    tasks = [
        (repetition, method, name)
        for repetition in range(max(count.values()))
        for method in methods
        for name in files
        if repetition < count[name]
    ]
    results: Results = {}
    for number, (repetition, method, name) in enumerate(tasks):
        if on_result is not None:
            on_result(number, len(tasks), f"{name}: {method.label}, repetition {repetition + 1}")
        predictions = _result(Path(out) / "results" / name, files[name], method, repetition, seed)
        results.setdefault((method.name, name), {})[repetition] = predictions
    return results


def load_results(
    files: dict[str, BagData], methods: Sequence[BenchmarkMethod], out: str | os.PathLike, *, seed: int = 0
) -> Results:
    """The results in a folder of :func:`run_benchmark`, without running anything."""
    results: Results = {}
    for method in methods:
        for name, data in files.items():
            for repetition in range(len(data.folds)):
                path = Path(out) / "results" / name / method.name / f"{repetition}.json"
                if path.exists():
                    predictions = _read(path, data.folds[repetition], _fingerprint(data, repetition, seed))
                    results.setdefault((method.name, name), {})[repetition] = predictions
    return results


def _result(folder, data, method, repetition, seed):
    path = folder / method.name / f"{repetition}.json"
    train = data.folds[repetition]
    fingerprint = _fingerprint(data, repetition, seed)
    if not path.exists():
        if method.parts:
            parts = [_result(folder, data, METHODS[name], repetition, seed) for name in method.parts]
            predictions = method.run(*parts)
        else:
            predictions = method.run(data, train, seed + 1000 * repetition)
        _write(path, predictions, train, {"method": method.name, "repetition": repetition, "fingerprint": fingerprint})
    return _read(path, train, fingerprint)


def _write(path, predictions, train, content):
    for entry in ("probabilities", "peeking"):
        values = getattr(predictions, entry)
        if values is not None:
            content[entry] = [row[~part].round(6).tolist() for row, part in zip(values, train, strict=True)]
    if predictions.inner_loss is not None:
        content["inner_loss"] = predictions.inner_loss.round(6).tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content, indent=None)


def _fingerprint(data, repetition, seed):
    digest = hashlib.sha256(str(seed).encode())
    for array in (data.features, data.offsets, data.labels, data.folds[repetition]):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _read(path, train, fingerprint):
    content = read_json(path, dict, _EXPECTED)
    if content.get("fingerprint") != fingerprint:
        raise DataError(f"{path}: expected a result with these bags, folds and seed; use another folder")
    inner_loss = content.get("inner_loss")
    return Predictions(
        _matrix(path, content.get("probabilities"), train),
        _matrix(path, content["peeking"], train) if "peeking" in content else None,
        None if inner_loss is None else np.array(inner_loss, dtype=float),
    )


def _matrix(path, rows, train):
    result = np.full(train.shape, np.nan)
    try:
        for row, values, part in zip(result, rows, train, strict=True):
            row[~part] = values
    except (TypeError, ValueError):
        raise DataError(f"{path}: expected {_EXPECTED}: a probability for every bag of every test part") from None
    return result
