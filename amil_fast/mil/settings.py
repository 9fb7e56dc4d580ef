"""Settings of a bag classifier and its training."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from amil_fast.mil.bag_methods import BAG_METHODS
from amil_fast.mil.labels import TASKS
from amil_fast.nn import POOLINGS
from amil_fast.nn.feature_normalization import NORMALIZATIONS
from amil_fast.utils.limits import MAX_COUNT, MAX_DEPTH, MAX_ITERS, MAX_SEED, MAX_WIDTH

SCHEDULES = ("constant", "cosine")  # cosine: linear warm-up over a twentieth of the steps, then half a cosine to 0
# bce: cross-entropy of every level's score; margin: Eq. 6 on the lengths of the pooled vectors, which then are the
# probabilities; bce+margin: their sum, with scores from the heads; mil: bag and instance loss (Eq. 10-17).
LOSSES = ("bce", "margin", "bce+margin", "mil")
METHODS = ("network", *BAG_METHODS)


@dataclass(frozen=True)
class MilSettings:
    """Architecture and training of a bag classifier, the same for every fold.

    The defaults are the recipe of ``docs/mil_benchmark.md``; :data:`PAPER_SETTINGS` are those of the paper.

    Attributes:
        pooling: name in :data:`amil_fast.nn.POOLINGS`.
        num_iters: iterations of adjust pooling.
        hidden: width of every layer.
        depth: number of layers, each followed by the pooling.
        residual: sum the bag vectors over the levels.
        deep_supervision: score every level instead of the last one only.
        instance_norm: length to which instance embeddings are scaled before pooling; 0: not scaled.
        instance_scale: factor on the embeddings before pooling.
        bag_scale: factor on the pooled vectors.
        input_dropout: dropout probability of the features.
        dropout: dropout probability of the hidden units.
        normalization: of the features, fitted to the training part
            (:class:`~amil_fast.nn.FeatureNormalization`): one of :data:`NORMALIZATIONS`, or ``"none"``.
        soft_clip: bound c > 0 toward which standardized features are compressed
            (:func:`~amil_fast.nn.feature_normalization.soft_clip`); 0: off.
        method: ``"network"``, to which all other settings apply; or another name in :data:`METHODS`, to which only the
            seed applies. These are more accurate on the benchmark sets, but do not respect the multiple-instance
            assumption.
        loss: one of :data:`LOSSES`.
        epochs: passes over the training part; the last epoch's model is used.
        batch_size: bags per step.
        lr: learning rate of Adam.
        schedule: one of :data:`SCHEDULES`.
        weight_decay: weight decay of Adam.
        ensemble: networks per fold whose probabilities are averaged.
        seed: seed of weights, batch order and dropout.
        backend: backend of adjust pooling.

    Raises:
        ValueError: a value out of range.
    """

    pooling: str = "adjust"
    num_iters: int = 3
    hidden: int = 128
    depth: int = 3
    residual: bool = True
    deep_supervision: bool = True
    instance_norm: float = 0.0
    instance_scale: float = 0.1
    bag_scale: float = 10.0
    input_dropout: float = 0.0
    dropout: float = 0.0
    normalization: str = "auto"
    soft_clip: float = 3.0
    method: str = "network"
    loss: str = "bce"
    epochs: int = 30
    batch_size: int = 8
    lr: float = 1e-3
    schedule: str = "cosine"
    weight_decay: float = 5e-3
    ensemble: int = 1
    seed: int = 0
    backend: str = "auto"

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.normalization not in ("none", *NORMALIZATIONS):
            expected = ", ".join(("none", *NORMALIZATIONS))
            raise ValueError(f"normalization: expected one of {expected}, got {self.normalization!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        for name, least, most in (
            ("num_iters", 1, MAX_ITERS),
            ("hidden", 1, MAX_WIDTH),
            ("depth", 1, MAX_DEPTH),
            *((name, 1, MAX_COUNT) for name in ("epochs", "batch_size", "ensemble")),
            ("seed", 0, MAX_SEED),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}: expected {least} to {most}, got {getattr(self, name)}")
        for name in ("lr", "instance_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("weight_decay", "instance_norm", "soft_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        for name in ("input_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")

    def network_options(self) -> dict[str, Any]:
        """Arguments that :class:`~amil_fast.nn.MIRNet` and :class:`~amil_fast.nn.StackedMIRNet` share."""
        return {
            "hidden": self.hidden,
            "depth": self.depth,
            "pooling": self.pooling,
            "num_iters": self.num_iters,
            "residual": self.residual,
            "deep_supervision": self.deep_supervision,
            "dropout": self.dropout,
            "input_dropout": self.input_dropout,
            "instance_norm": self.instance_norm or None,
            "instance_scale": self.instance_scale,
            "bag_scale": self.bag_scale,
            "backend": self.backend,
        }


PAPER_SETTINGS = MilSettings(
    instance_norm=0,
    instance_scale=1,
    bag_scale=1,
    input_dropout=0,
    dropout=0,
    normalization="standard",
    soft_clip=0,
    loss="bce",
    epochs=40,
    schedule="constant",
    ensemble=1,
)


@dataclass(frozen=True)
class TrainSettings(MilSettings):
    """Architecture and training of a bag classifier on bags that are read from disk (:class:`BagTraining`).

    The attributes of :class:`MilSettings`, except that the loss is the cross-entropy (squared error for regression),
    and that there are neither other methods nor ensembles. ``batch_size`` counts the bags of a step over all processes.

    Attributes:
        task: one of :data:`amil_fast.mil.labels.TASKS`.
        positive: positive class of two; by default the second in order.
        class_weights: ``"none"``; ``"balanced"``: weights inversely proportional to the classes' frequencies.
        max_instances: instances of a packed batch; the bags of a step are divided into such batches, which bounds the
            memory and changes the result by rounding only. A larger bag is a batch of its own.
        patience: epochs without an improvement of the inner validation part after which training stops; the best
            epoch's model is kept. 0: all epochs, the last epoch's model.
        validation: fraction of the training part held out as the inner validation part, if the bags have no split
            ``val``; 0: none.
        workers: processes that read bags ahead; None: 0 to 4 by the size of the set.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
        device: ``"cpu"``; None: a GPU if there is one.
        checkpoint_minutes: minutes between checkpoints within an epoch; 0: at its end only.
        tensorboard: write TensorBoard events.
    """

    task: str = "auto"
    positive: str | None = None
    class_weights: str = "none"
    max_instances: int = 32768
    patience: int = 8
    validation: float = 0.2
    workers: int | None = None
    precision: str = "fp32"
    device: str | None = None
    checkpoint_minutes: float = 10.0
    tensorboard: bool = True

    def __post_init__(self):
        super().__post_init__()
        fixed = {"loss": "bce", "method": "network", "ensemble": 1}
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}: expected {value!r} for bags read from disk, got {getattr(self, name)!r}")
        choices = {
            "task": TASKS,
            "class_weights": ("none", "balanced"),
            "precision": ("fp32", "bf16"),
            "device": (None, "cpu"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(str(value) for value in allowed if value is not None)
                raise ValueError(f"{name}: expected one of {expected}, got {getattr(self, name)!r}")
        if self.max_instances < 1:
            raise ValueError(f"max_instances: expected at least 1, got {self.max_instances}")
        for name in ("patience", "checkpoint_minutes", "workers"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation: expected a number in [0, 1), got {self.validation}")

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run must share; the others change speed and memory only."""
        free = ("workers", "max_instances", "device", "checkpoint_minutes", "tensorboard", "backend")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
