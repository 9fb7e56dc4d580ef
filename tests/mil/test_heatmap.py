"""Instance heatmaps: values, scales, pictures, effective numbers, the command."""

import csv

import cv2
import h5py
import numpy as np
import pytest
import torch

from amil_fast.mil import collapse_warning, draw_heatmap, effective_instances, instance_values, scaled_values
from amil_fast.mil.heatmap import patch_size_of
from amil_fast.nn import MIRNet
from tests.cli.helpers import amil_output


def net_of(pooling="adjust", **kwargs):
    torch.manual_seed(0)
    return MIRNet(4, hidden=8, pooling=pooling, **kwargs).eval()


def test_instance_values():
    x = torch.randn(7, 4)
    net = net_of(label_names=("a", "b"))
    weights = instance_values(net, x)
    output = net(x, cu_seqlens=torch.tensor([0, 7]), return_weights=True)
    assert np.array_equal(weights, output.weights[-1].detach().numpy()) and weights.sum() == pytest.approx(1)
    scores = instance_values(net, x, "scores", max_instances=3)
    alone = [net(x[i : i + 1], cu_seqlens=torch.tensor([0, 1])).probabilities.item() for i in range(7)]
    assert scores == pytest.approx(np.array(alone), rel=1e-5)
    assert instance_values(net, x, "scores", class_index=0) == pytest.approx(1 - scores, rel=1e-5)
    three = net_of(num_classes=3)
    columns = [instance_values(three, x, "scores", class_index=c) for c in range(3)]
    assert np.sum(columns, 0) == pytest.approx(np.ones(7))
    with pytest.raises(ValueError, match="pooling 'max' has no weight per instance; use 'scores'"):
        instance_values(net_of("max"), x)
    with pytest.raises(ValueError, match="values: expected one of weights, scores"):
        instance_values(net, x, "attention")


def test_scales():
    values = np.array([0.0, 0.1, 0.1, 10.0])
    assert scaled_values(values, "linear").tolist() == values.tolist()
    assert scaled_values(values, "rank") == pytest.approx([0, 0.5, 0.5, 1])
    assert scaled_values(values, "log") == pytest.approx(np.log10([1e-2, 0.1 / 2.55, 0.1 / 2.55, 10 / 2.55]))
    with pytest.raises(ValueError, match="scale: expected one of log, rank, linear"):
        scaled_values(values, "exp")
    with pytest.raises(ValueError, match="scale: 'log' is for nonnegative values"):
        scaled_values(-values)


def test_effective_number_of_instances():
    weights = torch.tensor([0.25, 0.25, 0.25, 0.25, 1.0, 0.0, 0.5, 0.5, 0.0])
    effective = effective_instances(weights, torch.tensor([0, 4, 6, 6, 9]))
    assert effective.tolist() == pytest.approx([4, 1, 0, 2])


def test_collapse_is_reported():
    sizes = np.array([100, 50, 10, 4])
    assert "pools by the mean: the effective number of instances is 49.9 of 50" in collapse_warning(
        np.array([99.8, 49.9, 9.99, 1]), sizes, "attention"
    )
    assert "relies on one instance per bag" in collapse_warning(np.array([1, 1.01, 1.02, 4]), sizes, "adjust")
    assert collapse_warning(np.array([50, 25, 5, 1]), sizes, "adjust") is None
    assert collapse_warning(np.array([100, 50, 10, 4.0]), sizes, "mean") is None
    assert collapse_warning(np.array([1, 1.0]), np.array([100, 50]), "adjust") is None


def grid(width=6, height=4, step=256, origin=(1000, 500)):
    x, y = np.meshgrid(np.arange(width) * step + origin[0], np.arange(height) * step + origin[1])
    return np.stack([x.ravel(), y.ravel()], 1)


def test_patch_size():
    assert patch_size_of(grid()) == 256 and patch_size_of(grid(1, 5, 64)) == 64 and patch_size_of(grid(1, 1)) == 1
    assert patch_size_of(grid(), {"patch_size_level0": 512.0, "patch_size": 224.0}) == 512


def heatmap_of(path):
    """Pixels ``(H, W, 3)`` of a picture's heatmap, without the color bar to the right of it."""
    image = cv2.imread(str(path)).astype(int)
    colored = np.ptp(image, axis=-1) > 20
    columns = np.flatnonzero(colored.any(0))
    end = columns[np.flatnonzero(np.diff(columns) > 5)[-1]] + 1
    rows = np.flatnonzero(colored[:, :end].any(1))
    return image[rows[0] : rows[-1] + 1, columns[0] : end]


def test_picture_shows_the_values_at_their_places(tmp_path):
    """The only high value is at the right place: the center of the red area, relative to the blue one."""
    coords = grid()
    for hot in (0, 10, 23):
        values = np.full(24, 0.001)
        values[hot] = 1.0
        path = tmp_path / "a.png"
        draw_heatmap(path, coords, values, scale="linear")
        image = heatmap_of(path)
        red = np.argwhere((image[..., 2] > 150) & (image[..., 0] < 90))
        center = red.mean(0) / image.shape[:2]
        row, column = divmod(hot, 6)
        assert center == pytest.approx([(row + 0.5) / 4, (column + 0.5) / 6], abs=0.02)
    # Over a thumbnail: the patch covers its part of the whole.
    thumbnail = np.full((40, 80, 3), 255, dtype=np.uint8)
    ends = grid()[[0, 5]]
    draw_heatmap(path, ends, np.array([0.0, 1]), scale="linear", patch_size=256, thumbnail=thumbnail, downsample=50)
    height, width, _ = heatmap_of(path).shape
    assert width == pytest.approx(6 * height, rel=0.1)
    draw_heatmap(path, ends, np.array([0.0, 1]), scale="linear", patch_size=256, thumbnail=thumbnail, downsample=100)
    assert heatmap_of(path).shape[0] == pytest.approx(height / 2, rel=0.2)
    with pytest.raises(ValueError, match="downsample: expected a positive number with a thumbnail"):
        draw_heatmap(path, coords, np.ones(24), thumbnail=thumbnail)
    with pytest.raises(ValueError, match=r"coords: expected shape \(3, 2\)"):
        draw_heatmap(path, coords, np.ones(3))
    with pytest.raises(ValueError, match="patch_size: expected a larger one"):
        draw_heatmap(path, coords * 1000, np.ones(24), patch_size=1)


def test_command(tmp_path):
    net = net_of(label_names=("normal", "tumor"), instance_scale=1e-4)
    net.save_pretrained(tmp_path / "model")
    (tmp_path / "bags").mkdir()
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in ("s1", "s2", "s3"):
        with h5py.File(tmp_path / "bags" / f"{name}.h5", "w") as file:
            file["features"] = rng.normal(size=(24, 4)).astype(np.float16)
            file["coords"] = grid()
            file["coords"].attrs["level0_width"] = 4000
        cv2.imwrite(str(tmp_path / "images" / f"{name}.jpg"), np.full((50, 80, 3), 200, np.uint8))
    output = amil_output(
        "mil", "heatmap", tmp_path / "model", tmp_path / "bags", "--out", tmp_path / "maps",
        "--thumbnails", tmp_path / "images", "--device", "cpu",
    )  # fmt: skip
    assert "s2: p(tumor) = 0." in output and "24.0 of 24 instances effective" in output
    assert "warning: the model pools by the mean" in output
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == [
        f"{name}.{suffix}" for name in ("s1", "s2", "s3") for suffix in ("csv", "png")
    ]
    with (tmp_path / "maps" / "s1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [[int(row["x"]), int(row["y"])] for row in rows] == grid().tolist()
    assert sum(float(row["weights"]) for row in rows) == pytest.approx(1, abs=1e-4)
    output = amil_output(
        "mil", "heatmap", tmp_path / "model", tmp_path / "bags", "--out", tmp_path / "one", "--bag", "s3",
        "--values", "scores", "--scale", "rank", "--label", "normal",
    )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["s3.csv", "s3.png"]
    for arguments, message in [
        (("--bag", "s9"), "found none for bag 's9'"),
        (("--label", "x"), "label: expected one of normal, tumor, got 'x'"),
        (("--thumbnails", tmp_path / "maps" / "none"), "expected an image s1"),
    ]:
        assert message in amil_output("mil", "heatmap", tmp_path / "model", tmp_path / "bags", *arguments, code=2)
    np.save(tmp_path / "bags" / "s4.npy", np.ones((3, 4), dtype=np.float32))
    output = amil_output("mil", "heatmap", tmp_path / "model", tmp_path / "bags", "--bag", "s4", code=2)
    assert "expected coordinates of the instances, found none for bag 's4'" in output
