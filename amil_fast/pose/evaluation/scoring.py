"""Scores of predictions, whoever made them: files of predictions and ground truth in, one dict of numbers out."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from amil_fast.metrics.functional import normalized_errors
from amil_fast.metrics.modules import (
    HEADLINE_THRESHOLDS,
    PCK,
    TABLE_THRESHOLDS,
    JointConfusion,
    JointErrors,
    PCKh,
    head_size,
)
from amil_fast.pose.data.annotations import Annotations
from amil_fast.pose.data.files import read_mat
from amil_fast.pose.skeletons import LSP14, MPII16, Skeleton, get_skeleton
from amil_fast.utils.files import DataError, read_json


@dataclass
class GroundTruth:
    """What predictions are scored against: S people with K joints each.

    Attributes:
        skeleton: the joints.
        joints: ``(S, K, 2)`` float64 in image pixels; ``valid (S, K)`` bool.
        head_sizes: ``(S,)`` float64 PCKh's size, NaN where unknown.
        sizes: ``(S,)`` float64, another size to divide by, or None.
        names: S lists of names by which a row of a results file may call the image.
        annotations: where the pictures are, or None.
        origin: what was subtracted from the coordinates of the MATLAB files this came from.
    """

    skeleton: Skeleton
    joints: np.ndarray
    valid: np.ndarray
    head_sizes: np.ndarray
    sizes: np.ndarray | None = None
    names: list | None = None
    annotations: Annotations | None = None
    origin: int = 0

    @classmethod
    def of_samples(cls, skeleton, samples):
        """That of samples of a :class:`~amil_fast.pose.data.PoseDataset`: their arrays by name, stacked."""
        joints, head_sizes = (samples[name].astype(np.float64) for name in ("image_joints", "head_size"))
        return cls(skeleton, joints, samples["visibility"] > 0, head_sizes)

    @classmethod
    def of(cls, annotations):
        """That of a data set."""
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
    """Image ids are written with and without leading zeros."""
    return str(int(text)) if str(text).isdecimal() else str(text)


def read_ground_truth(path, skeleton=None):
    """Ground truth from a file.

    ``.mat``: MPII's (``gt_valid.mat``): ``pos_gt_src (16, 2, S)``, ``jnt_missing (16, S)``, ``headboxes_src (2, 2,
    S)``. ``.npz``: ``targets (S, K, 2)`` with, if wanted, ``valid (S, K)``, ``normalizer (S,)``, ``head_boxes (S, 4)``.
    None where the file (of predictions) holds no ground truth. Raises DataError naming file and variable.
    """
    path = Path(path)
    if path.suffix == ".mat":
        content = read_mat(path)
        if "pos_gt_src" not in content:
            return None
        content = read_mat(path, "pos_gt_src", "jnt_missing", "headboxes_src")
        joints = _last_axis_first(content["pos_gt_src"], path, "pos_gt_src")
        missing = content["jnt_missing"].T != 0
        boxes = _last_axis_first(content["headboxes_src"], path, "headboxes_src").reshape(-1, 4)
        if joints.shape[1:] != (MPII16.num_joints, 2) or missing.shape != joints.shape[:2] or len(boxes) != len(joints):
            raise DataError(
                f"{path}: pos_gt_src {joints.shape}, jnt_missing {missing.shape} and headboxes_src {boxes.shape} "
                "(people first) don't fit together"
            )
        return GroundTruth(MPII16, joints - 1, ~missing, head_size(torch.from_numpy(boxes)).numpy(), origin=1)
    if path.suffix == ".npz":
        content = _read_npz(path)
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
            raise DataError(f"{path}: {K} joints: name their skeleton")
        skeleton = known[K]
    if skeleton.num_joints != K:
        raise DataError(f"{path}: {K} joints, but {skeleton.name} has {skeleton.num_joints}")
    return skeleton


def read_predictions(path, truth):
    """Predicted joints ``(S, K, 2)`` float64 for the people of a :class:`GroundTruth`, NaN where there is none.

    ``.json``
        COCO results: a list of rows with ``image_id`` (or ``file_name``) and ``keypoints`` (x, y, score for each
        joint). Where an image has several people, rows are given to those they fit best. People without a row count as
        wrong.
    ``.npy``, ``.npz``
        ``(S, K, 2)`` (further columns are ignored) in the order of the ground truth; the variable ``predictions``.
    ``.mat``
        ``pos_pred_src (K, 2, S)`` (Tompson's format) or ``preds (S, K, 2)`` (HRNet's), in the coordinates of the data
        set's MATLAB files.

    Raises DataError naming file and entry.
    """
    path = Path(path)
    if path.suffix == ".json":
        return _from_rows(path, truth)
    if path.suffix == ".mat":
        content = read_mat(path)
        if "pos_pred_src" in content:
            found = _last_axis_first(content["pos_pred_src"], path, "pos_pred_src")
        else:
            found = _numbers(read_mat(path, "preds")["preds"], path, "preds")
        found = found - truth.origin
    elif path.suffix == ".npy":
        found = _numbers(_load_numpy(path), path, "the array")
    elif path.suffix == ".npz":
        content = _read_npz(path)
        if "predictions" not in content:
            raise DataError(f"{path}: expected a variable 'predictions', found {', '.join(content) or 'nothing'}")
        found = _numbers(content["predictions"], path, "predictions")
    else:
        raise DataError(f"{path}: expected predictions as .json, .npy, .npz or .mat")
    S, K = truth.valid.shape
    if found.ndim != 3 or found.shape[:2] != (S, K) or found.shape[2] < 2:
        raise DataError(f"{path}: expected predictions for {S} people x {K} joints x (x, y), got {found.shape}")
    return found[..., :2]


def _from_rows(path, truth):
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of COCO result rows, got {type(rows).__name__}")
    if truth.names is None:
        raise DataError(f"{path}: COCO results need a data set whose images they name")
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
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: row {i}: expected image_id and keypoints ({error!r})") from None
        if points.shape != (3 * K,):
            raise DataError(f"{path}: row {i}: expected {3 * K} numbers as keypoints, got {points.size}")
        names = [name for key in keys for name in (str(key), Path(str(key)).name, _number(key))]
        image = next((tuple(people[name]) for name in names if name in people), None)
        if image is None:
            raise DataError(f"{path}: row {i}: the data set has no image {keys[0] if keys else None!r}")
        by_image.setdefault(image, []).append(points.reshape(K, 3)[:, :2])
    result = np.full((S, K, 2), np.nan)
    for image, found in by_image.items():
        image, found = np.array(image), np.array(found)
        if len(image) == len(found) == 1:
            result[image] = found
            continue
        valid = truth.valid[image]
        targets = np.where(valid[..., None], truth.joints[image], 0)
        extent = [
            np.ptp(joints[known], axis=0).max() if known.any() else 1
            for joints, known in zip(targets, valid, strict=True)
        ]
        distance = np.linalg.norm(targets[:, None] - found[None], axis=-1) / np.maximum(extent, 1)[:, None, None]
        cost = (np.minimum(np.nan_to_num(distance, nan=1.0), 1.0) * valid[:, None]).sum(-1)
        mine, theirs = linear_sum_assignment(cost)
        result[image[mine]] = found[theirs]
    return result


def _last_axis_first(array, path, name):
    array = _numbers(array, path, name)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3:
        raise DataError(f"{path}: {name}: expected three axes, the people last, got {array.shape}")
    return array.transpose(2, 0, 1)


def _numbers(array, path, name):
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path}: {name}: expected numbers, got {array.dtype}")
    return array.astype(np.float64)


def _load_numpy(path):
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: expected a NumPy file of numbers: {error}") from None


def _read_npz(path):
    content = _load_numpy(path)
    if not isinstance(content, np.lib.npyio.NpzFile):
        raise DataError(f"{path}: expected a NumPy .npz file")
    try:
        with content:
            return {name: content[name] for name in content.files}
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: expected a NumPy file of numbers: {error}") from None


@dataclass
class Result:
    """What :func:`score` found: ``summary`` for JSON files, ``pck``, ``confusion`` and ``errors`` as the metrics'
    ``compute()`` gives them, and ``sample_errors (S,)`` float64, each person's mean error, NaN where not measured."""

    summary: dict
    pck: dict
    confusion: torch.Tensor
    errors: dict
    sample_errors: np.ndarray

    @property
    def headline(self) -> str:
        """Name of the metric at the threshold that papers report, such as ``"PCK@0.2"``."""
        return headline(self.summary["metric"])

    @property
    def headline_score(self) -> float | None:
        """Mean over joints of :attr:`headline`, in percent; None where nothing was counted."""
        return self.summary[self.headline]["mean"]


def headline(metric: str) -> str:
    """Key in :attr:`Result.summary` of a metric (``"PCK"`` or ``"PCKh"``) at the threshold that papers report."""
    return f"{metric}@{HEADLINE_THRESHOLDS[metric]:g}"


def score(predictions, truth, *, metric="auto", pair="paper", either=False, radius=None):
    """PCK or PCKh with everything around it.

    Args:
        predictions: ``(S, K, 2)`` in image pixels.
        truth: a :class:`GroundTruth`.
        metric: ``"pck"``, ``"pckh"``, or ``"auto"``: PCKh for MPII's joints, else PCK.
        pair, either: of :class:`~amil_fast.metrics.modules.PCK`; not looked at where the ground truth brings sizes.
        radius: within which a prediction has landed on a joint, in units of the person's size; by default 0.2 (PCK) or
            0.5 (PCKh), the papers' thresholds.

    Returns:
        :class:`Result`. Raises ValueError for a metric that can't be computed.
    """
    skeleton = truth.skeleton
    if metric == "auto":
        metric = "pckh" if skeleton is MPII16 and truth.sizes is None else "pck"
    if metric not in ("pck", "pckh"):
        raise ValueError(f"metric: expected 'pck', 'pckh' or 'auto', got {metric!r}")
    joints, valid = torch.from_numpy(np.nan_to_num(truth.joints)), torch.from_numpy(np.ascontiguousarray(truth.valid))
    predictions = torch.as_tensor(predictions, dtype=torch.float64)
    # All people are given: nothing is to be added up over processes (sync_on_compute).
    if metric == "pckh":
        if not np.isfinite(truth.head_sizes).any():
            raise ValueError("metric: PCKh needs head sizes, and this ground truth has none; PCK ('pck') can be had")
        pck, sizes = PCKh(skeleton, sync_on_compute=False), torch.from_numpy(truth.head_sizes)
    else:
        pck = PCK(skeleton, pair, either=either, sync_on_compute=False)
        sizes = pck.sizes(joints, valid) if truth.sizes is None else torch.from_numpy(truth.sizes)
    name = "PCKh" if metric == "pckh" else "PCK"
    if radius is None:
        radius = HEADLINE_THRESHOLDS[name]
    confusion = JointConfusion(skeleton, radius, sync_on_compute=False)
    errors = JointErrors(skeleton, sync_on_compute=False)
    pck.update(predictions, joints, valid, normalizer=sizes)
    for other in (confusion, errors):
        other.update(predictions, joints, valid, sizes)
    table, counts, histogram = pck.compute(), confusion.compute(), errors.compute()
    by_sample, counted = normalized_errors(predictions, joints, sizes, valid)
    # A joint that is far off counts as one person's size: it mustn't hide what the others do.
    by_sample = torch.where(counted, by_sample.clamp(max=1.0), torch.nan)[:, list(skeleton.scored)].nanmean(1).numpy()
    summary = summarize(table, counts, histogram, skeleton, name, radius)
    if metric == "pck":
        given = truth.sizes is not None
        summary["normalizer"] = "given" if given else [[skeleton.joints[k] for k in pair] for pair in pck.pairs]
    else:
        summary["normalizer"] = "head size"
    return Result(summary, table, counts, histogram, by_sample)


def summarize(table, counts, histogram, skeleton, name, radius):
    """The numbers of the three metrics as a dict for JSON, in percent; None where nothing was counted."""

    def percent(value):
        value = float(value)
        return round(100 * value, 4) if np.isfinite(value) else None

    summary = {
        "metric": name,
        "skeleton": skeleton.name,
        "samples": int(table["samples"]),
        "unmeasured": int(table["unmeasured"]),
    }
    thresholds = table["thresholds"].tolist()
    for r in TABLE_THRESHOLDS:
        t = thresholds.index(r)
        summary[f"{name}@{r:g}"] = {
            "mean": percent(table["mean"][t]),
            **{group: percent(values[t]) for group, values in table["groups"].items()},
            "mean_of_joints": percent(table["mean_of_joints"][t]),
            "joints": {joint: percent(value) for joint, value in zip(skeleton.joints, table["joints"][t], strict=True)},
        }
    summary["auc"] = percent(table["auc"]["mean"])
    summary["auc_by_group"] = {group: percent(value) for group, value in table["auc"].items() if group != "mean"}
    summary["curve"] = {"thresholds": thresholds, "mean": [percent(value) for value in table["mean"]]}
    summary["counted"] = dict(zip(skeleton.joints, table["counted"].tolist(), strict=True))
    summary["confusion"] = {
        "radius": radius,
        "predicted": list(skeleton.joints),
        "landed_on": [*skeleton.joints, "none"],
        "counts": counts.tolist(),
    }
    summary["errors"] = {
        "edges": [round(edge, 6) for edge in histogram["edges"].tolist()],
        "counts": dict(zip(skeleton.joints, histogram["counts"].tolist(), strict=True)),
    }
    return summary
