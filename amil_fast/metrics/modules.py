"""PCK, PCKh, joint confusion and error histograms as torchmetrics metrics, summed over batches and processes."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torchmetrics import Metric

from amil_fast.metrics.functional import area_under_curve, count_correct, normalized_errors
from amil_fast.pose.skeletons import Skeleton, get_skeleton

__all__ = [
    "PCK",
    "PCKh",
    "JointConfusion",
    "JointErrors",
    "pair_distance",
    "head_size",
    "head_size_from_joints",
]

# Thresholds of curves and of tables.
CURVE_THRESHOLDS = tuple(k / 100 for k in range(51))
TABLE_THRESHOLDS = tuple(k / 100 for k in range(5, 51, 5))
HEADLINE_THRESHOLDS = {"PCK": 0.2, "PCKh": 0.5}  # what the LSP and MPII papers report


def pair_distance(joints: torch.Tensor, valid: torch.Tensor, pairs: Iterable[tuple[int, int]]) -> torch.Tensor:
    """Size of every person: the distance of the first pair of joints that are both valid.

    Args:
        joints: ``(S, K, 2)``.
        valid: ``(S, K)`` bool.
        pairs: pairs of joint indices, in order of preference.

    Returns:
        ``(S,)`` float64, NaN without a valid pair.
    """
    size = torch.full((len(joints),), torch.nan, dtype=torch.float64, device=joints.device)
    for a, b in pairs:
        distance = torch.linalg.vector_norm(joints[:, a].double() - joints[:, b].double(), dim=-1)
        usable = torch.isnan(size) & (valid[:, a] != 0) & (valid[:, b] != 0)
        size = torch.where(usable, distance, size)
    return size


def head_size(head_boxes: torch.Tensor) -> torch.Tensor:
    """Normalizer of PCKh, 0.6 times the diagonal of the head box: ``(S, 4)`` (x1, y1, x2, y2) -> ``(S,)`` float64."""
    corners = head_boxes.double().reshape(-1, 2, 2)
    return 0.6 * torch.linalg.vector_norm(corners[:, 1] - corners[:, 0], dim=-1)


def head_size_from_joints(joints: torch.Tensor, valid: torch.Tensor, skeleton: str | Skeleton) -> torch.Tensor:
    """Normalizer of PCKh without head boxes, from neck and head top: ``(S,)`` float64, NaN where one is not valid.

    Raises:
        ValueError: the skeleton has no head segment.
    """
    skeleton = get_skeleton(skeleton)
    if skeleton.head_segment is None or skeleton.head_factor is None:
        raise ValueError(f"skeleton: expected one whose head segment gives a head size, got {skeleton.name!r}")
    return skeleton.head_factor * pair_distance(joints, valid, [skeleton.head_segment])


class PCK(Metric):
    """Percentage of correct keypoints (Eq. 21) at many thresholds: by joint, by group, mean, area under the curve.

    Args:
        skeleton: a :class:`~amil_fast.pose.skeletons.Skeleton` or its name.
        pair: two joints whose distance is the person's size, by name or index, or a key of the skeleton's
            ``normalizer_pairs``: ``"paper"`` (left hip, right shoulder) or ``"lsp"`` (left shoulder, right hip).
        either: use the flipped pair if ``pair`` is not annotated. Samples without a size are left out and counted in
            ``unmeasured``.
        thresholds: in ascending order; the area under the curve is computed from the first to the last.
        options: arguments of ``torchmetrics.Metric``.

    ``compute()`` returns a dict of float64 fractions: ``thresholds (T,)``, ``joints (T, K)``, ``groups`` name ->
    ``(T,)``, ``mean (T,)`` (over the skeleton's scored joints, weighted by their number, as in the MPII and LSP
    papers), ``mean_of_joints (T,)`` (unweighted), ``auc`` name -> scalar for the mean and each group; and of int64
    counts: ``counted (K,)``, ``samples``, ``unmeasured``. With a single threshold torchmetrics converts shape ``(1,)``
    to scalars.

    Raises:
        ValueError: an unknown pair, or thresholds that are not ascending.
    """

    correct: torch.Tensor
    counted: torch.Tensor
    samples: torch.Tensor
    unmeasured: torch.Tensor
    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(
        self,
        skeleton: str | Skeleton,
        pair: str | tuple[str, str] | tuple[int, int] = "paper",
        *,
        either: bool = False,
        thresholds: Sequence[float] = CURVE_THRESHOLDS,
        **options: Any,
    ):
        super().__init__(**options)
        self.skeleton = get_skeleton(skeleton)
        a, b = self.skeleton.normalizer_pair(pair)
        flip = self.skeleton.flip_index
        self.pairs = [(a, b), (flip[a], flip[b])] if either else [(a, b)]
        self.thresholds = torch.as_tensor(thresholds, dtype=torch.float64)
        if len(self.thresholds) < 1 or (self.thresholds.diff() <= 0).any():
            raise ValueError(f"thresholds: expected at least one, ascending, got {list(thresholds)}")
        T, K = len(self.thresholds), self.skeleton.num_joints
        self.add_state("correct", torch.zeros(T, K, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("counted", torch.zeros(K, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("unmeasured", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        predictions: torch.Tensor,
        targets: torch.Tensor,
        valid: torch.Tensor,
        normalizer: torch.Tensor | None = None,
    ) -> None:
        """Adds S samples: ``(S, K, 2)``, ``(S, K, 2)``, ``(S, K)`` bool, and optionally the sizes ``(S,)``."""
        if normalizer is None:
            normalizer = self.sizes(targets, valid)
        errors, counted = normalized_errors(predictions, targets, normalizer, valid)
        self.correct += count_correct(errors, self.thresholds.to(errors.device))
        self.counted += counted.sum(0)
        self.samples += counted.any(1).sum()
        self.unmeasured += ((valid != 0).any(1) & ~counted.any(1)).sum()

    def sizes(self, targets: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Default sizes ``(S,)`` of the people, in pixels."""
        return pair_distance(targets, valid, self.pairs)

    def compute(self) -> dict:
        correct, counted = self.correct.double(), self.counted.double()
        joints = correct / counted
        scored = list(self.skeleton.scored)
        thresholds = self.thresholds.to(joints.device)
        groups = {name: joints[:, list(members)].nanmean(1) for name, members in self.skeleton.groups.items()}
        mean = correct[:, scored].sum(1) / counted[scored].sum()
        result = {
            "thresholds": thresholds,
            "joints": joints,
            "groups": groups,
            "mean": mean,
            "mean_of_joints": joints[:, scored].nanmean(1),
            "counted": self.counted.clone(),
            "samples": self.samples.clone(),
            "unmeasured": self.unmeasured.clone(),
        }
        if len(thresholds) > 1:
            result["auc"] = {
                name: area_under_curve(thresholds, values) for name, values in {"mean": mean, **groups}.items()
            }
        return result


class PCKh(PCK):
    """PCK in units of the head size, 0.6 times the diagonal of the head box (MPII).

    Args:
        skeleton: a :class:`~amil_fast.pose.skeletons.Skeleton` or its name.
        thresholds: in ascending order.
        options: arguments of ``torchmetrics.Metric``.
    """

    def __init__(
        self, skeleton: str | Skeleton = "mpii16", *, thresholds: Sequence[float] = CURVE_THRESHOLDS, **options: Any
    ):
        super().__init__(skeleton, thresholds=thresholds, **options)

    def update(  # type: ignore[override]  # head boxes come before sizes
        self,
        predictions: torch.Tensor,
        targets: torch.Tensor,
        valid: torch.Tensor,
        head_boxes: torch.Tensor | None = None,
        normalizer: torch.Tensor | None = None,
    ) -> None:
        """Adds S samples, with head boxes ``(S, 4)`` (x1, y1, x2, y2) or sizes; by default from neck and head top."""
        if normalizer is None and head_boxes is not None:
            normalizer = head_size(head_boxes)
        super().update(predictions, targets, valid, normalizer)

    def sizes(self, targets: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return head_size_from_joints(targets, valid, self.skeleton)


class JointConfusion(Metric):
    """Confusion matrix of predicted joints and the annotated joints nearest to them (Fig. 7 of the paper).

    Row k counts the predictions of joint k in samples with an annotation of k. Column j counts those whose nearest
    annotated joint is j, at a distance of at most ``radius`` times the person's size; the last column counts all
    others, including NaN. Ties go to the predicted joint, then to the smaller index. ``compute()`` returns the counts
    ``(K, K + 1)`` int64.

    Args:
        skeleton: a :class:`~amil_fast.pose.skeletons.Skeleton` or its name.
        radius: in units of the person's size.
        options: arguments of ``torchmetrics.Metric``.
    """

    counts: torch.Tensor
    full_state_update = False
    is_differentiable = False

    def __init__(self, skeleton: str | Skeleton, radius: float = 0.2, **options: Any):
        super().__init__(**options)
        self.skeleton = get_skeleton(skeleton)
        self.radius = radius
        K = self.skeleton.num_joints
        self.add_state("counts", torch.zeros(K, K + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, predictions: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor, normalizer: torch.Tensor
    ) -> None:
        """Adds S samples; arguments as in :func:`amil_fast.metrics.pck`."""
        _, counted = normalized_errors(predictions, targets, normalizer, valid)
        K = self.skeleton.num_joints
        # (S, K predicted, K annotated) distances in units of the person's size
        distance = torch.cdist(
            predictions.double(), targets.double().nan_to_num(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        distance = torch.nan_to_num(distance / normalizer.double()[:, None, None], nan=torch.inf)
        distance = distance.masked_fill(~counted[:, None, :], torch.inf)
        nearest = distance.min(-1)
        own = distance.diagonal(dim1=1, dim2=2) <= nearest.values
        landed = torch.where(own, torch.arange(K, device=distance.device), nearest.indices)
        landed = torch.where(nearest.values <= self.radius, landed, K)
        rows = torch.arange(K, device=distance.device).expand_as(landed)
        cells = (rows * (K + 1) + landed)[counted]
        self.counts += torch.bincount(cells, minlength=K * (K + 1)).view(K, K + 1)

    def compute(self) -> torch.Tensor:
        return self.counts.clone()


class JointErrors(Metric):
    """Histogram of every joint's error in units of the person's size.

    ``compute()`` returns ``edges (bins + 1,)`` and ``counts (K, bins + 1)`` int64; the last bin counts errors above
    ``limit``.

    Args:
        skeleton: a :class:`~amil_fast.pose.skeletons.Skeleton` or its name.
        bins: number of equal bins from 0 to ``limit``.
        limit: in units of the person's size.
        options: arguments of ``torchmetrics.Metric``.
    """

    counts: torch.Tensor
    full_state_update = False
    is_differentiable = False

    def __init__(self, skeleton: str | Skeleton, bins: int = 50, limit: float = 1.0, **options: Any):
        super().__init__(**options)
        self.skeleton = get_skeleton(skeleton)
        self.bins, self.limit = bins, limit
        self.add_state(
            "counts", torch.zeros(self.skeleton.num_joints, bins + 1, dtype=torch.int64), dist_reduce_fx="sum"
        )

    def update(
        self, predictions: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor, normalizer: torch.Tensor
    ) -> None:
        """Adds S samples; arguments as in :func:`amil_fast.metrics.pck`."""
        errors, counted = normalized_errors(predictions, targets, normalizer, valid)
        bins = (errors.nan_to_num(posinf=torch.inf) * (self.bins / self.limit)).clamp(max=self.bins).long()
        cells = (torch.arange(len(self.counts), device=errors.device) * (self.bins + 1) + bins)[counted]
        self.counts += torch.bincount(cells, minlength=self.counts.numel()).view_as(self.counts)

    def compute(self) -> dict:
        return {
            "edges": torch.linspace(0, self.limit, self.bins + 1, dtype=torch.float64),
            "counts": self.counts.clone(),
        }
