"""One bad input never ends a prediction: large images, pipes, odd names, boxes without images."""

import json
import os
import struct
import zlib

import cv2
import numpy as np
import pytest

from amil_fast.pose.data import DataError
from amil_fast.pose.data.files import image_size, read_image
from amil_fast.pose.data.video import VideoFrames
from amil_fast.pose.inference.predict import predict
from amil_fast.pose.inference.predictor import Predictor
from tests.pose import layouts as make
from tests.pose.color_finder import ColorFinder


def bomb(path, width, height):
    """Writes a PNG whose header claims width x height pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 + 3 * width))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def test_bad_items_are_counted_and_the_others_processed(tmp_path):
    folder = tmp_path / "in"
    make.picture(folder / "a.jpg", 60, 50)
    bomb(folder / "b.png", 40_000, 40_000)
    cv2.imwrite(str(folder / "c.bmp"), np.zeros((4, 65_600, 3), np.uint8))  # too wide for its JPEG overlay
    os.mkfifo(folder / "d.jpg")
    os.mkfifo(folder / "e.mp4")
    name = os.fsencode(folder) + b"/caf\xe9.jpg"
    os.rename(make.picture(folder / "f.jpg", 60, 50), name)
    os.rename(make.video(folder / "g.mp4", frames=2), os.fsencode(folder) + b"/caf\xe9.mp4")
    make.picture(folder / ("h" * 251 + ".jpg"), 60, 50)
    make.picture(folder / ("i" * 250 + ".bmp"), 60, 50)
    make.picture(folder / "z.jpg", 60, 50)
    problems = []
    summary = predict(Predictor(ColorFinder()), [folder], tmp_path / "out", on_problem=problems.append)
    assert sorted(problems) == sorted(summary.unreadable + summary.not_written)
    unreadable = "\n".join(summary.unreadable)
    assert len(summary.unreadable) == 4, unreadable
    for text in ("b.png: expected an image of at most 128 x 2^20 pixels", "d.jpg: cannot be read: not a regular file"):
        assert text in unreadable
    assert "e.mp4: cannot be read: not a regular file" in unreadable and "expected a name in UTF-8" in unreadable
    assert (
        len(summary.not_written) == 1 and "c.bmp: overlay not written: an image of 65600 x 4" in summary.not_written[0]
    )
    rows = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [row["file_name"][0] for row in rows] == ["a", "c", "c", "h", "i", "z"]
    assert len(os.listdir(tmp_path / "out")) == 6  # overlays of a, caf\xe9, h, i, z and the predictions


def test_predictions_are_kept_if_the_network_fails(tmp_path):
    for name in "abc":
        make.picture(tmp_path / f"in/{name}.jpg", 60, 50)
    predictor, calls = Predictor(ColorFinder()), []
    network = predictor._heatmaps

    def fail(images):
        calls.append(images)
        if len(calls) > 2:  # with the flip test two calls per image
            raise RuntimeError("device lost")
        return network(images)

    predictor._heatmaps = fail
    with pytest.raises(RuntimeError, match="device lost"):
        predict(predictor, [tmp_path / "in"], tmp_path / "out", batch_size=1)
    assert [row["file_name"] for row in json.loads((tmp_path / "out/predictions.json").read_text())] == ["a.jpg"]


def test_boxes_that_name_no_input(tmp_path):
    make.picture(tmp_path / "a.jpg", 60, 50)
    (tmp_path / "boxes.json").write_text('{"b.jpg": [[1, 2, 3, 4]]}')
    with pytest.raises(DataError, match=r"boxes.json: expected boxes for at least one of the images, found b.jpg"):
        predict(Predictor(ColorFinder()), [tmp_path / "a.jpg"], tmp_path / "out", boxes=tmp_path / "boxes.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("box", ["[1e308, 2, 1e308, 4]", f"[{10**400}, 2, 3, 4]", "[[[1]]]", "[NaN, 1, 2, 3]", '"x"'])
def test_invalid_boxes(tmp_path, box):
    (tmp_path / "boxes.json").write_text(f'{{"a.jpg": [{box}]}}')
    with pytest.raises(DataError, match=r"boxes.json: .*(expected|could not convert)"):
        predict(Predictor(ColorFinder()), [], tmp_path / "out", boxes=tmp_path / "boxes.json")


def test_large_images(tmp_path):
    bomb(tmp_path / "a.png", 13_000, 13_000)
    for read in (image_size, read_image):
        with pytest.raises(DataError, match=r"a.png: expected an image of at most 128 x 2\^20 pixels"):
            read(tmp_path / "a.png")


def test_names_that_are_not_utf8(tmp_path):
    """OpenCV ends the process with them."""
    os.rename(make.video(tmp_path / "a.mp4", frames=2), os.fsencode(tmp_path) + b"/\xe9.mp4")
    with pytest.raises(DataError, match="expected a name in UTF-8"):
        VideoFrames(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.mp4"))
