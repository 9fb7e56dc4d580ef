"""Folders of bags in every format, for the tests."""

import csv

import numpy as np
import torch


def write_bag(folder, name, features, coords=None, suffix=".npy"):
    """Writes one bag; ``.npy`` files have no coordinates."""
    import h5py

    path = folder / f"{name}{suffix}"
    if suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["features"] = features
            if coords is not None:
                file["coords"] = coords
    elif suffix == ".pt":
        tensor = torch.from_numpy(features)
        torch.save(tensor if coords is None else {"features": tensor, "coords": torch.from_numpy(coords)}, path)
    elif suffix == ".npz":
        np.savez(path, features=features, **({} if coords is None else {"coords": coords}))
    else:
        np.save(path, features)
    return path


def write_csv(path, rows):
    """Writes dicts as rows."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def learnable_bags(folder, num_bags=40, classes=2, seed=0, suffix=".npy", width=6, largest=12, dtype=np.float32):
    """Bags whose label is the class of a key instance; the class moves feature 1 + label. Returns rows for a CSV."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for b in range(num_bags):
        label, size = b % classes, int(rng.integers(3, largest))
        features = rng.normal(size=(size, width)).astype(np.float32) * 10 + 100
        features[rng.integers(size), label] += 60
        coords = np.stack([np.arange(size) * 256, np.arange(size) % 3 * 256], 1)
        write_bag(folder, f"bag{b:03}", features.astype(dtype), coords, suffix)
        rows.append({"bag_id": f"bag{b:03}", "label": label})
    return rows
