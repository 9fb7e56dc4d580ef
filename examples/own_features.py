"""One's own features: from files per bag and a CSV file of labels to a model, predictions, scores and a heatmap.

Synthetic slides in HDF5 (`features` and `coords`, as CLAM and TRIDENT write them); a slide is a tumor if some of its
patches are. Runs in less than a minute on a CPU:

    python examples/own_features.py
"""

import tempfile
from pathlib import Path

import h5py
import numpy as np

import amil_fast
from amil_fast.mil import (
    BagTraining,
    TrainSettings,
    draw_heatmap,
    evaluate_scores,
    instance_values,
    load_labeled_bags,
    make_targets,
    predict_bags,
)

SIDE, FEATURES = 8, 16  # patches per row of a slide, features per patch


def write_slides(folder, rng, num_slides=80):
    """Writes slides and `labels.csv`: two slides per patient, the last 30 for testing. Returns the tumor patches."""
    (folder / "features").mkdir()
    lines, tumors = ["bag_id,label,group,split"], {}
    x, y = np.meshgrid(np.arange(SIDE) * 256, np.arange(SIDE) * 256)
    for i in range(num_slides):
        name, label = f"slide{i:02}", ("normal", "tumor")[i // 2 % 2]
        features = rng.normal(size=(SIDE * SIDE, FEATURES)) * 5 + 20
        tumors[name] = rng.choice(SIDE * SIDE, 6, replace=False) if label == "tumor" else []
        features[tumors[name], :3] += 15
        with h5py.File(folder / "features" / f"{name}.h5", "w") as file:
            file["features"] = features.astype(np.float16)
            file["coords"] = np.stack([x.ravel(), y.ravel()], 1)
        lines.append(f"{name},{label},patient{i // 2},{'train' if i < 50 else 'test'}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return tumors


def main():
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tumors = write_slides(folder, np.random.default_rng(0))

        # The same by command: amil mil train features/ --labels labels.csv --out run
        bags = load_labeled_bags(folder / "features", folder / "labels.csv")
        targets = make_targets(bags.labels)
        settings = TrainSettings(epochs=20, lr=3e-3, tensorboard=False, device="cpu")
        BagTraining(bags, targets, bags.in_split("train"), folder / "run", settings, on_message=print).run()

        net = amil_fast.MIRNet.from_pretrained(folder / "run")  # normalizes features by itself
        test = bags.in_split("test")
        found = predict_bags(net, bags.source, test)
        groups = [bags.groups[i] for i in test]
        scores = evaluate_scores(
            net.task, net.label_names, found.scores, targets.values[test], threshold=net.threshold, groups=groups
        )
        auc = scores["auc"]
        print(f"AUC on {len(test)} test slides: {auc['value']:.3f} ({auc['low']:.3f} to {auc['high']:.3f})")

        hits = []
        for i in test:
            tumor = tumors[bags.source.names[i]]
            if len(tumor):
                hits.append(int(instance_values(net, bags.source.features(i), "scores").argmax()) in tumor)
        print(f"patch of largest score is a tumor patch in {sum(hits)} of {len(hits)} tumor slides")

        slide = int(test[-1])
        weights = instance_values(net, bags.source.features(slide))
        draw_heatmap(folder / "heatmap.png", bags.source.coords(slide), weights, label="weight")
        print(f"effective number of instances: {found.effective[-1]:.1f} of {found.sizes[-1]}")


if __name__ == "__main__":
    main()
