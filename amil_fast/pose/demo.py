"""The second half of ``amil demo``: generator and discriminator trained on drawn figures, and what they then see."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from amil_fast.pose import PoseDiscriminator, PoseGenerator, error_map
from amil_fast.pose.codec import encode_targets
from amil_fast.pose.data import PoseLoader
from amil_fast.pose.evaluation.evaluate import TRUTH_FIELDS, predict_batches
from amil_fast.pose.evaluation.scoring import GroundTruth, score
from amil_fast.pose.inference.predictor import Predictor, load_model
from amil_fast.pose.training.checkpoints import STATE, load_state, part
from amil_fast.pose.training.presets import preset
from amil_fast.pose.training.trainer import train
from amil_fast.pose.training.training_data import training_data
from amil_fast.pose.visualization.drawing import contact_sheet, pose_tile, to_picture
from amil_fast.pose.visualization.plots import plot_curves

_SIDE = 240  # of a tile in pixels


@dataclass
class FiguresResult:
    """``pck``: PCK@0.2 in percent on figures that weren't trained on; ``written``: the files."""

    pck: float
    figures: int
    seconds: float
    written: list


def run(folder, console, *, seed=0, image=None, changes=None):
    """Trains the preset ``demo``, scores it, and writes pictures into ``folder``.

    Args:
        folder: gets ``pose_curves.png`` (PCK over r), ``pose_sheet.jpg`` (ground truth beside prediction),
            ``pose_errors.jpg`` (the discriminator's error for right and corrupted poses), ``photo.jpg`` (the shipped
            weights on a photo), ``pose_scores.json``, and the run itself, ``pose/``.
        console: a ``rich.console.Console``.
        image: photo for the shipped weights; by default the portrait that comes with Matplotlib.
        changes: settings that replace the preset's (:meth:`~amil_fast.pose.training.config.TrainConfig.override`).
    """
    folder = Path(folder)
    config = preset("demo").override({"run.seed": seed, **(changes or {})})
    last = folder / "pose" / "last"
    if (last / STATE).is_file() and load_state(last)[1]["config"] != config.to_dict():
        raise ValueError(f"{folder}: holds a demo with other settings (another --seed); choose another --out")
    summary = train(config, folder / "pose", console, resume=True)
    generator = PoseGenerator.from_pretrained(folder / "pose" / "best")
    figures = training_data(config).validation
    samples, found, result = _score(generator, figures)
    plot_curves({"drawn figures": result.pck}, folder / "pose_curves.png", metric="PCK", marked=0.2)
    sheet = _sheet(samples, found, generator.skeleton)
    _write(folder / "pose_sheet.jpg", sheet)
    discriminator = trained_discriminator(folder / "pose", config)
    _write(folder / "pose_errors.jpg", error_sheet(discriminator, samples, generator, config.data.heatmap_std))
    _write(folder / "photo.jpg", photo(image))
    scores = {
        "data": "drawn figures",
        "figures": len(figures),
        "trained_on": config.data.synthetic,
        "epochs": config.schedule.epochs,
        "seed": seed,
        "seconds": summary["seconds"],
        "PCK@0.2": result.summary["PCK@0.2"]["mean"],
        "joint_groups": {k: v for k, v in result.summary["PCK@0.2"].items() if k not in ("joints", "mean_of_joints")},
    }
    (folder / "pose_scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    names = ("pose_curves.png", "pose_sheet.jpg", "pose_errors.jpg", "photo.jpg", "pose_scores.json")
    written = [folder / name for name in names]
    return FiguresResult(scores["PCK@0.2"], len(figures), summary["seconds"], written)


def _score(generator, figures):
    predictor = Predictor(generator)
    loader = PoseLoader(figures, 32, shuffle=False, workers=0)
    samples = predict_batches(predictor, loader, fields=(*TRUTH_FIELDS, "image", "joints", "valid"))
    result = score(samples["coords"], GroundTruth.of_samples(figures.skeleton, samples))
    return samples, samples["coords"], result


def _sheet(samples, found, skeleton, number=6):
    rows = [
        [pose_tile(samples["image"][i], joints[i], shown[i], skeleton=skeleton, side=_SIDE) for i in range(number)]
        for joints, shown in (
            (samples["image_joints"], samples["visibility"] > 0),
            (found, np.ones(found.shape[:2], bool)),
        )
    ]
    return contact_sheet(rows, titles=["truth", "found"], heading="Figures that were not trained on")


def trained_discriminator(out, config):
    """The discriminator of the run in ``out``, in evaluation mode."""
    tensors, _ = load_state(Path(out) / "last")
    skeleton = PoseGenerator.from_pretrained(Path(out) / "last").skeleton.name
    discriminator = PoseDiscriminator(skeleton, **dataclasses.asdict(config.discriminator))
    discriminator.load_state_dict(part("discriminator", tensors))
    return discriminator.eval()


def error_sheet(discriminator, samples, generator, heatmap_std, number=5):
    """Right poses above, the same with an arm bent into the wrong place below; beside each what the discriminator
    can't reconstruct."""
    skeleton = discriminator.skeleton
    images = torch.from_numpy(samples["image"][:number])
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (generator.mean, generator.std))
    normalized = (images.float() / 255 - mean) / std
    joints = torch.from_numpy(samples["joints"][:number]).float()
    visible = torch.from_numpy(samples["visibility"][:number] > 0)
    tiles, captions, top = [], [], None
    for what, pose in (("right", joints), ("corrupted", corrupted(joints, skeleton, images.shape[-1]))):
        heatmaps = encode_targets(pose, images.shape[-1], heatmap_std=heatmap_std, visible=visible)
        errors = error_map(discriminator, heatmaps, normalized)
        if top is None:
            top = 1.5 * float(errors.amax())
        row, row_captions = [], []
        for i in range(number):
            row.append(pose_tile(images[i], pose[i], visible[i].numpy(), skeleton=skeleton, side=_SIDE))
            row.append(_overlay(images[i], errors[i] / top))
            row_captions += [what, f"error {float(errors[i].mean()):.4f}"]
        tiles.append(row)
        captions.append(row_captions)
    return contact_sheet(
        tiles, captions=captions, heading="What the discriminator can't reconstruct, for right and corrupted poses"
    )


def corrupted(joints, skeleton, size):
    """Poses ``(B, K, 2)`` with the right elbow and wrist, and the left knee and ankle, thrown to the other side of the
    body's middle."""
    joints = joints.clone()
    middle = joints.mean(1, keepdim=True)
    for name in ("right elbow", "right wrist", "left knee", "left ankle"):
        k = skeleton.index(name)
        joints[:, k] = (2 * middle[:, 0] - joints[:, k]).clamp(0, size - 1)
    return joints


def _overlay(image, errors):
    """A crop in gray with the map ``(h, w)`` of values from 0 to 1 over it."""
    picture, _ = to_picture(image, _SIDE)
    gray = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    heat = np.clip(errors.numpy() * 255, 0, 255).astype(np.uint8)
    heat = cv2.resize(heat, (_SIDE, _SIDE), interpolation=cv2.INTER_LINEAR)
    return cv2.addWeighted(gray, 0.45, cv2.applyColorMap(heat, cv2.COLORMAP_INFERNO), 0.75, 0)


def photo(path=None):
    """A photo with the joints that the shipped weights find in it, ``(H, W, 3)`` uint8 BGR.

    Args:
        path: an image with one person; by default Matplotlib's portrait of Grace Hopper (public domain).
    """
    from amil_fast.pose.codec import crop_matrix
    from amil_fast.pose.data.augment import warp_crop
    from amil_fast.pose.data.files import read_image
    from amil_fast.pose.visualization.drawing import draw_pose

    portrait = path is None
    if portrait:
        from matplotlib import get_data_path

        path = Path(get_data_path()) / "sample_data" / "grace_hopper.jpg"
    image, _ = read_image(Path(path), upright=True)
    height, width = image.shape[:2]
    predictor = Predictor(load_model())
    # The network knows whole people: the portrait is the upper third of one, the rest of the crop stays black.
    side = 2.8 * height
    box = (width / 2 - side / 2, -0.1 * height, side, side) if portrait else (0, 0, width, height)
    matrix = crop_matrix(box, predictor.size)
    crop = warp_crop(image, matrix, predictor.size)
    coords, scores = predictor(torch.from_numpy(crop)[None], torch.from_numpy(matrix)[None])
    return draw_pose(image, coords[0].numpy(), scores[0].numpy() >= 0.3, skeleton=predictor.skeleton)


def _write(path, picture):
    cv2.imwrite(str(path), picture, [cv2.IMWRITE_JPEG_QUALITY, 92])
