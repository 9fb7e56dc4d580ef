"""What a training run shows and leaves: progress, one line per epoch, history, TensorBoard."""

import json
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

HISTORY = "history.jsonl"


class RunLog:
    """Shows a run to its user. On processes other than the first it does nothing.

    Args:
        out: the run's folder.
        console: a ``rich.console.Console``.
        main: whether this is the first process.
        tensorboard: write event files.
        steps: steps in all; done: those an earlier part of the run made.
    """

    def __init__(self, out, console, *, main, tensorboard, steps, done):
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
        self._board = None
        if main:
            self._keep_history(done)
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.out / "tensorboard"), purge_step=done or None)

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *_):
        self._progress.stop()
        if self._board is not None:
            self._board.close()

    def say(self, text):
        """A line of plain text."""
        if self.main:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step, epoch, epochs, values):
        """The mean losses since the last call, and other numbers, by name."""
        if not self.main:
            return
        shown = "  ".join(f"{name} {number(value)}" for name, value in values.items())
        self._progress.update(self._task, completed=step, description=f"epoch {epoch + 1}/{epochs}", terms=shown)
        self.scalars("train", values, step)

    def scalars(self, kind, values, step):
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def picture(self, name, picture, step):
        """``(H, W, 3)`` uint8 BGR: to TensorBoard and, as a file that the next one replaces, into the folder."""
        import cv2

        if not self.main:
            return
        if self._board is not None:
            self._board.add_image(name, picture[:, :, ::-1].copy(), step, dataformats="HWC")
        cv2.imwrite(str(self.out / f"{name}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 90])

    def epoch(self, row):
        """One epoch's numbers: a line for the user, a line of ``history.jsonl``."""
        if not self.main:
            return
        with open(self.out / HISTORY, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _keep_history(self, done):
        """Drops lines about steps that are going to be made again."""
        path = self.out / HISTORY
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= done:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # cut off by a kill
        path.write_text("".join(kept), encoding="utf-8")


def number(value):
    """Three significant digits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
