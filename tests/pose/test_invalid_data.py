"""Invalid files: errors name file and entry, and ``skip_bad`` excludes and lists the entry."""

import json

import cv2
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from amil_fast.pose.data import DataError, PoseDataset, load_coco, load_folder, load_lsp, load_lspet, load_mpii
from amil_fast.pose.data.files import image_size, read_image, safe_path
from tests.pose import layouts as make


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
    "name",
    ["../secret.jpg", "/etc/passwd", "a/../../b.jpg", "a\\..\\b.jpg", "C:\\x.jpg", "\\\\host\\x", "", "a\0b", 7],
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
        ({"bbox": [1, 2, 0, 4]}, r"expected a bbox \[x, y, width, height\] with positive width and height"),
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


def test_end_marker_of_a_thumbnail_does_not_end_the_image(tmp_path):
    """A JPEG truncated in its coded data, with a complete thumbnail in its header."""
    whole = make.picture(tmp_path / "a.jpg", 64, 48).read_bytes()
    thumbnail = make.picture(tmp_path / "b.jpg", 16, 12).read_bytes()
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    path = tmp_path / "c.jpg"
    path.write_bytes(whole[:2] + segment + whole[2:])
    assert image_size(path) == (64, 48)
    path.write_bytes(whole[:2] + segment + whole[2:-40])
    for read in (image_size, read_image):
        with pytest.raises(DataError, match=r"c.jpg: truncated JPEG file"):
            read(path)


def test_reduced_decoding_introduces_no_shift(tmp_path):
    """A JPEG decoded at 1/4 of its size gives the same crop within a fraction of a pixel."""
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
