"""Packed batches: collate functions, bounds, shares of processes, the loader."""

from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchmil.datasets import ProcessedMILDataset

import amil_fast
from amil_fast.mil import BagFolder, PackedLoader, TorchmilDataset, pack_by_size, packed_collate
from amil_fast.mil.packing import share_by_size
from tests.mil.own_bags import learnable_bags

SIZES = [4, 0, 1, 6]


def bags():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, generator=generator), i % 2) for i, n in enumerate(SIZES)]


def test_packed_collate_of_tuples():
    loader = DataLoader(bags(), batch_size=3, collate_fn=packed_collate)
    (x, cu_seqlens, labels), (last, last_cu, _) = loader
    assert x.shape == (5, 3) and cu_seqlens.tolist() == [0, 4, 4, 5] and labels.tolist() == [0, 1, 0]
    assert torch.equal(x[4:], bags()[2][0]) and last_cu.tolist() == [0, 6] and torch.equal(last, bags()[3][0])
    assert amil_fast.MIRNet(3, hidden=4)(x, cu_seqlens=cu_seqlens).probabilities.shape == (3,)
    assert len(packed_collate([(x,) for x, _ in bags()])) == 2
    with pytest.raises(ValueError, match=r"features: expected shape \(n, 3\) and dtype torch.float32.*got \(2, 4\)"):
        packed_collate([(torch.ones(2, 3), 0), (torch.ones(2, 4), 0)])
    with pytest.raises(ValueError, match=r"got \(2, 3\) and torch\.float64"):
        packed_collate([(torch.ones(2, 3), 0), (torch.ones(2, 3).double(), 0)])


@pytest.fixture
def torchmil_folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("features", "labels", "coords", "inst_labels"):
        (tmp_path / name).mkdir()
    for i, n in enumerate((4, 2, 2)):
        coords = np.stack([np.arange(n), np.zeros(n)], 1)
        stored = {"features": rng.normal(size=(n, 3)).astype(np.float32), "labels": np.array([i % 2])}
        stored |= {"coords": coords, "inst_labels": np.arange(n)}
        for name, array in stored.items():
            np.save(tmp_path / name / f"b{i}.npy", array)
    return tmp_path


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_torchmil_dataset(torchmil_folder):
    dataset = ProcessedMILDataset(
        features_path=str(torchmil_folder / "features"),
        labels_path=str(torchmil_folder / "labels"),
        inst_labels_path=str(torchmil_folder / "inst_labels"),
        coords_path=str(torchmil_folder / "coords"),
        verbose=False,
    )
    ((x, cu_seqlens, labels),) = DataLoader(TorchmilDataset(dataset), batch_size=3, collate_fn=packed_collate)
    folder = BagFolder(torchmil_folder)
    assert cu_seqlens.tolist() == [0, 4, 6, 8] and labels.tolist() == [0, 1, 0]
    assert torch.equal(x, torch.cat([folder.features(i) for i in range(3)]))
    # The dataset itself, whose items are TensorDicts with a sparse adjacency matrix.
    batch = packed_collate([dataset[i] for i in range(3)])
    assert torch.equal(batch["X"], x) and torch.equal(batch["cu_seqlens"], cu_seqlens)
    assert batch["Y"].shape == (3, 1) and batch["y_inst"].tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert batch["coords"].shape == (8, 2) and "adj" not in batch


def test_torchmil_like_items_without_torchmil():
    class Items:
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return {"X": torch.full((i + 1, 2), float(i)), "Y": torch.tensor([i]), "y_inst": torch.arange(i + 1)}

    ((x, _, labels),) = DataLoader(TorchmilDataset(Items()), batch_size=2, collate_fn=packed_collate)
    assert x.tolist() == [[0, 0], [1, 1], [1, 1]] and labels.tolist() == [0, 1]
    batch = packed_collate([Items()[0], Items()[1]])
    assert batch["Y"].tolist() == [[0], [1]] and batch["y_inst"].tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match=r"Y: expected one label per bag, got shape \(2,\)"):
        TorchmilDataset([{"X": torch.ones(3, 2), "Y": torch.ones(2)}])[0]


def test_batches_are_bounded_by_instances_with_long_bags_beside_short_ones():
    rng = np.random.default_rng(0)
    sizes = np.where(rng.random(200) < 0.1, rng.integers(5000, 20000, 200), rng.integers(0, 300, 200))
    batches = pack_by_size(range(200), sizes, 16000)
    assert sorted(chain(*batches)) == list(range(200))
    totals = [sizes[batch].sum() for batch in batches]
    assert all(total <= 16000 or len(batch) == 1 for total, batch in zip(totals, batches, strict=True))
    assert len(batches) <= 1.2 * max(sizes.sum() / 16000, (sizes > 8000).sum())
    mixed = [batch for batch in batches if sizes[batch].max() > 5000 and sizes[batch].min() < 300]
    assert mixed
    assert pack_by_size([], sizes, 10) == [] and pack_by_size([3], np.array([0, 0, 0, 99]), 10) == [[3]]


def test_shares_have_equally_many_instances():
    sizes = np.array([20000, 9000, 8000, 3000, 10, 10, 10])
    shares = share_by_size(range(7), sizes, 2)
    assert sorted(chain(*shares)) == list(range(7))
    assert [sizes[share].sum() for share in shares] == [20020, 20010]
    assert share_by_size([4], sizes, 3) == [[4], [], []]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_reads_lists_of_bags_again_and_again(tmp_path, workers):
    learnable_bags(tmp_path, 6, suffix=".pt", dtype=np.float16)
    source = BagFolder(tmp_path)
    loader = PackedLoader(source, workers)
    for batches in ([[3, 1], [], [0]], [[5]]):
        found = list(loader.read(batches))
        assert [batch.indices.tolist() for batch in found] == batches
        for batch, indices in zip(found, batches, strict=True):
            assert batch.cu_seqlens.diff().tolist() == source.sizes[indices].tolist()
            if indices:
                assert torch.equal(batch.features, torch.cat([source.features(i) for i in indices]))
                assert batch.features.dtype == torch.float16


def test_bags_of_large_sets_are_not_kept(tmp_path, monkeypatch):
    learnable_bags(tmp_path, 4)
    read = []
    original = BagFolder.features
    monkeypatch.setattr(BagFolder, "features", lambda self, i: read.append(i) or original(self, i))
    source = BagFolder(tmp_path)
    for large in (False, True):
        read.clear()
        if large:
            monkeypatch.setattr("amil_fast.mil.packing._is_small", lambda source: False)
        loader = PackedLoader(source, 0)
        for _ in range(2):
            list(loader.read([[0, 1], [2]]))
        assert read == [0, 1, 2] * (1 + large)
