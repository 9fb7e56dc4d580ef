"""Synthetic figures: determinism, anatomical plausibility, and labels that match the rendered image."""

import numpy as np
import pytest
import torch

from amil_fast.pose.data import SPORTS, PoseLoader, SyntheticFigures
from amil_fast.pose.skeletons import LSP14, SKELETONS


@pytest.mark.parametrize("skeleton", SKELETONS)
def test_samples(skeleton):
    figures = SyntheticFigures(20, 96, skeleton=skeleton)
    for sample in torch.utils.data.Subset(figures, range(20)):
        K = SKELETONS[skeleton].num_joints
        assert sample["image"].shape == (3, 96, 96) and sample["image"].dtype == torch.uint8
        assert sample["joints"].shape == (K, 2) and sample["valid"].all()
        assert (sample["visibility"] >= 1).all()
        assert 4 < sample["head_size"] < 30


def test_figure_depends_on_seed_and_index_only():
    one, other = SyntheticFigures(10, 64, seed=1), SyntheticFigures(10, 64, seed=2)
    assert torch.equal(one[3]["image"], SyntheticFigures(5, 64, seed=1)[3]["image"])
    assert not torch.equal(one[3]["image"], one[4]["image"])
    assert not torch.equal(one[3]["joints"], other[3]["joints"])
    assert torch.equal(one[-1]["image"], one[9]["image"])
    with pytest.raises(IndexError, match="index: expected less than 10, got 10"):
        one[10]


def test_size_does_not_change_the_figure():
    small, large = (SyntheticFigures(4, size)[2] for size in (64, 128))
    torch.testing.assert_close((small["joints"] + 0.5) * 2, large["joints"] + 0.5, rtol=0, atol=2.0)


def test_anatomical_plausibility():
    """Bone lengths are plausible; upside-down poses, back views and occluded joints occur."""
    figures = [SyntheticFigures(200, 64, seed=5).draw(i) for i in range(200)]
    joints, hidden = np.stack([f[1] for f in figures]), np.stack([f[2] for f in figures]) == 1

    def bone(a, b):
        return np.linalg.norm(joints[:, LSP14.index(a)] - joints[:, LSP14.index(b)], axis=-1)

    for side in ("left", "right"):
        assert (bone(f"{side} hip", f"{side} knee") < 2.2 * bone("neck", "head top")).all()
        assert (bone(f"{side} elbow", f"{side} wrist") < 1.3 * bone("neck", "head top")).all()
    upside_down = joints[:, 13, 1] > joints[:, [0, 5], 1].mean(1)
    behind = joints[:, LSP14.index("right shoulder"), 0] > joints[:, LSP14.index("left shoulder"), 0]
    assert 0.02 < upside_down.mean() < 0.25 and 0.1 < behind.mean() < 0.5
    assert 0.05 < hidden.mean() < 0.4
    unoccluded = np.stack([SyntheticFigures(60, 64, seed=5, occlusion=0).draw(i)[2] for i in range(60)]) == 1
    assert unoccluded.mean() < hidden.mean()


def test_sides_have_distinct_colors():
    """Visible lower legs are blue on the right side and orange on the left."""
    warmth = {"left": [], "right": []}
    figures = SyntheticFigures(150, 96, seed=2)
    for i in range(150):
        picture, joints, visibility, _ = figures.draw(i)
        for side in warmth:
            a, b = LSP14.index(f"{side} knee"), LSP14.index(f"{side} ankle")
            if (visibility[[a, b]] == 2).all():
                x, y = np.round((joints[a] + joints[b]) / 2).astype(int)
                blue, _, red = picture[y, x].astype(int)
                warmth[side].append(red - blue)
    assert np.median(warmth["left"]) > 60 and np.median(warmth["right"]) < -60


def test_augmentation_in_a_loader():
    figures = SyntheticFigures(10, 64, augmentation=SPORTS)
    loader = PoseLoader(figures, 5, workers=0)
    batch = next(iter(loader))
    assert batch["image"].shape == (5, 3, 64, 64) and batch["flipped"].any()
    sample = next(figures[1, i] for i in range(10) if figures[1, i]["flipped"])
    back = sample["to_image"][:, :2] @ sample["joints"].T + sample["to_image"][:, 2:]
    flipped = sample["image_joints"][list(LSP14.flip_index)]
    torch.testing.assert_close(back.T, flipped, rtol=0, atol=1e-3)
