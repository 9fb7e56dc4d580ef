"""Crop archives: round trip, reproducible bytes, subsets, workers, and detection of damage."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save

from amil_fast.pose.data import (
    SPORTS,
    STRONG,
    CropArchive,
    DataError,
    PoseDataset,
    PoseLoader,
    load_lspet,
    load_mpii,
    pack,
)
from amil_fast.pose.skeletons import Skeleton
from tests.pose import layouts as make


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    root = tmp_path_factory.mktemp("lspet")
    make.lspet(root, S=7)
    return load_lspet(root, "all")


@pytest.fixture(scope="module")
def boxed(tmp_path_factory):
    root = tmp_path_factory.mktemp("mpii")
    make.mpii_rows(root)
    return load_mpii(root, "valid")


def same_truth(one, other):
    for name in ("joints", "visibility", "valid", "to_image", "image_joints", "head_size", "flipped", "index"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("augmentation", [None, SPORTS])
def test_crops_match_those_of_the_images(people, tmp_path, augmentation):
    written = pack(people, tmp_path / "a.pack", 64, quality=95)
    assert written == sum(file.stat().st_size for file in tmp_path.iterdir())
    archive = CropArchive(tmp_path / "a.pack", augmentation=augmentation, seed=4)
    direct = PoseDataset(people, 64, augmentation=augmentation, seed=4)
    assert len(archive) == 7 and archive.annotations.images == people.images
    archive.verify()
    for epoch in range(3):
        for index in range(7):
            one, other = archive[epoch, index], direct[epoch, index]
            same_truth(one, other)
            assert (one["image"].float() - other["image"].float()).abs().mean() < 6


def test_room_around_boxes(boxed, tmp_path):
    """With room around the crop, rotated and shrunken crops contain image content instead of black."""
    pack(boxed, tmp_path / "a.pack", 64, quality=95, room=1.5)
    archive = CropArchive(tmp_path / "a.pack", augmentation=SPORTS)
    direct = PoseDataset(boxed, 64, augmentation=SPORTS)
    assert archive.settings["stored"] == 96
    for epoch in range(4):
        for index in range(4):
            one, other = archive[epoch, index], direct[epoch, index]
            same_truth(one, other)
            assert (one["image"].float() - other["image"].float()).abs().mean() < 8
    other_size = CropArchive(tmp_path / "a.pack", 48)[1]
    same_truth(other_size, PoseDataset(boxed, 48)[1])


@pytest.mark.parametrize("augmentation", [SPORTS, STRONG], ids=["sports", "strong"])
def test_deferred_warp(boxed, tmp_path, augmentation):
    pack(boxed, tmp_path / "a.pack", 64, quality=95)
    by_opencv = CropArchive(tmp_path / "a.pack", augmentation=augmentation, seed=1)
    by_torch = CropArchive(tmp_path / "a.pack", augmentation=augmentation, seed=1, on_device=True)
    loaders = [PoseLoader(dataset, 4, workers=0, seed=2) for dataset in (by_opencv, by_torch)]
    for loader in loaders:
        loader.set_epoch(3)
    one, raw = (next(iter(loader)) for loader in loaders)
    assert raw["image"].shape == (4, 3, 83, 83) and raw["image"].dtype == torch.uint8
    other = by_torch.augment(raw)
    assert other["image"].shape == (4, 3, 64, 64) and 0 <= other["image"].min() <= other["image"].max() <= 1
    same_truth(one, other)
    difference = (other["image"] - one["image"] / 255).abs()
    assert difference.mean() < 0.004 and difference.quantile(0.99) < 0.02
    assert set(other) == set(one)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_deferred_warp_on_a_gpu(boxed, tmp_path):
    pack(boxed, tmp_path / "a.pack", 64)
    dataset = CropArchive(tmp_path / "a.pack", augmentation=SPORTS, on_device=True)
    batch = torch.utils.data.default_collate([dataset[1, i] for i in range(4)])
    there, here = dataset.augment(batch, "cuda"), dataset.augment(batch)
    assert all(value.is_cuda for value in there.values())
    torch.testing.assert_close(there["image"].cpu(), here["image"], rtol=0, atol=1e-3)


def test_equal_input_gives_equal_bytes(people, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pack(people, tmp_path / name / "x.pack", 48)
    for file in ("x.pack", "x.pack.index"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["x.pack", "x.pack.index"]


def test_subset_of_an_archive(boxed, tmp_path):
    people = boxed
    pack(people, tmp_path / "a.pack", 48)
    whole = CropArchive(tmp_path / "a.pack")
    test = people.fold_mask(1, 2)
    part = CropArchive(tmp_path / "a.pack", indices=test)
    assert part.annotations.images == people.subset(test).images and len(part) == test.sum()
    for i, row in enumerate(np.flatnonzero(test)):
        assert torch.equal(part[i]["image"], whole[int(row)]["image"])
        for name in ("joints", "to_image", "head_size"):
            assert torch.equal(part[i][name], whole[int(row)][name]), name


def test_every_worker_maps_the_file(people, tmp_path):
    pack(people, tmp_path / "a.pack", 48)
    dataset = CropArchive(tmp_path / "a.pack", augmentation=SPORTS)
    before = dataset[0, 0]["image"]
    clone = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < (tmp_path / "a.pack").stat().st_size + 20_000
    assert torch.equal(clone[0, 0]["image"], before)
    images = [torch.cat([b["image"] for b in PoseLoader(dataset, 3, workers=w, seed=1)]) for w in (0, 2)]
    assert torch.equal(*images)


def test_interruption_leaves_no_files_and_keeps_old_ones(people, tmp_path):
    def interrupt(number):
        if number == 3:
            raise KeyboardInterrupt

    pack(people, tmp_path / "old.pack", 48)
    before = (tmp_path / "old.pack").read_bytes()
    for name in ("new.pack", "old.pack"):
        with pytest.raises(KeyboardInterrupt):
            pack(people, tmp_path / name, 64, progress=interrupt)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["old.pack", "old.pack.index"]
    assert (tmp_path / "old.pack").read_bytes() == before


def test_damage(people, tmp_path):
    path = tmp_path / "a.pack"
    pack(people, path, 48)
    whole, index = path.read_bytes(), (tmp_path / "a.pack.index").read_bytes()
    assert whole[:12] == b"AMILPACK\x01\0\0\0"

    def complains(message):
        with pytest.raises(DataError, match=message):
            CropArchive(path)

    path.write_bytes(whole[:-10])
    complains(r"a.pack: expected \d+ bytes as in the index, got \d+")
    path.write_bytes(b"AMILPACK\x09" + whole[9:])
    complains(r"a.pack: expected format version 1, got 9; run `amil pack` again")
    path.write_bytes(b"something else")
    complains(r"a.pack: expected a crop archive")
    path.write_bytes(whole)
    (tmp_path / "a.pack.index").write_bytes(index[: len(index) // 2])
    complains(r"a.pack.index: expected the index of a crop archive")
    (tmp_path / "a.pack.index").unlink()
    complains(r"a.pack.index: no such file \(a crop archive consists of a.pack and a.pack.index\)")
    (tmp_path / "a.pack.index").write_bytes(index)

    offsets = load_file(tmp_path / "a.pack.index")["offsets"]
    spoiled = bytearray(whole)
    spoiled[offsets[2] : offsets[2] + 60] = bytes(60)
    path.write_bytes(spoiled)
    dataset = CropArchive(path)
    dataset[1]
    with pytest.raises(DataError, match=r"a.pack: crop 2 is damaged"):
        dataset[2]
    with pytest.raises(DataError, match=r"a.pack: expected the content that .*a.pack.index describes"):
        dataset.verify()


@pytest.mark.parametrize("change", ["decreasing", "equal", "first", "last"])
def test_inconsistent_offsets(people, tmp_path, change):
    pack(people, tmp_path / "a.pack", 48)
    index = tmp_path / "a.pack.index"
    with safe_open(index, "numpy") as file:
        metadata = file.metadata()
    arrays = load_file(index)
    offsets = arrays["offsets"] = arrays["offsets"].copy()
    if change == "decreasing":
        offsets[[2, 3]] = offsets[[3, 2]]
    elif change == "equal":
        offsets[3] = offsets[2]
    else:
        offsets[{"first": 0, "last": -1}[change]] -= 1
    index.write_bytes(save(arrays, metadata=metadata))
    with pytest.raises(DataError, match=r"a.pack.index: expected the index .*: offsets that increase"):
        CropArchive(tmp_path / "a.pack")


def copy_of(skeleton):
    return Skeleton(**{item.name: getattr(skeleton, item.name) for item in dataclasses.fields(Skeleton) if item.init})


def test_settings(people, tmp_path):
    with pytest.raises(ValueError, match="quality: expected 1 to 100, got 0"):
        pack(people, tmp_path / "a.pack", quality=0)
    with pytest.raises(ValueError, match=r"room: expected at least 1, got 0.5"):
        pack(people, tmp_path / "a.pack", room=0.5)
    custom = dataclasses.replace(people, skeleton=copy_of(people.skeleton))
    with pytest.raises(ValueError, match="skeleton: expected a built-in skeleton, got the custom one 'lsp14'"):
        pack(custom, tmp_path / "a.pack")
    with pytest.raises(DataError, match="no people to write to a crop archive"):
        pack(people.subset([]), tmp_path / "a.pack")
    pack(people, tmp_path / "a.pack", 48)
    settings = CropArchive(tmp_path / "a.pack").settings
    assert settings["size"] == settings["stored"] == 48  # whole images have no surroundings
    assert settings["left_out"] == [] and settings["source"] == "joints.mat"
    json.dumps(settings)
