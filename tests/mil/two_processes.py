"""Run by test_training.py under torchrun with two processes: ``two_processes.py FOLDER``."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from amil_fast.mil import BagTraining, TrainSettings, load_labeled_bags, make_targets
from tests.helpers import exit_worker

folder = Path(sys.argv[1])
settings = TrainSettings(**json.loads((folder / "settings.json").read_text()))
bags = load_labeled_bags(folder / "bags", folder / "labels.csv")
run = BagTraining(bags, make_targets(bags.labels), np.arange(len(bags.labels)), folder / "two", settings)
assert run.accelerator.num_processes == 2
run.run()
rank = run.accelerator.process_index
torch.save(run.net.state_dict(), folder / f"rank{rank}.pt")
exit_worker(folder, rank)
