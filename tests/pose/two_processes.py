"""Run by test_distributed.py under torchrun with two processes: ``two_processes.py OUT``."""

import json
import sys
from pathlib import Path

import torch

from amil_fast.pose.training import PoseTraining
from amil_fast.pose.training.distributed import SyncedBatchNorm2d, synchronize_batch_norm
from tests.helpers import exit_worker
from tests.pose.training_runs import TINY, data_with_gaps, quiet_console

out = Path(sys.argv[1])
settings = json.loads((out / "settings.json").read_text())
losses = []  # of each step: indices of the samples, loss terms


def follow(run, parts, terms):
    losses.append([part["index"].tolist() for part in parts] + [terms.tolist()])


config = TINY.override(settings)
run = PoseTraining(config, out / "run", quiet_console(), data=data_with_gaps(config), on_step=follow)
assert run.world == 2, f"torchrun started {run.world}"
rank = run.accelerator.process_index

# Batch normalization of a batch in two halves, in float64; the test compares it with that of the whole batch.
case = torch.load(out / "norm.pt", weights_only=True)
layer = torch.nn.BatchNorm2d(case["x"].shape[1], momentum=0.3).double()
layer.load_state_dict(case["before"])
model = synchronize_batch_norm(torch.nn.Sequential(layer), "cpu")
assert type(model[0]) is SyncedBatchNorm2d and model[0].weight is layer.weight
half = case["x"].chunk(2)[rank].clone().requires_grad_()
y = model(half)
# As in training, the loss of a process is the mean over its share, and the total loss is the mean over processes.
(2 * (y * case["upstream"].chunk(2)[rank]).sum()).backward()
gradients = [half.grad / 2, layer.weight.grad, layer.bias.grad]
for gradient in gradients[1:]:
    torch.distributed.all_reduce(gradient)
    gradient /= 2
found = {"y": y.detach(), "x": gradients[0], "weight": gradients[1], "bias": gradients[2]}
found |= {name: value.clone() for name, value in model[0].state_dict().items() if "running" in name or "num" in name}
model.eval()
found["evaluated"] = model(half).detach()
torch.save(found, out / f"norm{rank}.pt")

summary = run.run()
(out / f"rank{rank}.json").write_text(json.dumps({"losses": losses, "summary": summary}))
weights = torch.cat([p.detach().flatten() for p in run.networks.generator.parameters()])
torch.save(weights, out / f"weights{rank}.pt")
exit_worker(out, rank)
