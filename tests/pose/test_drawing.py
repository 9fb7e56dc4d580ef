"""Visualization: colors and positions of rendered poses, contact sheets, and plots."""

import cv2
import numpy as np
import pytest
import torch

from amil_fast.metrics.modules import PCK, JointConfusion, JointErrors
from amil_fast.pose.data import SPORTS, SyntheticFigures
from amil_fast.pose.skeletons import COCO17, LSP14
from amil_fast.pose.visualization import (
    comparison_sheet,
    contact_sheet,
    draw_box,
    draw_pose,
    plot_confusion,
    plot_curves,
    plot_errors,
    pose_tile,
    sample_sheet,
)
from amil_fast.pose.visualization.drawing import to_bgr


def spread(K, side=200):
    angle = np.arange(K) * 2 * np.pi / K
    return side / 2 + 0.4 * side * np.stack([np.cos(angle), np.sin(angle)], -1)


def test_joints_and_limbs_have_the_skeleton_colors():
    joints = spread(14)
    image = draw_pose(np.full((200, 200, 3), 255, np.uint8), joints, skeleton=LSP14, thickness=4)
    for k, (x, y) in enumerate(joints.round().astype(int)):
        assert image[y, x].tolist() == list(LSP14.joint_colors[k][::-1])
    alone = np.zeros(14, bool)
    for limb, ((a, b), color) in enumerate(zip(LSP14.limbs, LSP14.limb_colors, strict=True)):
        shown = alone.copy()
        shown[[a, b]] = True
        if sum(shown[list(other)].all() for other in LSP14.limbs) > 1:
            continue
        image = draw_pose(np.full((200, 200, 3), 255, np.uint8), joints, shown, skeleton=LSP14, thickness=4)
        x, y = ((joints[a] + joints[b]) / 2).round().astype(int)
        assert image[y, x].tolist() == list(color[::-1]), limb


def test_hidden_joints_are_not_drawn():
    joints = spread(17)
    white = np.full((200, 200, 3), 255, np.uint8)
    assert (draw_pose(white.copy(), joints, np.zeros(17), skeleton=COCO17) == 255).all()
    assert (draw_pose(white.copy(), np.full((17, 2), np.nan), skeleton=COCO17) == 255).all()
    far = np.where(np.arange(17)[:, None] == 3, 1e9, joints)
    draw_pose(white.copy(), far, skeleton=COCO17)  # must not overflow OpenCV's integers
    assert (draw_box(white.copy(), np.full(4, np.nan)) == 255).all()
    boxed = draw_box(white.copy(), np.array([10, 20, 50, 60]))
    assert (boxed[50, 5] == 255).all() and (boxed[50, 8:12] < 100).any() and (boxed[50, 30] == 255).all()
    with pytest.raises(ValueError, match=r"joints: expected \(14, 2\) for lsp14, got \(17, 2\)"):
        draw_pose(white, joints, skeleton=LSP14)


def test_lines_are_anti_aliased():
    image = draw_pose(np.full((200, 200, 3), 255, np.uint8), spread(14), skeleton=LSP14)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 200  # an aliased drawing has about 20 colors


def test_tiles_preserve_coordinates():
    image = np.zeros((3, 50, 50), np.uint8)
    picture, factor = to_bgr(image, 200)
    assert picture.shape == (200, 200, 3) and factor == 4
    joints = np.full((14, 2), np.nan)
    joints[12] = (10, 20)
    tile = pose_tile(image, joints, skeleton=LSP14, side=200)
    ys, xs = np.nonzero(tile.sum(-1) > 100)
    assert abs(xs.mean() - (4 * 10 + 1.5)) < 0.6 and abs(ys.mean() - (4 * 20 + 1.5)) < 0.6
    red = np.zeros((3, 4, 4))
    red[0] = 1.0
    assert to_bgr(torch.from_numpy(red))[0][0, 0].tolist() == [0, 0, 255]


def test_contact_sheets():
    tiles = [np.full((60, 60, 3), value, np.uint8) for value in (10, 90, 170)]
    sheet = contact_sheet(
        [tiles, tiles[:2]], captions=[["a", "b", "c"], ["d", ""]], titles=["one", "two"], heading="All"
    )
    assert sheet.dtype == np.uint8 and all((sheet == value).all(-1).sum() >= 3600 for value in (10, 90, 170))
    with pytest.raises(ValueError, match="rows: expected at least one image"):
        contact_sheet([])
    figures = SyntheticFigures(4, 64, augmentation=SPORTS)
    sheet = sample_sheet(figures, [(1, 0), (2, 0), 3], columns=2, side=80)
    assert sheet.shape[0] > 160 and sheet.shape[1] > 160


def test_comparison_sheet_shows_ground_truth_next_to_prediction():
    figures = SyntheticFigures(9, 64)
    samples = [figures[i] for i in range(9)]
    targets = np.stack([sample["image_joints"] for sample in samples])
    errors = np.linspace(0, 1, 9)
    predictions = targets + errors[:, None, None] * 10
    sheet = comparison_sheet(
        lambda i: (samples[i]["image"], samples[i]["to_image"]),
        targets,
        predictions,
        np.ones((9, 14), bool),
        errors,
        skeleton=LSP14,
        number=2,
        side=64,
    )
    line, left, gap = round(64 * 0.11), round(64 * 0.42), 6
    truth = pose_tile(samples[8]["image"], targets[8], skeleton=LSP14, side=64)
    y = gap + 2 * (64 + line + gap)  # the third row starts with the worst sample
    np.testing.assert_array_equal(sheet[y : y + 64, left : left + 64], truth)
    assert (sheet[y : y + 64, left + 70 : left + 134] != truth).any()


def test_plots(tmp_path):
    torch.manual_seed(0)
    targets = torch.rand(50, 14, 2) * 100
    predictions = targets + 8 * torch.randn(50, 14, 2)
    valid = torch.ones(50, 14).bool()
    valid[:, 3] = False  # never annotated
    sizes = torch.full((50,), 40.0)
    pck, confusion, errors = PCK(LSP14), JointConfusion(LSP14), JointErrors(LSP14)
    for metric in (pck, confusion, errors):
        metric.update(predictions, targets, valid, sizes)
    figure = plot_curves({"one": pck.compute(), "two": pck.compute()}, tmp_path / "curves.png")
    line = figure.axes[0].lines[1]
    np.testing.assert_allclose(line.get_ydata(), 100 * pck.compute()["mean"])
    figure = plot_confusion(confusion.compute(), LSP14, tmp_path / "confusion.png")
    assert len(figure.axes[0].patches) == 12  # six pairs, in both directions
    plot_errors(errors.compute(), LSP14, tmp_path / "errors.png")
    for name in ("curves", "confusion", "errors"):
        picture = cv2.imread(str(tmp_path / f"{name}.png"))
        assert picture.shape[0] > 500 and picture.std() > 10
