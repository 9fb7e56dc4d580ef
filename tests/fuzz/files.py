"""Fuzzer of the file readers: ``python -m tests.fuzz.files --mutations 5000 --seed 0``.

Good files of every format are mutated and read in child processes. A reader must return, or raise a ValueError or
OSError that names the file. Anything else is a failure: another exception, a signal, more than 20 s, or more than 1 GiB
of address space beyond that of the imported package. Equal seeds give equal mutations.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from pathlib import Path

import cv2
import h5py
import numpy as np
import torch
from scipy.io import loadmat, savemat

from amil_fast.cli.common import read_config
from amil_fast.mil.bag_files import load_bags, save_bags, stratified_folds
from amil_fast.mil.bag_sources import BagFolder
from amil_fast.pose import PoseDiscriminator
from amil_fast.pose.data import CropArchive, load_coco, load_lsp, load_lspet, load_mpii, load_mpii_mat
from amil_fast.pose.data.boxes import Boxes
from amil_fast.pose.data.crop_archive import pack
from amil_fast.pose.data.files import image_size, read_image
from amil_fast.pose.data.video import VideoFrames
from amil_fast.pose.evaluation.ground_truth import GroundTruth, read_ground_truth, read_predictions
from amil_fast.pose.skeletons import LSP14
from amil_fast.pose.training import TrainConfig
from amil_fast.utils.training_state import load_config, load_weights, save_state
from tests.pose import layouts

MEMORY = 1 << 30
SECONDS = 20
BATCH = 25  # mutations per child process
_VALUES = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**400,
    1e308,
    -1e308,
    0.5,
    "",
    "x",
    "../x",
    "\ud800",
    [],
    {},
    [[]],
    [1, 2],
]
_NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 8, 14, 15, 16]


def _bags(root):
    labels, rng = np.arange(8) % 2, np.random.default_rng(0)
    save_bags(root / "a.npz", rng.normal(size=(24, 3)), np.arange(9) * 3, labels, stratified_folds(labels, 1, 2))
    np.savez(root / "b.npz", **np.load(root / "a.npz"))  # uncompressed


def _bag_folder(root):
    features, coords = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32), np.arange(12).reshape(6, 2)
    with h5py.File(root / "a.h5", "w") as file:
        file["features"], file["coords"] = features, coords
        file["coords"].attrs.update({"patch_size": 256, "level": "0"})
    with h5py.File(root / "b.h5", "w") as file:  # in chunks, each compressed
        file.create_dataset("features", data=features[None], chunks=(1, 2, 3), compression="gzip", shuffle=True)
    tensors = {"features": torch.from_numpy(features), "coords": torch.from_numpy(coords)}
    torch.save(tensors, root / "c.pt")
    torch.save(tensors["features"].half(), root / "d.pt", _use_new_zipfile_serialization=False)
    np.save(root / "e.npy", features.astype(np.float64))
    np.savez(root / "f.npz", features=features, coords=coords)
    np.savez_compressed(root / "g.npz", features)


def _read_bag(path):
    bag = BagFolder(path.parent, [path.stem])
    bag.features(0), bag.coords(0), bag.attributes(0)


def _compress(path):
    """Compresses the variables of a MATLAB file."""
    savemat(path, {k: v for k, v in loadmat(path).items() if not k.startswith("__")}, do_compression=True)


def _lspet(root):
    layouts.lspet(root)
    _compress(root / "joints.mat")


def _mpii(root):
    layouts.mpii_gt(root / "annot/gt_valid.mat", layouts.mpii_rows(root))


def _mpii_mat(root):
    layouts.mpii_mat(root, layouts.mpii_rows(root))
    shutil.rmtree(root / "annot")


def _boxes(root):
    (root / "a.json").write_text('{"a.jpg": [[1, 2, 30, 40], [3, 4, 5, 6]], "b/c.mp4": [[1.5, 2, 3, 4]]}')
    rows = [{"file_name": "a.jpg", "bbox": [1, 2, 3, 4], "frame": 3}, {"image_id": 7, "bbox": [1, 2, 3, 4]}]
    (root / "b.json").write_text(json.dumps(rows))


def _truth():
    joints = np.random.default_rng(0).uniform(10, 90, (4, 14, 2))
    names = [{f"{i}.jpg", str(i)} for i in range(4)]
    return GroundTruth(LSP14, joints, np.ones((4, 14), bool), np.full(4, np.nan), names=names)


def _predictions(root):
    joints = _truth().joints
    rows = [{"image_id": i, "keypoints": np.insert(joints[i], 2, 1, 1).reshape(-1).tolist()} for i in range(4)]
    (root / "a.json").write_text(json.dumps(rows))
    np.save(root / "a.npy", joints)
    np.savez(root / "a.npz", predictions=joints)
    savemat(root / "a.mat", {"preds": joints})
    savemat(root / "b.mat", {"pos_pred_src": joints.transpose(1, 2, 0)})


def _ground_truth(root):
    layouts.mpii_gt(root / "a.mat", layouts.mpii_rows(root))
    shutil.rmtree(root / "annot")
    np.savez(root / "a.npz", targets=_truth().joints, valid=_truth().valid, head_boxes=np.ones((4, 4)))


def _archive(root):
    layouts.lsp(root / "lsp", S=3)
    pack(load_lsp(root / "lsp", "all"), root / "a.pack", 32)
    shutil.rmtree(root / "lsp")


def _read_archive(path):
    archive = CropArchive(path.with_name("a.pack"))
    for index in range(len(archive)):
        archive.stored(index)


def _state(root):
    tensors = {"generator.weight": torch.ones(3, 4), "random.cpu": torch.get_rng_state()}
    save_state(root, tensors, {"step": 3, "epoch": 1, "config": TrainConfig().to_dict()})


def _weights(root):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(3, 4), "bias": torch.ones(3).half()}, root / "a.safetensors")


def _images(root):
    for suffix in ("jpg", "png", "bmp", "webp", "tiff", "ppm"):
        layouts.picture(root / f"a.{suffix}", 40, 30)


def _read_image(path):
    image_size(path)
    for shrink in (1, 8):
        read_image(path, upright=True, shrink=shrink)


def _videos(root):
    for suffix in ("avi", "mp4", "mpg"):
        layouts.video(root / f"a.{suffix}", frames=4, width=48, height=32, rate=25)


# Format -> (writes good files into a folder, reads a file of the folder or the folder).
FORMATS = {
    "LSP": (layouts.lsp, lambda path: load_lsp(path.parent, "all")),
    "LSPET": (_lspet, lambda path: load_lspet(path.parent, "all", crop="joints")),
    "MPII JSON": (_mpii, lambda path: load_mpii(path.parents[1], "valid")),
    "MPII MATLAB": (_mpii_mat, lambda path: load_mpii_mat(path.parent)),
    "COCO": (layouts.coco, lambda path: load_coco(path.parents[1])),
    "boxes": (_boxes, Boxes),
    "bags": (_bags, load_bags),
    "bag folder": (_bag_folder, _read_bag),
    "predictions": (_predictions, lambda path: read_predictions(path, _truth())),
    "ground truth": (_ground_truth, read_ground_truth),
    "crop archive": (_archive, _read_archive),
    "model": (
        lambda root: PoseDiscriminator(features=8).save_pretrained(root),
        lambda path: PoseDiscriminator.from_pretrained(path.parent),
    ),
    "training state": (_state, lambda path: load_config(path.parent)),
    "configuration": (lambda root: (root / "a.json").write_text(json.dumps(TrainConfig().to_dict())), read_config),
    "weights": (_weights, lambda path: load_weights(torch.nn.Linear(4, 3), path)),
    "images": (_images, _read_image),
    "videos": (_videos, lambda path: list(VideoFrames(path))),
}
# Images belong to some data sets; as a format of their own they are mutated once.
_IMAGES = (".jpg", ".png")


def good_files(root):
    """Writes good files of all formats; returns ``(format, file)`` pairs of the files to mutate."""
    found = []
    for name, (write, read) in FORMATS.items():
        folder = root / name
        folder.mkdir()
        write(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        files = [path for path in files if name == "images" or path.suffix not in _IMAGES]
        for path in files:
            read(path)
            found.append((name, path))
    return found


def mutate(data, suffix, rng):
    """A mutation of a file's content."""
    if suffix == ".json" and rng.random() < 0.7:
        return _mutate_json(data, rng)
    if suffix in (".safetensors", ".index") and rng.random() < 0.7:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        text = header.get("__metadata__", {}).get("amil")
        if text is not None and rng.random() < 0.7:
            header["__metadata__"]["amil"] = _mutate_json(text.encode(), rng).decode(errors="replace")
            new = json.dumps(header).encode()
        else:
            new = _mutate_json(data[8 : 8 + size], rng)
        return struct.pack("<Q", len(new)) + new + data[8 + size :]
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        # Headers and ends of files decide more than their contents.
        where = rng.choice([rng.randrange(len(data) + 1), rng.randrange(min(512, len(data) + 1))])
        where = rng.choice([where, where, len(data) - rng.randrange(min(256, len(data) + 1))])
        kind = rng.randrange(6)
        if kind == 0 and where < len(data):
            data[where] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[where : where + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            order = rng.choice("<>")
            data[where : where + 4] = struct.pack(f"{order}I", rng.choice(_NUMBERS))
        elif kind == 3:
            del data[where : where + rng.randrange(1, 40)]
        elif kind == 4:
            data[where:where] = data[where : where + rng.randrange(1, 200)]
        else:
            del data[max(where, 1) :]
    return bytes(data)


def _mutate_json(data, rng):
    """Replaces or removes a value anywhere in a JSON text, or nests it deeply."""
    content = json.loads(data)
    places = []

    def visit(container):
        for key in container if isinstance(container, dict) else range(len(container)):
            places.append((container, key))
            if isinstance(container[key], (dict, list)):
                visit(container[key])

    if isinstance(content, (dict, list)):
        visit(content)
    if not places or rng.random() < 0.03:
        return json.dumps(rng.choice(_VALUES)).encode()
    container, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del container[key]
    elif kind == 1:
        container[key] = "DEEP"
    elif kind == 2:
        container[key] = [container[key]]
    else:
        container[key] = rng.choice(_VALUES)
    depth = rng.choice([30, 900, 100_000])
    return json.dumps(content).replace('"DEEP"', "[" * depth + "]" * depth).encode()


def run(mutations, seed, keep=None):
    """Reads mutated files; returns the failures as texts. ``keep``: folder for the files of failures."""
    rng = random.Random(seed)
    failures = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        files = good_files(root)
        contents = {path: path.read_bytes() for _, path in files}
        names = list(FORMATS)
        for start in range(0, mutations, BATCH):
            tasks = []
            for number in range(start, min(start + BATCH, mutations)):
                # Formats in turn, files of a format at random.
                name, path = rng.choice([(n, p) for n, p in files if n == names[number % len(names)]])
                tasks.append((name, path, mutate(contents[path], path.suffix, rng)))
            while tasks:
                done, failure = _run_child(tasks)
                if failure is not None:
                    name, path, data = tasks[done]
                    failures.append(f"{name}, {path.name}: {failure}")
                    if keep is not None:
                        (keep / f"{len(failures)}-{path.name}").write_bytes(data)
                for _, path, _ in tasks[: done + 1]:
                    path.write_bytes(contents[path])
                del tasks[: done + 1]
    return failures


def _run_child(tasks):
    """Reads mutated files in a child process until one fails; returns its index, or the last one, and the failure."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        _read_all(tasks, sender)
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        lines = pipe.read().decode(errors="replace").split("\n")
    status = os.waitpid(child, 0)[1]
    done = int([line for line in lines if line.isdecimal()][-1])
    if os.WIFSIGNALED(status):
        which = signal.Signals(os.WTERMSIG(status)).name
        return done, f"no end in {SECONDS} s" if which == "SIGALRM" else f"ended by {which}"
    if os.WEXITSTATUS(status):
        return done, "\n".join(lines[lines.index(str(done)) + 1 :]).strip() or f"exit code {os.WEXITSTATUS(status)}"
    return len(tasks) - 1, None


def _read_all(tasks, sender):
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)  # libraries print about damaged files
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
    for number, (name, path, data) in enumerate(tasks):
        os.write(sender, f"{number}\n".encode())
        original = path.read_bytes()
        path.write_bytes(data)
        signal.alarm(SECONDS)
        try:
            FORMATS[name][1](path)
        except BaseException as error:
            folder = str(path.parents[1] if name in ("MPII JSON", "COCO") else path.parent)
            if not isinstance(error, (ValueError, OSError)) or folder not in str(error):
                os.write(sender, traceback.format_exc()[-3000:].encode(errors="replace"))
                os._exit(1)
        signal.alarm(0)
        path.write_bytes(original)
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files of failures")
    arguments = parser.parse_args()
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # threads do not survive a fork
    failures = run(arguments.mutations, arguments.seed, arguments.keep)
    for failure in failures:
        print(failure)
    print(f"{arguments.mutations} mutations of {len(FORMATS)} formats: {len(failures)} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
