"""What a training run is told, as frozen dataclasses: presets, files, and ``section.key=value`` overrides.

An unknown key is an error that names the nearest known one; so is a value of the wrong type.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # our names -> Accelerate's
OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("constant", "cosine", "inverse-time")
HEATMAP_LOSSES = ("l2", "cross-entropy")
AUGMENTATIONS = ("none", "default", "sports")
SYNTHETIC = "synthetic"  # the name of drawn figures among data sets


@dataclass(frozen=True)
class _BlocksConfig:
    """What the blocks of both networks are told."""

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
    """What is trained and validated on.

    Attributes:
        dataset: a name of the data registry, or ``"synthetic"`` for drawn figures.
        root: the data set's folder.
        split, validation_split: parts of it; by default those the registry names.
        archive: a crop archive written by ``amil pack``, used instead of ``root``.
        archive_validation: another one to validate on.
        holdout: keep so many people back for validation, the last ones, and never train on them; 0: validate on
            ``validation_split`` or ``archive_validation``.
        skip_bad: leave out and list bad entries instead of stopping.
        input_size: side of the crops in pixels.
        batch_size: crops per optimizer step, over all processes and accumulated parts.
        augmentation: ``"none"``, ``"default"`` or ``"sports"`` (people at any angle).
        heatmap_std: standard deviation of the target Gaussians in heatmap pixels.
        workers: processes that read, for each training process; None: one per core beside a GPU, else one per eight.
        synthetic, synthetic_validation: numbers of drawn figures.
        limit: train on the first so many people only; 0: on all.
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
    """What the generator minimizes.

    Attributes:
        heatmap: ``"l2"``, the squared error of the heatmaps (the paper's), or ``"cross-entropy"`` of the regions'
            probabilities, which learns faster; the latter for generators with blocks and ``mil_scale=1``.
        adversarial: weight of the adversarial term (Chou et al.: 1e-4).
        mil: weight of the MIL loss of PAPER §4.
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
    """The learning rate's factor over the run.

    ``"cosine"``: half a cosine down to ``final``. ``"inverse-time"``: 1 / (1 + base · ⌊epoch / every⌋), Table 2 of the
    paper. Any of them starts with a linear rise over ``warmup`` epochs.
    """

    epochs: int = 100
    kind: str = "cosine"
    warmup: float = 0.0
    final: float = 0.0
    base: float = 0.01
    every: int = 20

    def factor(self, step, epoch_steps):
        """The factor at a step, counted from 0."""
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
    """How it runs.

    Attributes:
        seed: of weights, order and augmentation.
        device: ``"auto"`` or ``"cpu"``.
        threads: of the CPU that compute; 0: torch's default. One is fastest where the cores have other work as well.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (GPU only) autocast.
        accumulation: parts a batch is split into, to save memory.
        ema_decay: of the moving average of the generator's weights that is evaluated and saved; 0: none.
        compile: use ``torch.compile``.
        sync_batch_norm: several processes normalize by the statistics of all their crops, as one process would; off is
            faster, and fine where each has some dozens.
        init: what ``save_pretrained`` wrote (or a ``.safetensors`` file) to start the generator from.
        log_every: steps between reading the losses from the device.
        evaluate_every: epochs between validations.
        flip_test: validate with the flip test (average with the flipped crop's heatmaps).
        overlays: validation crops drawn at every evaluation.
        tensorboard: write its event files.
        checkpoint_minutes: time between checkpoints within an epoch; 0: only at its end.
        checkpoint_steps: steps between them; 0: by time only.
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
    """A training run. ``discriminator`` None: no adversarial training."""

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
    def adversarial(self):
        """Whether a discriminator is trained."""
        return self.discriminator is not None and self.loss.adversarial > 0

    def _get(self, name):
        section, key = name.split(".")
        return getattr(getattr(self, section), key)

    def to_dict(self):
        """As nested dicts and lists for JSON; :func:`from_dict` turns it back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def override(self, settings):
        """A copy with some fields changed.

        Args:
            settings: ``"section.key"`` -> value; ``"discriminator"`` alone takes None, or a dict of its fields.
        """
        content = self.to_dict()
        for name, value in settings.items():
            _place(content, name.split("."), value, name)
        return from_dict(content)


def from_dict(content):
    """A :class:`TrainConfig` from nested dicts; fields that aren't there keep their defaults.

    Raises:
        ValueError: an unknown key (with the nearest known one), a value of the wrong type or out of range.
    """
    return _build(TrainConfig, content, "")


def parse_override(text):
    """``"section.key=value"`` -> (name, value); the value is JSON, or else a string as it stands."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--set: expected section.key=value, got {text!r}")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), None if value in ("None", "none") else value


def preset(name):
    """One of :data:`PRESETS`; ValueError names the nearest."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}{_nearest(name, PRESETS)}")
    return PRESETS[name]


def _place(content, path, value, name):
    here, known = content, TrainConfig
    for depth, key in enumerate(path[:-1]):
        _known(known, key, ".".join(path[: depth + 1]))
        if here.get(key) is None:  # a discriminator that was switched off
            here[key] = {}
        here, known = here[key], _section(known, key)
        if known is None:
            raise ValueError(f"{name}: {'.'.join(path[: depth + 1])} has no fields")
    _known(known, path[-1], name)
    here[path[-1]] = value


def _section(known, key):
    """The dataclass that is the type of a field, or None."""
    hint = typing.get_type_hints(known)[key]
    options = typing.get_args(hint) or (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _known(known, key, name):
    names = [f.name for f in dataclasses.fields(known)]
    if key not in names:
        raise ValueError(f"{name}: unknown setting{_nearest(key, names)}; known here: {', '.join(names)}")


def _nearest(key, names):
    near = difflib.get_close_matches(key, list(names), 1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def _build(kind, content, prefix):
    if not isinstance(content, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'configuration'}: expected a dict, got {content!r}")
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in content.items():
        _known(kind, key, prefix + key)
        values[key] = _convert(hints[key], value, prefix + key)
    return kind(**values)


def _convert(hint, value, name):
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options:
            return None
        raise ValueError(f"{name}: expected {_describe(hint)}, got nothing")
    for option in options:
        if dataclasses.is_dataclass(option):
            return _build(option, value, f"{name}.")
        if typing.get_origin(option) is tuple:
            parts = typing.get_args(option)
            if isinstance(value, list | tuple) and len(value) == len(parts):
                return tuple(_convert(part, v, name) for part, v in zip(parts, value, strict=True))
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif option is not type(None) and type(value) is option:
            return value
    raise ValueError(f"{name}: expected {_describe(hint)}, got {value!r}")


def _describe(hint):
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _paper(dataset, decay, **data):
    """Table 2 of the paper."""
    return TrainConfig(
        generator=GeneratorConfig(backbone="resnet50"),
        data=DataConfig(dataset=dataset, **data),
        optimizer=OptimizerConfig(name="adam", lr=1e-3, weight_decay=decay),
        loss=LossConfig(adversarial=1e-4, mil=1e-4),
        schedule=ScheduleConfig(epochs=350, kind="inverse-time", base=decay, every=20),
    )


PRESETS = types.MappingProxyType(
    {
        # The test part of LSP chooses nothing: the last of the 1,000 training images do.
        "paper-lsp": _paper("lsp", 0.005, holdout=100, augmentation="sports"),
        "paper-mpii": _paper("mpii", 0.01),
        "lspet-small": TrainConfig(
            data=DataConfig(
                dataset="lspet",
                split="all",
                skip_bad=True,
                holdout=500,
                input_size=128,
                augmentation="sports",
                heatmap_std=1.5,
            ),
            optimizer=OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.01, clip=1.0),
            loss=LossConfig(adversarial=1e-4, mil=1e-4),
            schedule=ScheduleConfig(epochs=60, kind="cosine", warmup=1.0, final=0.01),
            run=RunConfig(precision="bf16"),
        ),
        "demo": TrainConfig(
            generator=GeneratorConfig(features=64, blocks=1),
            discriminator=DiscriminatorConfig(features=32),
            data=DataConfig(
                dataset=SYNTHETIC,
                input_size=96,
                augmentation="none",
                heatmap_std=1.5,
                synthetic=2000,
                synthetic_validation=100,
            ),
            optimizer=OptimizerConfig(name="adamw", lr=2e-3, weight_decay=0.01, clip=1.0),
            loss=LossConfig(heatmap="cross-entropy", adversarial=1e-4, mil=1e-4),
            schedule=ScheduleConfig(epochs=5, kind="cosine", warmup=0.5, final=0.01),
            # Left and right of the figures differ by color, which a flip does not exchange: no flip test.
            run=RunConfig(precision="bf16", ema_decay=0.99, evaluate_every=2, flip_test=False),
        ),
    }
)
