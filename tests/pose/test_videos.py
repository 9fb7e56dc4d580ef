"""Image folders, bounding boxes from JSON files, videos, UCF11, and input discovery."""

import json

import numpy as np
import pytest
import torch

from amil_fast.pose.data import (
    Boxes,
    DataError,
    PoseDataset,
    VideoFrames,
    VideoPeople,
    find_inputs,
    find_ucf11,
    load_folder,
)
from tests.pose import layouts as make


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


def test_boxes_from_result_rows(tmp_path):
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
        ('{"a.jpg": [[1, 2, 3]]}', r"'a.jpg', box 0: expected a bbox \[x, y, width, height\]"),
        ('{"a.jpg": 3}', "'a.jpg', box 0"),
        ('[{"bbox": [1, 2, 3, 4]}]', "row 0: 'image_id' is missing"),
        ("[[1, 2, 3, 4]]", "row 0: expected an object with bbox and file_name or image_id"),
        ('[{"file_name": "a", "bbox": [1, 2, -3, 4]}]', "row 0: expected .* with positive width and height"),
        ("7", "expected an object or a list, got int"),
        ("{", "expected a JSON file"),
    ],
)
def test_invalid_boxes(tmp_path, content, message):
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


def test_find_inputs(tmp_path):
    make.picture(tmp_path / "b.jpg", 20, 20)
    make.picture(tmp_path / "deep/a.PNG", 20, 20)
    (tmp_path / "notes.txt").write_text("not an image")
    assert [name.as_posix() for _, name in find_inputs([tmp_path])] == ["b.jpg", "deep/a.PNG"]
    with pytest.raises(DataError, match=r"notes.txt: expected an image or a video"):
        find_inputs([tmp_path / "notes.txt"])
    with pytest.raises(DataError, match=r"c.jpg: no such file"):
        find_inputs([tmp_path / "c.jpg"])
