"""Training of a bag classifier on bags that are read from disk while they are used."""

import dataclasses
import json
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amil_fast.mil.classifiers import cosine_factor
from amil_fast.mil.labels import LabeledBags, Targets
from amil_fast.mil.metrics import best_threshold
from amil_fast.mil.packing import PackedLoader, default_workers, pack_by_size, share_by_size
from amil_fast.mil.prediction import network_input, predict_bags
from amil_fast.mil.settings import TrainSettings
from amil_fast.mil.step_loss import bag_losses, class_weights, score_losses
from amil_fast.mil.training_setup import inner_split, make_network
from amil_fast.nn import FeatureStatistics
from amil_fast.utils.accelerator import make_accelerator
from amil_fast.utils.errors import Interrupted
from amil_fast.utils.files import publish, write_json
from amil_fast.utils.history import append_row, drop_rows
from amil_fast.utils.optional import require
from amil_fast.utils.signals import StopRequest
from amil_fast.utils.training_state import (
    STATE,
    load_optimizer,
    load_state,
    optimizer_tensors,
    part,
    prefixed,
    save_state,
)

_FEWEST = 10  # bags of each class from which on the validation part alone determines the threshold


class BagTraining:
    """A training run.

    Each step divides its bags over the processes by size, and every share into packed batches; gradients are summed
    over all of them, so that the result depends on neither the number of processes nor ``max_instances``, except for
    rounding (and for the dropout masks, if dropout is used).

    Args:
        bags: labeled bags.
        targets: their targets.
        train: indices of the training part.
        out: the run's folder: ``config.json`` and ``model.safetensors`` (for :meth:`amil_fast.MIRNet.from_pretrained`),
            ``last/state.safetensors``, ``history.jsonl``, ``tensorboard/``.
        settings: architecture and training.
        validation: indices of the inner validation part; None: ``settings.validation`` of the training part is held
            out, groups whole.
        resume: continue from ``last/`` if it exists; with one process on a CPU the result is bit-identical to that of
            an uninterrupted run.
        on_progress: called with (description, done, total) after each batch.
        on_message: called with lines of text.

    Attributes:
        net: the network; after :meth:`run` that of the best epoch.
        train, validation: the parts used.
        stop: ``stop.request(reason)`` ends the run as a signal does.

    Raises:
        ValueError: settings or targets that do not fit, or ``out`` contains a run and ``resume`` is False.
    """

    def __init__(
        self,
        bags: LabeledBags,
        targets: Targets,
        train: np.ndarray,
        out: str | Path,
        settings: TrainSettings,
        *,
        validation: np.ndarray | None = None,
        resume: bool = False,
        on_progress: Callable[[str, int, int], object] | None = None,
        on_message: Callable[[str], object] | None = None,
    ):
        self.bags, self.targets, self.settings, self.out = bags, targets, settings, Path(out)
        self._on_progress, self._on_message = on_progress, on_message
        self.train, self.validation = inner_split(bags, targets, np.asarray(train), validation, settings)
        self.accelerator = make_accelerator(settings.device, settings.precision)
        self.main = self.accelerator.is_main_process
        self.stop = StopRequest()
        workers = settings.workers
        if workers is None:
            workers = default_workers(bags.source, self.accelerator.num_processes)
        self._loader = PackedLoader(bags.source, workers, pin_memory=self.accelerator.device.type == "cuda")
        self._values = targets.values
        torch.manual_seed(settings.seed)
        self.net = make_network(bags.source, targets, self.train, settings).to(self.accelerator.device)
        torch.manual_seed(settings.seed + 1 + self.accelerator.process_index)  # dropout masks
        self._weights = np.ones(len(bags.labels), dtype=np.float32)
        if settings.class_weights == "balanced" and targets.task != "regression":
            classes = self._values[self.train]
            self._weights = class_weights(classes, len(targets.names))[np.maximum(self._values, 0)]
        self._optimizer = torch.optim.Adam(self.net.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        self._progress: dict[str, Any] = {"epoch": 0, "step": 0, "loss": 0.0, "best": None, "seconds": 0.0}
        self._best: dict[str, torch.Tensor] = {}
        self._found = (self.out / "last" / STATE).is_file()
        if self._found and not resume:
            raise ValueError(f"{self.out}: already contains a training run; pass --resume, or choose another --out")
        if self._found:
            self._restore()

    @property
    def epoch_steps(self) -> int:
        """Steps per epoch."""
        return -(-len(self.train) // self.settings.batch_size)

    def run(self) -> dict[str, Any]:
        """Trains to the end, chooses the threshold, and writes the model.

        Returns:
            ``epochs``, ``best`` (epoch and loss of the validation part), ``threshold``, ``seconds``.

        Raises:
            Interrupted: SIGINT or SIGTERM was received; the state is saved.
            ValueError: the loss is not finite.
        """
        settings, progress = self.settings, self._progress
        self._started = self._saved = time.monotonic()
        self._writer = self._tensorboard()
        with self.stop:
            if self._found:
                self._say(f"resuming in epoch {progress['epoch'] + 1}, step {progress['step']}")
            else:
                self._fit_normalization()
            while progress["epoch"] < settings.epochs and not self._exhausted():
                self._train_epoch()
                self._after_epoch()
            return self._finish()

    def _fit_normalization(self):
        if self.net.normalization is None:
            return
        statistics = FeatureStatistics(self.bags.source.num_features)
        share = self._share(self.train)
        done = 0
        for batch in self._loader.read(pack_by_size(share, self.bags.source.sizes, self.settings.max_instances)):
            statistics.update(batch.features)
            done += len(batch.indices)
            self._show("normalization", done, len(share))
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            merged = FeatureStatistics(self.bags.source.num_features)
            for other in gather_object([statistics]):
                merged.merge(other)
            statistics = merged
        self.net.normalization.fit(statistics)
        self._progress["normalization"] = self.net.normalization.kind
        if self.settings.normalization == "auto":
            self._say(f"normalization: {self.net.normalization.kind}")

    def _share(self, bag_indices):
        """Bags of this process."""
        shares = share_by_size(bag_indices, self.bags.source.sizes, self.accelerator.num_processes)
        return shares[self.accelerator.process_index]

    def _train_epoch(self):
        settings, progress = self.settings, self._progress
        order = np.random.default_rng([settings.seed, progress["epoch"]]).permutation(self.train)
        steps = np.array_split(order, self.epoch_steps)[progress["step"] :]
        # A process without bags in a step reads an empty batch: all processes take part in every step.
        shares = [pack_by_size(self._share(s), self.bags.source.sizes, settings.max_instances) or [[]] for s in steps]
        batches = iter(self._loader.read(batch for share in shares for batch in share))
        self.net.train()
        description = f"epoch {progress['epoch'] + 1}/{settings.epochs}"
        for step, share in zip(steps, shares, strict=True):
            self._step(islice(batches, len(share)), len(step))
            progress["step"] += 1
            self._show(description, progress["step"], self.epoch_steps)
            self._stop_if_requested()
            minutes = (time.monotonic() - self._saved) / 60
            if settings.checkpoint_minutes and minutes > settings.checkpoint_minutes:
                self._save()

    def _step(self, batches, num_bags):
        """One optimization step on the bags of all processes; ``batches`` are those of this process."""
        settings, device = self.settings, self.accelerator.device
        done = (self._progress["epoch"] * self.epoch_steps + self._progress["step"]) / (
            settings.epochs * self.epoch_steps
        )
        for group in self._optimizer.param_groups:
            group["lr"] = settings.lr * (cosine_factor(done) if settings.schedule == "cosine" else 1)
        self._optimizer.zero_grad(set_to_none=False)
        total = torch.zeros((), device=device)
        for batch in batches:
            indices = batch.indices.numpy()
            targets = self._standardized(self._values[indices])
            weights = torch.from_numpy(self._weights[indices]).to(device, non_blocking=True)
            batch = batch.to(device)
            with self.accelerator.autocast():
                output = self.net(network_input(self.net, batch.features), cu_seqlens=batch.cu_seqlens)
            losses = bag_losses(self.net, output.logits.float(), targets.to(device, non_blocking=True))
            loss = (losses * weights).sum() / num_bags
            loss.backward()
            total += loss.detach()
        if self.accelerator.num_processes > 1:
            self._sum_over_processes(total)
        self._optimizer.step()
        self._progress["loss"] += float(total) * num_bags

    def _standardized(self, values):
        if self.targets.task == "regression":
            values = ((values - self.net.target_mean) / self.net.target_std).astype(np.float32)
        return torch.from_numpy(values)

    def _sum_over_processes(self, total):
        """Sums gradients and loss, as one tensor."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.net.parameters()]
        flat = torch.cat([g.flatten() for g in gradients] + [total[None]])
        flat = self.accelerator.reduce(flat, "sum")
        for parameter, values in zip(
            self.net.parameters(), flat[:-1].split([g.numel() for g in gradients]), strict=True
        ):
            parameter.grad = values.view_as(parameter).clone()
        total.copy_(flat[-1])

    def _after_epoch(self):
        progress = self._progress
        loss = progress["loss"] / len(self.train)
        if not np.isfinite(loss):
            raise ValueError(f"the loss of epoch {progress['epoch'] + 1} is {loss}; a smaller --lr may help")
        row = {"epoch": progress["epoch"] + 1, "loss": loss, "lr": self._optimizer.param_groups[0]["lr"]}
        if len(self.validation):
            scores = self._predict(self.validation, "validation")
            row["validation_loss"] = float(
                score_losses(self.targets.task, scores, self._values[self.validation]).mean()
            )
            best = progress["best"]
            if best is None or row["validation_loss"] < best["validation_loss"]:
                progress["best"] = {"epoch": row["epoch"], "validation_loss": row["validation_loss"]}
                self._best = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        progress["epoch"], progress["step"], progress["loss"] = row["epoch"], 0, 0.0
        self._log(row)
        self._save()
        self._stop_if_requested(saved=True)

    def _exhausted(self):
        best, patience = self._progress["best"], self.settings.patience
        return bool(patience and best and self._progress["epoch"] - best["epoch"] >= patience)

    def _predict(self, bag_indices, description):
        return predict_bags(
            self.net,
            self.bags.source,
            bag_indices,
            max_instances=self.settings.max_instances,
            loader=self._loader,
            accelerator=self.accelerator,
            on_batch=lambda done, total: self._show(description, done, total),
        ).scores

    def _finish(self):
        settings, progress = self.settings, self._progress
        if self._best and settings.patience:
            self.net.load_state_dict(self._best)
        self.net.eval()
        if self.targets.task == "classification" and len(self.targets.names) == 2:
            self.net.threshold = self._choose_threshold()
        summary = {
            "epochs": progress["epoch"],
            "best": progress["best"] if settings.patience else None,
            "threshold": self.net.threshold,
            "seconds": round(self._seconds(), 1),
            "training_bags": len(self.train),
            "validation_bags": len(self.validation),
        }
        if self.main:
            notes = {"settings": dataclasses.asdict(settings), "training": summary}
            self.net.save_pretrained(self.out, notes=notes)
            write_json(self.out / "summary.json", summary)
        if self._writer is not None:
            self._writer.close()
        self.accelerator.wait_for_everyone()
        return summary

    def _choose_threshold(self):
        """The most accurate threshold on the validation part; with few bags there, on the whole training part."""
        chosen = self.validation
        if not len(chosen) or np.bincount(self._values[chosen], minlength=2).min() < _FEWEST:
            chosen = np.concatenate([self.train, self.validation])
        return best_threshold(self._predict(chosen, "threshold"), self._values[chosen])

    def _show(self, description, done, total):
        if self._on_progress is not None and self.main:
            self._on_progress(description, done, total)

    def _say(self, text):
        if self._on_message is not None and self.main:
            self._on_message(text)

    def _tensorboard(self):
        if not (self.settings.tensorboard and self.main):
            return None
        require("tensorboard", "logs of training (or pass --no-tensorboard)")
        from torch.utils.tensorboard import SummaryWriter

        repeated = self._progress["epoch"] + 1 if self._found else None
        return SummaryWriter(str(self.out / "tensorboard"), purge_step=repeated)

    def _log(self, row):
        if not self.main:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        append_row(self.out, row)
        text = f"epoch {row['epoch']}: loss {row['loss']:.4f}"
        if "validation_loss" in row:
            text += f", validation {row['validation_loss']:.4f}"
        self._say(text)
        if self._writer is not None:
            for name in row.keys() - {"epoch"}:
                self._writer.add_scalar(name, row[name], row["epoch"])

    def _seconds(self):
        return self._progress["seconds"] + time.monotonic() - self._started

    def _save(self):
        self._saved = time.monotonic()
        if not self.main:
            return
        tensors = prefixed("net", self.net.state_dict()) | prefixed("best", self._best)
        tensors |= prefixed("optimizer", optimizer_tensors(self._optimizer)) | {"random": torch.get_rng_state()}
        facts = {"progress": {**self._progress, "seconds": self._seconds()}, "fixed": self._fixed()}
        publish(self.out / "last", lambda folder: save_state(folder, tensors, facts))

    def _fixed(self):
        """Settings and parts that a resumed run must share with the interrupted one."""
        names = self.bags.source.names
        parts = {"train": self.train, "validation": self.validation}
        return {"settings": self.settings.fixed(), **{k: [names[i] for i in v] for k, v in parts.items()}}

    def _restore(self):
        tensors, facts = load_state(self.out / "last")
        fixed = json.loads(json.dumps(self._fixed()))
        for name, value in fixed["settings"].items():
            if facts["fixed"]["settings"].get(name) != value:
                raise ValueError(
                    f"{name}: expected {facts['fixed']['settings'].get(name)!r} as in the run to resume, got {value!r}"
                )
        if {**facts["fixed"], "settings": 0} != {**fixed, "settings": 0}:
            raise ValueError(f"{self.out}: expected the bags of the run to resume, got others")
        self.net.load_state_dict(part("net", tensors))
        self._best = {name: value.to(self.accelerator.device) for name, value in part("best", tensors).items()}
        load_optimizer(self._optimizer, part("optimizer", tensors))
        torch.set_rng_state(tensors["random"])
        self._progress = facts["progress"]
        if self.main:
            drop_rows(self.out, "epoch", self._progress["epoch"])
        if self.net.normalization is not None:
            # Absent in states that were saved before there was a choice.
            self.net.normalization.kind = self._progress.get("normalization", self.net.normalization.kind)

    def _stop_if_requested(self, saved=False):
        requested = bool(self.stop)
        if self.accelerator.num_processes > 1:  # a process that stopped alone would block the others
            total = torch.tensor(float(requested), device=self.accelerator.device)
            requested = bool(self.accelerator.reduce(total, "sum"))
        if not requested:
            return
        if not saved:
            self._save()
        raise Interrupted(f"{self.stop.reason or 'a signal'}: stopped; {self.out / 'last'} is saved")
