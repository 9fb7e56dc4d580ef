"""Data set loaders on small files in the published layouts, and their errors for invalid files."""

import json

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat

from amil_fast.pose.data import (
    Boxes,
    DataError,
    PoseDataset,
    VideoFrames,
    VideoPeople,
    find_inputs,
    find_ucf11,
    load,
    load_coco,
    load_folder,
    load_lsp,
    load_lspet,
    load_mpii,
    load_mpii_mat,
)
from amil_fast.pose.data.files import image_size, read_image, safe_path
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


# COCO, folders, videos


def test_coco(tmp_path):
    content = make.coco(tmp_path)
    people = load_coco(tmp_path)
    rows = [content["annotations"][i] for i in (0, 3, 4)]  # no crowd, nobody without joints
    assert people.ids == [7, 7, 39] and people.images[2] == "000000000039.jpg"
    points = np.array([row["keypoints"] for row in rows]).reshape(3, 17, 3)
    assert (people.visibility == points[..., 2]).all()
    np.testing.assert_allclose(people.joints[people.valid], points[points[..., 2] > 0][:, :2])
    np.testing.assert_allclose(people.boxes, [row["bbox"] for row in rows])
    assert len(load("coco", tmp_path)) == 3


def test_folder_with_and_without_boxes(tmp_path):
    make.picture(tmp_path / "in/a.jpg", 60, 40)
    make.picture(tmp_path / "in/deep/000012.png", 50, 70)
    whole = load_folder(tmp_path / "in")
    assert whole.images == ["a.jpg", "deep/000012.png"] and np.isnan(whole.boxes).all() and not whole.valid.any()
    sample = PoseDataset(whole, 32)[0]
    np.testing.assert_allclose(sample["to_image"].numpy() @ (15.5, 15.5, 1), (29.5, 19.5), atol=1e-5)

    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({"a.jpg": [[1, 2, 30, 20], [5, 5, 10, 10]], "000012.png": [[0, 0, 9, 9]]}))
    people = load_folder(tmp_path / "in", boxes)
    assert people.images == ["a.jpg", "a.jpg", "deep/000012.png"]
    assert people.boxes.tolist() == [[1, 2, 30, 20], [5, 5, 10, 10], [0, 0, 9, 9]]


def test_boxes_by_row(tmp_path):
    path = tmp_path / "boxes.json"
    rows = [
        {"image_id": 12, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.9},
        {"file_name": "clip.mp4", "frame": 3, "bbox": [5, 6, 7, 8]},
        {"file_name": "clip.mp4", "bbox": [9, 9, 9, 9]},
    ]
    path.write_text(json.dumps(rows))
    boxes = Boxes(path)
    assert boxes.of("images/000000000012.jpg").tolist() == [[1, 2, 3, 4]]
    assert boxes.of("clip.mp4", 3).tolist() == [[5, 6, 7, 8], [9, 9, 9, 9]]
    assert boxes.of("clip.mp4", 4).tolist() == [[9, 9, 9, 9]]
    assert boxes.of("nobody.jpg").shape == (0, 4)
    assert np.isnan(Boxes().of("any.jpg")).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a.jpg": [[1, 2, 3]]}', r"'a.jpg', box 0: expected \[x, y, width, height\]"),
        ('{"a.jpg": 3}', "'a.jpg', box 0"),
        ('[{"bbox": [1, 2, 3, 4]}]', "row 0: expected bbox and file_name or image_id"),
        ('[{"file_name": "a", "bbox": [1, 2, -3, 4]}]', "row 0: expected .* with positive width and height"),
        ("7", "expected an object or a list, got int"),
        ("{", "expected a JSON file"),
    ],
)
def test_bad_boxes(tmp_path, content, message):
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(DataError, match=f"boxes.json: {message}"):
        Boxes(tmp_path / "boxes.json")


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".mpg"])
def test_video_frames(tmp_path, suffix):
    path = make.video(tmp_path / f"clip{suffix}", frames=9, rate=25)
    frames = VideoFrames(path)
    found = list(frames)
    assert [number for number, _ in found] == list(range(9)) and frames.missing == 0
    assert frames.rate == pytest.approx(25)
    brightness = [frame[40:].mean() for _, frame in found]
    np.testing.assert_allclose(brightness, 10 + 15 * np.arange(9), atol=4)


def test_people_in_videos(tmp_path):
    paths = [make.video(tmp_path / name, frames=6, width=96, height=64) for name in ("a.avi", "b.mp4")]
    whole = list(VideoPeople(paths, size=32, every=2))
    assert [(s["video"].item(), s["frame"].item()) for s in whole] == [(v, f) for v in range(2) for f in (0, 2, 4)]
    np.testing.assert_allclose(whole[0]["to_image"].numpy() @ (15.5, 15.5, 1), (47.5, 31.5), atol=1e-5)
    assert whole[0]["image"].shape == (3, 32, 32) and whole[0]["to_image"][0, 0] == 3
    brightness = [sample["image"][0, 18:24].float().mean().item() for sample in whole[:3]]
    np.testing.assert_allclose(brightness, [10, 40, 70], atol=4)

    rows = [{"file_name": "b.mp4", "bbox": [10, 10, 20, 30]}, {"file_name": "b.mp4", "frame": 3, "bbox": [0, 0, 9, 9]}]
    (tmp_path / "boxes.json").write_text(json.dumps(rows))
    found = VideoPeople(paths, tmp_path / "boxes.json", size=32)
    assert [sample["frame"].item() for sample in found] == [0, 1, 2, 3, 3, 4, 5]
    np.testing.assert_allclose(next(iter(found))["to_image"].numpy() @ (15.5, 15.5, 1), (19.5, 24.5), atol=1e-5)
    loader = torch.utils.data.DataLoader(VideoPeople(paths, size=32), 4, num_workers=2)
    shown = [pair for b in loader for pair in zip(b["video"].tolist(), b["frame"].tolist(), strict=True)]
    assert sorted(shown) == [(v, f) for v in range(2) for f in range(6)]


def test_truncated_video(tmp_path):
    path = make.video(tmp_path / "clip.avi", frames=20, width=640, height=480)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])
    frames = VideoFrames(path)
    read = sum(frame is not None for _, frame in frames)
    assert 5 < read < 20
    assert frames.missing + read == frames.expected or frames.expected <= read
    path.write_bytes(data[:40])
    with pytest.raises(DataError, match=r"clip.avi: expected a video, cannot be opened"):
        VideoFrames(path)


def test_ucf11(tmp_path):
    for name in ("biking/v_biking_01/v_biking_01_01.avi", "diving/v_diving_02/v_diving_02_03.avi"):
        make.video(tmp_path / name, frames=3)
    (tmp_path / "biking/Annotation").mkdir()
    (tmp_path / "biking/Annotation/v_biking_01_01.xgtf").write_text("<viper/>")
    clips = find_ucf11(tmp_path)
    assert [(clip.label, clip.group) for clip in clips] == [("biking", "v_biking_01"), ("diving", "v_diving_02")]
    assert len(list(clips[1].frames())) == 3
    assert [clip.label for clip in find_ucf11(tmp_path, ["diving"])] == ["diving"]
    with pytest.raises(DataError, match="swing: expected videos at swing/<group>"):
        find_ucf11(tmp_path, ["swing"])


def test_inputs(tmp_path):
    make.picture(tmp_path / "b.jpg", 20, 20)
    make.picture(tmp_path / "deep/a.PNG", 20, 20)
    (tmp_path / "notes.txt").write_text("not an image")
    assert [name.as_posix() for _, name in find_inputs([tmp_path])] == ["b.jpg", "deep/a.PNG"]
    with pytest.raises(DataError, match=r"notes.txt: expected an image or a video"):
        find_inputs([tmp_path / "notes.txt"])
    with pytest.raises(DataError, match=r"c.jpg: no such file"):
        find_inputs([tmp_path / "c.jpg"])


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
        again = people.fold(number, 3, seed=5)[1]
        assert again.images == test.images
    assert sorted(seen) == sorted(people.images)
    with pytest.raises(ValueError, match="fold: expected 0 <= number < folds <= 6 images, got 3 of 3"):
        people.fold(3, 3)


# Bad data


def damage(root, kind):
    """Damages entry 1 of a small LSPET."""
    image = root / "images/im00002.jpg"
    if kind == "missing":
        (root / "images/im99999.jpg").write_bytes(image.read_bytes())  # the number of files is unchanged
        image.unlink()
    elif kind == "truncated":
        make.truncate(image)
    elif kind == "not an image":
        image.write_text("this is text")
    elif kind == "empty":
        image.write_bytes(b"")
    elif kind == "outside":
        content = loadmat(root / "joints.mat")["joints"]
        content[4, :, 1] = (500, 20, 1)
        savemat(root / "joints.mat", {"joints": content})
    elif kind == "nan":
        content = loadmat(root / "joints.mat")["joints"]
        content[4, :, 1] = (np.nan, 20, 1)
        savemat(root / "joints.mat", {"joints": content})


@pytest.mark.parametrize(
    ("kind", "message", "left"),
    [
        ("missing", r"joints.mat: entry 1: .*im00002.jpg: no such image", 5),
        ("truncated", r"joints.mat: entry 1: .*im00002.jpg: (truncated JPEG|expected an image)", 5),
        ("not an image", r"joints.mat: entry 1: .*im00002.jpg: expected an image", 5),
        ("empty", r"joints.mat: entry 1: .*im00002.jpg: expected an image", 5),
        ("outside", r"joints.mat: entry 1, joint 4 \(left knee\): \(500, 20\) lies outside the image of 80 x 60", 6),
        ("nan", r"joints.mat: entry 1, joint 4 \(left knee\): \(nan, 20\) lies outside", 6),
    ],
)
def test_bad_entries(tmp_path, kind, message, left):
    _, annotated = make.lspet(tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(DataError, match=message):
        load_lspet(tmp_path, "all")
    people = load_lspet(tmp_path, "all", skip_bad=True)
    assert len(people.left_out) == 1 and str(people.left_out[0]).startswith(str(tmp_path / "joints.mat"))
    assert len(people) == left
    if left == 6:
        assert people.visibility[1, 4] == 0 and np.isnan(people.joints[1, 4]).all()
        assert (people.visibility > 0).sum() == (annotated.sum() - annotated[1, 4])
    for i in range(left):
        PoseDataset(people, 32)[i]


def test_number_of_images_differs_from_entries(tmp_path):
    make.lsp(tmp_path)
    (tmp_path / "images/im0006.jpg").unlink()
    with pytest.raises(DataError, match=r"joints.mat: 6 entries, but .*images holds 5 files"):
        load_lsp(tmp_path, "train")
    people = load_lsp(tmp_path, "test", skip_bad=True)
    assert len(people) == 2 and len(people.left_out) == 2  # the count, and the image itself


def test_image_damaged_after_loading(tmp_path):
    """The error names the file."""
    make.lspet(tmp_path)
    people = load_lspet(tmp_path, "all")
    make.truncate(tmp_path / "images/im00003.jpg")
    with pytest.raises(DataError, match=r"im00003.jpg: "):
        PoseDataset(people, 32)[2]


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg", "C:\\x.jpg", "\\\\host\\x", "", "a\0b", 7]
)
def test_paths_outside_the_data_set(tmp_path, name):
    rows = make.mpii_rows(tmp_path)
    rows[2]["image"] = name
    (tmp_path / "annot/valid.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"valid.json: entry 2: expected (a path|the name)"):
        load_mpii(tmp_path, "valid")
    people = load_mpii(tmp_path, "valid", skip_bad=True)
    assert len(people) == 3 and "entry 2" in str(people.left_out[0])
    with pytest.raises(ValueError, match="expected"):
        safe_path(tmp_path, name)


def test_unusual_names_inside_the_data_set(tmp_path):
    assert safe_path(tmp_path, "a/b..c/..d.jpg") == tmp_path / "a/b..c/..d.jpg"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"center": None}, "entry 1"),
        ({"joints": [[1, 2]]}, r"entry 1: expected center \(2,\), joints \(16, 2\)"),
        ({"scale": -1}, "entry 1: expected a finite center and a positive scale"),
        ({"scale": "big"}, "entry 1: could not convert"),
        (None, "entry 1: 'image' is missing"),
        (3, "entry 1"),
    ],
)
def test_bad_rows(tmp_path, change, message):
    rows = make.mpii_rows(tmp_path)
    if isinstance(change, dict):
        rows[1] |= change
    elif change is None:
        del rows[1]["image"]
    else:
        rows[1] = change
    (tmp_path / "annot/valid.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=f"valid.json: {message}"):
        load_mpii(tmp_path, "valid")
    assert len(load_mpii(tmp_path, "valid", skip_bad=True)) == 3


def test_bad_coco_rows(tmp_path):
    content = make.coco(tmp_path)
    path = tmp_path / "annotations/person_keypoints_val2017.json"
    for change, message in (
        ({"keypoints": [1, 2, 2]}, "expected 51 numbers as keypoints"),
        ({"image_id": 99}, "image_id 99 is not among the images"),
        ({"bbox": [1, 2, 0, 4]}, "expected a bbox with positive width and height"),
    ):
        bad = json.loads(json.dumps(content))
        bad["annotations"][3] |= change
        path.write_text(json.dumps(bad))
        with pytest.raises(DataError, match=rf"val2017.json: annotations\[3\]: {message}"):
            load_coco(tmp_path)
        assert len(load_coco(tmp_path, skip_bad=True)) == 2


@pytest.mark.parametrize("content", [b"{not json", b"\xff\xfe\x00", b"", b"[" * 100_000])
def test_invalid_json(tmp_path, content):
    make.mpii_rows(tmp_path)
    (tmp_path / "annot/valid.json").write_bytes(content)
    with pytest.raises(DataError, match=r"valid.json: expected a JSON file"):
        load_mpii(tmp_path, "valid")
    (tmp_path / "annot/valid.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"valid.json: expected a list of people, got dict"):
        load_mpii(tmp_path, "valid")


def test_invalid_mat(tmp_path):
    with pytest.raises(DataError, match=r"joints.mat: no such file"):
        load_lsp(tmp_path)
    for content in (b"", b"no matlab", b"\x00" * 200):
        (tmp_path / "joints.mat").write_bytes(content)
        with pytest.raises(DataError, match=r"joints.mat: expected a"):
            load_lsp(tmp_path)
    savemat(tmp_path / "joints.mat", {"other": 1})
    with pytest.raises(DataError, match=r"joints.mat: expected a variable 'joints', found other"):
        load_lsp(tmp_path)


def test_number_of_head_boxes_differs_from_people(tmp_path):
    rows = make.mpii_rows(tmp_path)
    make.mpii_gt(tmp_path / "annot/gt_valid.mat", rows[:3])
    with pytest.raises(DataError, match=r"gt_valid.mat: 3 head boxes, but .*valid.json has 4 people"):
        load_mpii(tmp_path, "valid")


def test_names_of_splits_and_data_sets(tmp_path):
    with pytest.raises(ValueError, match="dataset: expected one of 'lsp'"):
        load("lps", tmp_path)
    for name in ("lsp", "lspet", "mpii", "mpii-mat"):
        with pytest.raises(ValueError, match="split: expected one of"):
            load(name, tmp_path, "tset")


# Files


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_truncated_images_are_detected(tmp_path, suffix):
    path = make.picture(tmp_path / f"a{suffix}", 64, 48)
    assert image_size(path) == (64, 48)
    data = path.read_bytes()
    for share in (0.995, 0.7, 0.3, 0.05, 0):
        path.write_bytes(data[: int(len(data) * share)])
        for read in (image_size, read_image):
            with pytest.raises(DataError, match=rf"a{suffix}: (truncated|expected an image)"):
                read(path)
    path.unlink()
    for read in (image_size, read_image):
        with pytest.raises(DataError, match=rf"a{suffix}: no such image"):
            read(path)
    if suffix == ".jpg":
        path.write_bytes(data + b"trailing bytes as some cameras append")
        assert image_size(path) == (64, 48)


def test_reduced_decoding_introduces_no_shift(tmp_path):
    """A JPEG decoded at 1/4 of its size gives the same crop within a fraction of a pixel."""
    import cv2

    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.integers(0, 255, (6, 8, 3)).astype(np.uint8), (801, 603), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(tmp_path / "a.jpg"), smooth)
    cv2.imwrite(str(tmp_path / "a.png"), smooth)
    (tmp_path / "boxes.json").write_text(json.dumps({name: [[31, 22, 700, 500]] for name in ("a.jpg", "a.png")}))
    people = load_folder(tmp_path, tmp_path / "boxes.json")
    jpeg, png = (PoseDataset(people, 128)[i]["image"].float() for i in range(2))
    assert read_image(tmp_path / "a.jpg", shrink=4.5)[1] == 4 and read_image(tmp_path / "a.png", shrink=4.5)[1] == 1
    inside = (slice(None), slice(24, -24), slice(8, -8))
    assert (jpeg - png).abs()[inside].mean() < 1.0
    shifted = (jpeg[:, :, 1:] - png[:, :, :-1]).abs()[:, 24:-24, 8:-8].mean()
    assert shifted > 2 * (jpeg - png).abs()[inside].mean()  # the difference that a shift by one pixel causes
