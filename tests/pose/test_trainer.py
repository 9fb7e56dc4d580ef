"""The training loop: data, targets, losses, moving average, precision, initialization."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from amil_fast import decode_heatmaps
from amil_fast.pose import heatmap_loss, region_cross_entropy, softmax_cross_entropy
from amil_fast.pose.codec import heatmap_to_image
from amil_fast.pose.data import SPORTS, SyntheticFigures, load_lspet, pack
from amil_fast.pose.inference.predictor import load_model
from amil_fast.pose.skeletons import LSP14
from amil_fast.pose.training import PoseTraining, preset, train
from amil_fast.pose.training.training_data import training_data
from amil_fast.utils import training_state
from tests.pose import layouts as make
from tests.pose.training_runs import (  # one_thread is a fixture
    TINY,
    history,
    one_thread,  # noqa: F401
    quiet_console,
    text_of,
    training,
)

# ---------------------------------------------------------------------- data and targets


@pytest.mark.parametrize("augmentation", ["none", "sports"])
def test_targets_decode_to_the_joints(tmp_path, augmentation):
    """The decoder maps the target heatmaps back to the joints, within 0.15 pixels of the image."""
    run = training(tmp_path, data__augmentation=augmentation)
    batch = next(iter(run.loader))
    images, target, valid = run.optimization.prepare(batch)
    assert images.shape == (4, 3, 64, 64) and images.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (run.networks.generator.mean, run.networks.generator.std))
    plain = (batch["image"].float() / 255 - mean) / std
    torch.testing.assert_close(images, plain)
    found, _ = decode_heatmaps(target, refine="dark", affine=heatmap_to_image(batch["to_image"], 4))
    order = torch.tensor(run.data.skeleton.flip_index)
    joints = torch.where(batch["flipped"][:, None, None], batch["image_joints"][:, order], batch["image_joints"])
    inner = valid & (batch["joints"] > 16).all(-1) & (batch["joints"] < 48).all(-1)  # Gaussians within the border
    assert inner.sum() > 20
    assert (found - joints)[inner].abs().max() < 0.15
    assert (target[~valid] == 0).all()


def test_crop_archive_and_augmentation_on_the_device(tmp_path):
    """Crops warped as a batch on the device equal those of the workers; held-out people are not trained on."""
    make.lspet(tmp_path / "lspet", S=9)
    pack(load_lspet(tmp_path / "lspet", "all"), tmp_path / "a.pack", 64, quality=95)
    settings = {"data.archive": str(tmp_path / "a.pack"), "data.holdout": 2, "data.augmentation": "sports"}
    config = TINY.override(settings)
    data = training_data(config)
    assert [sample.annotations.ids for sample in (data.training, data.validation)] == [list(range(1, 8)), [8, 9]]
    assert data.validation.augmentation is None and data.training.augmentation is SPORTS
    run = PoseTraining(config, tmp_path / "run", quiet_console())
    there = next(iter(run.loader))
    run.optimization.data = training_data(config, on_device=True)
    here = torch.utils.data.default_collate([run.optimization.data.training[0, int(i)] for i in there["index"]])
    assert "warp" in here
    on_host, on_device = run.optimization.prepare(there), run.optimization.prepare(here)
    assert (on_host[0] - on_device[0]).abs().mean() < 0.1
    assert torch.equal(on_host[1], on_device[1]) and torch.equal(on_host[2], on_device[2])


def test_data_set_with_holdout(tmp_path):
    make.lspet(tmp_path / "lspet", S=9)
    settings = {"data.root": str(tmp_path / "lspet"), "data.holdout": 2, "data.batch_size": 4, "data.input_size": 64}
    data = training_data(preset("lspet-small").override(settings))
    assert data.training.annotations.ids == list(range(1, 8)) and data.validation.annotations.ids == [8, 9]
    with pytest.raises(ValueError, match=r"data\.holdout: expected less than the 9 people"):
        training_data(preset("lspet-small").override({**settings, "data.holdout": 9}))
    with pytest.raises(ValueError, match=r"data\.batch_size: expected at most the 7 people, got 8"):
        training_data(preset("lspet-small").override({**settings, "data.batch_size": 8}))
    with pytest.raises(ValueError, match=r"data\.root: 'lspet' requires the data set's folder"):
        training_data(preset("lspet-small"))


def test_synthetic_training_and_validation_figures_differ():
    data = training_data(TINY)
    one, other = data.training[0]["image"], data.validation[0]["image"]
    assert isinstance(data.validation, SyntheticFigures) and not torch.equal(one, other)


# ---------------------------------------------------------------------- the loop


def test_complete_run(tmp_path):
    run = training(tmp_path / "run", run__tensorboard=True, run__flip_test=False)
    summary = run.run()
    out = tmp_path / "run"
    assert summary["step"] == 9 and summary == json.loads((out / "summary.json").read_text())
    rows = history(out)
    assert [row["step"] for row in rows] == [3, 6, 9] and [("PCK@0.2" in row) for row in rows] == [False, True, True]
    assert all(np.isfinite(row[name]) for row in rows for name in ("loss", "heatmap", "mil", "real", "fake", "k"))
    assert rows[0]["convergence"] > 0 and rows[0]["images/s"] > 0
    scores = [row["PCK@0.2"] for row in rows[1:]]
    assert summary["best"]["score"] == max(scores)
    assert {"head", "wrist", "ankle", "mean"} <= summary["validation"]["PCK@0.2"].keys()
    for folder in ("best", "last"):
        model = load_model(out / folder)
        assert model.skeleton.name == "lsp14" and model.input_size == 64 and not model.flip_test
        assert json.loads((out / folder / "train.json").read_text()) == run.config.to_dict()
    # The moving average is saved, not the weights of the last step.
    shipped = load_file(out / "last" / "model.safetensors")
    tensors, facts = training_state.load_state(out / "last")
    raw, average = training_state.part("generator", tensors), training_state.part("average.module", tensors)
    assert all(torch.equal(shipped[name], average[name]) for name in shipped)
    assert any(not torch.equal(shipped[name], raw[name]) for name in shipped)
    assert (facts["epoch"], facts["epoch_step"], facts["step"]) == (3, 0, 9)
    assert (out / "overlays.jpg").stat().st_size > 1000
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert {"train/loss", "train/k", "validation/PCK@0.2"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("validation/PCK@0.2")] == [6, 9]
    assert events.Tags()["images"] == ["overlays"]
    lines = text_of(run).splitlines()
    assert "12 people for training, 6 for validation" in lines[0] and lines[1].startswith("epoch 1/3  loss ")


@pytest.mark.parametrize(
    ("loss", "function", "nothing", "learned"),
    [
        ("l2", heatmap_loss, 0.0, 0.85),
        ("cross-entropy", region_cross_entropy, -3.9, 0.7),
        ("softmax", softmax_cross_entropy, 0.0, 0.75),
    ],
)
def test_loss_decreases(tmp_path, loss, function, nothing, learned):
    """Overfitting two figures: the loss starts at that of (nearly) empty heatmaps and ends far below it."""
    run = training(
        tmp_path,
        discriminator=None,
        loss__heatmap=loss,
        loss__mil=0,
        generator__features=32,
        generator__pooling="none",
        data__synthetic=2,
        data__batch_size=2,
        data__heatmap_std=1.5,
        data__synthetic_validation=0,
        optimizer__lr=3e-3,
        schedule__epochs=100,
    )
    _, target, valid = run.optimization.prepare(next(iter(run.loader)))
    empty = float(function(torch.full_like(target, nothing), target, valid))
    run.run()
    losses = [row["heatmap"] for row in history(tmp_path)]
    assert losses[0] > 0.8 * empty and losses[-1] < learned * empty


@pytest.mark.parametrize(("swap_after", "exchanged"), [(None, False), (1.5, True)])
def test_sides_are_exchanged_after_some_epochs(tmp_path, swap_after, exchanged, monkeypatch):
    """The loss is that of the labels that choose_sides returns, from the given epoch on."""
    calls = []

    def choose(scores, target, valid, flip_index, margin):
        calls.append((run.progress.step, margin))
        return target, torch.zeros_like(valid), None

    monkeypatch.setattr("amil_fast.pose.training.step.choose_sides", choose)
    settings = {"loss__heatmap": "softmax", "loss__mil": 0, "loss__swap_after": swap_after, "loss__swap_margin": 0.25}
    run = training(tmp_path, discriminator=None, schedule__epochs=2, data__synthetic_validation=0, **settings)
    losses = []
    run.on_step = lambda run, parts, terms: losses.append(float(terms[0]))
    run.run()
    # Three steps per epoch: the fifth step begins after 4/3 epochs, the sixth after 5/3.
    assert calls == ([(5, 0.25)] if exchanged else [])
    assert all(loss > 0 for loss in losses[:5]) and (losses[5] == 0) == exchanged


def test_self_distillation(tmp_path):
    """The target is mixed with what the moving average predicts for the flipped crop, mapped back."""
    settings = {"loss__heatmap": "softmax", "loss__mil": 0, "loss__distillation": 0.5, "data__synthetic_validation": 0}
    run = training(tmp_path, discriminator=None, **settings)
    generator = run.networks.generator
    run.networks.average.module.load_state_dict(
        {name: v + 0.1 if v.is_floating_point() else v for name, v in generator.state_dict().items()}
    )
    batch = next(iter(run.loader))
    images, target, valid = run.optimization.prepare(batch)
    with torch.no_grad():
        found = run.networks.average.module(images.flip(-1))[:, list(run.data.skeleton.flip_index)].flip(-1)
        target, found = (maps / maps.sum((-2, -1), keepdim=True).clamp(min=1e-30) for maps in (target, found))
        scores = generator(images, all_blocks=True).scores
        expected = softmax_cross_entropy(scores, (target + found) / 2, valid)
        assert not torch.isclose(expected, softmax_cross_entropy(scores, target, valid), rtol=1e-2)
    torch.testing.assert_close(run.train_step([batch])[0], expected)
    assert all(parameter.grad is None for parameter in run.networks.average.parameters())


def test_self_distillation_leaves_the_real_heatmaps_of_the_discriminator(tmp_path):
    real, heatmap = [], []
    for weight in (0.0, 0.5):
        run = training(tmp_path / str(weight), loss__heatmap="softmax", loss__mil=0, loss__distillation=weight)
        terms = dict(zip(run.optimization.term_names, run.train_step([next(iter(run.loader))]).tolist(), strict=True))
        real.append(terms["real"])
        heatmap.append(terms["heatmap"])
    assert real[0] == real[1] and heatmap[0] != heatmap[1]


def test_validation_with_either_pair(tmp_path):
    """More people have one of the two pairs annotated than the first."""
    measured = []
    for either in (False, True):
        run = training(tmp_path / str(either), discriminator=None, schedule__epochs=1, run__either=either)
        batches = list(run.validation_loader)
        for batch in batches:
            batch["visibility"][batch["index"] < 2, LSP14.joints.index("left hip")] = 0
        run.validation_loader.close()
        run._validation.loader = batches
        run.run()
        measured.append(history(tmp_path / str(either))[0]["samples"])
    assert measured == [4, 6]


def test_moving_average(tmp_path):
    """The average follows the recursion with min(decay, (1 + n) / (10 + n)), including batch norm statistics."""
    expected = {}

    def follow(run, parts, terms):
        n = run.progress.step - 1
        decay = min(0.25, (1 + n) / (10 + n))
        for key in (name, "blocks.0.score.weight"):
            now = run.networks.generator.state_dict()[key].clone()
            expected[key] = now if n == 0 else decay * expected[key] + (1 - decay) * now

    run = training(tmp_path, schedule__epochs=2, run__ema_decay=0.25, on_step=follow)
    name = next(name for name, _ in run.networks.generator.named_buffers() if name.endswith("running_mean"))
    run.run()
    found = run.networks.average.module.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    assert not torch.equal(found[name], run.networks.generator.state_dict()[name])


def test_without_discriminator_average_and_validation(tmp_path):
    run = training(
        tmp_path,
        discriminator=None,
        run__ema_decay=0,
        data__synthetic_validation=0,
        schedule__epochs=1,
        optimizer__clip=0,
    )
    summary = run.run()
    assert run.networks.discriminator is None and "validation" not in summary
    row = history(tmp_path)[0]
    assert "k" not in row and "fake" not in row and "norm" not in row
    tensors, _ = training_state.load_state(tmp_path / "last")
    assert {name.partition(".")[0] for name in tensors} == {"generator", "optimizer", "random"}
    best, raw = load_file(tmp_path / "best" / "model.safetensors"), training_state.part("generator", tensors)
    assert all(torch.equal(best[name], raw[name]) for name in best)


def test_both_networks_move_and_the_balance(tmp_path):
    run = training(tmp_path, schedule__epochs=1)
    before = {name: value.clone() for name, value in run.networks.discriminator.named_parameters()}
    run.run()
    moved = [
        name for name, value in run.networks.discriminator.named_parameters() if not torch.equal(value, before[name])
    ]
    assert len(moved) > 0.9 * len(before)
    assert 0 < float(run.networks.balance.k) < 1


def test_the_balance_follows_equation_20(tmp_path):
    run = training(tmp_path, balance__k=0.3, balance__step=0.5, schedule__epochs=1)
    k = 0.3
    for parts in zip(run.loader, strict=True):
        real, fake = run.train_step(parts)[3:5].tolist()
        k = min(1.0, max(0.0, k + 0.5 * (0.5 * real - fake)))
        assert float(run.networks.balance.k) == pytest.approx(k, rel=1e-5)


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    """Parts with different numbers of annotated joints: each joint has the same weight. (Batch normalization uses the
    statistics of a part, so it is in evaluation mode here.)"""
    results = []
    for parts in (1, 2):
        run = training(tmp_path / str(parts), run__accumulation=parts, balance__k=0.5, optimizer__clip=1e9)
        run.networks.generator.eval()
        run.networks.discriminator.eval()
        batch = torch.utils.data.default_collate([run.data.training[0, i] for i in range(4)])
        batch["valid"][:2, :9] = False
        size = 4 // parts
        terms = run.train_step(
            [{name: v[i * size : (i + 1) * size] for name, v in batch.items()} for i in range(parts)]
        )
        gradients = {
            name: p.grad.clone() for name, p in run.networks.generator.named_parameters() if p.grad is not None
        }
        judge = {
            name: p.grad.clone() for name, p in run.networks.discriminator.named_parameters() if p.grad is not None
        }
        results.append((terms, gradients, judge))
    (one, *gradients), (two, *others) = results
    torch.testing.assert_close(one[[0, 1, 2, 3, 4]], two[[0, 1, 2, 3, 4]], rtol=1e-4, atol=1e-7)
    for a, b in zip(gradients, others, strict=True):
        assert a.keys() == b.keys() and len(a) > 5
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("bf16", "amx", "expected"), [(False, False, "no"), (True, False, "bf16"), (False, True, "bf16")]
)
def test_automatic_precision_is_bf16_where_the_processor_multiplies_it(bf16, amx, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    run = training(tmp_path, run__precision="auto", run__device="cpu", schedule__epochs=1)
    assert run.accelerator.mixed_precision == expected


@pytest.mark.parametrize("precision", ["bf16"])
def test_low_precision(tmp_path, precision):
    run = training(tmp_path, run__precision=precision, schedule__epochs=1)
    seen = []
    layer = next(module for module in run.networks.generator.modules() if isinstance(module, torch.nn.Conv2d))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    run.run()
    assert seen and set(seen) == {torch.bfloat16}
    assert run.networks.generator.state_dict()["blocks.0.score.weight"].dtype == torch.float32


def test_loss_scaling_does_not_change_the_step(tmp_path):
    """As in fp16 on a GPU, here in float32: two optimizers share a scaler, and gradients are unscaled once."""
    results = []
    for scale in (None, 1024.0):
        run = training(tmp_path / str(scale), optimizer__clip=0.05)
        if scale:
            run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        losses = []
        for parts in zip(run.loader, strict=True):
            losses.append(run.train_step(parts))
        weights = [*run.networks.generator.parameters(), *run.networks.discriminator.parameters()]
        results.append((torch.stack(losses), torch.cat([p.detach().flatten() for p in weights])))
        if scale:
            assert run.accelerator.scaler.get_scale() == 2 * scale, (
                "expected one growth in three steps, not one per optimizer"
            )
    (losses, weights), (scaled_losses, scaled_weights) = results
    torch.testing.assert_close(losses, scaled_losses, rtol=1e-3, atol=1e-6)
    assert torch.linalg.vector_norm(weights - scaled_weights) < 1e-3 * torch.linalg.vector_norm(weights)


def test_fp16_requires_a_gpu(tmp_path):
    with pytest.raises(ValueError, match=r"run\.precision: fp16 requires a GPU"):
        training(tmp_path, run__precision="fp16")


def test_init_loads_matching_tensors(tmp_path):
    training(tmp_path / "a", schedule__epochs=1).run()
    run = training(tmp_path / "b", run__init=str(tmp_path / "a" / "best"), generator__blocks=2, schedule__epochs=1)
    start = load_file(tmp_path / "a" / "best" / "model.safetensors")
    own = run.networks.generator.state_dict()
    assert all(torch.equal(own[name], value) for name, value in start.items())
    average = run.networks.average.module.state_dict()
    assert all(torch.equal(average[name], own[name]) for name in own)
    run.run()
    assert "  missing: blocks.1.score.weight" in text_of(run)
    assert f"{len(start)} tensors loaded" in text_of(run)


def test_train_function(tmp_path):
    console = quiet_console()
    summary = train(TINY.override({"schedule.epochs": 1}), tmp_path, console)
    assert summary["epochs"] == 1 and "epoch 1/1" in console.file.getvalue()
