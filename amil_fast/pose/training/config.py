"""Training configuration as frozen dataclasses."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from amil_fast.pose.training.overrides import build, place

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # our names -> Accelerate's
OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("constant", "cosine", "inverse-time")
HEATMAP_LOSSES = ("l2", "cross-entropy")
AUGMENTATIONS = ("none", "default", "sports")
SYNTHETIC = "synthetic"  # name of the synthetic data set


@dataclass(frozen=True)
class _BlocksConfig:
    """Settings of the MI-RNet blocks, common to both networks."""

    depth: int = 3
    pooling: str = "adjust"
    num_iters: int = 3
    residual: bool = True
    bag_scale: float = 1.0
    mil_scale: float = 1.0
    backend: str = "auto"


@dataclass(frozen=True)
class GeneratorConfig(_BlocksConfig):
    """Arguments of :class:`~amil_fast.pose.PoseGenerator`; its skeleton and input size come from the data."""

    backbone: str = "resnet18"
    features: int = 128
    blocks: int = 2  # 0: backbone and linear heatmaps, the baseline


@dataclass(frozen=True)
class DiscriminatorConfig(_BlocksConfig):
    """Arguments of :class:`~amil_fast.pose.PoseDiscriminator`."""

    use_image: bool = True
    features: int = 64
    levels: int = 3
    blocks: int = 1


@dataclass(frozen=True)
class DataConfig:
    """Training and validation data.

    Attributes:
        dataset: a name of the data registry, or ``"synthetic"`` for synthetic figures.
        root: folder of the data set.
        split, validation_split: names of its splits; None: the registry's defaults.
        archive: a crop archive written by ``amil pack``, used instead of ``root``.
        archive_validation: a crop archive for validation.
        holdout: number of people, the last of the training data, that are reserved for validation; 0: validate on
            ``validation_split`` or ``archive_validation``.
        skip_bad: skip and report invalid entries instead of raising an error.
        input_size: side length of the square crops in pixels.
        batch_size: crops per optimizer step, over all processes and accumulated parts.
        augmentation: ``"none"``, ``"default"`` or ``"sports"`` (any rotation).
        heatmap_std: standard deviation of the target Gaussians in heatmap pixels.
        workers: loader processes per training process; None: one per core on a GPU, one per eight cores on a CPU.
        synthetic, synthetic_validation: number of synthetic figures for training and validation.
        limit: train on the first ``limit`` people only; 0: no limit.
    """

    dataset: str = "lspet"
    root: str | None = None
    split: str | None = None
    validation_split: str | None = None
    archive: str | None = None
    archive_validation: str | None = None
    holdout: int = 0
    skip_bad: bool = False
    input_size: int = 256
    batch_size: int = 32
    augmentation: str = "default"
    heatmap_std: float = 2.0
    workers: int | None = None
    synthetic: int = 2000
    synthetic_validation: int = 200
    limit: int = 0


@dataclass(frozen=True)
class OptimizerConfig:
    """``weight_decay`` acts on weights only, neither on biases nor on normalization; ``clip`` is the largest allowed
    norm of the gradient, 0 for none; ``discriminator_lr`` None means ``lr``."""

    name: str = "adam"
    lr: float = 1e-3
    discriminator_lr: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 0.0


@dataclass(frozen=True)
class LossConfig:
    """Loss of the generator.

    Attributes:
        heatmap: ``"l2"``, the squared error of the heatmaps (the paper's), or ``"cross-entropy"`` of the regions'
            probabilities, which converges faster and requires ``blocks >= 1`` and ``mil_scale=1``.
        adversarial: weight of the adversarial term (Chou et al.: 1e-4).
        mil: weight of the MIL loss (Eq. 10-18).
    """

    heatmap: str = "l2"
    adversarial: float = 1e-4
    mil: float = 0.0


@dataclass(frozen=True)
class BalanceConfig:
    """k_0, ω_k and γ of Eq. 20 with the values of Chou et al."""

    k: float = 0.0
    step: float = 0.001
    gamma: float = 0.5


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate schedule.

    ``"cosine"``: half a cosine down to ``final``. ``"inverse-time"``: 1 / (1 + base · ⌊epoch / every⌋), Table 2 of the
    paper. Each starts with a linear warm-up over ``warmup`` epochs.
    """

    epochs: int = 100
    kind: str = "cosine"
    warmup: float = 0.0
    final: float = 0.0
    base: float = 0.01
    every: int = 20

    def factor(self, step: int, epoch_steps: int) -> float:
        """Factor on the learning rate at ``step``, counted from 0."""
        epochs = step / epoch_steps
        factor = 1.0
        if self.kind == "inverse-time":
            factor = 1 / (1 + self.base * (step // epoch_steps // self.every))
        elif self.kind == "cosine":
            done = max(0.0, epochs - self.warmup) / max(self.epochs - self.warmup, 1e-9)
            factor = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        if epochs < self.warmup:
            factor *= (step + 1) / (self.warmup * epoch_steps + 1)
        return factor


@dataclass(frozen=True)
class RunConfig:
    """Execution of the run.

    Attributes:
        seed: seed of weights, sample order and augmentation.
        device: ``"auto"`` or ``"cpu"``.
        threads: intra-op CPU threads; 0: PyTorch's default. One is fastest on a shared CPU.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (GPU only) autocast.
        accumulation: number of parts of a batch whose gradients are accumulated, to save memory.
        ema_decay: decay of the moving average of the generator's weights, which is evaluated and saved; 0: off.
        compile: use ``torch.compile``.
        sync_batch_norm: compute batch statistics over all processes; off is faster, and sufficient for dozens of crops
            per process.
        init: initial weights of the generator: a folder written by ``save_pretrained``, or a ``.safetensors`` file.
        log_every: steps between transfers of the losses from the device.
        evaluate_every: epochs between validations.
        flip_test: validate with the flip test (average with the flipped crop's heatmaps).
        overlays: number of validation crops in the overlay picture.
        tensorboard: write TensorBoard event files.
        checkpoint_minutes: minutes between checkpoints within an epoch; 0: only at its end.
        checkpoint_steps: steps between checkpoints within an epoch; 0: by time only.
    """

    seed: int = 0
    device: str = "auto"
    threads: int = 0
    precision: str = "fp32"
    accumulation: int = 1
    ema_decay: float = 0.999
    compile: bool = False
    sync_batch_norm: bool = True
    init: str | None = None
    log_every: int = 10
    evaluate_every: int = 5
    flip_test: bool = True
    overlays: int = 8
    tensorboard: bool = True
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run. ``discriminator`` None: no adversarial training."""

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig | None = field(default_factory=DiscriminatorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        for name, choices in (
            ("optimizer.name", OPTIMIZERS),
            ("schedule.kind", SCHEDULES),
            ("run.precision", PRECISIONS),
            ("run.device", ("auto", "cpu")),
            ("loss.heatmap", HEATMAP_LOSSES),
            ("data.augmentation", AUGMENTATIONS),
        ):
            value = self._get(name)
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        for name, least in (
            ("generator.blocks", 0),
            ("data.input_size", 16),
            ("data.batch_size", 1),
            ("data.holdout", 0),
            ("data.limit", 0),
            ("data.synthetic", 1),
            ("data.synthetic_validation", 0),
            ("optimizer.weight_decay", 0),
            ("optimizer.clip", 0),
            ("loss.adversarial", 0),
            ("loss.mil", 0),
            ("schedule.epochs", 1),
            ("schedule.warmup", 0),
            ("schedule.final", 0),
            ("schedule.every", 1),
            ("run.threads", 0),
            ("run.accumulation", 1),
            ("run.log_every", 1),
            ("run.evaluate_every", 1),
            ("run.overlays", 0),
            ("run.checkpoint_minutes", 0),
            ("run.checkpoint_steps", 0),
        ):
            if not self._get(name) >= least:
                raise ValueError(f"{name}: expected at least {least}, got {self._get(name)}")
        for name in ("optimizer.lr", "data.heatmap_std"):
            if not self._get(name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {self._get(name)}")
        if self.loss.heatmap == "cross-entropy" and (self.generator.blocks == 0 or self.generator.mil_scale != 1):
            raise ValueError(
                "loss.heatmap: 'cross-entropy' needs heatmaps that are probabilities: generator.blocks of at least 1 "
                f"and generator.mil_scale 1, got {self.generator.blocks} and {self.generator.mil_scale}"
            )
        if not 0 <= self.run.ema_decay < 1:
            raise ValueError(f"run.ema_decay: expected a number in [0, 1), got {self.run.ema_decay}")

    @property
    def adversarial(self) -> bool:
        """True if a discriminator is trained."""
        return self.discriminator is not None and self.loss.adversarial > 0

    def _get(self, name):
        section, key = name.split(".")
        return getattr(getattr(self, section), key)

    def to_dict(self) -> dict[str, Any]:
        """Returns nested dicts and lists for JSON, the inverse of :func:`from_dict`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def override(self, settings: Mapping[str, Any]) -> "TrainConfig":
        """Returns a copy with some fields changed.

        Args:
            settings: ``"section.key"`` -> value; ``"discriminator"`` alone takes None, or a dict of its fields.
        """
        content = self.to_dict()
        for name, value in settings.items():
            place(TrainConfig, content, name.split("."), value, name)
        return from_dict(content)


def from_dict(content: Any) -> TrainConfig:
    """Builds a :class:`TrainConfig` from nested dicts; missing fields keep their defaults.

    Raises:
        ValueError: an unknown key (with the nearest known one), a value of the wrong type or out of range.
    """
    return build(TrainConfig, content, "")
