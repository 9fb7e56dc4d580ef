"""Peak memory of training and prediction on bags larger than the memory.

    python benchmarks/mil_memory.py --folder /scratch/bags

makes 1,000 bags of 20,000 x 1024 float16 (40 GB; symbolic links to a few distinct files, each of which is read anew),
trains for one epoch, predicts all bags, and prints the peak of the resident memory of all processes together
(proportional set size, which counts shared pages once).
"""

import argparse
import json
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from amil_fast.mil import BagTraining, TrainSettings, load_labeled_bags, make_targets, predict_bags


class PeakMemory(threading.Thread):
    """Samples the memory of this process and its children; ``peak`` in bytes."""

    def __init__(self, seconds: float = 0.25):
        super().__init__(daemon=True)
        self.peak, self._seconds, self._done = 0, seconds, threading.Event()

    def run(self) -> None:
        own = psutil.Process()
        while not self._done.wait(self._seconds):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # ended meanwhile
                    continue
            self.peak = max(self.peak, total)

    def __enter__(self) -> "PeakMemory":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self.join()


def make_bags(folder: Path, num_bags: int, size: int, width: int, distinct: int) -> Path:
    """Writes bags and their CSV file; returns its path. The label is the sign of the shift of some instances."""
    bags = folder / "bags"
    bags.mkdir(parents=True, exist_ok=True)
    originals = folder / "originals"
    originals.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for k in range(distinct):
        features = rng.standard_normal((size, width), dtype=np.float32)
        features[: max(size // 20, 1), : width // 8] += 1.5 if k % 2 else -1.5
        np.save(originals / f"{k}.npy", features.astype(np.float16))
    lines = ["bag_id,label"]
    for b in range(num_bags):
        link = bags / f"bag{b:05}.npy"
        if not link.exists():
            link.symlink_to(originals / f"{b % distinct}.npy")
        lines.append(f"bag{b:05},{b % distinct % 2}")
    labels = folder / "labels.csv"
    labels.write_text("\n".join(lines) + "\n")
    return labels


def measure(
    folder: Path, num_bags: int, size: int, width: int, distinct: int, workers: int, max_instances: int
) -> dict:
    """Trains for one epoch and predicts; returns peak memory, times and the accuracy of the predictions."""
    labels = make_bags(folder, num_bags, size, width, distinct)
    bags = load_labeled_bags(folder / "bags", labels)
    targets = make_targets(bags.labels)
    settings = TrainSettings(
        epochs=1, patience=0, tensorboard=False, device="cpu", workers=workers, max_instances=max_instances
    )
    with PeakMemory() as memory:
        begin = time.perf_counter()
        run = BagTraining(bags, targets, np.arange(num_bags), folder / f"run-{time.time_ns()}", settings)
        run.run()
        trained = time.perf_counter()
        found = predict_bags(run.net, bags.source, max_instances=max_instances, workers=workers)
    return {
        "bags": num_bags,
        "gigabytes": num_bags * size * width * 2 / 1e9,
        "peak_gigabytes": memory.peak / 1e9,
        "training_seconds": round(trained - begin, 1),
        "prediction_seconds": round(time.perf_counter() - trained, 1),
        "accuracy": float(((found.scores >= run.net.threshold) == targets.values).mean()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--bags", type=int, default=1000)
    parser.add_argument("--size", type=int, default=20000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--distinct", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max-instances", type=int, default=32768)
    options = vars(parser.parse_args())
    print(json.dumps(measure(num_bags=options.pop("bags"), **options), indent=2))
