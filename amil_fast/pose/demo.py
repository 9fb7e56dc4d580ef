"""The pose half of ``amil demo``: generator and discriminator trained on synthetic figures, scores and pictures."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from amil_fast.pose import PoseDiscriminator, PoseGenerator, error_map
from amil_fast.pose.codec import crop_matrix, encode_targets
from amil_fast.pose.data import PoseLoader
from amil_fast.pose.data.augment import warp_crop
from amil_fast.pose.data.files import encode_image, read_image
from amil_fast.pose.evaluation import GroundTruth, score, scores_of_groups
from amil_fast.pose.evaluation.evaluate import TRUTH_FIELDS, predict_batches
from amil_fast.pose.inference.predictor import Predictor, load_model
from amil_fast.pose.training.presets import preset
from amil_fast.pose.training.trainer import train
from amil_fast.pose.training.training_data import training_data
from amil_fast.pose.visualization import contact_sheet, draw_pose, plot_curves, pose_tile
from amil_fast.pose.visualization.drawing import to_bgr
from amil_fast.utils.files import write_bytes, write_json
from amil_fast.utils.training_state import STATE, load_state, part

_SIDE = 240  # of a tile in pixels


@dataclass
class PoseDemoResult:
    """Result of :func:`run`.

    Attributes:
        pck: PCK@0.2 on the validation figures, in percent.
        num_figures: number of validation figures.
        seconds: training time.
        written: files written.
    """

    pck: float
    num_figures: int
    seconds: float
    written: list[Path]


def run(folder, console, *, seed=0, image=None, changes=None):
    """Trains the preset ``demo``, scores it on held-out figures and writes pictures to ``folder``.

    Args:
        folder: receives ``pose_curves.png`` (PCK over the threshold), ``pose_sheet.jpg`` (ground truth and prediction),
            ``pose_errors.jpg`` (reconstruction error of the discriminator for correct and corrupted poses),
            ``photo.jpg`` (prediction of the shipped weights on a photo), ``pose_scores.json``, and the run, ``pose/``.
        console: a ``rich.console.Console``.
        seed: seed of weights, figures and sample order.
        image: photo for the shipped weights; by default the portrait included in Matplotlib.
        changes: settings that override the preset's (:meth:`~amil_fast.pose.training.TrainConfig.override`).

    Returns:
        :class:`PoseDemoResult`.

    Raises:
        ValueError: ``folder`` holds a demo with other settings.
    """
    folder = Path(folder)
    config = preset("demo").override({"run.seed": seed, **(changes or {})})
    last = folder / "pose" / "last"
    if (last / STATE).is_file():
        _check_settings(folder, load_state(last)[1]["config"], config.to_dict())
    summary = train(config, folder / "pose", console, resume=True)
    generator = PoseGenerator.from_pretrained(folder / "pose" / "best")
    figures = training_data(config).validation
    samples = predict_batches(
        Predictor(generator),
        PoseLoader(figures, 32, shuffle=False, workers=0),
        fields=(*TRUTH_FIELDS, "image", "joints"),
    )
    result = score(samples["coords"], GroundTruth.of_samples(figures.skeleton, samples))
    plot_curves({"synthetic figures": result.pck}, folder / "pose_curves.png", metric="PCK", marked=0.2)
    discriminator = trained_discriminator(folder / "pose", config)
    sheets = {
        "pose_sheet.jpg": _sheet(samples, generator.skeleton),
        "pose_errors.jpg": error_sheet(discriminator, samples, generator, config.data.heatmap_std),
        "photo.jpg": photo(image),
    }
    for name, picture in sheets.items():
        write_bytes(folder / name, encode_image(picture, ".jpg"))
    scores = {
        "data": "synthetic figures",
        "figures": len(figures),
        "trained_on": config.data.synthetic,
        "epochs": config.schedule.epochs,
        "seed": seed,
        "seconds": summary["seconds"],
        result.headline: result.headline_score,
        "joint_groups": scores_of_groups(result.summary[result.headline]),
    }
    write_json(folder / "pose_scores.json", scores)
    written = [folder / name for name in ("pose_curves.png", *sheets, "pose_scores.json")]
    return PoseDemoResult(result.headline_score, len(figures), summary["seconds"], written)


def _check_settings(folder, found, expected):
    found, expected = _flat(found), _flat(expected)
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{folder}: holds a demo with other settings, {name} {found.get(name)!r} instead of "
                f"{expected.get(name)!r}; choose another --out"
            )


def _flat(config):
    return {f"{section}.{key}": value for section, values in config.items() for key, value in (values or {}).items()}


def _sheet(samples, skeleton, number=6):
    poses = {
        "ground truth": (samples["image_joints"], samples["visibility"] > 0),
        "prediction": (samples["coords"], np.ones(samples["visibility"].shape, bool)),
    }
    rows = [
        [pose_tile(samples["image"][i], joints[i], shown[i], skeleton=skeleton, side=_SIDE) for i in range(number)]
        for joints, shown in poses.values()
    ]
    return contact_sheet(rows, titles=list(poses), heading="Held-out synthetic figures")


def trained_discriminator(out, config):
    """Returns the discriminator of the run in ``out``, in evaluation mode."""
    tensors, _ = load_state(Path(out) / "last")
    skeleton = PoseGenerator.from_pretrained(Path(out) / "last").skeleton.name
    discriminator = PoseDiscriminator(skeleton, **dataclasses.asdict(config.discriminator))
    discriminator.load_state_dict(part("discriminator", tensors))
    return discriminator.eval()


def error_sheet(discriminator, samples, generator, heatmap_std, number=5):
    """Contact sheet of correct poses (top) and corrupted ones (bottom), each beside the discriminator's error map."""
    skeleton = discriminator.skeleton
    images = torch.from_numpy(samples["image"][:number])
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (generator.mean, generator.std))
    normalized = (images.float() / 255 - mean) / std
    joints = torch.from_numpy(samples["joints"][:number]).float()
    visible = torch.from_numpy(samples["visibility"][:number] > 0)
    tiles, captions, top = [], [], None
    for what, pose in (("correct", joints), ("corrupted", corrupted(joints, skeleton, images.shape[-1]))):
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
        tiles, captions=captions, heading="Reconstruction error of the discriminator for correct and corrupted poses"
    )


def corrupted(joints, skeleton, size):
    """Poses ``(B, K, 2)`` with right elbow and wrist, left knee and ankle reflected at the body's vertical axis."""
    joints = joints.clone()
    middle = joints.mean(1, keepdim=True)
    for name in ("right elbow", "right wrist", "left knee", "left ankle"):
        k = skeleton.index(name)
        joints[:, k] = (2 * middle[:, 0] - joints[:, k]).clamp(0, size - 1)
    return joints


def _overlay(image, errors):
    """Gray crop with an error map ``(h, w)`` of values in [0, 1] blended over it."""
    bgr, _ = to_bgr(image, _SIDE)
    gray = cv2.cvtColor(cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    heat = np.clip(errors.numpy() * 255, 0, 255).astype(np.uint8)
    heat = cv2.resize(heat, (_SIDE, _SIDE), interpolation=cv2.INTER_LINEAR)
    return cv2.addWeighted(gray, 0.45, cv2.applyColorMap(heat, cv2.COLORMAP_INFERNO), 0.75, 0)


def photo(path=None):
    """Photo with the joints predicted by the shipped weights, ``(H, W, 3)`` uint8 BGR.

    Args:
        path: image of one person; by default Matplotlib's portrait of Grace Hopper (public domain).
    """
    portrait = path is None
    if portrait:
        from matplotlib import get_data_path

        path = Path(get_data_path()) / "sample_data" / "grace_hopper.jpg"
    image, _ = read_image(Path(path), upright=True)
    height, width = image.shape[:2]
    predictor = Predictor(load_model())
    # The network is trained on whole people: the portrait becomes the upper third of a crop that is black below.
    side = 2.8 * height
    box = (width / 2 - side / 2, -0.1 * height, side, side) if portrait else (0, 0, width, height)
    matrix = crop_matrix(box, predictor.size)
    crop = warp_crop(image, matrix, predictor.size)
    coords, scores = predictor(torch.from_numpy(crop)[None], torch.from_numpy(matrix)[None])
    return draw_pose(image, coords[0].numpy(), scores[0].numpy() >= 0.3, skeleton=predictor.skeleton)
