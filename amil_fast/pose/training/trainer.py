"""The training loop of the pose model (Eq. 10-20): generator and, where wanted, discriminator."""

import dataclasses
import math
import os
import signal
import threading
import time
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from amil_fast.pose import (
    Balance,
    PoseDiscriminator,
    PoseGenerator,
    adversarial_loss,
    discriminator_losses,
    heatmap_loss,
    region_cross_entropy,
    region_loss,
)
from amil_fast.pose.codec import encode_targets, invert, transform
from amil_fast.pose.data import PoseLoader
from amil_fast.pose.data.loader import cores
from amil_fast.pose.evaluation import GroundTruth, score
from amil_fast.pose.evaluation.evaluate import predict_batches
from amil_fast.pose.inference.predictor import Predictor
from amil_fast.pose.training import checkpoints
from amil_fast.pose.training.config import PRECISIONS
from amil_fast.pose.training.distributed import synchronize_batch_norm
from amil_fast.pose.training.run_log import RunLog, number
from amil_fast.pose.training.training_data import training_data
from amil_fast.pose.visualization import contact_sheet, pose_tile
from amil_fast.utils.files import publish, write_json


class Interrupted(Exception):
    """The run was stopped by a signal, and saved."""


class NotFinite(ArithmeticError):
    """A loss became NaN or infinite."""


class PoseTraining:
    """A training run.

    Args:
        config: a :class:`~amil_fast.pose.training.config.TrainConfig`.
        out: the run's folder: ``last/``, ``best/``, ``history.jsonl``, ``tensorboard/``, ``overlays.jpg``.
        console: a ``rich.console.Console``.
        resume: go on from ``last/`` where there is one; on one process and a CPU the result is bit for bit that of a
            run that was never stopped.

    Raises:
        ValueError: settings or data that don't work; ``out`` holds a run already and ``resume`` is off.
    """

    def __init__(self, config, out, console, *, resume=False):
        self.config, self.out, self.console = config, Path(out), console
        run = config.run
        AcceleratorState._reset_state()  # of an earlier run in this process, which may have had another precision
        if run.threads:
            torch.set_num_threads(run.threads)
        # Without a GPU it has to be said, or processes under torchrun don't find each other.
        cpu = run.device == "cpu" or not torch.accelerator.is_available()
        if run.precision == "fp16" and cpu:
            raise ValueError("run.precision: fp16 needs a GPU; bf16 works everywhere")
        self.accelerator = Accelerator(mixed_precision=PRECISIONS[run.precision], cpu=cpu)
        self.device, self.world = self.accelerator.device, self.accelerator.num_processes
        on_gpu = self.device.type == "cuda"
        torch.backends.cudnn.benchmark = on_gpu

        found = (self.out / "last" / checkpoints.STATE).is_file()
        if found and not resume:
            raise ValueError(f"{self.out}: holds a training run already; go on with --resume, or choose another --out")
        tensors, facts = checkpoints.load_state(self.out / "last") if found else ({}, {})

        self.data = training_data(config, on_device=on_gpu)
        shares = self.world * run.accumulation
        if config.data.batch_size % shares:
            raise ValueError(
                f"data.batch_size: expected a multiple of {self.world} processes x {run.accumulation} accumulated "
                f"parts, got {config.data.batch_size}"
            )
        self.part_size = config.data.batch_size // shares
        self.epoch_steps = len(self.data.training) // config.data.batch_size
        workers = config.data.workers
        if workers is None:
            # A core reads about 1,500 packed crops/s; a CPU needs its cores to train.
            workers = max(1, cores() // self.world // (1 if on_gpu else 8))
        share = {"rank": self.accelerator.process_index, "world": self.world, "workers": min(workers, 16)}
        # Its own generator: the loader draws seeds for its workers, which must not shift anybody else's numbers.
        share |= {"pin_memory": on_gpu, "generator": torch.Generator()}
        self.loader = PoseLoader(self.data.training, self.part_size, seed=run.seed, drop_last=True, **share)
        self.validation_loader = None
        if self.data.validation is not None:
            self.validation_loader = PoseLoader(self.data.validation, max(self.part_size, 16), shuffle=False, **share)

        self._build()
        # Where the run is: epochs done, steps done in this one and in all; the best score; this epoch's sums.
        self.epoch = self.epoch_step = self.step = 0
        self.best = {"score": None}
        self.totals, self.seconds = {}, 0.0
        if found:
            self._restore(tensors, facts)
        self._pending = []
        self._stop = None

    def _build(self):
        config, run = self.config, self.config.run
        torch.manual_seed(run.seed)
        data = config.data
        self.generator = PoseGenerator(self.data.skeleton.name, data.input_size, **dataclasses.asdict(config.generator))
        self.notes = list(self.data.notes)
        if run.init is not None:
            taken, missing, left = checkpoints.load_weights(self.generator, run.init)
            self.notes.append(f"started from {run.init}: {taken} tensors taken")
            self.notes += [f"  not there: {name}" for name in missing] + [f"  not used: {name}" for name in left]
        self.discriminator = self.balance = None
        if config.adversarial:
            self.discriminator = PoseDiscriminator(self.data.skeleton.name, **dataclasses.asdict(config.discriminator))
            self.balance = Balance(**dataclasses.asdict(config.balance)).to(self.device)
        # Dropout, if any, differs between processes; everything else was drawn above.
        torch.manual_seed(run.seed + 1 + self.accelerator.process_index)
        self._mean, self._std = (
            torch.tensor(value, device=self.device).view(3, 1, 1) for value in (self.generator.mean, self.generator.std)
        )
        self.average = None
        if run.ema_decay:
            self.generator.to(self.device, memory_format=torch.channels_last)
            self.average = AveragedModel(self.generator, multi_avg_fn=self._average, use_buffers=True)
            self.average.module.eval().requires_grad_(False)
        self.generator, self._call, self.optimizer = self._prepare_model(self.generator, config.optimizer.lr)
        if run.compile:
            self._call = torch.compile(self._call)
        if self.discriminator is not None:
            rate = config.optimizer.discriminator_lr or config.optimizer.lr
            self.discriminator, self._judge, self.discriminator_optimizer = self._prepare_model(
                self.discriminator, rate
            )

    def _prepare_model(self, model, rate):
        """The bare model on its device, what to call in training, and its optimizer."""
        model = model.to(self.device, memory_format=torch.channels_last).train()
        if self.world > 1 and self.config.run.sync_batch_norm:
            model = synchronize_batch_norm(model, self.device)
        settings = self.config.optimizer
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.name]
        groups = [
            {"params": [p for p in model.parameters() if (p.dim() > 1) == decayed], "weight_decay": decay}
            for decayed, decay in ((True, settings.weight_decay), (False, 0.0))
        ]
        optimizer = kind(groups, lr=rate, betas=settings.betas, fused=True)
        for group in optimizer.param_groups:
            group["rate"] = rate
        return model, *self.accelerator.prepare(model, optimizer)

    def _average(self, average, current, _):
        # The average starts short: the first weights are worth nothing.
        done = int(self.average.n_averaged)
        get_ema_multi_avg_fn(min(self.config.run.ema_decay, (1 + done) / (10 + done)))(average, current, None)

    @property
    def shipped(self):
        """The generator that is evaluated and saved."""
        return self.generator if self.average is None else self.average.module

    # ------------------------------------------------------------------ the loop

    def run(self):
        """Trains to the end. Returns what ``summary.json`` holds; None on processes other than the first.

        Raises:
            Interrupted: SIGINT or SIGTERM; the state is saved.
            NotFinite: a loss is NaN or infinite; the last checkpoint is left as it was.
        """
        config, run = self.config, self.config.run
        main = self.accelerator.is_main_process
        if main:
            self.out.mkdir(parents=True, exist_ok=True)
        steps = config.schedule.epochs * self.epoch_steps
        self.report = RunLog(
            self.out, self.console, main=main, tensorboard=run.tensorboard, steps=steps, done=self.step
        )
        self._saved = self._clock = time.monotonic()
        self._steps_shown = self.step
        with self._signals(), self.report, ExitStack() as stack:
            for loader in (self.loader, self.validation_loader):
                if loader is not None:
                    stack.callback(loader.close)
            self._introduce()
            while self.epoch < config.schedule.epochs:
                self.loader.set_epoch(self.epoch, start=self.epoch_step * run.accumulation * self.part_size)
                # Parts of one batch; by their number: with several processes the sampler has some to spare.
                batches = zip(*[iter(self.loader)] * run.accumulation, strict=False)
                for parts in islice(batches, self.epoch_steps - self.epoch_step):
                    self._step(parts)
                    self._after_step()
                self._after_epoch()
            return self._finish()

    def _step(self, parts):
        """One optimizer step on the batches that are this process's share."""
        config, accelerator = self.config, self.accelerator
        rate = self._rate()
        optimizers = [self.optimizer] + ([self.discriminator_optimizer] if self.discriminator is not None else [])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate"]
            optimizer.zero_grad()
        parts = [self._prepare_batch(part) for part in parts]
        # Annotated joints in an average part: gradients averaged over parts and processes are those of one batch.
        annotated = accelerator.reduce(sum(valid.sum() for _, _, valid in parts).float(), "sum")
        count = annotated / (self.world * len(parts))
        terms = 0
        for place, part in enumerate(parts):
            with ExitStack() as gathering:
                if place + 1 < len(parts):
                    for model in (self._call, self._judge) if self.discriminator is not None else (self._call,):
                        gathering.enter_context(accelerator.no_sync(model))
                terms = terms + self._backward(*part, count, 1 / len(parts))
        terms = accelerator.reduce(terms, "mean")
        # With fp16, two optimizers share one scaler of the loss: Accelerate's own steps would each update it, and its
        # clipping would divide by the scale twice.
        scaler = accelerator.scaler
        if scaler is not None:
            for optimizer in optimizers:
                scaler.unscale_(optimizer.optimizer)
        if config.optimizer.clip:
            norm = torch.nn.utils.clip_grad_norm_(self.generator.parameters(), config.optimizer.clip)
            terms = torch.cat([terms, norm.detach().float().view(1)])
            if self.discriminator is not None:
                torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), config.optimizer.clip)
        for optimizer in optimizers:
            if scaler is not None:
                scaler.step(optimizer.optimizer)
            else:
                optimizer.step()
        if scaler is not None:
            scaler.update()
        if self.balance is not None:
            real, fake = terms[3:5].unbind()
            self.balance.update(real, fake)
        if self.average is not None:
            self.average.update_parameters(self.generator)
        self._pending.append(terms)
        self.step += 1
        self.epoch_step += 1

    def _backward(self, images, target, valid, count, share):
        """Gradients of both networks, each at its present weights; the loss terms, detached."""
        weights = self.config.loss
        output = self._call(images, all_blocks=True)
        heatmaps = output.heatmaps[-1]
        if weights.heatmap == "cross-entropy":
            heatmap = region_cross_entropy(output.scores, target, valid, count)
        else:
            heatmap = heatmap_loss(output.heatmaps, target, valid, count)
        nothing = torch.zeros((), device=self.device)
        mil = adversarial = real = fake = nothing
        if weights.mil and output.scores is not None:
            mil = region_loss(output.scores, valid, self.config.generator.mil_scale)
        if self.discriminator is not None:
            real, fake = discriminator_losses(self._judge, target, heatmaps.detach(), images, valid, count)
            self.accelerator.backward(share * self.balance.loss(real, fake))
            adversarial = adversarial_loss(self.discriminator, heatmaps, images, valid, count)
        loss = heatmap + weights.mil * mil + weights.adversarial * adversarial
        self.accelerator.backward(share * loss)
        return share * torch.stack([loss.detach(), heatmap.detach(), mil.detach(), real.detach(), fake.detach()])

    @property
    def _names(self):
        return ("loss", "heatmap", "mil", "real", "fake") + (("norm",) if self.config.optimizer.clip else ())

    def _prepare_batch(self, batch):
        """``images (B, 3, S, S)`` normalized and channels-last, ``target (B, K, h, w)``, ``valid (B, K)``."""
        if "warp" in batch:
            batch = self.data.training.augment(batch, self.device)
            images = batch["image"]
        else:
            batch = {name: batch[name].to(self.device, non_blocking=True) for name in ("image", "joints", "valid")}
            images = batch["image"].float() / 255
        images = ((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
        target = encode_targets(
            batch["joints"], images.shape[-1], heatmap_std=self.config.data.heatmap_std, visible=batch["valid"]
        )
        return images, target, batch["valid"]

    def _rate(self):
        """Factor on the learning rates at this step."""
        return self.config.schedule.factor(self.step, self.epoch_steps)

    def _after_step(self):
        """Everything that needs numbers back from the device, and processes to agree: every few steps."""
        run = self.config.run
        by_steps = run.checkpoint_steps and self.step % run.checkpoint_steps == 0
        stop = self.world == 1 and self._stop
        if self.step % run.log_every and self.epoch_step < self.epoch_steps and not by_steps and not stop:
            return
        self._read_losses()
        self._stop_if_asked()
        by_time = run.checkpoint_minutes and time.monotonic() - self._saved > 60 * run.checkpoint_minutes
        if (by_steps or by_time) and self.epoch_step < self.epoch_steps:
            self._save()

    def _read_losses(self):
        if not self._pending:
            return
        values = torch.stack(self._pending).double().cpu().numpy()
        first, self._pending = self.step - len(self._pending) + 1, []
        looked_at = 5 if self.config.run.precision == "fp16" else None  # its scaler tries gradients that overflow
        bad = ~np.isfinite(values[:, :looked_at]).all(1)
        if bad.any():
            at = int(bad.argmax())
            terms = ", ".join(f"{name} {value:g}" for name, value in zip(self._names, values[at], strict=True))
            self._not_finite(f"the loss of step {first + at} is not finite ({terms})")
        for name, column in zip(self._names, values.T, strict=True):
            self.totals[name] = self.totals.get(name, 0.0) + float(column.sum())
        self.totals["steps"] = self.totals.get("steps", 0) + len(values)
        now = time.monotonic()
        seconds, steps = now - self._clock, self.step - self._steps_shown
        self._clock, self._steps_shown = now, self.step
        self.seconds += seconds
        self.totals["seconds"] = self.totals.get("seconds", 0.0) + seconds
        shown = self._shown(dict(zip(self._names, values.mean(0).tolist(), strict=True)))
        shown["images/s"] = steps * self.config.data.batch_size / max(seconds, 1e-9)
        self.report.advance(self.step, self.epoch, self.config.schedule.epochs, shown)

    def _shown(self, terms):
        """Loss terms that say something in this run, with k and the measure of convergence."""
        shown = {name: terms[name] for name in ("loss", "heatmap")}
        if self.config.loss.mil and self.config.generator.blocks:
            shown["mil"] = terms["mil"]
        if self.balance is not None:
            real, fake = terms["real"], terms["fake"]
            shown |= {"real": real, "fake": fake, "k": float(self.balance.k)}
            shown["convergence"] = float(self.balance.convergence(torch.tensor(real), torch.tensor(fake)))
        if "norm" in terms:
            shown["norm"] = terms["norm"]
        shown["lr"] = self._rate() * self.config.optimizer.lr
        return shown

    def _not_finite(self, what):
        state = self.out / "last" / checkpoints.STATE
        good = f"the last good checkpoint is {state.parent}" if state.is_file() else "there is no checkpoint yet"
        if state.is_file():
            good += f", of step {checkpoints.load_state(state.parent)[1]['step']}"
        raise NotFinite(f"{what}; {good}. A smaller learning rate, clipping (optimizer.clip) or fp32 may help")

    def _after_epoch(self):
        config = self.config
        epoch, last = self.epoch + 1, self.epoch + 1 == config.schedule.epochs
        result = None
        if self.validation_loader is not None and (epoch % config.run.evaluate_every == 0 or last):
            result = self._evaluate(self.shipped, overlays=config.run.overlays)
            if result is None:  # stopped in the middle: it is made when the run goes on
                self._stop_if_asked()
        steps = max(self.totals.get("steps", 0), 1)
        terms = self._shown({name: self.totals.get(name, math.nan) / steps for name in self._names})
        rate = steps * config.data.batch_size / max(self.totals.get("seconds", 0.0), 1e-9)
        row = {"epoch": epoch, "step": self.step, "seconds": round(self.seconds, 1), **terms, "images/s": rate}
        if result is not None:
            row[result.headline] = result.headline_score
            row |= {"samples": result.summary["samples"], "unmeasured": result.summary["unmeasured"]}
            self.report.scalars("validation", {result.headline: result.headline_score or 0.0}, self.step)
        self.report.epoch(row)
        self._say_epoch(row, result)
        if self._is_better(result):
            self.best = {"score": None if result is None else result.headline_score, "step": self.step, "epoch": epoch}
            self._save_generator("best")
        self.epoch, self.epoch_step, self.totals = epoch, 0, {}
        self._clock = time.monotonic()  # evaluation doesn't count as training
        self._save()
        self._stop_if_asked(saved=True)

    def _is_better(self, result):
        if result is None:  # without validation the last is the best there is
            return self.validation_loader is None
        found = result.headline_score
        return self.best["score"] is None or (found is not None and found > self.best["score"])

    def _finish(self):
        """Scores the best generator in full precision, and writes ``summary.json``."""
        self.accelerator.wait_for_everyone()
        summary = {"epochs": self.epoch, "step": self.step, "seconds": round(self.seconds, 1), "best": self.best}
        if self.validation_loader is not None:
            best = PoseGenerator.from_pretrained(self.out / "best").to(self.device, memory_format=torch.channels_last)
            result = self._evaluate(best, exact=True)
            self._stop_if_asked(saved=True)
            summary["validation"] = {
                name: value for name, value in result.summary.items() if name not in ("curve", "confusion", "errors")
            }
        if not self.accelerator.is_main_process:
            return None
        write_json(self.out / "summary.json", summary)
        return summary

    # ------------------------------------------------------------------ evaluation

    def _evaluate(self, model, *, overlays=0, exact=False):
        """Scores on the validation people, or None where the run is to stop. ``exact``: in full precision."""
        predictor = Predictor(model, flip_test=self.config.run.flip_test)
        tiles = []

        def on_batch(batch, coords):
            for i in range(min(overlays - len(tiles), len(coords))):
                joints = transform(invert(batch["to_image"][i].double().numpy()), coords[i].double().numpy())
                tiles.append(pose_tile(batch["image"][i], joints, skeleton=self.data.skeleton))
            return not (self._stop and self.world == 1)

        with nullcontext() if exact else self.accelerator.autocast():
            found = predict_batches(predictor, self.validation_loader, on_batch=on_batch)
        if found is None:
            return None
        if model is self.generator:
            model.train()
        if tiles:
            sheet = contact_sheet([tiles[i : i + 4] for i in range(0, len(tiles), 4)])
            self.report.picture("overlays", sheet, self.step)
        rows = gather_object([found])
        everything = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        order = everything["index"].argsort(kind="stable")
        everything = {name: value[order] for name, value in everything.items()}
        return score(everything["coords"], GroundTruth.of_samples(self.data.skeleton, everything))

    def _say_epoch(self, row, result):
        terms = {name: value for name, value in row.items() if name not in ("epoch", "step", "seconds")}
        for name in ("samples", "unmeasured"):
            terms.pop(name, None)
        text = "  ".join(f"{name} {'-' if value is None else number(value)}" for name, value in terms.items())
        if result is not None and row["unmeasured"]:
            text += f" ({row['samples']} people; {row['unmeasured']} can't be measured and are left out)"
        self.report.say(f"epoch {row['epoch']}/{self.config.schedule.epochs}  {text}")

    def _introduce(self):
        data, config = self.data, self.config
        for note in self.notes:
            self.report.say(note)
        held = 0 if data.validation is None else len(data.validation)
        networks = f"generator {_millions(self.generator)}"
        if self.discriminator is not None:
            networks += f", discriminator {_millions(self.discriminator)}"
        self.report.say(
            f"{len(data.training)} people to train on, {held} for validation; {networks}; {self.epoch_steps} steps of "
            f"{config.data.batch_size} crops of {config.data.input_size} px in each of {config.schedule.epochs} epochs;"
            f" {self.world} x {self.device.type}, {config.run.precision}"
        )
        if self.step:
            self.report.say(f"going on after step {self.step}, in epoch {self.epoch + 1}")

    # ------------------------------------------------------------------ checkpoints and signals

    def _save(self):
        """``last/``, unless the weights are broken already."""
        if not all(bool(p.isfinite().all()) for p in self.generator.parameters()):
            self._not_finite(f"the generator's weights are not finite after step {self.step}")
        self._saved = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        tensors = checkpoints.prefixed("generator", self.generator.state_dict())
        tensors |= checkpoints.prefixed("optimizer", checkpoints.optimizer_tensors(self.optimizer))
        if self.average is not None:
            tensors |= checkpoints.prefixed("average", self.average.state_dict())
        if self.discriminator is not None:
            tensors |= checkpoints.prefixed("discriminator", self.discriminator.state_dict())
            tensors |= checkpoints.prefixed(
                "discriminator_optimizer", checkpoints.optimizer_tensors(self.discriminator_optimizer)
            )
            tensors["balance.k"] = self.balance.k
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        facts = {name: getattr(self, name) for name in ("epoch", "epoch_step", "step", "best", "totals", "seconds")}
        facts |= {"config": self.config.to_dict(), "world": self.world}
        if self.accelerator.scaler is not None:
            facts["scaler"] = self.accelerator.scaler.state_dict()
        self._save_generator("last", lambda folder: checkpoints.save_state(folder, tensors, facts))

    def _save_generator(self, name, also=None):
        if not self.accelerator.is_main_process:
            return

        def write(folder):
            notes = {"step": self.step, "epoch": self.epoch}
            if name == "best":
                notes = {**self.best}
            self.shipped.save_pretrained(folder, notes=notes)
            write_json(folder / "train.json", self.config.to_dict())
            if also is not None:
                also(folder)

        publish(self.out / name, write)

    def _restore(self, tensors, facts):
        try:
            self.generator.load_state_dict(checkpoints.part("generator", tensors))
            if self.average is not None:
                self.average.load_state_dict(checkpoints.part("average", tensors))
            if self.discriminator is not None:
                self.discriminator.load_state_dict(checkpoints.part("discriminator", tensors))
        except RuntimeError as error:
            raise ValueError(
                f"{self.out / 'last'}: its networks are not those of this configuration: {error}"
            ) from None
        checkpoints.load_optimizer(self.optimizer, checkpoints.part("optimizer", tensors))
        if self.discriminator is not None:
            saved = checkpoints.part("discriminator_optimizer", tensors)
            checkpoints.load_optimizer(self.discriminator_optimizer, saved)
            self.balance.k.copy_(tensors["balance.k"])
        for name in ("epoch", "epoch_step", "step", "best", "totals", "seconds"):
            setattr(self, name, facts[name])
        if self.step != self.epoch * self.epoch_steps + self.epoch_step:
            raise ValueError(
                f"{self.out / 'last'}: made {self.step} steps by epoch {self.epoch + 1}, which doesn't fit "
                f"{self.epoch_steps} steps in an epoch: the data or the batch size is another"
            )
        if self.accelerator.scaler is not None and "scaler" in facts:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        if self.world == facts["world"] == 1:
            torch.set_rng_state(tensors["random.cpu"])
            if self.device.type == "cuda" and "random.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        else:
            torch.manual_seed(hash((self.config.run.seed, self.step, self.accelerator.process_index)) % 2**63)

    @contextmanager
    def _signals(self):
        """SIGINT and SIGTERM ask the loop to save and stop; a second SIGINT stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        process = os.getpid()

        def ask(which, _):
            if os.getpid() != process:
                return  # a worker that was forked with this handler: the main process decides
            if self._stop and which == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop = signal.Signals(which).name

        before = {which: signal.signal(which, ask) for which in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)

    def _stop_if_asked(self, saved=False):
        asked = self._stop is not None
        if self.world > 1:  # one that stops alone would leave the others waiting
            asked = bool(self.accelerator.reduce(torch.tensor(float(asked), device=self.device), "sum"))
        if not asked:
            return
        if not saved:
            self._read_losses()
            self._save()
        raise Interrupted(f"{self._stop or 'a signal'}: stopped after step {self.step}; {self.out / 'last'} is saved")


def train(config, out, console, *, resume=False):
    """Trains a pose model; see :class:`PoseTraining`. Returns the summary."""
    return PoseTraining(config, out, console, resume=resume).run()


def _millions(model):
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
