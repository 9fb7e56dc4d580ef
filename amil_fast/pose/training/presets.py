"""Named training configurations."""

import types

from amil_fast.pose.training.config import (
    SYNTHETIC,
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from amil_fast.pose.training.overrides import suggestion


def preset(name: str) -> TrainConfig:
    """Returns the entry ``name`` of :data:`PRESETS`; raises ValueError, with the closest name, if there is none."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}{suggestion(name, PRESETS)}")
    return PRESETS[name]


def _paper(dataset, decay, **data):
    """Table 2 of the paper."""
    return TrainConfig(
        generator=GeneratorConfig(backbone="resnet50"),
        data=DataConfig(dataset=dataset, **data),
        optimizer=OptimizerConfig(name="adam", lr=1e-3, weight_decay=decay),
        loss=LossConfig(adversarial=1e-4, mil=1e-4),
        schedule=ScheduleConfig(epochs=350, kind="inverse-time", base=decay, every=20),
    )


def _lspet(**data):
    common = {"split": "all", "skip_bad": True, "holdout": 500, "augmentation": "sports", "heatmap_std": 1.5}
    return DataConfig(dataset="lspet", **common, **data)


PRESETS: types.MappingProxyType[str, TrainConfig] = types.MappingProxyType(
    {
        # Models are selected on the last 100 of the 1,000 training images, not on the test split of LSP.
        "paper-lsp": _paper("lsp", 0.005, holdout=100, augmentation="sports"),
        "paper-mpii": _paper("mpii", 0.01),
        "lspet-small": TrainConfig(
            data=_lspet(input_size=128),
            optimizer=OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.01, clip=1.0),
            loss=LossConfig(adversarial=1e-4, mil=1e-4),
            schedule=ScheduleConfig(epochs=60, kind="cosine", warmup=1.0, final=0.01),
            run=RunConfig(precision="auto"),
        ),
        # The settings of the shipped generator, which was trained in stages with growing crops (model card).
        "lspet": TrainConfig(
            generator=GeneratorConfig(backbone="patchresnet32x2-2-4-4", features=64, blocks=1, bag_scale=4.0),
            discriminator=None,
            data=_lspet(input_size=224, batch_size=128),
            optimizer=OptimizerConfig(name="adamw", lr=2e-3, weight_decay=0.05, clip=1.0),
            loss=LossConfig(heatmap="softmax", swap_after=24, swap_margin=2.0),
            schedule=ScheduleConfig(epochs=100, kind="wsd", warmup=1.0, final=0.01, decay=0.35),
            run=RunConfig(precision="auto", ema_decay=0.998, either=True),
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
            run=RunConfig(precision="auto", ema_decay=0.99, evaluate_every=2, flip_test=False),
        ),
    }
)
