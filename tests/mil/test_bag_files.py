"""Bag files: reading, writing, folds, and the error messages for invalid files."""

import numpy as np
import pytest

from amil_fast.mil.bag_files import load_bags, save_bags, stratified_folds
from amil_fast.utils.files import DataError


def good():
    rng = np.random.default_rng(0)
    labels = np.array([1, 1, 1, 0, 0, 0])
    return {
        "features": rng.normal(size=(12, 3)).astype(np.float32),
        "offsets": np.array([0, 2, 3, 3, 7, 10, 12]),
        "labels": labels,
        "folds": stratified_folds(labels, 2, 3),
    }


def test_round_trip(tmp_path):
    entries = good()
    save_bags(tmp_path / "a.npz", **entries)
    data = load_bags(tmp_path / "a.npz")
    for name, value in entries.items():
        assert np.array_equal(getattr(data, name), value), name
    assert data.sizes.tolist() == [2, 1, 0, 4, 3, 2]
    rows, cu_seqlens = data.rows(np.array([4, 2, 0]))
    assert rows.tolist() == [7, 8, 9, 0, 1] and cu_seqlens.tolist() == [0, 3, 3, 5]


def test_suffix_is_appended_as_by_numpy(tmp_path):
    save_bags(tmp_path / "bags", **good())
    save_bags(str(tmp_path / "bags.v2"), **good())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bags.npz", "bags.v2.npz"]


def broken(name, value):
    return lambda entries: entries | {name: value(entries[name].copy())}


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: {k: v for k, v in e.items() if k != "offsets"},
            "entry 'offsets' is missing (found: f",
        ),
        (broken("features", lambda a: a[:, 0]), "entry 'features': expected shape (instances, D), got shape (12,)"),
        (
            broken("features", lambda a: a.astype(str)),
            "entry 'features': expected an array of numbers, got dtype <U",
        ),
        (
            broken("features", put((4, 1), np.nan)),
            "entry 'features': expected finite float32 values, got nan in row 4",
        ),
        (broken("features", lambda a: a.astype(float) * 1e300), "finite float32 values, got"),
        (broken("offsets", put(0, 1)), "entry 'offsets': expected the first value to be 0, got 1"),
        (
            broken("offsets", put(-1, 11)),
            "entry 'offsets': expected the last value to be the 12 rows",
        ),
        (broken("offsets", put(2, 9)), "entry 'offsets': expected non-decreasing values, got 9 then 3 at 2"),
        (
            # Differences that wrap around to positive numbers.
            broken("offsets", put(slice(1, 3), [2**63 - 1, -2])),
            "entry 'offsets': expected non-decreasing values, got 9223372036854775807 then -2 at 1",
        ),
        (broken("offsets", lambda a: a.astype(float)), "entry 'offsets': expected integers, got dtype float64"),
        (broken("labels", lambda a: a[:-1]), "entry 'labels': expected shape (6,), one per bag, got shape (5,)"),
        (broken("labels", put(3, 2)), "entry 'labels': expected 0 or 1, got [2] for bag 3"),
        (broken("labels", lambda a: a * 2 - 1), "entry 'labels': expected 0 or 1, got [-1] for bag 3"),
        (broken("folds", lambda a: a[0]), "entry 'folds': expected shape (repetitions, folds, 6), got shape (3, 6)"),
        (
            broken("folds", lambda a: a[..., 1:]),
            "entry 'folds': expected shape (repetitions, folds, 6), got shape (2",
        ),
        (broken("folds", lambda a: a.astype(int) + 1), "entry 'folds': expected bool values"),
        (broken("folds", put((1, 2), True)), "bags in every test part, got none in repetition 1, fold 2"),
        (broken("folds", put((0, 1), False)), "bags in every training part, got none in repetition 0, fold 1"),
    ],
)
def test_bad_entries(tmp_path, change, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **change(good()))
    with pytest.raises(DataError) as error:
        load_bags(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_unreadable_files(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(DataError, match=r"a\.npz: no such file"):
        load_bags(path)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        load_bags(tmp_path)
    np.savez_compressed(path, **good())
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="expected a bag file"):
        load_bags(path)
    content[60:90] = b"x" * 30  # inside the first entry's compressed data
    path.write_bytes(content)
    with pytest.raises(DataError, match="entry 'features': expected an array of numbers, got"):
        load_bags(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bags.csv", b"bag,label\n1,0\n2,1\n"),
        ("bags.h5", b"\x89HDF\r\n\x1a\n" + bytes(100)),
        ("bags.txt", b"not a bag file"),
        ("empty.npz", b""),
        ("bags.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }" + bytes(100)),
    ],
)
def test_other_formats_are_named_and_never_unpickled(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_bags(tmp_path / name)
    expected = "expected a bag file: an .npz archive with the entries features, offsets, labels, folds"
    assert str(error.value) == f"{tmp_path / name}: {expected}"


def test_objects_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **(good() | {"labels": np.array([1, 1, 1, 0, 0, None], dtype=object)}))
    with pytest.raises(DataError, match=r"'labels': expected an array of numbers, got an array of Python objects$"):
        load_bags(tmp_path / "a.npz")


def test_stratified_folds():
    labels = np.array([1] * 7 + [0] * 18)
    folds = stratified_folds(labels, 3, 5, seed=1)
    assert folds.shape == (3, 5, 25)
    assert ((~folds).sum(1) == 1).all(), "every bag is in one test part per repetition"
    for test in (~folds).reshape(-1, 25):
        assert test.sum() == 5 and labels[test].sum() in (1, 2)
    assert not np.array_equal(folds[0], folds[1])
    assert np.array_equal(folds, stratified_folds(labels, 3, 5, seed=1))
    with pytest.raises(ValueError, match=r"folds: expected 2\.\.25"):
        stratified_folds(labels, 1, 26)
