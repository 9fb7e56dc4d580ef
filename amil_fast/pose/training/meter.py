"""Progress of a training run, and the statistics of its losses."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from amil_fast.pose import Balance
from amil_fast.pose.training.config import TrainConfig
from amil_fast.utils.errors import RunFailed


class NotFinite(RunFailed, ArithmeticError):
    """A loss or a weight became NaN or infinite."""


@dataclass
class TrainingProgress:
    """Progress of a run; saved with each checkpoint.

    Attributes:
        epoch: finished epochs.
        epoch_step: finished steps of the current epoch.
        step: finished steps.
        best: ``score`` of the best validation in percent (or None), its ``step`` and ``epoch``.
        totals: sums of the loss terms over the steps of the current epoch, and their number and seconds.
        seconds: training time without validation.
    """

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    best: dict[str, Any] = field(default_factory=lambda: {"score": None})
    totals: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class LossMeter:
    """Collects the loss terms of the steps on the device, and adds them to the progress in batches.

    Args:
        config: the run's configuration.
        names: names of the terms.
        balance: balance of the adversarial losses, or None.
        progress: its ``totals`` and ``seconds`` are updated.
    """

    def __init__(
        self, config: TrainConfig, names: tuple[str, ...], balance: Balance | None, progress: TrainingProgress
    ):
        self.config, self.names, self.balance, self.progress = config, names, balance, progress
        self._pending: list[torch.Tensor] = []
        self._clock, self._step = time.monotonic(), progress.step

    def start(self) -> None:
        """Starts the clock; time before this call does not count as training."""
        self._clock = time.monotonic()

    def add(self, terms: torch.Tensor) -> None:
        """Adds the terms of a step without waiting for the device."""
        self._pending.append(terms)

    def read(self, rate: float) -> dict[str, float] | None:
        """Transfers the collected terms from the device.

        Args:
            rate: factor on the learning rates.

        Returns:
            Means since the last call and images per second, for display; None if there are no new terms.

        Raises:
            NotFinite: a term is NaN or infinite.
        """
        if not self._pending:
            return None
        progress = self.progress
        values = torch.stack(self._pending).double().cpu().numpy()
        first, self._pending = progress.step - len(self._pending) + 1, []
        # The scaler of fp16 tolerates gradients that overflow: their norm, the last term, is not checked.
        checked = 5 if self.config.run.precision == "fp16" else None
        bad = ~np.isfinite(values[:, :checked]).all(1)
        if bad.any():
            at = int(bad.argmax())
            terms = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, values[at], strict=True))
            raise NotFinite(f"the loss of step {first + at} is not finite ({terms})")
        for name, column in zip(self.names, values.T, strict=True):
            progress.totals[name] = progress.totals.get(name, 0.0) + float(column.sum())
        progress.totals["steps"] = progress.totals.get("steps", 0) + len(values)
        now = time.monotonic()
        seconds, steps = now - self._clock, progress.step - self._step
        self._clock, self._step = now, progress.step
        progress.seconds += seconds
        progress.totals["seconds"] = progress.totals.get("seconds", 0.0) + seconds
        shown = self._displayed(dict(zip(self.names, values.mean(0).tolist(), strict=True)), rate)
        shown["images/s"] = steps * self.config.data.batch_size / max(seconds, 1e-9)
        return shown

    def epoch_means(self, rate: float) -> dict[str, float]:
        """Returns the means over the current epoch, for display."""
        totals = self.progress.totals
        steps = max(totals.get("steps", 0), 1)
        means = self._displayed({name: totals.get(name, float("nan")) / steps for name in self.names}, rate)
        means["images/s"] = steps * self.config.data.batch_size / max(totals.get("seconds", 0.0), 1e-9)
        return means

    def _displayed(self, terms, rate):
        """Selects the terms that this run uses; adds k and the convergence measure of the balance."""
        shown = {name: terms[name] for name in ("loss", "heatmap")}
        if self.config.loss.mil and self.config.generator.blocks:
            shown["mil"] = terms["mil"]
        if self.balance is not None:
            real, fake = terms["real"], terms["fake"]
            shown |= {"real": real, "fake": fake, "k": float(self.balance.k)}
            shown["convergence"] = float(self.balance.convergence(torch.tensor(real), torch.tensor(fake)))
        if "norm" in terms:
            shown["norm"] = terms["norm"]
        shown["lr"] = rate * self.config.optimizer.lr
        return shown
