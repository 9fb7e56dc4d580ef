"""Codec, crops, augmentation and loaders: joints stay aligned with the image, and samples are reproducible."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch
from scipy.io import savemat

from amil_fast import decode_heatmaps
from amil_fast.pose.codec import (
    STRIDE,
    compose,
    crop_matrix,
    encode_targets,
    heatmap_to_image,
    invert,
    joints_box,
    resampling,
    transform,
)
from amil_fast.pose.data import (
    Augmentation,
    PoseDataset,
    PoseLoader,
    PoseSampler,
    load_lsp,
    load_lspet,
)
from amil_fast.pose.data.augment import SPORTS, STRONG, color_matrix, cut_out, cut_out_batch, warp_batch, warp_crop
from amil_fast.pose.data.dataset import ground_truth
from amil_fast.pose.skeletons import LSP14
from tests.pose import layouts as make

# One color per joint (BGR), distinguishable after interpolation.
COLORS = np.array([[40 + 100 * (k % 3), 40 + 100 * (k // 3 % 3), 40 + 100 * (k // 9)] for k in range(14)])


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """LSP layout with 4 images in which each joint is a dot of its own color on black."""
    root = tmp_path_factory.mktemp("painted")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    all_joints = []
    for i, (width, height) in enumerate(((240, 180), (150, 260), (200, 200), (301, 203))):
        grid = np.array([[x, y] for x in (0.2, 0.4, 0.6, 0.8) for y in (0.2, 0.4, 0.6, 0.8)])[rng.permutation(16)[:14]]
        joints = grid * (width, height) + rng.uniform(-4, 4, (14, 2))
        image = np.zeros((height, width, 3), np.uint8)
        for k, point in enumerate(joints):
            center = np.round(point * 16).astype(int).tolist()
            cv2.circle(image, center, 8 * 16, COLORS[k].tolist(), -1, cv2.LINE_8, 4)
        cv2.imwrite(str(root / f"images/im{i + 1:04d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 100])
        all_joints.append(joints)
    joints = np.stack(all_joints).transpose(2, 1, 0)
    savemat(root / "joints.mat", {"joints": np.concatenate([joints, np.zeros((1, 14, 4))])})
    return root


def seen_joints(sample):
    """Index of the joint whose dot is at each joint's coordinates, by color; -1 outside the crop."""
    image = sample["image"].numpy().astype(int)[::-1]  # BGR
    S = image.shape[-1]
    seen = []
    for x, y in sample["joints"].round().int().tolist():
        if not (1 <= x < S - 1 and 1 <= y < S - 1):
            seen.append(-1)
            continue
        color = image[:, y, x]
        seen.append(int(np.abs(COLORS - color).sum(1).argmin()))
    return seen


GEOMETRIC = Augmentation(brightness=0, contrast=0, saturation=0, tint=0, any_rotation=0.5)


def test_joints_stay_on_their_dots(painted):
    people = load_lsp(painted, "all")
    dataset = PoseDataset(people, 160, augmentation=GEOMETRIC, seed=3)
    flips, checked = 0, 0
    for epoch in range(12):
        for index in range(4):
            sample = dataset[epoch, index]
            flips += int(sample["flipped"])
            # In a flipped crop the dot of the right wrist is at the coordinates of the left wrist.
            expected = list(LSP14.flip_index) if sample["flipped"] else list(range(14))
            for k, joint in enumerate(seen_joints(sample)):
                if joint >= 0:
                    assert joint == expected[k], (epoch, index, LSP14.joints[k])
                    checked += 1
            # The matrix maps them to the image.
            back = transform(sample["to_image"].double().numpy(), sample["joints"].double().numpy())
            np.testing.assert_allclose(back, people.joints[index][expected], atol=2e-3)
    assert 10 < flips < 38 and checked > 500


def test_visibility_of_flipped_and_outer_joints():
    joints = np.full((14, 2), 20.0)
    joints[:5, 0] = (-0.6, -0.4, 39.4, 39.6, 100)  # the crop covers -0.5 to 39.5
    visibility = np.arange(14, dtype=np.uint8) % 3
    visibility[:5] = 1
    for flip in (False, True):
        matrix = crop_matrix((0, 0, 40, 40), 40, flip=flip)
        sample = ground_truth(joints, visibility, matrix, 40, skeleton=LSP14, flip=flip, head_size=1.0, index=0)
        order = list(LSP14.flip_index) if flip else list(range(14))
        assert sample["visibility"].tolist() == visibility[order].tolist()
        inside = np.array([False, True, True, False, False, *[True] * 9])
        assert sample["valid"].tolist() == (inside & (visibility > 0))[order].tolist()


def test_unaugmented_crop_shows_the_whole_image(painted):
    people = load_lsp(painted, "all")
    for index, (width, height) in enumerate(people.sizes.tolist()):
        sample = PoseDataset(people, 160)[index]
        step = max(width, height) / 160
        assert sample["to_image"][0, 0].item() == pytest.approx(step)
        assert seen_joints(sample) == list(range(14)) and sample["valid"].all()
        corner = sample["to_image"].double().numpy() @ (-0.5, -0.5, 1)  # the crop's outer corner
        np.testing.assert_allclose(corner + 0.5, ((width - step * 160) / 2, (height - step * 160) / 2), atol=1e-4)


def test_directions():
    """Rotation is clockwise as displayed, shift moves the person right and down, scale enlarges it."""
    box, size = (0, 0, 100, 100), 50

    def appears(point, **geometry):
        return transform(invert(crop_matrix(box, size, **geometry)), np.array(point, float))

    np.testing.assert_allclose(appears((49.5, 49.5)), (24.5, 24.5))
    np.testing.assert_allclose(appears((69.5, 49.5)), (34.5, 24.5))
    np.testing.assert_allclose(appears((69.5, 49.5), rotation=90), (24.5, 34.5), atol=1e-9)
    np.testing.assert_allclose(appears((69.5, 49.5), scale=2), (44.5, 24.5))
    np.testing.assert_allclose(appears((69.5, 49.5), shift=(0.1, -0.2)), (39.5, 14.5))
    np.testing.assert_allclose(appears((69.5, 49.5), flip=True), (14.5, 24.5))
    np.testing.assert_allclose(appears((69.5, 49.5), flip=True, rotation=90, shift=(0.1, 0)), (29.5, 14.5), atol=1e-9)
    np.testing.assert_allclose(appears((69.5, 49.5), margin=2), (29.5, 24.5))


def test_matrices():
    rng = np.random.default_rng(1)
    first, second = (crop_matrix(rng.uniform(10, 50, 4), 64, rotation=rng.uniform(0, 360)) for _ in range(2))
    points = rng.uniform(0, 64, (5, 2))
    np.testing.assert_allclose(transform(compose(first, second), points), transform(first, transform(second, points)))
    np.testing.assert_allclose(transform(invert(first), transform(first, points)), points)
    np.testing.assert_allclose(transform(resampling(4), np.array([[0.0, 0.0], [1.0, 2.0]])), [[1.5, 1.5], [5.5, 9.5]])
    stacked = np.stack([first, second])
    for array in (stacked, torch.from_numpy(stacked)):
        by_heatmap = np.asarray(heatmap_to_image(array, 4))
        for matrix, combined in zip(stacked, by_heatmap, strict=True):
            np.testing.assert_allclose(combined, compose(matrix, resampling(4)))
    assert joints_box(np.array([[1.0, 2], [5, 9], [100, 100]]), [True, True, False]).tolist() == [1.5, 2.5, 4, 7]
    assert joints_box(np.zeros((2, 2)), [False, False]) is None


def test_encoding_and_its_inverse():
    """heatmap_to_image inverts the coordinate map of encode_targets exactly."""
    rng = np.random.default_rng(3)
    size = 64
    to_image = crop_matrix((20, 10, 80, 60), size, rotation=25)
    for u, v in ((0, 0), (5, 11), (15, 15)):  # pixel centers, where a Gaussian has its maximum 1
        in_crop = transform(heatmap_to_image(np.eye(2, 3), STRIDE), np.array([u, v]))
        targets = encode_targets(
            torch.from_numpy(in_crop)[None, None], size, heatmap_std=1.0, visible=torch.ones(1, 1, dtype=torch.bool)
        )
        assert targets.shape == (1, 1, size // STRIDE, size // STRIDE) and targets[0, 0, v, u] == 1
        assert targets.flatten().argmax() == v * size // STRIDE + u
    # A crop's outer corners are those of its heatmaps.
    corners = np.array([[-0.5, -0.5], [size / STRIDE - 0.5, size / STRIDE - 0.5]])
    np.testing.assert_allclose(
        transform(heatmap_to_image(to_image, STRIDE), corners), transform(to_image, corners * STRIDE + (STRIDE - 1) / 2)
    )
    np.testing.assert_allclose(corners * STRIDE + (STRIDE - 1) / 2, [[-0.5, -0.5], [size - 0.5, size - 0.5]])
    points = rng.uniform(0, 64, (5, 2))
    np.testing.assert_allclose(
        transform(heatmap_to_image(to_image, STRIDE), (points - (STRIDE - 1) / 2) / STRIDE), transform(to_image, points)
    )


def test_joints_survive_encoding_and_decoding():
    """Image -> crop -> heatmaps -> decode_heatmaps -> image, with rotated, enlarged and flipped crops."""
    rng = np.random.default_rng(0)
    size = 128
    in_crop = rng.uniform(16, size - 17, (3, 14, 2))  # Gaussians inside the heatmaps
    to_image = np.stack(
        [
            crop_matrix(
                (20 + i, 10, 80, 60 + 40 * i),
                size,
                margin=1.25,
                scale=1.1,
                rotation=25 * i,
                shift=(0.05, -0.02),
                flip=f,
            )
            for i, f in enumerate((False, True, False))
        ]
    )
    targets = encode_targets(
        torch.from_numpy(in_crop), size, heatmap_std=2.0, visible=torch.ones(3, 14, dtype=torch.bool)
    )
    affine = torch.from_numpy(heatmap_to_image(to_image, STRIDE)).float()
    found, scores = decode_heatmaps(targets, refine="dark", affine=affine)
    expected = np.stack([transform(matrix, points) for matrix, points in zip(to_image, in_crop, strict=True)])
    # 0.1 image pixels; an error of half a heatmap pixel would be about 2.
    np.testing.assert_allclose(found.numpy(), expected, atol=0.1)
    assert scores.min() > 0.8


def test_flipped_heatmaps_need_no_shift():
    """Flipping commutes with the map between crop and heatmap, because pixels are areas."""
    matrix = crop_matrix((0, 0, 64, 64), 64)
    flipped = crop_matrix((0, 0, 64, 64), 64, flip=True)
    point = np.array([3.0, 5.0])  # of a heatmap of 16 x 16
    np.testing.assert_allclose(
        transform(heatmap_to_image(flipped, 4), np.array([15 - point[0], point[1]])),
        transform(heatmap_to_image(matrix, 4), point),
    )


def test_parameters_depend_on_seed_epoch_and_index_only():
    first = SPORTS.draw(1, 2, 3)
    again = SPORTS.draw(1, 2, 3)
    assert first[0] == again[0] and (first[1] == again[1]).all()
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)):
        assert SPORTS.draw(*other)[0] != first[0]
    without = dataclasses.replace(SPORTS, shift=0, contrast=0).draw(1, 2, 3)[0]
    assert without["rotation"] == first[0]["rotation"] and without["flip"] == first[0]["flip"]


def test_ranges():
    draws = [Augmentation(rotation=30, scale=(0.5, 2), shift=0.1).draw(0, 0, i)[0] for i in range(2000)]
    rotation, scale = (np.array([draw[name] for draw in draws]) for name in ("rotation", "scale"))
    shift = np.array([draw["shift"] for draw in draws])
    assert abs(rotation).max() <= 30 and rotation.max() > 28 and rotation.min() < -28
    assert 0.5 <= scale.min() < 0.52 and 1.95 < scale.max() <= 2 and abs((scale < 1).mean() - 0.5) < 0.05
    assert abs(shift).max() <= 0.1 and abs(np.mean([draw["flip"] for draw in draws]) - 0.5) < 0.05
    upside_down = [abs(SPORTS.draw(0, 0, i)[0]["rotation"]) > 90 for i in range(1000)]
    assert 0.1 < np.mean(upside_down) < 0.2
    for change in ({"scale": (0, 1)}, {"scale": (2, 1)}, {"flip": 1.5}, {"any_rotation": -1}):
        with pytest.raises(ValueError, match=next(iter(change))):
            Augmentation(**change)


def test_cutouts():
    """Rectangles of uniform color, equal in both implementations; other parameters do not depend on them."""
    plain, cut = (dataclasses.replace(STRONG, cutouts=n) for n in (0, 3))
    assert plain.draw(1, 2, 3)[0] == cut.draw(1, 2, 3)[0] and plain.draw_cutouts(1, 2, 3).shape == (0, 4)
    draws = np.stack([cut.draw_cutouts(0, 0, i) for i in range(500)])
    extent = draws[..., 2:] - draws[..., :2]
    used = extent.max(-1) > 0
    assert abs(used.mean() - 0.5) < 0.04 and (extent[~used] == 0).all()
    low, high = cut.cutout_size
    assert low - 1e-6 <= extent[used].min() < low + 0.01 and high - 0.01 < extent[used].max() <= high + 1e-6
    assert (cut.draw_cutouts(0, 0, 7) == draws[7]).all() and (cut.draw_cutouts(0, 1, 7) != draws[7]).any()

    crop = np.full((3, 8, 8), 9, np.uint8)
    # Pixel centers at (i + 1/2) / 8: columns 1 and 2, rows 4 to 7; the second rectangle is not used.
    cutouts = np.array([[0.15, 0.5, 0.35, 1.2], [0, 0, 0, 0]], np.float32)
    cut_out(crop, cutouts)
    assert (crop[0] != 9).nonzero()[0].tolist() == [4, 4, 5, 5, 6, 6, 7, 7]
    assert (crop[0] != 9).nonzero()[1].tolist() == [1, 2] * 4
    assert crop[:, 5, 1].tolist() == [124, 116, 104]
    for rectangles in (cutouts, *draws[:20]):
        one, batch = np.full((3, 32, 32), 51, np.uint8), torch.full((1, 3, 32, 32), 0.2)
        cut_out(one, rectangles)
        torch.testing.assert_close(
            cut_out_batch(batch, torch.from_numpy(rectangles)[None])[0], torch.from_numpy(one) / 255, atol=0.002, rtol=0
        )


def read_all(dataset, workers, batch_size, epochs=2):
    loader = PoseLoader(dataset, batch_size, workers=workers, seed=5)
    result = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        batches = list(loader)
        result.append({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})
        assert loader.images_per_second > 0
    return result


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    make.lspet(tmp_path, S=11)
    dataset = PoseDataset(load_lspet(tmp_path, "all"), 48, augmentation=SPORTS, seed=9)
    alone = read_all(dataset, 0, 4)
    assert (alone[0]["index"] != alone[1]["index"]).any()
    assert sorted(alone[0]["index"].tolist()) == list(range(11))
    for workers, batch_size in ((1, 4), (2, 3), (3, 11)):
        for one, other in zip(read_all(dataset, workers, batch_size), alone, strict=True):
            for name in one:
                assert torch.equal(one[name].nan_to_num(-1), other[name].nan_to_num(-1)), (workers, name)
    # Every epoch is different.
    first, second = (dataset[epoch, 3]["image"] for epoch in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(dataset[3]["image"], dataset[0, 3]["image"])
    assert torch.equal(dataset[-1]["image"], dataset[10]["image"])
    with pytest.raises(IndexError, match="index: expected less than 11, got 11"):
        dataset[11]


def test_sampler():
    orders = {}
    for epoch in range(2):
        sampler = PoseSampler(10, seed=1)
        sampler.set_epoch(epoch)
        orders[epoch] = list(sampler)
        assert sorted(index for _, index in orders[epoch]) == list(range(10)) and len(sampler) == 10
        assert {e for e, _ in orders[epoch]} == {epoch}
    assert [i for _, i in orders[0]] != [i for _, i in orders[1]]
    shares = [list(PoseSampler(10, seed=1, rank=rank, world=4)) for rank in range(4)]
    assert {len(share) for share in shares} == {3} == {len(PoseSampler(10, rank=3, world=4))}
    assert {key for share in shares for key in share} == set(orders[0])
    sampler = PoseSampler(10, seed=1)
    sampler.set_epoch(0, start=4)
    assert list(sampler) == orders[0][4:] and len(sampler) == 6
    in_order = [list(PoseSampler(5, shuffle=False, rank=rank, world=2)) for rank in range(2)]
    assert in_order == [[(0, 0), (0, 2), (0, 4)], [(0, 1), (0, 3)]]  # no sample twice, so that scores are exact
    assert len(list(PoseSampler(2, rank=4, world=5))) == 1
    with pytest.raises(ValueError, match="rank: expected 0 <= rank < world, got 2 of 2"):
        PoseSampler(4, rank=2, world=2)


def test_both_warps_agree():
    rng = np.random.default_rng(2)
    smooth = cv2.resize(rng.integers(0, 255, (12, 12, 3)).astype(np.uint8), (96, 96), interpolation=cv2.INTER_CUBIC)
    # OpenCV rounds coordinates, which is visible at the edge to the black outside; this range shows little of it.
    seldom_outside = dataclasses.replace(SPORTS, scale=(0.75, 1.35))
    draws = [seldom_outside.draw(0, 1, i) for i in range(8)]
    matrices = np.stack([crop_matrix((0, 0, 96, 96), 64, **geometry) for geometry, _ in draws])
    colors = np.stack([color for _, color in draws])
    expected = np.stack([warp_crop(smooth, m, 64, c) for m, c in zip(matrices, colors, strict=True)]) / 255
    images = torch.from_numpy(np.ascontiguousarray(smooth[:, :, ::-1].transpose(2, 0, 1))).expand(8, 3, 96, 96)
    found = warp_batch(images, torch.from_numpy(matrices), 64, torch.from_numpy(colors))
    difference = np.abs(found.numpy() - expected)
    assert difference.mean() < 0.003 and np.quantile(difference, 0.999) < 0.02
    plain = warp_batch(images, torch.from_numpy(matrices), 64)
    assert np.abs(plain.numpy() - expected).mean() > 0.02  # colors have an effect


def test_color_matrix_by_hand():
    pixel = np.array([0.2, 0.4, 0.6, 1.0])
    np.testing.assert_allclose(color_matrix() @ pixel, pixel[:3], atol=1e-6)
    np.testing.assert_allclose(color_matrix(brightness=0.1) @ pixel, pixel[:3] + 0.1, atol=1e-6)
    np.testing.assert_allclose(color_matrix(contrast=2) @ pixel, 0.5 + 2 * (pixel[:3] - 0.5), atol=1e-6)
    gray = 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6
    np.testing.assert_allclose(color_matrix(saturation=0) @ pixel, [gray] * 3, atol=1e-6)
    np.testing.assert_allclose(color_matrix(tint=(1, 0.5, 1)) @ pixel, (0.2, 0.2, 0.6), atol=1e-6)
    image = np.full((4, 4, 3), (153, 102, 51), np.uint8)  # BGR of the pixel above
    crop = warp_crop(image, crop_matrix((0, 0, 4, 4), 4), 4, color_matrix(tint=(1, 0.5, 1)))
    assert crop[:, 0, 0].tolist() == [51, 51, 153]


def test_reduction_does_not_alias():
    """Noise reduced 8 times is averaged over 64 pixels; bilinear sampling averages 4."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 1), dtype=np.uint8)
    crop = warp_crop(np.repeat(noise, 3, 2), crop_matrix((0, 0, 256, 256), 32), 32)
    assert crop[0, 1:-1, 1:-1].std() < 1.2 * noise.std() / 8
    with pytest.raises(ValueError, match="size: expected a positive number of pixels, got 0"):
        PoseDataset(None, 0)
