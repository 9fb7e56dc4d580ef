"""Checkpoints: bit-identical round trips, and a complete checkpoint after a kill at any moment."""

import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from amil_fast.utils import training_state
from amil_fast.utils.files import publish
from amil_fast.utils.training_state import load_state, load_weights, save_state
from tests.pose.training_runs import one_thread  # noqa: F401 (a fixture)


def test_state_round_trip(tmp_path):
    tensors = {
        "a.b": torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
        "half": torch.randn(7).bfloat16(),
        "count": torch.tensor(3),
        "random": torch.get_rng_state(),
    }
    facts = {"step": 7, "best": {"score": None}, "seconds": 1.25}
    save_state(tmp_path, tensors, facts)
    found, numbers = load_state(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)
    assert facts.items() <= numbers.items()
    assert (found["random"] == torch.get_rng_state()).all()


def test_invalid_states(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_state(tmp_path)
    (tmp_path / training_state.STATE).write_bytes(b"\x80\x04not a checkpoint")
    with pytest.raises(ValueError, match=r"state\.safetensors: expected a training state"):
        load_state(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / training_state.STATE)
    with pytest.raises(ValueError, match="expected a training state"):
        load_state(tmp_path)
    save_state(tmp_path, {}, {"version": training_state.VERSION + 1})
    with pytest.raises(ValueError, match="version: expected at most 1, got 2; update amil_fast"):
        load_state(tmp_path)


def test_publish_is_all_or_nothing(tmp_path):
    out = tmp_path / "last"
    publish(out, lambda folder: (folder / "a").write_text("1"))

    def fails(folder):
        (folder / "a").write_text("2")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        publish(out, fails)
    assert (out / "a").read_text() == "1" and [path.name for path in out.iterdir()] == ["a"]
    # Leftovers of a killed process are not published.
    (out / ".partial").mkdir()
    (out / ".partial" / "rubbish").write_text("x")
    publish(out, lambda folder: (folder / "b").write_text("3"))
    assert sorted(path.name for path in out.iterdir()) == ["a", "b"]


def test_published_files_are_readable_like_their_folder(tmp_path):
    publish(tmp_path / "a", lambda folder: save_state(folder, {"x": torch.zeros(1)}, {}))
    mode = (tmp_path / "a" / training_state.STATE).stat().st_mode & 0o777
    assert mode == (tmp_path / "a").stat().st_mode & 0o666


def _publish_forever(out, size):
    for step in range(10**9):
        tensors = {"x": torch.from_numpy(np.full(size, step))}
        publish(out, lambda folder, tensors=tensors, step=step: save_state(folder, tensors, {"step": step}))


def test_killed_at_random_moments(tmp_path):
    """SIGKILL during writes, twenty times: the checkpoint is always complete.

    The writers are forked, for a fast start; torch's threads do not survive a fork, so they use numpy only.
    """
    out, size, seen = tmp_path / "last", 200_000, []
    publish(out, lambda folder: save_state(folder, {"x": torch.zeros(size)}, {"step": 0}))
    rng = random.Random(0)
    interrupted = 0
    for _ in range(20):
        process = multiprocessing.get_context("fork").Process(target=_publish_forever, args=(out, size))
        process.start()
        time.sleep(rng.uniform(0.01, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        interrupted += (out / ".partial").exists()
        tensors, facts = load_state(out)
        assert (tensors["x"] == facts["step"]).all() and len(tensors["x"]) == size
        seen.append(facts["step"])
    assert interrupted > 3, "no kill interrupted a write: the test is not effective"
    assert max(seen) > 0


def test_restored_optimizer_is_bit_identical():
    def network():
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        return layers.to(memory_format=torch.channels_last)

    def optimizer_of(model):
        groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1}]
        groups.append({"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0})
        return torch.optim.AdamW(groups, lr=1e-2, fused=True)

    def steps(model, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
            model(x.to(memory_format=torch.channels_last)).square().sum().backward()
            optimizer.step()

    straight = network()
    steps(straight, optimizer_of(straight), range(6))
    first = network()
    optimizer = optimizer_of(first)
    steps(first, optimizer, range(3))
    tensors = {name: value.contiguous() for name, value in training_state.optimizer_tensors(optimizer).items()}
    assert len(tensors) == 3 * 4  # step, exp_avg, exp_avg_sq of four parameters
    second = network()
    second.load_state_dict(first.state_dict())
    optimizer = optimizer_of(second)
    training_state.load_optimizer(optimizer, tensors)
    average = optimizer.state[second[0].weight]["exp_avg"]
    assert average.stride() == second[0].weight.stride(), "the state has another memory format than its parameter"
    steps(second, optimizer, range(3, 6))
    for one, other in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_load_weights_loads_matching_tensors(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))
    before = model[1].weight.clone()
    save_file(
        {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3), "1.weight": torch.ones(4, 9), "head": torch.ones(1)},
        tmp_path / "model.safetensors",
    )
    for path in (tmp_path, tmp_path / "model.safetensors"):
        taken, missing, unused = load_weights(model, path)
        assert (taken, missing, unused) == (2, ["1.weight", "1.bias"], ["1.weight", "head"])
    assert (model[0].weight == 1).all() and torch.equal(model[1].weight, before)


def test_load_weights_of_invalid_files(tmp_path):
    model = torch.nn.Linear(2, 3)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"expected a folder with model\.safetensors, or a \.safetensors file"):
        load_weights(model, tmp_path / "model.pt")
    save_file({"other": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no tensor has the name and shape"):
        load_weights(model, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        load_weights(model, tmp_path / "broken.safetensors")
    assert load_file(tmp_path / "other.safetensors")
