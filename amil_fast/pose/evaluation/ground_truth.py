"""Ground truth and predictions from files: MATLAB, NumPy and COCO results."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from amil_fast.metrics.modules import head_size
from amil_fast.pose.data.annotations import Annotations
from amil_fast.pose.data.errors import BAD_ENTRY, reason
from amil_fast.pose.data.files import read_mat
from amil_fast.pose.skeletons import LSP14, MPII16, Skeleton, get_skeleton
from amil_fast.utils.files import DataError, brief, read_json
from amil_fast.utils.numpy_files import read_npy, read_npz


@dataclass
class GroundTruth:
    """Ground truth of S people with K joints each.

    Attributes:
        skeleton: the joints.
        joints: ``(S, K, 2)`` float64 in image pixels.
        valid: ``(S, K)`` bool, annotated joints.
        head_sizes: ``(S,)`` float64, normalizer of PCKh in pixels, NaN where unknown.
        sizes: ``(S,)`` float64, normalizer of PCK in pixels, or None for the distance of two joints.
        names: S sets of names by which a row of a results file can refer to the image, or None.
        annotations: annotations with the images, or None.
        origin: offset subtracted from the coordinates of the source's MATLAB files.
    """

    skeleton: Skeleton
    joints: np.ndarray
    valid: np.ndarray
    head_sizes: np.ndarray
    sizes: np.ndarray | None = None
    names: list[set[str]] | None = None
    annotations: Annotations | None = None
    origin: int = 0

    @classmethod
    def of_samples(cls, skeleton: Skeleton, samples: dict[str, np.ndarray]) -> "GroundTruth":
        """Ground truth of samples of a :class:`~amil_fast.pose.data.PoseDataset`, stacked to arrays by name."""
        joints, head_sizes = (samples[name].astype(np.float64) for name in ("image_joints", "head_size"))
        return cls(skeleton, joints, samples["visibility"] > 0, head_sizes)

    @classmethod
    def of(cls, annotations: Annotations) -> "GroundTruth":
        """Ground truth of a data set."""
        names = []
        for image, number in zip(annotations.images, annotations.ids, strict=True):
            path = Path(image)
            names.append({str(number), str(image), path.name, path.stem, _number(path.stem)})
        return cls(
            annotations.skeleton,
            annotations.joints,
            annotations.valid,
            annotations.head_sizes,
            names=names,
            annotations=annotations,
            origin=1 if annotations.skeleton is MPII16 else 0,
        )


def _number(text):
    """Image id without leading zeros; other names unchanged."""
    return str(int(text)) if str(text).isdecimal() and len(str(text)) < 20 else str(text)


def read_ground_truth(path: str | os.PathLike, skeleton: str | Skeleton | None = None) -> GroundTruth | None:
    """Reads ground truth from a file.

    ``.mat``
        MPII's ``gt_valid.mat``: ``pos_gt_src (16, 2, S)``, ``jnt_missing (16, S)``, ``headboxes_src (2, 2, S)``.
    ``.npz``
        ``targets (S, K, 2)`` and optionally ``valid (S, K)``, ``normalizer (S,)``, ``head_boxes (S, 4)``.

    Args:
        path: the file.
        skeleton: skeleton of an ``.npz`` file; by default the one with K joints.

    Returns:
        :class:`GroundTruth`; None if the file holds predictions only.

    Raises:
        DataError: with the names of file and variable.
    """
    path = Path(path)
    if path.suffix == ".mat":
        if "pos_gt_src" not in read_mat(path, optional=["pos_gt_src"]):
            return None
        content = read_mat(path, "pos_gt_src", "jnt_missing", "headboxes_src")
        joints = _last_axis_first(content["pos_gt_src"], path, "pos_gt_src")
        missing = content["jnt_missing"].T != 0
        boxes = _last_axis_first(content["headboxes_src"], path, "headboxes_src").reshape(-1, 4)
        if joints.shape[1:] != (MPII16.num_joints, 2) or missing.shape != joints.shape[:2] or len(boxes) != len(joints):
            raise DataError(
                f"{path}: pos_gt_src {joints.shape}, jnt_missing {missing.shape} and headboxes_src {boxes.shape} "
                "(people first) have inconsistent shapes"
            )
        return GroundTruth(MPII16, joints - 1, ~missing, head_size(torch.from_numpy(boxes)).numpy(), origin=1)
    if path.suffix == ".npz":
        content = read_npz(path)
        if "targets" not in content:
            return None
        joints = _numbers(content["targets"], path, "targets")
        if joints.ndim != 3 or joints.shape[2] != 2:
            raise DataError(f"{path}: targets: expected (S, K, 2), got {joints.shape}")
        S, K = joints.shape[:2]
        arrays = {"valid": (S, K), "normalizer": (S,), "head_boxes": (S, 4)}
        for name, shape in arrays.items():
            if name in content and content[name].shape != shape:
                raise DataError(f"{path}: {name}: expected {shape}, got {content[name].shape}")
        valid = content["valid"] != 0 if "valid" in content else np.isfinite(joints).all(-1)
        boxes = torch.from_numpy(_numbers(content.get("head_boxes", np.full((S, 4), np.nan)), path, "head_boxes"))
        return GroundTruth(
            _skeleton_of(K, skeleton, path),
            joints,
            valid,
            head_size(boxes).numpy(),
            _numbers(content["normalizer"], path, "normalizer") if "normalizer" in content else None,
        )
    raise DataError(f"{path}: expected ground truth as .mat or .npz")


def _skeleton_of(K, skeleton, path):
    if skeleton is not None:
        skeleton = get_skeleton(skeleton)
    else:
        known = {14: LSP14, 16: MPII16, 17: get_skeleton("coco17")}
        if K not in known:
            raise DataError(f"{path}: {K} joints: expected a skeleton (--skeleton)")
        skeleton = known[K]
    if skeleton.num_joints != K:
        raise DataError(f"{path}: {K} joints, but {skeleton.name} has {skeleton.num_joints}")
    return skeleton


def read_predictions(path: str | os.PathLike, truth: GroundTruth) -> np.ndarray:
    """Reads predictions for the people of a :class:`GroundTruth`.

    ``.json``
        COCO results: a list of rows with ``image_id`` (or ``file_name``) and ``keypoints`` (x, y, score per joint).
        With several people in an image, rows are assigned by minimum distance. People without a row count as wrong.
    ``.npy``, ``.npz``
        ``(S, K, 2)``, further columns are ignored, in the order of the ground truth; variable ``predictions``.
    ``.mat``
        ``pos_pred_src (K, 2, S)`` (Tompson et al.) or ``preds (S, K, 2)`` (HRNet), in the coordinates of the data
        set's MATLAB files.

    Returns:
        ``(S, K, 2)`` float64 in image pixels, NaN where a person has no prediction.

    Raises:
        DataError: with the names of file and entry.
    """
    path = Path(path)
    if path.suffix == ".json":
        return _read_coco_results(path, truth)
    if path.suffix == ".mat":
        content = read_mat(path, optional=["pos_pred_src", "preds"])
        if "pos_pred_src" in content:
            found = _last_axis_first(content["pos_pred_src"], path, "pos_pred_src")
        elif "preds" in content:
            found = _numbers(content["preds"], path, "preds")
        else:
            raise DataError(f"{path}: expected a variable 'pos_pred_src' or 'preds'")
        found = found - truth.origin
    elif path.suffix == ".npy":
        found = _numbers(read_npy(path), path, "the array")
    elif path.suffix == ".npz":
        content = read_npz(path)
        if "predictions" not in content:
            raise DataError(f"{path}: expected a variable 'predictions', found {', '.join(content) or 'nothing'}")
        found = _numbers(content["predictions"], path, "predictions")
    else:
        raise DataError(f"{path}: expected predictions as .json, .npy, .npz or .mat")
    S, K = truth.valid.shape
    if found.ndim != 3 or found.shape[:2] != (S, K) or found.shape[2] < 2:
        raise DataError(f"{path}: expected predictions for {S} people x {K} joints x (x, y), got {found.shape}")
    return found[..., :2]


def _read_coco_results(path, truth):
    rows = read_json(path, list, "a list of COCO result rows")
    if truth.names is None:
        raise DataError(f"{path}: COCO results need a data set with image names (--dataset)")
    S, K = truth.valid.shape
    people = {}
    for person, names in enumerate(truth.names):
        for name in names:
            people.setdefault(name, []).append(person)
    by_image = {}
    for i, row in enumerate(rows):
        try:
            points = np.array(row["keypoints"], np.float64)
            keys = [row[name] for name in ("file_name", "image_id") if name in row]
        except BAD_ENTRY as error:
            raise DataError(f"{path}: row {i}: expected image_id and keypoints: {reason(error)}") from None
        if points.shape != (3 * K,):
            raise DataError(f"{path}: row {i}: expected {3 * K} numbers as keypoints, got {points.size}")
        names = [name for key in keys for name in (str(key), Path(str(key)).name, _number(key))]
        image = next((tuple(people[name]) for name in names if name in people), None)
        if image is None:
            raise DataError(f"{path}: row {i}: the data set has no image {brief(keys[0] if keys else None)}")
        by_image.setdefault(image, []).append(points.reshape(K, 3)[:, :2])
    result = np.full((S, K, 2), np.nan)
    for image, found in by_image.items():
        _assign(np.array(image), np.array(found), truth, result)
    return result


def _assign(image, found, truth, result):
    """Assigns the predictions ``found (n, K, 2)`` of an image to its people, by minimum total distance."""
    if len(image) == len(found) == 1:
        result[image] = found
        return
    valid = truth.valid[image]
    targets = np.where(valid[..., None], truth.joints[image], 0)
    extent = [
        np.ptp(joints[known], axis=0).max() if known.any() else 1 for joints, known in zip(targets, valid, strict=True)
    ]
    distance = np.linalg.norm(targets[:, None] - found[None], axis=-1) / np.maximum(extent, 1)[:, None, None]
    cost = (np.minimum(np.nan_to_num(distance, nan=1.0), 1.0) * valid[:, None]).sum(-1)
    people, rows = linear_sum_assignment(cost)
    result[image[people]] = found[rows]


def _last_axis_first(array, path, name):
    array = _numbers(array, path, name)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3:
        raise DataError(f"{path}: {name}: expected three axes, people last, got {array.shape}")
    return array.transpose(2, 0, 1)


def _numbers(array, path, name):
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path}: {name}: expected numbers, got {array.dtype}")
    return array.astype(np.float64)
