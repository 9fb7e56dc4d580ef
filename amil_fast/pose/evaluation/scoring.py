"""PCK or PCKh, joint confusion and error histograms of predictions."""

from dataclasses import dataclass

import numpy as np
import torch

from amil_fast.metrics.functional import normalized_errors
from amil_fast.metrics.modules import HEADLINE_THRESHOLDS, PCK, TABLE_THRESHOLDS, JointConfusion, JointErrors, PCKh
from amil_fast.pose.evaluation.ground_truth import GroundTruth
from amil_fast.pose.skeletons import MPII16, Skeleton


@dataclass
class Result:
    """Result of :func:`score`.

    Attributes:
        summary: numbers for a JSON file, in percent.
        pck: result of :class:`~amil_fast.metrics.modules.PCK` or :class:`~amil_fast.metrics.modules.PCKh`.
        confusion: result of :class:`~amil_fast.metrics.modules.JointConfusion`.
        errors: result of :class:`~amil_fast.metrics.modules.JointErrors`.
        sample_errors: ``(S,)`` float64, mean normalized error of every person, NaN without a normalizer.
    """

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


def scores_of_groups(row: dict) -> dict[str, float | None]:
    """Mean and joint groups of an entry ``"PCK@..."`` of :attr:`Result.summary`, in percent."""
    return {name: value for name, value in row.items() if name not in ("joints", "mean_of_joints")}


def score(
    predictions: np.ndarray | torch.Tensor,
    truth: GroundTruth,
    *,
    metric: str = "auto",
    pair: str | tuple[str, str] = "paper",
    either: bool = False,
    radius: float | None = None,
) -> Result:
    """Computes PCK or PCKh, joint confusion and error histograms.

    Args:
        predictions: ``(S, K, 2)`` in image pixels; NaN counts as wrong.
        truth: ground truth of the same S people.
        metric: ``"pck"``, ``"pckh"``, or ``"auto"``: PCKh for MPII's joints, otherwise PCK.
        pair: joints whose distance normalizes PCK, see :class:`~amil_fast.metrics.modules.PCK`; not used if the ground
            truth contains sizes.
        either: use the flipped pair where ``pair`` is not annotated.
        radius: distance within which a prediction is assigned to a joint in the confusion matrix, in units of the
            person's size; by default 0.2 (PCK) or 0.5 (PCKh), the thresholds of the papers.

    Returns:
        :class:`Result`.

    Raises:
        ValueError: an unknown metric, or PCKh without head sizes.
    """
    skeleton = truth.skeleton
    if metric == "auto":
        metric = "pckh" if skeleton is MPII16 and truth.sizes is None else "pck"
    if metric not in ("pck", "pckh"):
        raise ValueError(f"metric: expected 'pck', 'pckh' or 'auto', got {metric!r}")
    joints, valid = torch.from_numpy(np.nan_to_num(truth.joints)), torch.from_numpy(np.ascontiguousarray(truth.valid))
    predictions = torch.as_tensor(predictions, dtype=torch.float64)
    # The arrays hold all people, so the metrics must not be reduced over processes.
    if metric == "pckh":
        if not np.isfinite(truth.head_sizes).any():
            raise ValueError("metric: PCKh needs head sizes, and this ground truth has none; expected 'pck'")
        pck: PCK = PCKh(skeleton, sync_on_compute=False)
        sizes = torch.from_numpy(truth.head_sizes)
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
    normalized, counted = normalized_errors(predictions, joints, sizes, valid)
    # Clipped, so that a single distant joint does not dominate a person's mean error.
    by_sample = torch.where(counted, normalized.clamp(max=1.0), torch.nan)[:, list(skeleton.scored)].nanmean(1).numpy()
    summary = summarize(table, counts, histogram, skeleton, name, radius)
    if metric == "pck":
        given = truth.sizes is not None
        summary["normalizer"] = "given" if given else [[skeleton.joints[k] for k in pair] for pair in pck.pairs]
    else:
        summary["normalizer"] = "head size"
    return Result(summary, table, counts, histogram, by_sample)


def summarize(table: dict, counts: torch.Tensor, histogram: dict, skeleton: Skeleton, name: str, radius: float) -> dict:
    """Results of the three metrics as a dict for JSON, in percent; None where nothing was counted."""

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
