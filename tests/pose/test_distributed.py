"""Two processes under torchrun against one process with the whole batch."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import amil_fast
from amil_fast.pose.training import PoseTraining, train
from amil_fast.utils import training_state
from amil_fast.utils.processes import end_process_group
from tests.pose.training_runs import (  # one_thread is a fixture
    TINY,
    data_with_gaps,
    one_thread,  # noqa: F401
    quiet_console,
)

HERE = Path(__file__).parent
# Seven people, batches of four: with two processes the sampler has one sample to spare, which must not be used. Joints
# without annotation are distributed unevenly over the crops.
SETTINGS = {
    "data.synthetic": 7,
    "data.synthetic_validation": 5,
    "data.augmentation": "sports",
    "schedule.epochs": 4,
    "schedule.warmup": 0.0,
    "balance.k": 0.2,
    "optimizer.lr": 1e-4,
    "loss.adversarial": 0.1,
    "run.checkpoint_steps": 1,
    "run.seed": 5,
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder written by two processes."""
    out = tmp_path_factory.mktemp("two")
    (out / "settings.json").write_text(json.dumps(SETTINGS))
    torch.manual_seed(0)
    layer = torch.nn.BatchNorm2d(3, momentum=0.3).double()
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    x = torch.randn(6, 3, 5, 4).double() * 3 + 10
    torch.save({"x": x, "upstream": torch.randn(x.shape).double(), "before": layer.state_dict()}, out / "norm.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(HERE.parents[1]), str(Path(amil_fast.__file__).parents[1])]  # the package under test
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [*command, str(HERE / "two_processes.py"), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def test_same_samples_same_losses(two, tmp_path):
    losses = []

    def follow(run, parts, terms):
        losses.append((parts[0]["index"].tolist(), terms.tolist()))

    config = TINY.override(SETTINGS)
    one = PoseTraining(config, tmp_path, quiet_console(), data=data_with_gaps(config), on_step=follow)
    summary = one.run()
    ranks = [json.loads((two / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert len(losses) == len(ranks[0]["losses"]) == 4
    valid = [int(one.data.training[epoch, i]["valid"].sum()) for epoch in range(4) for i in losses[epoch][0]]
    assert len(set(valid)) > 1, "all crops have equally many joints: a mean over each process's joints would pass"
    # The first step agrees up to rounding, which Adam amplifies with every step: it normalizes small gradients. The
    # last term, the norm of the gradient, is amplified most (4 % after three steps on some processors).
    for number, ((indices, values), tolerance) in enumerate(zip(losses, (2e-5, 5e-3, 2e-2, 2e-2), strict=True)):
        shares = [rank["losses"][number] for rank in ranks]
        assert sorted(shares[0][0] + shares[1][0]) == sorted(indices)
        assert not set(shares[0][0]) & set(shares[1][0])
        assert shares[0][1] == shares[1][1], "the processes disagree"
        compared = slice(None) if number == 0 else slice(-1)
        assert shares[0][1][compared] == pytest.approx(values[compared], rel=tolerance, abs=1e-9)
    assert torch.equal(torch.load(two / "weights0.pt"), torch.load(two / "weights1.pt"))
    # Each of the five validation samples is scored once.
    assert ranks[0]["summary"]["validation"]["samples"] == summary["validation"]["samples"] == 5
    assert ranks[1]["summary"] is None
    assert ranks[0]["summary"]["validation"]["counted"] == summary["validation"]["counted"]
    # Only one process writes.
    assert training_state.load_state(two / "run" / "last")[1]["step"] == 4
    assert len((two / "run" / "history.jsonl").read_text().splitlines()) == 4


def test_synchronized_batch_norm(two):
    case = torch.load(two / "norm.pt")
    layer = torch.nn.BatchNorm2d(3, momentum=0.3).double()
    layer.load_state_dict(case["before"])
    x = case["x"].clone().requires_grad_()
    y = layer(x)
    (y * case["upstream"]).sum().backward()
    halves = [torch.load(two / f"norm{rank}.pt") for rank in (0, 1)]
    expected = {"weight": layer.weight.grad, "bias": layer.bias.grad}
    expected |= {name: getattr(layer, name) for name in ("running_mean", "running_var", "num_batches_tracked")}
    for half in halves:
        for name, value in expected.items():
            torch.testing.assert_close(half[name], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([half["y"] for half in halves]), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([half["x"] for half in halves]), x.grad, rtol=1e-10, atol=1e-12)
    layer.eval()
    torch.testing.assert_close(torch.cat([half["evaluated"] for half in halves]), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{"schedule.epochs": 1}, {"run.accumulation": 3}], ids=["done", "failed"])
def test_training_ends_the_process_group(tmp_path, settings):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with contextlib.suppress(ValueError):
            train(TINY.override(settings), tmp_path, quiet_console())
        assert not torch.distributed.is_initialized()
    finally:
        end_process_group()


def test_batch_must_divide(tmp_path):
    with pytest.raises(ValueError, match=r"data\.batch_size: expected a multiple of 1 processes x 3 accumulated parts"):
        PoseTraining(TINY.override({"run.accumulation": 3}), tmp_path, quiet_console())
