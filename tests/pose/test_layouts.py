"""Data set loaders on small files in the published layouts, and their splits."""

import json

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from amil_fast.pose.data import (
    DataError,
    PoseDataset,
    load,
    load_coco,
    load_lsp,
    load_lspet,
    load_mpii,
    load_mpii_mat,
)
from amil_fast.pose.skeletons import MPII16
from tests.helpers import SHARED
from tests.pose import layouts as make

DATA = SHARED / "data"


def needs(folder):
    return pytest.mark.skipif(not (DATA / folder).exists(), reason=f"{DATA / folder} not found")


# Leeds Sports Pose


def test_lsp(tmp_path):
    joints, hidden = make.lsp(tmp_path)
    train, test = load_lsp(tmp_path), load_lsp(tmp_path, "test")
    assert train.images == [f"images/im000{i}.jpg" for i in (1, 2, 3)]
    assert test.images == [f"images/im000{i}.jpg" for i in (4, 5, 6)] and test.ids == [4, 5, 6]
    np.testing.assert_allclose(np.concatenate([train.joints, test.joints]), joints)
    assert (np.concatenate([train.visibility, test.visibility]) == np.where(hidden, 1, 2)).all()
    assert train.sizes.tolist() == [[80, 60]] * 3
    assert len(load_lsp(tmp_path, "all")) == 6


def test_lspet_joints_without_annotation_are_nan(tmp_path):
    joints, annotated = make.lspet(tmp_path)
    people = load_lspet(tmp_path, "all")
    assert people.images[1] == "images/im00002.jpg"
    assert (people.valid == annotated).all()
    np.testing.assert_allclose(people.joints[annotated], joints[annotated])
    assert np.isnan(people.joints[~annotated]).all()
    sample = PoseDataset(people, 64)[0]
    assert (sample["joints"][~annotated[0]] == 0).all() and (sample["image_joints"][~annotated[0]] == 0).all()
    with pytest.raises(DataError, match="expected more than the 500 validation entries, got 6"):
        load_lspet(tmp_path, "train")


def test_splits_of_lspet(tmp_path):
    savemat(tmp_path / "joints.mat", {"joints": np.ones((14, 3, 520))})
    train, val = (load_lspet(tmp_path, split, check_images=False) for split in ("train", "val"))
    assert train.ids == list(range(1, 21)) and val.ids == list(range(21, 521))


def test_crops_of_whole_images_do_not_depend_on_the_joints(tmp_path):
    make.lspet(tmp_path)
    first = PoseDataset(load_lspet(tmp_path, "all"), 64)[2]
    content = loadmat(tmp_path / "joints.mat")["joints"]
    content[:, :2, 2] = 40 - 0.5 * content[:, :2, 2]
    savemat(tmp_path / "joints.mat", {"joints": content})
    second = PoseDataset(load_lspet(tmp_path, "all"), 64)[2]
    assert (first["image"] == second["image"]).all() and (first["to_image"] == second["to_image"]).all()
    assert not (first["joints"] == second["joints"]).all()
    around = PoseDataset(load_lspet(tmp_path, "all", crop="joints"), 64)[2]
    assert not (around["to_image"] == second["to_image"]).all()
    assert around["valid"].sum() == (around["visibility"] > 0).sum()  # all joints are in the crop


@pytest.mark.parametrize(("write", "load"), [(make.lsp, load_lspet), (make.lspet, load_lsp)])
def test_the_layout_of_the_other_data_set_is_rejected(tmp_path, write, load):
    write(tmp_path)
    with pytest.raises(DataError, match=r"joints.mat: joints: expected .* x images, got .* \(the layout of LSP"):
        load(tmp_path)


@needs("lsp")
def test_lsp_as_published():
    people = load_lsp(DATA / "lsp", "all", check_images=False)
    assert len(people) == 2000
    assert (people.visibility == 1).sum() == 2044 and (people.visibility == 2).sum() == 25956
    assert len(load_lsp(DATA / "lsp", check_images=False)) == 1000


@needs("lspet")
def test_lspet_as_published():
    with pytest.raises(DataError, match=r"joints.mat: entry 8074, joint 1 \(right knee\): \(386.322, 150.625\) lies"):
        load_lspet(DATA / "lspet", "train")
    people = load_lspet(DATA / "lspet", "train", skip_bad=True)
    assert [problem.entry for problem in people.left_out] == ["entry 8074, joint 1 (right knee)"]
    assert len(people) == 8500
    val = load_lspet(DATA / "lspet", "val")
    assert val.images[0] == "images/im08501.jpg"
    assert (people.visibility == 0).sum() + (val.visibility == 0).sum() == 15181 + 1


# MPII


def check_mpii(people, rows):
    assert people.images == [row["image"] for row in rows]
    joints = np.array([row["joints"] for row in rows]) - 1  # MATLAB counts from 1
    valid = np.array([row["joints_vis"] for row in rows]) > 0
    assert (people.valid == valid).all()
    np.testing.assert_allclose(people.joints[valid], joints[valid])
    for box, row in zip(people.boxes, rows, strict=True):
        x, y = np.add(row["center"], (0, 15 * row["scale"])) - 1
        side = 200 * row["scale"]
        np.testing.assert_allclose(box, (x + 0.5 - side / 2, y + 0.5 - side / 2, side, side))
    assert people.margin == 1.25 and people.skeleton is MPII16


def test_mpii_json(tmp_path):
    rows = make.mpii_rows(tmp_path)
    people = load_mpii(tmp_path, "valid")
    check_mpii(people, rows)
    joints = np.array([row["joints"] for row in rows])
    np.testing.assert_allclose(people.head_sizes, 0.75 * np.linalg.norm(joints[:, 8] - joints[:, 9], axis=-1))
    boxes = make.mpii_gt(tmp_path / "annot/gt_valid.mat", rows)
    people = load_mpii(tmp_path, "valid")
    np.testing.assert_allclose(people.head_sizes, 0.6 * np.hypot(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]))
    # the crop's matrix is HRNet's transform: the center of the person is the center of the crop
    sample = PoseDataset(people, 128)[1]
    center = np.add(rows[1]["center"], (0, 15 * rows[1]["scale"])) - 1
    np.testing.assert_allclose(sample["to_image"].numpy() @ (63.5, 63.5, 1), center, atol=1e-3)
    assert sample["to_image"][0, 0].item() == pytest.approx(200 * rows[1]["scale"] * 1.25 / 128)
    assert sample["head_size"].item() == pytest.approx(people.head_sizes[1])


def test_mpii_official_mat(tmp_path):
    rows = make.mpii_rows(tmp_path)
    make.mpii_mat(tmp_path, rows)
    people = load_mpii_mat(tmp_path)
    check_mpii(people, rows)
    assert (people.visibility[:, 0] == 1).all() and (people.visibility[:, 1] == 2).all()
    np.testing.assert_allclose(people.head_sizes, 0.6 * 50)
    test = load_mpii_mat(tmp_path, "test")
    assert test.images == ["test.jpg"] and not test.valid.any()
    savemat(tmp_path / "split.mat", {"RELEASE_img_index": [[1, 2]], "RELEASE_person_index": [[2, 1]]})
    valid = load_mpii_mat(tmp_path, "valid", tompson=tmp_path / "split.mat")
    train = load_mpii_mat(tmp_path, "train", tompson=tmp_path / "split.mat")
    np.testing.assert_allclose(valid.joints, people.joints[[1, 2]])
    np.testing.assert_allclose(train.joints, people.joints[[0, 3]])
    with pytest.raises(ValueError, match="tompson: expected the file"):
        load_mpii_mat(tmp_path, "valid")


def test_mpii_joints_above_the_image_are_right(tmp_path):
    """Neck and head top are computed from the head box, which may reach out of the image."""
    rows = make.mpii_rows(tmp_path)
    rows[0]["joints"][9] = [50.0, -8.0]
    (tmp_path / "annot/valid.json").write_text(json.dumps(rows))
    assert load_mpii(tmp_path, "valid").joints[0, 9].tolist() == [49, -9]
    rows[0]["joints"][10] = [50.0, -8.0]
    (tmp_path / "annot/valid.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"valid.json: entry 0, joint 10 \(right wrist\): \(49, -9\) lies outside"):
        load_mpii(tmp_path, "valid")


# COCO


def test_coco(tmp_path):
    content = make.coco(tmp_path)
    people = load_coco(tmp_path)
    rows = [content["annotations"][i] for i in (0, 3, 4)]  # neither crowds nor people without joints
    assert people.ids == [7, 7, 39] and people.images[2] == "000000000039.jpg"
    points = np.array([row["keypoints"] for row in rows]).reshape(3, 17, 3)
    assert (people.visibility == points[..., 2]).all()
    np.testing.assert_allclose(people.joints[people.valid], points[points[..., 2] > 0][:, :2])
    np.testing.assert_allclose(people.boxes, [row["bbox"] for row in rows])
    assert len(load("coco", tmp_path)) == 3


# Splits


def test_folds_do_not_separate_people_of_one_image(tmp_path):
    make.mpii_rows(tmp_path, S=12)
    people = load_mpii(tmp_path, "valid")
    seen = []
    for number in range(3):
        train, test = people.fold(number, 3, seed=5)
        assert len(train) + len(test) == 12 and not set(train.images) & set(test.images)
        assert len(test) == 4
        seen += test.images
        # By the order of the images in the file, not by that of a set, which differs between processes.
        folds = np.random.default_rng(5).permutation(6) % 3
        images = list(dict.fromkeys(people.images))
        assert set(test.images) == {images[i] for i in np.flatnonzero(folds == number)}
    assert sorted(seen) == sorted(people.images)
    with pytest.raises(ValueError, match="fold: expected 0 <= number < folds <= 6 images, got 3 of 3"):
        people.fold(3, 3)


def test_names_of_splits_and_data_sets(tmp_path):
    with pytest.raises(ValueError, match="dataset: expected one of 'lsp'"):
        load("lps", tmp_path)
    for name in ("lsp", "lspet", "mpii", "mpii-mat"):
        with pytest.raises(ValueError, match="split: expected one of"):
            load(name, tmp_path, "tset")
