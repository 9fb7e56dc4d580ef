"""Bags on disk: the formats, what is read when, and the messages for files that are not bags."""

import contextlib
import os
import pickle
import zipfile

import h5py
import numpy as np
import pytest
import torch

from amil_fast.mil import BagFileSource, BagFolder, open_bags
from amil_fast.mil import feature_files as feature_files_module
from amil_fast.mil.bag_files import save_bags
from amil_fast.utils.files import DataError
from tests.mil.helpers import easy_bags
from tests.mil.own_bags import write_bag

FEATURES = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
COORDS = np.arange(10).reshape(5, 2) * 256


@pytest.mark.parametrize("suffix", [".h5", ".pt", ".npy", ".npz"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_formats(tmp_path, suffix, dtype):
    stored = (FEATURES * 10).astype(dtype)
    write_bag(tmp_path, "b", stored[:2], COORDS[:2], suffix)
    write_bag(tmp_path, "a", stored, COORDS, suffix)
    (tmp_path / "notes.txt").write_text("not a bag")
    (tmp_path / "._a.h5").write_text("written by a Mac")
    bags = BagFolder(tmp_path)
    assert bags.names == ["a", "b"] and bags.sizes.tolist() == [5, 2] and bags.num_features == 3 and len(bags) == 2
    features = bags.features(0)
    assert features.dtype == (torch.float16 if dtype == np.float16 else torch.float32)
    assert np.array_equal(features.numpy(), stored.astype(features.numpy().dtype))
    if suffix == ".npy":
        assert bags.coords(0) is None
    else:
        assert np.array_equal(bags.coords(1), COORDS[:2])
    assert bags.positions(["b", "a"]) == [1, 0]
    assert BagFolder(tmp_path, ["b", f"a{suffix}"]).sizes.tolist() == [2, 5]


def test_leading_axis_bfloat16_and_attributes(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["coords"] = FEATURES[None], COORDS[None]
        file["coords"].attrs.update({"patch_size": 256, "name": "a", "level_dim": [3, 4]})
    torch.save(torch.from_numpy(FEATURES).bfloat16(), tmp_path / "b.pt")
    bags = BagFolder(tmp_path)
    assert bags.sizes.tolist() == [5, 5] and np.array_equal(bags.coords(0), COORDS)
    assert bags.attributes(0) == {"patch_size": 256.0} and bags.attributes(1) == {}
    assert torch.equal(bags.features(1), torch.from_numpy(FEATURES).bfloat16())


def test_torchmil_folders(tmp_path):
    for name in ("features", "labels", "coords"):
        (tmp_path / name).mkdir()
    for i, name in enumerate(("x", "y")):
        np.save(tmp_path / "features" / f"{name}.npy", FEATURES[: 3 + i])
        np.save(tmp_path / "labels" / f"{name}.npy", np.array([i]) if i else np.array(i))
        np.save(tmp_path / "coords" / f"{name}.npy", COORDS[: 3 + i])
    bags = open_bags(tmp_path)
    assert bags.names == ["x", "y"] and bags.labels == ["0", "1"]
    assert np.array_equal(bags.coords(1), COORDS[:4])
    np.save(tmp_path / "coords" / "y.npy", COORDS[:3])
    with pytest.raises(DataError, match=r"coords/y\.npy: coords: expected shape \(4, 2\).*got \(3, 2\)"):
        bags.coords(1)
    np.save(tmp_path / "labels" / "y.npy", np.array([1, 0, 1]))
    with pytest.raises(DataError, match=r"labels/y\.npy: expected one label"):
        open_bags(tmp_path)


def test_bag_file(tmp_path):
    data = easy_bags(6)
    save_bags(tmp_path / "a.npz", data.features, data.offsets, data.labels, data.folds)
    bags = open_bags(tmp_path / "a.npz")
    assert isinstance(bags, BagFileSource) and bags.names == list("012345") and bags.labels == list("010101")
    chosen = open_bags(tmp_path / "a.npz", ["4", "1"])
    assert chosen.sizes.tolist() == data.sizes[[4, 1]].tolist() and chosen.labels == ["0", "1"]
    begin, end = data.offsets[4:6]
    assert np.array_equal(chosen.features(0).numpy(), data.features[begin:end])
    with pytest.raises(DataError, match=r"a\.npz: expected bags 0\.\.5, got '6'"):
        open_bags(tmp_path / "a.npz", ["6"])


@pytest.mark.parametrize("suffix", [".h5", ".pt", ".npy", ".npz"])
def test_features_are_read_on_use_only(tmp_path, suffix, monkeypatch):
    """Opening reads headers: a bag whose values are damaged is noticed when it is read, not before."""
    write_bag(tmp_path, "good", FEATURES, None, suffix)
    bad = FEATURES.copy()
    bad[3, 1] = np.nan
    write_bag(tmp_path, "bad", bad, None, suffix)
    reader = feature_files_module.READERS[suffix]
    read = []
    original = type(reader).features
    monkeypatch.setattr(
        type(reader), "features", lambda self, path, **k: read.append(path) or original(self, path, **k)
    )
    bags = BagFolder(tmp_path)
    assert not read
    assert bags.features(1).shape == (5, 3) and len(read) == 1
    with pytest.raises(DataError, match=rf"bad\{suffix}: features: expected finite values, got nan in row 3, column 1"):
        bags.features(0)


def test_messages(tmp_path):
    def error_of(*arguments):
        with pytest.raises(DataError) as error:
            open_bags(*arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "absent: expected a folder of bags or a bag file" in error_of(tmp_path / "absent")
    assert "expected files of features (.h5, .hdf5, .pt, .npy, .npz), one per bag, found none" in error_of(tmp_path)
    write_bag(tmp_path, "a", FEATURES)
    assert "found none for bag 'c'" in error_of(tmp_path, ["a", "c"])
    write_bag(tmp_path, "b", FEATURES[:, :2])
    assert "b.npy: expected 3 features as in a.npy, got 2" in error_of(tmp_path)
    write_bag(tmp_path, "b", FEATURES[:, 0])
    assert "b.npy: features: expected shape (instances, D), got (5,)" in error_of(tmp_path)
    write_bag(tmp_path, "b", np.array([["x"]]))
    assert "b.npy: features: expected numbers, got dtype <U1" in error_of(tmp_path)
    write_bag(tmp_path, "b", FEATURES)
    write_bag(tmp_path, "b", FEATURES, suffix=".pt")
    assert "b.pt: expected one file per bag, got b.npy as well" in error_of(tmp_path)

    (tmp_path / "b.npy").unlink()
    (tmp_path / "b.pt").write_bytes(b"not a tensor")
    assert "b.pt: " in error_of(tmp_path)
    torch.save(torch.eye(3).to_sparse(), tmp_path / "b.pt")
    assert "b.pt: expected a dense tensor" in error_of(tmp_path)
    torch.save({"x": torch.eye(3)}, tmp_path / "b.pt")
    assert "or a dict with one under 'features', got nothing" in error_of(tmp_path)
    (tmp_path / "b.pt").unlink()
    (tmp_path / "b.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    assert "b.h5: cannot be read: " in error_of(tmp_path)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["feats"] = FEATURES
    assert "b.h5: dataset 'features' is missing (found: feats)" in error_of(tmp_path)
    (tmp_path / "b.h5").unlink()
    data = easy_bags(6)
    save_bags(tmp_path / "b.npz", data.features, data.offsets, data.labels, data.folds)
    assert "b.npz: expected the features of one bag, got a bag file of many" in error_of(tmp_path)
    (tmp_path / "b.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:100])
    assert "b.npz: cannot be read: " in error_of(tmp_path)


def test_arrays_larger_than_their_file(tmp_path):
    """Shapes that the file cannot hold are refused before memory is allocated."""
    header = np.lib.format.header_data_from_array_1_0(FEATURES) | {"shape": (10**12, 3)}
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.write(tmp_path / "a.npy", "features.npy")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.create_dataset("features", (10**12, 3), "f4", chunks=(100, 3))
    torch.save(torch.zeros(1).expand(10**12, 3), tmp_path / "d.pt")
    for name in ("a.npy", "b.npz", "c.h5", "d.pt"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read: shape \(1000000000000, 3\) of .* in \d+ bytes"):
            BagFolder(tmp_path, [name])


@pytest.mark.parametrize("suffix", [".h5", ".pt", ".npy", ".npz"])
def test_named_pipes_are_refused(tmp_path, suffix):
    os.mkfifo(tmp_path / f"a{suffix}")
    with pytest.raises(DataError, match=rf"a\{suffix}: cannot be read: not a regular file"):
        open_bags(tmp_path)


def test_damaged_pickles_are_reported(tmp_path):
    """Every single-byte change of the format before PyTorch 1.6: an array of the same shape, or a DataError."""
    torch.save(torch.from_numpy(FEATURES), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    good = (tmp_path / "a.pt").read_bytes()
    for position in range(len(good)):
        (tmp_path / "a.pt").write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        with contextlib.suppress(DataError):
            open_bags(tmp_path).features(0)


class Attack:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "bags"
    folder.mkdir()
    torch.save({"features": Attack()}, folder / "a.pt")
    with pytest.raises(DataError, match=r"a\.pt: expected a file that torch\.load reads with weights_only=True"):
        open_bags(folder)
    (folder / "a.pt").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(DataError, match=r"a\.pt: "):
        open_bags(folder)
    (folder / "a.pt").unlink()
    np.save(folder / "a.npy", np.array([Attack()], dtype=object))
    with pytest.raises(DataError, match=r"a\.npy: features: expected numbers, got dtype object"):
        open_bags(folder)
    assert not (tmp_path / "executed").exists()


def test_missing_h5py_is_named_with_the_remedy(tmp_path, monkeypatch):
    write_bag(tmp_path, "a", FEATURES, suffix=".h5")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match=r"h5py: needed for reading \.h5 files; install it with: pip install h5py"):
        open_bags(tmp_path)
