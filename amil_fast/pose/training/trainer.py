"""Training loop of the pose model: generator and, if configured, discriminator."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from amil_fast.pose import PoseGenerator, heatmap_loss
from amil_fast.pose.data import PoseLoader
from amil_fast.pose.data.loader import cores
from amil_fast.pose.evaluation import Result
from amil_fast.pose.training.config import TrainConfig
from amil_fast.pose.training.meter import LossMeter, NotFinite, TrainingProgress
from amil_fast.pose.training.networks import Networks
from amil_fast.pose.training.run_folder import RunFolder
from amil_fast.pose.training.run_log import RunLog
from amil_fast.pose.training.step import Batch, OptimizationStep
from amil_fast.pose.training.training_data import TrainingData, training_data
from amil_fast.pose.training.validation import Validation
from amil_fast.utils import training_state
from amil_fast.utils.accelerator import make_accelerator, uses_cpu
from amil_fast.utils.errors import Interrupted
from amil_fast.utils.files import write_json
from amil_fast.utils.processes import end_process_group
from amil_fast.utils.signals import StopRequest


class PoseTraining:
    """A training run.

    Args:
        config: the configuration.
        out: the run's folder: ``last/``, ``best/``, ``stable/`` (schedule ``"wsd"``), ``history.jsonl``,
            ``tensorboard/``, ``overlays.jpg``.
        console: where to print.
        resume: continue from ``last/`` if it exists; with one process on a CPU the result is bit-identical to that of
            an uninterrupted run.
        data: data sets; by default those of the configuration.
        heatmap_loss: replaces the L2 loss: ``(heatmaps, target, valid, count) -> scalar``.
        on_step: called after each optimization step with this object, the step's batches and its loss terms (on the
            device).
        on_save: called with this object before each checkpoint of ``last/``.

    Attributes:
        networks: generator, discriminator, optimizers.
        optimization: the optimization step.
        loader, validation_loader: batches of this process; the latter may be None.
        progress: epochs and steps so far.
        stop: ``stop.request(reason)`` ends the run as a signal does.

    Raises:
        ValueError: invalid settings or data, or ``out`` contains a run and ``resume`` is False.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: str | Path,
        console: Console,
        *,
        resume: bool = False,
        data: TrainingData | None = None,
        heatmap_loss: Callable[..., torch.Tensor] = heatmap_loss,
        on_step: "Callable[[PoseTraining, Sequence[Batch], torch.Tensor], object] | None" = None,
        on_save: "Callable[[PoseTraining], object] | None" = None,
    ):
        self.config, self.out, self.console = config, Path(out), console
        self.on_step, self.on_save = on_step, on_save
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        if config.run.precision == "fp16" and uses_cpu(config.run.device):
            raise ValueError("run.precision: fp16 requires a GPU; bf16 is supported on all devices")
        self.accelerator = make_accelerator(config.run.device, config.run.precision)
        torch.backends.cudnn.benchmark = self.accelerator.device.type == "cuda"
        self.world = self.accelerator.num_processes
        found = (self.out / "last" / training_state.STATE).is_file()
        if found and not resume:
            raise ValueError(f"{self.out}: already contains a training run; pass --resume, or choose another --out")
        tensors, facts = training_state.load_state(self.out / "last") if found else ({}, {})

        on_gpu = self.accelerator.device.type == "cuda"
        self.data = training_data(config, on_device=on_gpu) if data is None else data
        shares = self.world * config.run.accumulation
        if config.data.batch_size % shares:
            raise ValueError(
                f"data.batch_size: expected a multiple of {self.world} processes x {config.run.accumulation} "
                f"accumulated parts, got {config.data.batch_size}"
            )
        self.part_size = config.data.batch_size // shares
        self.epoch_steps = len(self.data.training) // config.data.batch_size
        self._steps = config.schedule.epochs * self.epoch_steps
        self.loader, self.validation_loader = self._loaders()
        self.networks = Networks(config, self.data.skeleton.name, self.accelerator)
        self.optimization = OptimizationStep(config, self.networks, self.accelerator, self.data, heatmap_loss)
        self.progress, self.stop = TrainingProgress(), StopRequest()
        self.folder = RunFolder(self.out, config, self.networks, self.accelerator)
        if found:
            self.folder.restore(self.progress, tensors, facts, self.epoch_steps)
        self._meter = LossMeter(config, self.optimization.term_names, self.networks.balance, self.progress)
        self._validation = None
        if self.validation_loader is not None:
            self._validation = Validation(
                self.validation_loader,
                self.data.skeleton,
                self.accelerator,
                either=config.run.either,
                stopped=lambda: bool(self.stop) and self.world == 1,
            )

    def run(self) -> dict[str, Any] | None:
        """Trains to the end.

        Returns:
            The content of ``summary.json``; None in processes other than the first.

        Raises:
            Interrupted: SIGINT or SIGTERM was received; the state is saved.
            NotFinite: a loss or weight is NaN or infinite; the last checkpoint is unchanged.
        """
        config, main, progress = self.config, self.accelerator.is_main_process, self.progress
        if main:
            self.out.mkdir(parents=True, exist_ok=True)
        self.log = RunLog(
            self.out, self.console, main=main, tensorboard=config.run.tensorboard, steps=self._steps, done=progress.step
        )
        self._saved = time.monotonic()
        self._meter.start()
        accumulation = config.run.accumulation
        with self.stop, self.log, ExitStack() as stack:
            for loader in (self.loader, self.validation_loader):
                if loader is not None:
                    stack.callback(loader.close)
            self._log_start()
            while progress.epoch < config.schedule.epochs:
                self.loader.set_epoch(progress.epoch, start=progress.epoch_step * accumulation * self.part_size)
                # Limited by number: with several processes the sampler may have batches to spare.
                batches = zip(*[iter(self.loader)] * accumulation, strict=False)
                for parts in islice(batches, self.epoch_steps - progress.epoch_step):
                    terms = self.train_step(parts)
                    self._meter.add(terms)
                    if self.on_step is not None:
                        self.on_step(self, parts, terms)
                    self._after_step()
                self._after_epoch()
            return self._finish()

    def train_step(self, parts: Sequence[Batch]) -> torch.Tensor:
        """Makes one optimization step and returns its loss terms; see :class:`OptimizationStep`."""
        terms = self.optimization(parts, self._rate(), self.progress.step / self.epoch_steps)
        self.progress.step += 1
        self.progress.epoch_step += 1
        return terms

    def _loaders(self):
        run, on_gpu = self.config.run, self.accelerator.device.type == "cuda"
        workers = self.config.data.workers
        if workers is None:
            # A core reads about 1,500 crops/s from an archive; without a GPU the cores are needed for training.
            workers = max(1, cores() // self.world // (1 if on_gpu else 8))
        share = {"rank": self.accelerator.process_index, "world": self.world, "workers": min(workers, 16)}
        # A separate generator: the loader draws seeds for its workers, which must not advance the global one.
        share |= {"pin_memory": on_gpu, "generator": torch.Generator()}
        training = PoseLoader(self.data.training, self.part_size, seed=run.seed, drop_last=True, **share)
        if self.data.validation is None:
            return training, None
        return training, PoseLoader(self.data.validation, max(self.part_size, 16), shuffle=False, **share)

    def _rate(self):
        """Factor on the learning rates at the current step."""
        return self.config.schedule.factor(self.progress.step, self.epoch_steps)

    def _after_step(self):
        """Reads losses, stops, saves: every few steps, since this waits for the device and the other processes."""
        run, step = self.config.run, self.progress.step
        within_epoch = self.progress.epoch_step < self.epoch_steps
        by_steps = run.checkpoint_steps and step % run.checkpoint_steps == 0
        stop = self.world == 1 and self.stop
        decays = step == self.config.schedule.decay_start(self.epoch_steps) and step < self._steps
        if step % run.log_every and within_epoch and not by_steps and not stop and not decays:
            return
        self._read_losses()
        if decays:
            self._save("stable")
        self._stop_if_requested()
        by_time = run.checkpoint_minutes and time.monotonic() - self._saved > 60 * run.checkpoint_minutes
        if (by_steps or by_time) and within_epoch:
            self._save()

    def _read_losses(self):
        try:
            shown = self._meter.read(self._rate())
        except NotFinite as error:
            raise self._with_advice(error) from None
        if shown is not None:
            self.log.advance(self.progress.step, self.progress.epoch, self.config.schedule.epochs, shown)

    def _after_epoch(self):
        config, progress = self.config, self.progress
        epoch = progress.epoch + 1
        last = epoch == config.schedule.epochs
        result = None
        if self._validation is not None and (epoch % config.run.evaluate_every == 0 or last):
            result, overlays = self._validation(self.networks.evaluated, overlays=config.run.overlays)
            if overlays is not None:
                self.log.picture("overlays", overlays, progress.step)
            if result is None:  # interrupted: the validation is repeated after a resume
                self._stop_if_requested()
        row = {"epoch": epoch, "step": progress.step, "seconds": round(progress.seconds, 1)}
        row |= self._meter.epoch_means(self._rate())
        if result is not None:
            row[result.headline] = result.headline_score
            row |= {"samples": result.summary["samples"], "unmeasured": result.summary["unmeasured"]}
            self.log.scalars("validation", {result.headline: result.headline_score or 0.0}, progress.step)
        self.log.epoch(row, config.schedule.epochs)
        if self._is_best(result):
            score = None if result is None else result.headline_score
            progress.best = {"score": score, "step": progress.step, "epoch": epoch}
            self.folder.save_best(progress)
        progress.epoch, progress.epoch_step, progress.totals = epoch, 0, {}
        self._meter.start()  # validation does not count as training time
        self._save()
        self._stop_if_requested(saved=True)

    def _is_best(self, result: Result | None) -> bool:
        if result is None:  # without validation data the last generator is kept as the best
            return self._validation is None
        found, best = result.headline_score, self.progress.best["score"]
        return best is None or (found is not None and found > best)

    def _finish(self):
        """Scores the best generator in full precision, and writes ``summary.json``."""
        self.accelerator.wait_for_everyone()
        progress = self.progress
        summary = {"epochs": progress.epoch, "step": progress.step}
        summary |= {"seconds": round(progress.seconds, 1), "best": progress.best}
        if self._validation is not None:
            best = PoseGenerator.from_pretrained(self.out / "best")
            best = best.to(self.accelerator.device, memory_format=torch.channels_last)
            result, _ = self._validation(best, full_precision=True)
            self._stop_if_requested(saved=True)
            summary["validation"] = {
                name: value for name, value in result.summary.items() if name not in ("curve", "confusion", "errors")
            }
        if not self.accelerator.is_main_process:
            return None
        write_json(self.out / "summary.json", summary)
        return summary

    def _log_start(self):
        data, config, networks = self.data, self.config, self.networks
        for note in [*data.notes, *networks.notes]:
            self.log.message(note)
        held_out = 0 if data.validation is None else len(data.validation)
        sizes = f"generator {_millions(networks.generator)}"
        if networks.discriminator is not None:
            sizes += f", discriminator {_millions(networks.discriminator)}"
        precision = self.accelerator.mixed_precision
        self.log.message(
            f"{len(data.training)} people for training, {held_out} for validation; {sizes}; {config.schedule.epochs} "
            f"epochs of {self.epoch_steps} steps of {config.data.batch_size} crops of {config.data.input_size} px; "
            f"{self.world} x {self.accelerator.device.type}, {'fp32' if precision == 'no' else precision}"
        )
        if self.progress.step:
            self.log.message(f"resuming after step {self.progress.step}, in epoch {self.progress.epoch + 1}")

    def _save(self, name="last"):
        if self.on_save is not None:
            self.on_save(self)
        try:
            self.folder.save(self.progress, name)
        except NotFinite as error:
            raise self._with_advice(error) from None
        self._saved = time.monotonic()

    def _with_advice(self, error):
        return NotFinite(
            f"{error}; {self.folder.last_checkpoint()}. A smaller learning rate, gradient clipping (optimizer.clip) or "
            "fp32 may help"
        )

    def _stop_if_requested(self, saved=False):
        requested = bool(self.stop)
        if self.world > 1:  # all processes must agree: one that stopped alone would block the others
            total = torch.tensor(float(requested), device=self.accelerator.device)
            requested = bool(self.accelerator.reduce(total, "sum"))
        if not requested:
            return
        if not saved:
            self._read_losses()
            self._save()
        reason = self.stop.reason or "a signal"
        raise Interrupted(
            f"{reason}: stopped after step {self.progress.step}; {self.out / 'last'} is saved, --resume continues"
        )


def train(config: TrainConfig, out: str | Path, console: Console, *, resume: bool = False) -> dict[str, Any] | None:
    """Trains a pose model and returns its summary; see :class:`PoseTraining` for arguments and errors.

    Ends the process group, so that the processes of a launcher can exit afterwards.
    """
    try:
        return PoseTraining(config, out, console, resume=resume).run()
    finally:
        end_process_group()


def _millions(model):
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
