"""Training configuration as frozen dataclasses, to and from JSON.

The names are those of the users' ``train.json`` files.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from amil_fast.pose.training.overrides import build, place
from amil_fast.utils.limits import MAX_COUNT, MAX_CROP, MAX_DEPTH, MAX_ITERS, MAX_SEED, MAX_WIDTH

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("constant", "cosine", "inverse-time", "wsd")
HEATMAP_LOSSES = ("l2", "cross-entropy", "softmax")
AUGMENTATIONS = ("none", "default", "sports", "strong", "strong-upright")
SYNTHETIC = "synthetic"  # data.dataset: synthetic figures instead of a data set of the registry


@dataclass(frozen=True)
class _BlocksConfig:
    """MI-RNet blocks; the arguments of the same names of both networks."""

    depth: int = 3
    pooling: str = "adjust"
    num_iters: int = 3
    residual: bool = True
    bag_scale: float = 1.0
    mil_scale: float = 1.0
    backend: str = "auto"


@dataclass(frozen=True)
class GeneratorConfig(_BlocksConfig):
    """Arguments of :class:`~amil_fast.pose.PoseGenerator`; its skeleton and input size come from the data.

    Attributes:
        backbone: name of the backbone.
        features: channels of the feature map.
        blocks: number of MI-RNet blocks; 0 predicts heatmaps from the backbone linearly, the baseline.
        depth: fully connected levels of a block.
        pooling: bag pooling, ``"none"`` for no bag features.
        num_iters: iterations of adjust pooling.
        residual: residual connections between levels.
        bag_scale: factor on the bag features.
        mil_scale: factor on the instance scores.
        backend: backend of :func:`amil_fast.adjust_pool`.
    """

    backbone: str = "resnet18"
    features: int = 128
    blocks: int = 2


@dataclass(frozen=True)
class DiscriminatorConfig(_BlocksConfig):
    """Arguments of :class:`~amil_fast.pose.PoseDiscriminator`.

    Attributes:
        use_image: condition the discriminator on the image.
        features: channels of the feature map.
        levels: resolution levels.
        blocks: number of MI-RNet blocks; their settings are those of :class:`GeneratorConfig`.
    """

    use_image: bool = True
    features: int = 64
    levels: int = 3
    blocks: int = 1


@dataclass(frozen=True)
class DataConfig:
    """Training and validation data.

    Attributes:
        dataset: name in the data registry, or ``"synthetic"``.
        root: folder of the data set.
        split, validation_split: splits to train and validate on; by default those that the registry names.
        archive: crop archive written by ``amil pack``, used instead of ``root``.
        archive_validation: crop archive to validate on.
        holdout: number of people, the last ones, that are excluded from training and used for validation; 0 validates
            on ``validation_split`` or ``archive_validation``.
        skip_bad: skip invalid entries and list them instead of raising an error.
        input_size: side of the crops in pixels.
        batch_size: crops per optimization step, over all processes and accumulated parts.
        augmentation: ``"none"``, ``"default"``, ``"sports"`` (rotations by any angle), ``"strong"`` (larger ranges and
            cutout) or ``"strong-upright"`` (without rotations by any angle).
        heatmap_std: standard deviation of the target Gaussians in heatmap pixels.
        workers: loader processes per training process; None: one per core with a GPU, else one per eight cores.
        synthetic, synthetic_validation: number of synthetic figures.
        limit: number of people, the first ones, to train on; 0 for all.
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
    """Optimizer of both networks.

    Attributes:
        name: ``"adam"`` or ``"adamw"``.
        lr: learning rate of the generator.
        discriminator_lr: learning rate of the discriminator; None for ``lr``.
        weight_decay: applied to weights, neither to biases nor to normalization layers.
        betas: decay rates of the moment estimates.
        clip: maximum norm of each network's gradient; 0 disables clipping.
    """

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
        heatmap: ``"l2"``, the squared error of the heatmaps (the paper's); ``"cross-entropy"`` of the regions'
            probabilities, which converges faster and needs a generator with blocks and ``mil_scale=1``; or
            ``"softmax"``, the cross-entropy of a softmax over all regions of a map, which converges fastest. The
            generator's heatmaps are then that softmax.
        swap_after: number of epochs after which each pose is trained with the better of its labels and these with left
            and right exchanged (:func:`~amil_fast.pose.choose_sides`); None: always as annotated. Needs ``"softmax"``.
        swap_margin: least improvement, in nats per joint, for exchanging left and right.
        distillation: weight, in the target, of the heatmaps that the moving average of the weights predicts for the
            flipped crop (self-distillation): the network learns what the flip test would add. Needs ``"softmax"`` and
            ``run.ema_decay``; costs one forward pass.
        adversarial: weight of the adversarial term (Chou et al.: 1e-4).
        mil: weight of the MIL loss (Eq. 10-18).
    """

    heatmap: str = "l2"
    swap_after: float | None = None
    swap_margin: float = 0.5
    distillation: float = 0.0
    adversarial: float = 1e-4
    mil: float = 0.0


@dataclass(frozen=True)
class BalanceConfig:
    """Balance of the adversarial losses (Eq. 20); the defaults are those of Chou et al.

    Attributes:
        k: initial weight k_0 of the generated heatmaps' loss.
        step: update rate ω_k of k.
        gamma: target ratio γ of the losses of generated and real heatmaps.
    """

    k: float = 0.0
    step: float = 0.001
    gamma: float = 0.5


@dataclass(frozen=True)
class ScheduleConfig:
    """Schedule of the learning rates.

    Attributes:
        epochs: length of the training.
        kind: ``"constant"``; ``"cosine"``, half a cosine down to ``final``; ``"wsd"`` (warmup, stable, decay), constant
            and then linear down to ``final`` over the last part of the training; or ``"inverse-time"``,
            1 / (1 + base · ⌊epoch / every⌋), Table 2 of the paper.
        warmup: epochs of a linear warmup, for each kind.
        final: final factor of ``"cosine"`` and ``"wsd"``.
        decay: fraction of the epochs over which ``"wsd"`` decays. The state before the decay is kept in ``stable/``: a
            longer training can be resumed from it without repeating the constant part.
        base, every: decay and its period in epochs, of ``"inverse-time"``.
    """

    epochs: int = 100
    kind: str = "cosine"
    warmup: float = 0.0
    final: float = 0.0
    decay: float = 0.2
    base: float = 0.01
    every: int = 20

    def factor(self, step: int, epoch_steps: int) -> float:
        """Returns the factor on the learning rates at ``step``, counted from 0; an epoch has ``epoch_steps`` steps."""
        epochs = step / epoch_steps
        factor = 1.0
        if self.kind == "inverse-time":
            factor = 1 / (1 + self.base * (step // epoch_steps // self.every))
        elif self.kind == "cosine":
            done = max(0.0, epochs - self.warmup) / max(self.epochs - self.warmup, 1e-9)
            factor = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        elif self.kind == "wsd":
            left = (self.epochs * epoch_steps - step) / max(self.decay * self.epochs * epoch_steps, 1e-9)
            factor = self.final + (1 - self.final) * min(max(left, 0.0), 1.0)
        if epochs < self.warmup:
            factor *= (step + 1) / (self.warmup * epoch_steps + 1)
        return factor

    def decay_start(self, epoch_steps: int) -> int | None:
        """Returns the number of steps before the decay of ``"wsd"``; None for other kinds."""
        return math.ceil((1 - self.decay) * self.epochs * epoch_steps) if self.kind == "wsd" else None


@dataclass(frozen=True)
class RunConfig:
    """Execution: device, precision, checkpoints, logs.

    Attributes:
        seed: seed of weights, sample order and augmentation.
        device: ``"auto"`` or ``"cpu"``.
        threads: intra-op CPU threads; 0 for PyTorch's default. One is fastest on a shared CPU.
        precision: ``"fp32"``, or autocast to ``"bf16"`` or ``"fp16"`` (GPU only); ``"auto"``: bf16 where the device
            multiplies it in hardware (x86 with AVX-512 BF16 or AMX, CUDA from compute capability 8.0 on), else fp32.
        accumulation: number of parts a batch is split into to save memory.
        ema_decay: decay of the moving average of the generator's weights, which is evaluated and saved; 0 disables it.
        compile: apply ``torch.compile`` to the generator.
        sync_batch_norm: batch statistics over all processes, equal to those of one process; off is faster, and adequate
            with some dozens of crops per process.
        init: folder written by ``save_pretrained`` (or ``.safetensors`` file) that initializes the generator.
        log_every: steps between transfers of the losses from the device.
        evaluate_every: epochs between validations.
        flip_test: average with the heatmaps of the flipped crop, in the validation and by default in predictions of the
            trained generator.
        either: normalize the PCK of the validation by the flipped pair of joints where the pair is not annotated, which
            measures more people.
        overlays: number of validation crops drawn at each validation.
        tensorboard: write TensorBoard event files.
        checkpoint_minutes: minutes between checkpoints within an epoch; 0 saves at its end only.
        checkpoint_steps: steps between checkpoints within an epoch; 0 saves by time only.
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
    either: bool = False
    overlays: int = 8
    tensorboard: bool = True
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run; ``discriminator`` is None without adversarial training.

    Raises:
        ValueError: a value is out of range, or two settings exclude each other.
    """

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
            ("loss.swap_margin", 0),
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
        self._check_maxima()
        for name in ("optimizer.lr", "data.heatmap_std"):
            if not self._get(name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {self._get(name)}")
        if self.loss.heatmap == "cross-entropy" and (self.generator.blocks == 0 or self.generator.mil_scale != 1):
            raise ValueError(
                "loss.heatmap: 'cross-entropy' needs heatmaps that are probabilities: generator.blocks of at least 1 "
                f"and generator.mil_scale 1, got {self.generator.blocks} and {self.generator.mil_scale}"
            )
        if self.loss.swap_after is not None and self.loss.heatmap != "softmax":
            raise ValueError(f"loss.swap_after: needs loss.heatmap 'softmax', got {self.loss.heatmap!r}")
        if not 0 <= self.loss.distillation <= 1:
            raise ValueError(f"loss.distillation: expected 0 to 1, got {self.loss.distillation}")
        if self.loss.distillation and (self.loss.heatmap != "softmax" or not self.run.ema_decay):
            raise ValueError(
                "loss.distillation: needs loss.heatmap 'softmax' and a positive run.ema_decay, got "
                f"{self.loss.heatmap!r} and {self.run.ema_decay}"
            )
        if self.loss.heatmap == "softmax" and self.loss.mil:
            raise ValueError(
                "loss.mil: expected 0 with loss.heatmap 'softmax', whose regions are not independent, got "
                f"{self.loss.mil}"
            )
        if not 0 <= self.schedule.decay <= 1:
            raise ValueError(f"schedule.decay: expected a fraction, got {self.schedule.decay}")
        if not 0 <= self.run.ema_decay < 1:
            raise ValueError(f"run.ema_decay: expected a number in [0, 1), got {self.run.ema_decay}")

    def _check_maxima(self):
        """Bounds integers, so that a mistyped one is not a run without end or memory."""
        most = {"seed": MAX_SEED, "input_size": MAX_CROP, "num_iters": MAX_ITERS, "features": MAX_WIDTH}
        most |= dict.fromkeys(("blocks", "depth", "levels"), MAX_DEPTH)
        for section, values in dataclasses.asdict(self).items():
            for key, value in (values or {}).items():
                bound = most.get(key, MAX_COUNT)
                if isinstance(value, int) and not 0 <= value <= bound:
                    raise ValueError(f"{section}.{key}: expected 0 to {bound}, got {value}")

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
            place(TrainConfig, content, name, value)
        return from_dict(content)


def from_dict(content: Mapping[str, Any]) -> TrainConfig:
    """Builds a :class:`TrainConfig` from nested dicts; missing fields keep their defaults.

    Raises:
        ValueError: an unknown key (with the closest known one), or a value of the wrong type or out of range.
    """
    return build(TrainConfig, content)
