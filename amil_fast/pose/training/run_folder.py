"""Folders ``last/`` and ``best/`` of a training run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from amil_fast.pose.training.config import TrainConfig
from amil_fast.pose.training.meter import NotFinite, TrainingProgress
from amil_fast.pose.training.networks import Networks
from amil_fast.pose.training.overrides import build
from amil_fast.utils import training_state
from amil_fast.utils.files import publish, write_json


class RunFolder:
    """Saves and restores networks, progress, random state and gradient scaler; only the first process writes.

    Args:
        out: the run's folder.
        config: stored with each checkpoint.
        networks, accelerator: what is saved and restored.
    """

    def __init__(self, out: Path, config: TrainConfig, networks: Networks, accelerator: Accelerator):
        self.out, self.config, self.networks, self.accelerator = out, config, networks, accelerator

    def save(self, progress: TrainingProgress, name: str = "last") -> None:
        """Writes ``last/``, or the folder ``name``.

        Raises:
            NotFinite: the generator's weights are not finite; the folder is left as it was.
        """
        if not all(bool(p.isfinite().all()) for p in self.networks.generator.parameters()):
            raise NotFinite(f"the generator's weights are not finite after step {progress.step}")
        accelerator = self.accelerator
        if not accelerator.is_main_process:
            return
        tensors = self.networks.state()
        tensors["random.cpu"] = torch.get_rng_state()
        if accelerator.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(accelerator.device)
        facts = dataclasses.asdict(progress) | {"config": self.config.to_dict(), "world": accelerator.num_processes}
        if accelerator.scaler is not None:
            facts["scaler"] = accelerator.scaler.state_dict()
        notes = {"step": progress.step, "epoch": progress.epoch}
        self._write(name, notes, lambda folder: training_state.save_state(folder, tensors, facts))

    def save_best(self, progress: TrainingProgress) -> None:
        """Writes the generator to ``best/``."""
        if self.accelerator.is_main_process:
            self._write("best", dict(progress.best))

    def restore(
        self, progress: TrainingProgress, tensors: dict[str, torch.Tensor], facts: dict[str, Any], epoch_steps: int
    ) -> None:
        """Restores everything from the contents of ``last/state.safetensors``.

        Raises:
            ValueError: the state belongs to other networks, or to another number of steps per epoch.
        """
        accelerator, last = self.accelerator, self.out / "last"
        try:
            self.networks.load_state(tensors)
            saved = {each.name: facts[each.name] for each in dataclasses.fields(progress)}
            world, random_state = facts["world"], tensors["random.cpu"]
        except (RuntimeError, KeyError, ValueError, IndexError, TypeError) as error:
            raise ValueError(f"{last}: the networks differ from those of this configuration: {error}") from None
        vars(progress).update(vars(build(TrainingProgress, saved, f"{last}: ")))
        if progress.step != progress.epoch * epoch_steps + progress.epoch_step:
            raise ValueError(
                f"{last}: expected {epoch_steps} steps per epoch, got step {progress.step} in epoch "
                f"{progress.epoch + 1}: the data or the batch size differs"
            )
        if accelerator.scaler is not None and "scaler" in facts:
            accelerator.scaler.load_state_dict(facts["scaler"])
        if accelerator.num_processes == world == 1:
            torch.set_rng_state(random_state)
            if accelerator.device.type == "cuda" and "random.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random.cuda"], accelerator.device)
        else:
            torch.manual_seed(hash((self.config.run.seed, progress.step, accelerator.process_index)) % 2**63)

    def last_checkpoint(self) -> str:
        """Describes the checkpoint that a failed run can be resumed from."""
        last = self.out / "last"
        if not (last / training_state.STATE).is_file():
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {last}, of step {training_state.load_state(last)[1]['step']}"

    def _write(self, name: str, notes: dict[str, Any], also: Callable[[Path], None] | None = None) -> None:
        def write(folder):
            self.networks.evaluated.save_pretrained(folder, notes=notes)
            write_json(folder / "train.json", self.config.to_dict())
            if also is not None:
                also(folder)

        publish(self.out / name, write)
