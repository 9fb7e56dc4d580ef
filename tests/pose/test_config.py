"""Training configuration: presets, overrides, invalid settings."""

import json
from itertools import pairwise

import pytest

from amil_fast.pose.training import PRESETS, ScheduleConfig, TrainConfig, from_dict, parse_override, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_json(name):
    chosen = preset(name)
    assert from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen
    assert chosen.adversarial == (name != "lspet")


def test_presets_match_table_2_of_the_paper():
    lsp, mpii = preset("paper-lsp"), preset("paper-mpii")
    for chosen, decay in ((lsp, 0.005), (mpii, 0.01)):
        assert (chosen.optimizer.name, chosen.optimizer.lr, chosen.optimizer.weight_decay) == ("adam", 1e-3, decay)
        schedule = chosen.schedule
        assert (schedule.epochs, schedule.kind, schedule.base, schedule.every) == (350, "inverse-time", decay, 20)
        assert chosen.generator.num_iters == 3 and chosen.generator.depth == 3
        assert (chosen.balance.k, chosen.balance.step, chosen.balance.gamma) == (0.0, 0.001, 0.5)
    # 1 / (1 + base * floor(epoch / 20)), with 7 steps per epoch
    factors = [lsp.schedule.factor(7 * epoch, 7) for epoch in (0, 19, 20, 45, 349)]
    assert factors == pytest.approx([1, 1, 1 / 1.005, 1 / 1.01, 1 / 1.085])


def test_lspet_holds_out_500_people():
    data = preset("lspet-small").data
    assert (data.dataset, data.split, data.holdout, data.augmentation) == ("lspet", "all", 500, "sports")


def test_cosine_with_warm_up():
    schedule = ScheduleConfig(epochs=5, kind="cosine", warmup=1.0, final=0.1)
    factors = [schedule.factor(step, 10) for step in range(51)]
    assert factors[0] == pytest.approx(1 / 11) and factors[9] == pytest.approx(10 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[30] == pytest.approx(0.55) and factors[50] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert ScheduleConfig(kind="constant").factor(12345, 10) == 1.0


def test_constant_then_decay():
    schedule = ScheduleConfig(epochs=10, kind="wsd", warmup=1.0, decay=0.4, final=0.1)
    factors = [schedule.factor(step, 5) for step in range(51)]
    assert factors[0] == pytest.approx(1 / 6) and factors[5:31] == [1.0] * 26
    assert factors[40] == pytest.approx(0.55) and factors[50] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(factors[30:]))
    assert schedule.decay_start(5) == 30 and ScheduleConfig(kind="cosine").decay_start(5) is None
    longer = ScheduleConfig(epochs=20, kind="wsd", warmup=1.0, decay=0.4, final=0.1)
    assert [longer.factor(step, 5) for step in range(31)] == factors[:31]


def test_override_reaches_every_section():
    chosen = TrainConfig().override(
        {"optimizer.lr": 5e-4, "generator.blocks": 3, "optimizer.betas": [0.5, 0.9], "data.workers": 2, "loss.mil": 1}
    )
    assert chosen.optimizer.lr == 5e-4 and chosen.generator.blocks == 3 and chosen.data.workers == 2
    assert chosen.optimizer.betas == (0.5, 0.9) and chosen.loss.mil == 1.0
    assert chosen.override({"data.workers": None}).data.workers is None
    assert TrainConfig().optimizer.lr == 1e-3


def test_discriminator_on_and_off():
    off = TrainConfig().override({"discriminator": None})
    assert off.discriminator is None and not off.adversarial
    assert not TrainConfig().override({"loss.adversarial": 0}).adversarial
    on = off.override({"discriminator.features": 16})
    assert on.discriminator.features == 16 and on.adversarial
    assert from_dict(off.to_dict()) == off


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.lr=5e-4", ("optimizer.lr", 5e-4)),
        ("generator.pooling=mean", ("generator.pooling", "mean")),
        ("run.compile=true", ("run.compile", True)),
        ("discriminator=none", ("discriminator", None)),
        ("data.root=a=b", ("data.root", "a=b")),
    ],
)
def test_parse_override(text, expected):
    assert parse_override(text) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generator.bloks": 1}, r"generator\.bloks: unknown setting, did you mean 'blocks'\?"),
        ({"optimzer.lr": 1}, r"optimzer: unknown setting, did you mean 'optimizer'\?"),
        ({"zzz": 1}, r"zzz: unknown setting; known here: generator, "),
        ({"optimizer.lr.x": 1}, r"optimizer\.lr has no fields"),
        ({"optimizer.lr": "fast"}, r"optimizer\.lr: expected float, got 'fast'"),
        ({"generator.blocks": 1.5}, r"generator\.blocks: expected int, got 1\.5"),
        ({"generator.blocks": True}, r"generator\.blocks: expected int, got True"),
        ({"generator.blocks": None}, r"generator\.blocks: expected int, got nothing"),
        ({"run.compile": 1}, r"run\.compile: expected bool, got 1"),
        ({"optimizer.betas": [0.9]}, r"optimizer\.betas: expected .*, got \[0\.9\]"),
        ({"generator": 3}, r"generator: expected a dict, got 3"),
        ({"generator.blocks": -1}, r"generator\.blocks: expected at least 0, got -1"),
        ({"optimizer.lr": 0}, r"optimizer\.lr: expected a positive number"),
        ({"run.ema_decay": 1}, r"run\.ema_decay: expected a number in \[0, 1\)"),
        ({"schedule.kind": "cosinus"}, r"schedule\.kind: expected one of constant, cosine, inverse-time"),
        ({"schedule.decay": 1.5}, r"schedule\.decay: expected a fraction, got 1\.5"),
        ({"loss.heatmap": "l1"}, r"loss\.heatmap: expected one of l2, cross-entropy, softmax, got 'l1'"),
        ({"loss.swap_after": 3}, r"loss\.swap_after: needs loss\.heatmap 'softmax', got 'l2'"),
        ({"loss.distillation": 0.5}, r"loss\.distillation: needs loss\.heatmap 'softmax' and .*, got 'l2' and 0\.999"),
        ({"loss.heatmap": "softmax", "loss.distillation": 0.5, "run.ema_decay": 0}, r"loss\.distillation: .* and 0\.0"),
        ({"loss.heatmap": "softmax", "loss.distillation": 2}, r"loss\.distillation: expected 0 to 1, got 2\.0"),
        ({"loss.heatmap": "softmax", "loss.mil": 1e-4}, r"loss\.mil: expected 0 with loss\.heatmap 'softmax'"),
        ({"loss.heatmap": "cross-entropy", "generator.blocks": 0}, r"loss\.heatmap: 'cross-entropy' needs .* got 0"),
        ({"loss.heatmap": "cross-entropy", "generator.mil_scale": 2}, r"loss\.heatmap: .*, got 2 and 2\.0"),
        ({"run.precision": "fp8"}, r"run\.precision: expected one of auto, fp32, bf16, fp16"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig().override(settings)


def test_invalid_names():
    with pytest.raises(ValueError, match=r"--set: expected section\.key=value, got 'optimizer\.lr'"):
        parse_override("optimizer.lr")
    with pytest.raises(ValueError, match=r"preset: expected one of .*, got 'lspet-smal', did you mean"):
        preset("lspet-smal")
