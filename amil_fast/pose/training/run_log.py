"""Console, ``history.jsonl`` and TensorBoard of a training run."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from amil_fast.pose.data.files import encode_image
from amil_fast.utils.files import write_bytes
from amil_fast.utils.history import append_row, drop_rows


class RunLog:
    """Context manager for the output of a run: progress bar, messages, history and TensorBoard events.

    Args:
        out: the run's folder.
        console: where to print.
        main: False in all processes but the first, where nothing is printed or written.
        tensorboard: write event files.
        steps, done: total number of steps, and those made before a resume.
    """

    def __init__(self, out: Path, console: Console, *, main: bool, tensorboard: bool, steps: int, done: int):
        self.out, self.console, self.main = Path(out), console, main
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}"),
            console=console,
            transient=True,
            disable=not main or not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=steps, completed=done, terms="")
        self._board: Any = None
        if main:
            drop_rows(self.out, "step", done)
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.out / "tensorboard"), purge_step=done or None)

    def __enter__(self) -> "RunLog":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._board is not None:
            self._board.close()

    def message(self, text: str) -> None:
        """Prints a line of plain text."""
        if self.main:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int, epoch: int, epochs: int, values: Mapping[str, float]) -> None:
        """Updates the progress bar, and writes the mean losses since the last call, by name, to TensorBoard."""
        if not self.main:
            return
        shown = "  ".join(f"{name} {number(value)}" for name, value in values.items())
        self._progress.update(self._task, completed=step, description=f"epoch {epoch + 1}/{epochs}", terms=shown)
        self.scalars("train", values, step)

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Writes ``kind/name`` to TensorBoard."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Writes ``picture (H, W, 3)`` uint8 BGR to TensorBoard and, replacing the previous one, to ``name.jpg``."""
        if not self.main:
            return
        if self._board is not None:
            self._board.add_image(name, picture[:, :, ::-1].copy(), step, dataformats="HWC")
        write_bytes(self.out / f"{name}.jpg", encode_image(picture, ".jpg", 90))

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        """Appends the numbers of an epoch to ``history.jsonl`` and prints them."""
        if not self.main:
            return
        append_row(self.out, row)
        hidden = ("epoch", "step", "seconds", "samples", "unmeasured")
        terms = {name: value for name, value in row.items() if name not in hidden}
        text = "  ".join(f"{name} {'-' if value is None else number(value)}" for name, value in terms.items())
        if row.get("unmeasured"):
            text += f" ({row['samples']} people; {row['unmeasured']} without a normalizer left out)"
        self.message(f"epoch {row['epoch']}/{epochs}  {text}")


def number(value: float) -> str:
    """Formats ``value`` with three significant digits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
