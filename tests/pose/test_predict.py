"""File-based prediction, using a network with known predictions."""

import json
import time

import cv2
import numpy as np
import pytest
import torch

from amil_fast.pose.codec import crop_matrix, joints_box
from amil_fast.pose.data import Boxes, DataError, VideoFrames, load_lsp
from amil_fast.pose.evaluation.evaluate import predict_people
from amil_fast.pose.inference.frames import Frame
from amil_fast.pose.inference.predict import predict
from amil_fast.pose.inference.predictor import Predictor
from amil_fast.pose.inference.two_stage import COARSE_MARGINS, num_crops, search
from amil_fast.pose.skeletons import LSP14
from tests.pose import layouts as make
from tests.pose.color_finder import GROUND, ColorFinder, ground, paint, person


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture
def inputs(tmp_path):
    """Creates a folder of images (one corrupt) and a video; returns the folder and the joints by (name, frame)."""
    rng = np.random.default_rng(0)
    joints = {}
    for name, (width, height) in {"a.jpg": (300, 200), "deep/b.png": (201, 333)}.items():
        joints[name, None] = person(rng, width, height)
        write(tmp_path / "in" / name, paint(ground(width, height), joints[name, None], 5))
    make.truncate(make.picture(tmp_path / "in/bad.jpg", 90, 90))
    writer = cv2.VideoWriter(str(tmp_path / "in/clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 12, (320, 240))
    for frame in range(7):
        joints["clip.avi", frame] = person(rng, 320, 240)
        writer.write(paint(ground(320, 240), joints["clip.avi", frame], 5))
    writer.release()
    return tmp_path / "in", joints


def keypoints(row):
    return np.array(row["keypoints"]).reshape(-1, 3)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_images_and_videos(inputs, tmp_path, batch_size):
    folder, joints = inputs
    problems, progress = [], []
    summary = predict(
        Predictor(ColorFinder()),
        [folder],
        tmp_path / "out",
        batch_size=batch_size,
        on_problem=problems.append,
        on_progress=lambda *numbers: progress.append(numbers),
    )
    assert summary.images == summary.people == 9 and not summary.interrupted and summary.images_per_second > 0
    assert len(problems) == 1 and "bad.jpg" in problems[0] and summary.unreadable == problems
    assert progress[-1] == (10, 10)
    rows = json.loads((tmp_path / "out/predictions.json").read_text())
    assert len(rows) == 9
    for row in rows:
        expected = joints[row["file_name"], row.get("frame")]
        assert np.abs(keypoints(row)[:, :2] - expected).max() < 1.5, row["file_name"]
        assert keypoints(row)[:, 2].min() > 0 and row["category_id"] == 1
        assert row["score"] == pytest.approx(keypoints(row)[:, 2].mean(), abs=1e-4)
    assert rows[0]["bbox"] == [0, 0, 300, 200] and rows[0]["image_id"] == "a.jpg"
    assert [row["image_id"] for row in rows[1:3]] == ["clip.avi:0", "clip.avi:1"]

    files = sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert files == ["a.jpg", "clip.avi", "deep/b.png", "predictions.json"]
    overlay = cv2.imread(str(tmp_path / "out/deep/b.png"))
    original = cv2.imread(str(folder / "deep/b.png"))
    assert overlay.shape == original.shape
    knee, ankle = joints["deep/b.png", None][[1, 0]]
    x, y = ((knee + ankle) / 2).round().astype(int)
    shin = LSP14.limb_colors[LSP14.limbs.index((LSP14.index("right knee"), LSP14.index("right ankle")))]
    assert np.abs(overlay[y, x].astype(int) - shin[::-1]).max() < 40 and (original[y, x] == GROUND[::-1]).all()
    frames = VideoFrames(tmp_path / "out/clip.avi")
    assert frames.rate == 12 and sum(frame is not None for _, frame in frames) == 7


def test_boxes(tmp_path):
    """One image has two bounding boxes, which are cropped separately; another image has none."""
    rng = np.random.default_rng(1)
    image, boxes = ground(600, 400), [[30, 40, 200, 220], [330, 120, 240, 200]]
    people = [person(rng, box=box) for box in boxes]
    for joints in people:
        paint(image, joints, 6)
    write(tmp_path / "000000000012.png", image)
    write(tmp_path / "empty.png", ground(100, 100))
    (tmp_path / "boxes.json").write_text(json.dumps([{"image_id": 12, "bbox": box} for box in boxes]))
    files = [tmp_path / "000000000012.png", tmp_path / "empty.png"]
    summary = predict(Predictor(ColorFinder()), files, tmp_path / "out", boxes=tmp_path / "boxes.json", margin=1.0)
    rows = json.loads((tmp_path / "out/predictions.json").read_text())
    assert (summary.images, summary.people) == (2, 2)
    assert [row["image_id"] for row in rows] == [12, 12] and [row["bbox"] for row in rows] == boxes
    for row, joints in zip(rows, people, strict=True):
        assert np.abs(keypoints(row)[:, :2] - joints).max() < 2
    assert (cv2.imread(str(tmp_path / "out/empty.png")) == ground(100, 100)).all()
    # the predictions are a valid file of bounding boxes
    assert Boxes(tmp_path / "out/predictions.json").of("000000000012.png").tolist() == boxes


def test_exif_orientation_is_applied(tmp_path):
    """Cameras store images in sensor orientation, together with an EXIF orientation tag."""
    from PIL import Image

    joints = person(np.random.default_rng(2), 200, 300)
    upright = paint(ground(200, 300), joints, 6)
    rotated = Image.fromarray(np.rot90(upright)[:, :, ::-1].copy())
    exif = rotated.getexif()
    exif[0x0112] = 6  # to be rotated clockwise
    rotated.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    predict(Predictor(ColorFinder()), [tmp_path / "photo.jpg"], tmp_path / "out")
    (row,) = json.loads((tmp_path / "out/predictions.json").read_text())
    assert np.abs(keypoints(row)[:, :2] - joints).max() < 1.5
    assert cv2.imread(str(tmp_path / "out/photo.jpg")).shape == (300, 200, 3)


def test_equal_file_names_get_distinct_outputs(tmp_path):
    for folder in ("one", "two"):
        write(tmp_path / folder / "a.png", ground(40, 40))
    summary = predict(Predictor(ColorFinder()), [tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    rows = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [row["file_name"] for row in rows] == ["a.png", "a-2.png"] and len(summary.written) == 3


def test_inputs_are_never_overwritten(tmp_path):
    write(tmp_path / "in/a.png", ground(40, 40))
    write(tmp_path / "in/b.bmp", ground(40, 40))
    before = (tmp_path / "in/a.png").read_bytes()
    predictor = Predictor(ColorFinder())
    with pytest.raises(DataError, match=r"in: expected another folder, the overlay would overwrite .*a.png"):
        predict(predictor, [tmp_path / "in/a.png"], tmp_path / "in")
    with pytest.raises(DataError, match=r"expected another folder"):
        predict(predictor, [tmp_path / "in"], tmp_path / "in")
    # an output folder below the inputs is not read as input by the next run
    for _ in range(2):
        summary = predict(predictor, [tmp_path / "in"], tmp_path / "in/found")
        assert summary.images == 2
    names = sorted(path.name for path in (tmp_path / "in/found").iterdir())
    assert names == ["a.png", "b.bmp.jpg", "predictions.json"]
    predict(predictor, [tmp_path / "in/a.png"], tmp_path / "in", overlays=False)
    assert (tmp_path / "in/a.png").read_bytes() == before


def test_damaged_videos_do_not_stop_the_run(inputs, tmp_path):
    folder, _ = inputs
    data = (folder / "clip.avi").read_bytes()
    (folder / "clip.avi").write_bytes(data[: int(0.75 * len(data))])
    (folder / "broken.mp4").write_bytes(b"no video")
    summary = predict(Predictor(ColorFinder()), [folder], tmp_path / "out")
    assert len(summary.unreadable) == 3
    report = " ".join(summary.unreadable)
    assert "broken.mp4: expected a video" in report and "of 7 frames are missing" in report and "bad.jpg" in report
    assert 4 <= summary.images < 9
    assert (tmp_path / "out/clip.avi").exists() and (tmp_path / "out/deep/b.png").exists()


class Interrupting(ColorFinder):
    """Raises KeyboardInterrupt during the fourth batch."""

    def forward(self, images):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls > 6:  # two forward passes per batch (flip test)
            raise KeyboardInterrupt
        return super().forward(images)


def test_interrupted_runs_leave_complete_files_only(inputs, tmp_path):
    folder, _ = inputs
    summary = predict(Predictor(Interrupting()), [folder], tmp_path / "out", batch_size=1)
    assert summary.interrupted
    rows = json.loads((tmp_path / "out/predictions.json").read_text())
    assert len(rows) == 3  # one image and two frames
    files = [file.name for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert sorted(files) == ["a.jpg", "predictions.json"]  # no truncated video, no temporary file


def test_missing_inputs(tmp_path):
    predictor = Predictor(ColorFinder())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no image or video found"):
        predict(predictor, [tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(DataError, match=r"boxes.json: no such file"):
        predict(predictor, [tmp_path / "empty"], tmp_path / "out", boxes=tmp_path / "boxes.json")


def test_search_for_people():
    """Every scale is refined; the better half is refined again. Candidates with too few joints are not."""
    calls = []
    mean_scores = np.array([[0.3, 0.5], [0.5, 0.4], [0.6, 0.1], [0.7, 0.3]])  # of every scale and person

    def look(people, boxes, part):
        number = len(calls)
        calls.append((people.tolist(), boxes, part))
        coords = np.tile(np.linspace(0, 20, 14)[:, None] + [30.0, 40.0], (len(people), 1, 1)) + number
        if number < 4:
            return coords, np.tile(mean_scores[number][:, None], (1, 14))
        order = np.arange(len(people), dtype=float)[:, None]
        return coords, np.tile(0.2 + order / 10, (1, 14)) if number == 4 else np.tile(0.9 - order / 10, (1, 14))

    coords, scores = search(look, 2, 3)
    assert [part for _, _, part in calls] == [*COARSE_MARGINS, 1, 1]
    # Person 1 has no candidate at the third scale. Scores of the second pass: .2, .4, .6, .7 and .3, .5, (.1), .8.
    assert [people for people, _, _ in calls[4:]] == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 0, 1]]
    x, y, w, h = joints_box(np.linspace(0, 20, 14)[:, None] + [31.0, 41.0], np.ones(14, bool), least=8)
    np.testing.assert_allclose(calls[4][1][2], (x - w / 8, y - h / 8, 1.25 * w, 1.25 * h))  # of the second scale
    assert (coords == np.linspace(0, 20, 14)[:, None] + [35.0, 45.0]).all()
    np.testing.assert_allclose(scores, [[0.9] * 14, [0.8] * 14])
    assert num_crops(1) == 1 and num_crops(2) == 8 and num_crops(3) == 10 and num_crops(4) == 11
    calls.clear()
    search(look, 2, 1)
    assert [part for _, _, part in calls] == [1]


@pytest.mark.parametrize(("score", "count"), [(0.9, 8), (0.1, 4)])
def test_two_stage_prediction(tmp_path, score, count):
    matrices = []
    joints = np.full((14, 2), 40.0)
    joints[3], joints[5] = (30, 20), (50, 60)  # 20 x 40 pixels, edges at 29.5 and 19.5

    class Fixed:
        size, skeleton = 64, LSP14

        def __call__(self, images, to_image):
            first = len(matrices)
            matrices.extend(to_image.numpy())
            confidence = score + 0.05 * torch.tensor([number == 5 for number in range(first, len(matrices))])
            shift = 9.0 * torch.arange(first, len(matrices)).ge(4)
            return torch.tensor(joints).float() + shift[:, None, None], confidence[:, None].expand(-1, 14)

    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((100, 80, 3), np.uint8))
    predict(Fixed(), [tmp_path / "a.png"], tmp_path / "out", passes=2)
    assert len(matrices) == count
    for matrix, margin in zip(matrices, COARSE_MARGINS, strict=False):
        np.testing.assert_allclose(matrix, crop_matrix((0, 0, 80, 100), 64, margin=margin), rtol=1e-6)
    for matrix in matrices[4:]:
        np.testing.assert_allclose(matrix, crop_matrix((25.5, 15.5, 30, 50), 64), atol=1e-5)
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert rows[0]["bbox"] == [0, 0, 80, 100]
    expected = joints + 9 if count == 8 else joints
    np.testing.assert_allclose(np.reshape(rows[0]["keypoints"], (14, 3))[:, :2], expected)
    with pytest.raises(ValueError, match="passes: expected at least 1, got 0"):
        predict(Fixed(), [tmp_path / "a.png"], tmp_path / "out", passes=0)


def test_two_stage_prediction_of_several_images(tmp_path):
    """A batch of images gives the joints of the images one by one."""
    rng = np.random.default_rng(0)
    for name in "abc":
        write(tmp_path / "in" / f"{name}.png", paint(ground(90, 70), person(rng, 90, 70), 3))
    predictor = Predictor(ColorFinder())
    predict(predictor, [tmp_path / "in"], tmp_path / "all", passes=3, overlays=False)
    rows = json.loads((tmp_path / "all" / "predictions.json").read_text())
    for row, name in zip(rows, "abc", strict=True):
        predict(predictor, [tmp_path / "in" / f"{name}.png"], tmp_path / name, passes=3, overlays=False)
        (alone,) = json.loads((tmp_path / name / "predictions.json").read_text())
        np.testing.assert_allclose(row["keypoints"], alone["keypoints"], atol=0.01)


def test_data_set_and_image_give_the_same_joints(tmp_path):
    """amil evaluate and amil predict: the same crops in the same order."""
    root = tmp_path / "lsp"
    make.lsp(root, S=4)
    people = load_lsp(root, "test")
    name = people.images[0]
    write(root / name, paint(ground(90, 70), person(np.random.default_rng(0), 90, 70), 3))
    predictor = Predictor(ColorFinder())
    for passes in (1, 2, 3):
        predict(predictor, [root / name], tmp_path / "out", passes=passes, overlays=False)
        rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
        found = predict_people(predictor, people.subset([0]), passes=passes)
        np.testing.assert_allclose(np.reshape(rows[0]["keypoints"], (14, 3))[:, :2], found[0], atol=0.01)


def test_network_seconds_exclude_cropping(tmp_path, monkeypatch):
    """A clock that advances by 1 s per call of the network and by 100 s per crop."""
    clock = [0.0]
    crop = Frame.crop

    def slow_crop(*arguments):
        crop(*arguments)
        clock[0] += 100

    class Fixed:
        size, skeleton = 64, LSP14

        def __call__(self, images, to_image):
            clock[0] += 1
            joints = torch.tensor(person(np.random.default_rng(0), 80, 100)).float()
            return joints.expand(len(images), -1, -1), torch.ones(len(images), 14)

    write(tmp_path / "a.png", ground(80, 100))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Frame, "crop", slow_crop)
    assert predict(Fixed(), [tmp_path / "a.png"], tmp_path / "out", passes=2).network_seconds == 5
