"""One optimization step of generator and discriminator."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator

from amil_fast.ops import flip_back
from amil_fast.pose import (
    adversarial_loss,
    choose_sides,
    discriminator_losses,
    distillation_target,
    heatmap_loss,
    region_cross_entropy,
    region_loss,
    softmax_cross_entropy,
)
from amil_fast.pose.codec import encode_targets
from amil_fast.pose.training.config import TrainConfig
from amil_fast.pose.training.networks import Networks
from amil_fast.pose.training.training_data import TrainingData

Batch = dict[str, torch.Tensor]


class OptimizationStep:
    """Losses, gradients, and updates of both networks, the balance and the moving average.

    Args:
        config: the run's configuration.
        networks: updated in place.
        accelerator: device, precision and processes.
        data: augments batches on the device where its loader leaves that to it.
        heatmap_loss: replaces the L2 loss: ``(heatmaps, target, valid, count) -> scalar``.
    """

    def __init__(
        self,
        config: TrainConfig,
        networks: Networks,
        accelerator: Accelerator,
        data: TrainingData,
        heatmap_loss: Callable[..., torch.Tensor] = heatmap_loss,
    ):
        self.config, self.networks, self.accelerator, self.data = config, networks, accelerator, data
        self.heatmap_loss = heatmap_loss
        self._mean, self._std = (
            torch.tensor(value, device=accelerator.device).view(3, 1, 1)
            for value in (networks.generator.mean, networks.generator.std)
        )

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the loss terms that a step returns."""
        return ("loss", "heatmap", "mil", "real", "fake") + (("norm",) if self.config.optimizer.clip else ())

    def prepare(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns ``images (B, 3, S, S)`` normalized and channels-last, ``target (B, K, h, w)``, ``valid (B, K)``."""
        device = self.accelerator.device
        if "warp" in batch:
            batch = self.data.training.augment(batch, device)
            images = batch["image"]
        else:
            batch = {name: batch[name].to(device, non_blocking=True) for name in ("image", "joints", "valid")}
            images = batch["image"].float() / 255
        images = ((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
        target = encode_targets(
            batch["joints"], images.shape[-1], heatmap_std=self.config.data.heatmap_std, visible=batch["valid"]
        )
        return images, target, batch["valid"]

    def __call__(self, parts: Sequence[Batch], rate: float, epoch: float = 0.0) -> torch.Tensor:
        """Makes one step.

        Args:
            parts: this process's share of the batch, in ``run.accumulation`` parts.
            rate: factor on the learning rates.
            epoch: epochs so far, for ``loss.swap_after``.

        Returns:
            The means of :attr:`term_names` over parts and processes, on the device.
        """
        clip, accelerator, networks = self.config.optimizer.clip, self.accelerator, self.networks
        optimizers = networks.optimizers
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate"]
            optimizer.zero_grad()
        prepared = [self.prepare(part) for part in parts]
        # Annotated joints in an average part: with this divisor, gradients averaged over parts and processes equal
        # those of the undivided batch.
        joints: Any = sum(valid.sum() for _, _, valid in prepared)
        annotated = accelerator.reduce(joints.float(), "sum")
        count = annotated / (accelerator.num_processes * len(prepared))
        terms: Any = 0
        for place, part in enumerate(prepared):
            with ExitStack() as gathering:
                if place + 1 < len(prepared):
                    for model in networks.called:
                        gathering.enter_context(accelerator.no_sync(model))
                terms = terms + self._backward(*part, count, 1 / len(prepared), epoch)
        terms = accelerator.reduce(terms, "mean")
        # In fp16, two optimizers share one gradient scaler: Accelerate's optimizer step would update it once per
        # optimizer, and its clipping would unscale twice.
        scaler = accelerator.scaler
        if scaler is not None:
            for optimizer in optimizers:
                scaler.unscale_(optimizer.optimizer)
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(networks.generator.parameters(), clip)
            terms = torch.cat([terms, norm.detach().float().view(1)])
            if networks.discriminator is not None:
                torch.nn.utils.clip_grad_norm_(networks.discriminator.parameters(), clip)
        for optimizer in optimizers:
            if scaler is not None:
                scaler.step(optimizer.optimizer)
            else:
                optimizer.step()
        if scaler is not None:
            scaler.update()
        if networks.balance is not None:
            real, fake = terms[3:5].unbind()
            networks.balance.update(real, fake)
        if networks.average is not None:
            networks.average.update_parameters(networks.generator)
        return terms

    def _backward(self, images, target, valid, count, share, epoch):
        """Accumulates the gradients of both networks, each at its present weights; returns the detached loss terms."""
        weights, networks = self.config.loss, self.networks
        output = networks.call_generator(images, all_blocks=True)
        heatmaps = output.heatmaps[-1]
        if weights.heatmap == "softmax":
            if weights.swap_after is not None and epoch >= weights.swap_after:
                flip_index = self.data.skeleton.flip_index
                target, valid, _ = choose_sides(output.scores, target, valid, flip_index, weights.swap_margin)
            mixed = target  # not of the scale of heatmaps: for this loss only
            if weights.distillation:
                mixed = distillation_target(target, self._predict_flipped(images), weights.distillation)
            heatmap = softmax_cross_entropy(output.scores, mixed, valid, count)
        elif weights.heatmap == "cross-entropy":
            heatmap = region_cross_entropy(output.scores, target, valid, count)
        else:
            heatmap = self.heatmap_loss(output.heatmaps, target, valid, count)
        zero = torch.zeros((), device=self.accelerator.device)
        mil = adversarial = real = fake = zero
        if weights.mil and output.scores is not None:
            mil = region_loss(output.scores, valid, self.config.generator.mil_scale)
        if networks.discriminator is not None:
            real, fake = discriminator_losses(
                networks.call_discriminator, target, heatmaps.detach(), images, valid, count
            )
            self.accelerator.backward(share * networks.balance.loss(real, fake))
            adversarial = adversarial_loss(networks.discriminator, heatmaps, images, valid, count)
        loss = heatmap + weights.mil * mil + weights.adversarial * adversarial
        self.accelerator.backward(share * loss)
        return share * torch.stack([loss.detach(), heatmap.detach(), mil.detach(), real.detach(), fake.detach()])

    @torch.no_grad()
    def _predict_flipped(self, images):
        """Heatmaps ``(B, K, h, w)`` of the moving average for the flipped crops, flipped back."""
        with self.accelerator.autocast():
            heatmaps = self.networks.average.module(images.flip(-1))
        return flip_back(heatmaps, self.data.skeleton.flip_pairs)
