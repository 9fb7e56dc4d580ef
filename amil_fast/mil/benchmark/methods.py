"""Interface of the benchmark's methods."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from amil_fast.mil.bag_files import BagData


class Predictions(NamedTuple):
    """Predictions on the test parts of several folds, NaN in the training parts.

    Attributes:
        probabilities: float ``(folds, num_bags)``.
        peeking: likewise, for the methods that are also scored with the epoch and threshold of the highest accuracy on
            the test part: probabilities of that epoch, moved so that the threshold is .5.
        inner_loss: float ``(folds,)``, log-loss on the inner split of each training part, for choices by it.
    """

    probabilities: np.ndarray
    peeking: np.ndarray | None = None
    inner_loss: np.ndarray | None = None


@dataclass(frozen=True)
class BenchmarkMethod:
    """Method of the benchmark.

    Attributes:
        name: name on the command line and of its results.
        label: name in the table.
        run: ``run(data, train, seed)``; ``train`` is bool ``(folds, num_bags)``, True in the training parts. Nothing
            but ``run(...).peeking`` may depend on labels outside the training part of a fold. With ``parts``, it is
            called with the predictions of these methods instead.
        parts: names of methods of which this one is a function.
        package: optional dependency.
    """

    name: str
    label: str
    run: Callable[..., Predictions]
    parts: tuple[str, ...] = ()
    package: str | None = None

    def installed(self) -> bool:
        """True if the optional dependency, if any, is installed."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


def per_fold(method: Callable[[BagData, np.ndarray, int], np.ndarray]) -> Callable[..., Predictions]:
    """Method for several folds from one for a single fold, whose training part is ``(num_bags,)``."""

    def run(data: BagData, train: np.ndarray, seed: int) -> Predictions:
        return Predictions(np.stack([method(data, part, seed + fold) for fold, part in enumerate(train)]))

    return run
