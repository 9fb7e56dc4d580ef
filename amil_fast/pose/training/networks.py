"""Networks of a training run: generator, its moving average, discriminator, balance and optimizers."""

import dataclasses
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from amil_fast.pose import Balance, PoseDiscriminator, PoseGenerator
from amil_fast.pose.training.config import TrainConfig
from amil_fast.pose.training.distributed import synchronize_batch_norm
from amil_fast.utils import training_state


class Networks:
    """Builds the networks and optimizers of a configuration on the accelerator's device.

    Attributes:
        generator, discriminator: the bare models; ``discriminator`` is None without adversarial training.
        call_generator, call_discriminator: what a training step calls: wrapped for several processes, compiled.
        optimizer, discriminator_optimizer: prepared by the accelerator.
        average: moving average of the generator's weights and buffers, or None.
        balance: balance of the adversarial losses (Eq. 20), or None.
        notes: messages for the user.
    """

    def __init__(self, config: TrainConfig, skeleton: str, accelerator: Accelerator):
        run, device = config.run, accelerator.device
        self.config, self.accelerator = config, accelerator
        torch.manual_seed(run.seed)
        options = dataclasses.asdict(config.generator) | {"flip_test": run.flip_test}
        if config.loss.heatmap == "softmax":
            options["softmax_std"] = config.data.heatmap_std
        generator = PoseGenerator(skeleton, config.data.input_size, **options)
        self.generator: Any = generator  # Any: torch annotates neither Module.to(memory_format=...) nor wrapped models
        self.notes: list[str] = []
        if run.init is not None:
            taken, missing, unused = training_state.load_weights(self.generator, run.init)
            self.notes.append(f"initialized from {run.init}: {taken} tensors loaded")
            self.notes += [f"  missing: {name}" for name in missing] + [f"  not used: {name}" for name in unused]
        self.discriminator: Any = None
        self.balance: Balance | None = None
        if config.discriminator is not None and config.adversarial:
            self.discriminator = PoseDiscriminator(skeleton, **dataclasses.asdict(config.discriminator))
            self.balance = Balance(**dataclasses.asdict(config.balance)).to(device)
        # Processes differ in dropout only, if there is any: all random initialization is done.
        torch.manual_seed(run.seed + 1 + accelerator.process_index)
        self.average: Any = None
        if run.ema_decay:
            self.generator.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.average = AveragedModel(self.generator, multi_avg_fn=self._update_average, use_buffers=True)
            self.average.module.eval().requires_grad_(False)
        settings = config.optimizer
        self.generator, self.call_generator, self.optimizer = self._prepare(self.generator, settings.lr)
        if run.compile:
            self.call_generator = torch.compile(self.call_generator)
        self.call_discriminator = self.discriminator_optimizer = None
        if self.discriminator is not None:
            rate = settings.discriminator_lr or settings.lr
            self.discriminator, self.call_discriminator, self.discriminator_optimizer = self._prepare(
                self.discriminator, rate
            )

    @property
    def evaluated(self) -> PoseGenerator:
        """The generator that is evaluated and saved: the moving average where there is one."""
        return self.generator if self.average is None else self.average.module

    @property
    def optimizers(self) -> list[Any]:
        """Optimizers of the generator and, if present, the discriminator."""
        return [each for each in (self.optimizer, self.discriminator_optimizer) if each is not None]

    @property
    def called(self) -> list[Any]:
        """The models that a training step calls."""
        return [each for each in (self.call_generator, self.call_discriminator) if each is not None]

    def state(self) -> dict[str, torch.Tensor]:
        """Returns all tensors of networks, optimizers and balance by name."""
        tensors = training_state.prefixed("generator", self.generator.state_dict())
        tensors |= training_state.prefixed("optimizer", training_state.optimizer_tensors(self.optimizer))
        if self.average is not None:
            tensors |= training_state.prefixed("average", self.average.state_dict())
        if self.discriminator is not None:
            tensors |= training_state.prefixed("discriminator", self.discriminator.state_dict())
            tensors |= training_state.prefixed(
                "discriminator_optimizer", training_state.optimizer_tensors(self.discriminator_optimizer)
            )
            tensors["balance.k"] = self.balance.k  # type: ignore[union-attr]
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restores :meth:`state`; raises RuntimeError if the networks have other parameters."""
        self.generator.load_state_dict(training_state.part("generator", tensors))
        if self.average is not None:
            self.average.load_state_dict(training_state.part("average", tensors))
        if self.discriminator is not None:
            self.discriminator.load_state_dict(training_state.part("discriminator", tensors))
        training_state.load_optimizer(self.optimizer, training_state.part("optimizer", tensors))
        if self.discriminator is not None:
            saved = training_state.part("discriminator_optimizer", tensors)
            training_state.load_optimizer(self.discriminator_optimizer, saved)
            self.balance.k.copy_(tensors["balance.k"])  # type: ignore[union-attr]

    def _prepare(self, model, rate):
        """Returns the bare model on its device, the model to call in training, and its optimizer."""
        device = self.accelerator.device
        model = model.to(device, memory_format=torch.channels_last).train()
        if self.accelerator.num_processes > 1 and self.config.run.sync_batch_norm:
            model = synchronize_batch_norm(model, device)
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

    def _update_average(self, average, current, _):
        # The effective window grows with the number of updates, so that the initial weights are forgotten quickly.
        done = int(self.average.n_averaged)
        get_ema_multi_avg_fn(min(self.config.run.ema_decay, (1 + done) / (10 + done)))(average, current, None)
