"""Labels of bags: CSV files, classes and values, splits by group."""

import numpy as np
import pytest

from amil_fast.mil import load_labeled_bags, make_targets, split_groups
from amil_fast.mil.bag_files import save_bags
from amil_fast.utils.files import DataError
from tests.mil.helpers import easy_bags
from tests.mil.own_bags import write_bag


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "bags").mkdir()
    for name in "abcd":
        write_bag(tmp_path / "bags", name, np.ones((ord(name) - 95, 3), dtype=np.float32))
    return tmp_path / "bags"


def labels_file(folder, text):
    path = folder.parent / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_columns(folder):
    path = labels_file(
        folder,
        "\ufeffbag_id, label,group,split,fold\nd,tumor,p1,train,0\nb,normal,p2,Validation,1\na,tumor,p3,test,1\n",
    )
    bags = load_labeled_bags(folder, path)
    assert bags.source.names == ["d", "b", "a"] and bags.source.sizes.tolist() == [5, 3, 2]
    assert bags.labels == ["tumor", "normal", "tumor"] and bags.groups == ["p1", "p2", "p3"]
    assert bags.splits == ["train", "val", "test"] and bags.folds.tolist() == [0, 1, 1]
    assert bags.in_split("val").tolist() == [1]
    plain = load_labeled_bags(folder, labels_file(folder, "bag_id,label\na,1\nb,0\n"))
    assert plain.groups is plain.splits is plain.folds is None
    assert plain.in_split("train").tolist() == [0, 1] and plain.in_split("test").tolist() == []
    unlabeled = load_labeled_bags(folder, labels_file(folder, "bag_id,label\na,\nb,0\n"), need_labels=False)
    assert unlabeled.labels == [None, "0"]
    assert load_labeled_bags(folder, need_labels=False).labels == [None] * 4


def test_without_csv(folder, tmp_path):
    data = easy_bags(6)
    save_bags(tmp_path / "a.npz", data.features, data.offsets, data.labels, data.folds)
    assert load_labeled_bags(tmp_path / "a.npz").labels == list("010101")
    with pytest.raises(DataError, match="contains no labels; pass a CSV file with the columns bag_id,label"):
        load_labeled_bags(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row 1: expected the columns bag_id,label[,group][,split][,fold], got nothing"),
        ("slide,label\na,1\n", "row 1: expected the columns bag_id,label[,group][,split][,fold], got slide,label"),
        ("bag_id,label\n", "expected a row per bag, got none"),
        ("bag_id,label\na,1\nb\n", "row 3: expected 2 fields"),
        ("bag_id,label\na,1\nb,0,7\n", "row 3: expected 2 fields"),
        ("bag_id,label\na,1\n,0\n", "row 3: bag_id: expected a value"),
        ("bag_id,label\na,1\nb,0\na,0\n", "row 4: bag_id: 'a' is also in row 2"),
        ("bag_id,label\na,1\nb,\n", "row 3: label: expected a value, got none for bag 'b'"),
        ("bag_id,label,split\na,1,training\nb,0,dev\n", "row 3: split: expected train, val or test, got 'dev'"),
        ("bag_id,label,fold\na,1,0\nb,0,-1\n", "row 3: fold: expected a whole number, got '-1'"),
        ("bag_id,label,group\na,1,p\nb,0,\n", "row 3: group: expected a value"),
        (
            "bag_id,label,group,split\na,1,p,train\nb,0,q,train\nc,1,p,test\n",
            "row 4: split: group 'p' is in test here and in train in row 2",
        ),
        ("bag_id,label,group,fold\na,1,p,0\nb,0,p,1\n", "row 3: fold: group 'p' is in 1 here and in 0 in row 2"),
    ],
)
def test_bad_csv(folder, text, message):
    path = labels_file(folder, text)
    with pytest.raises(DataError) as error:
        load_labeled_bags(folder, path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_absent_files(folder, tmp_path):
    with pytest.raises(DataError, match=r"none\.csv: cannot be read: No such file"):
        load_labeled_bags(folder, tmp_path / "none.csv")
    with pytest.raises(DataError, match="found none for bag 'z'"):
        load_labeled_bags(folder, labels_file(folder, "bag_id,label\na,1\nz,0\n"))
    (tmp_path / "labels.csv").write_bytes(b"bag_id,label\n\xff\xfe,1\n")
    with pytest.raises(DataError, match=r"labels\.csv: expected a CSV file"):
        load_labeled_bags(folder, tmp_path / "labels.csv")


def test_targets():
    two = make_targets(["b", "a", None, "b"])
    assert two.task == "classification" and two.names == ("a", "b") and two.values.tolist() == [1, 0, -1, 1]
    assert two.known.tolist() == [True, True, False, True]
    assert make_targets(["b", "a"], positive="a").names == ("b", "a")
    assert make_targets(["10", "9", "2"]).names == ("2", "9", "10")
    assert make_targets(["b", "a"], "one_vs_rest").task == "classification"
    assert make_targets(["b", "a", "c"], "one_vs_rest").task == "one_vs_rest"
    assert make_targets(["a"], names=("b", "a")).values.tolist() == [1]
    values = make_targets(["1", None, "2.5"])
    assert values.task == "regression" and values.names == () and values.known.tolist() == [True, False, True]
    assert make_targets(["1", "2"], "regression").values.tolist() == [1.0, 2.0]
    for arguments, message in [
        ((["a", "a"],), "expected at least two classes, got a"),
        ((["a", "1"], "regression"), "expected finite numbers for regression, got 'a'"),
        ((["1", "nan"], "regression"), "expected finite numbers for regression, got 'nan'"),
        (([str(i) for i in range(30)],), "30 distinct labels of 30 bags; set the task"),
        ((["a"], "ranking"), "task: expected one of auto, classification"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_targets(*arguments)
    with pytest.raises(ValueError, match="positive: expected one of two classes, got 'x'"):
        make_targets(["a", "b"], positive="x")
    with pytest.raises(ValueError, match="label: expected one of a, b, got 'c'"):
        make_targets(["c"], names=("a", "b"))


def test_groups_are_never_split():
    rng = np.random.default_rng(0)
    groups = [f"p{i}" for i in rng.integers(0, 25, 100)]
    labels = rng.integers(0, 2, 25)
    targets = np.array([labels[int(group[1:])] for group in groups])
    folds = split_groups(targets, groups, 5, seed=1)
    assert set(folds.tolist()) == set(range(5))
    for group in set(groups):
        assert len({fold for fold, g in zip(folds, groups, strict=True) if g == group}) == 1
    assert np.array_equal(folds, split_groups(targets, groups, 5, seed=1))
    assert not np.array_equal(folds, split_groups(targets, groups, 5, seed=2))
    # Without groups the classes are evenly distributed; values by quartile.
    alone = split_groups(targets, None, 5, seed=0)
    assert np.ptp([targets[alone == fold].sum() for fold in range(5)]) <= 1
    values = rng.normal(size=40)
    of_value = split_groups(values, None, 4, seed=0)
    smallest = [(values[of_value == fold] < np.quantile(values, 0.25)).sum() for fold in range(4)]
    assert min(smallest) >= 2 and sum(smallest) == 10
    assert len(set(split_groups(np.arange(3), None, 3, seed=0).tolist())) == 3
    with pytest.raises(ValueError, match=r"folds: expected 2\.\.2 \(the number of groups\), got 3"):
        split_groups(np.array([0, 1, 0, 1]), ["a", "a", "b", "b"], 3, seed=0)
