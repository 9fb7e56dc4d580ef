"""PCK, PCKh, confusion and error histograms as torchmetrics metrics: counts that add up over batches and processes."""

import torch
from torchmetrics import Metric

from amil_fast.metrics.functional import area_under_curve, count_correct, normalized_errors
from amil_fast.pose.skeletons import get_skeleton

# The curves' thresholds: 0, 0.01, ..., 0.5, and those that tables show.
CURVE_THRESHOLDS = tuple(k / 100 for k in range(51))
TABLE_THRESHOLDS = tuple(k / 100 for k in range(5, 51, 5))
HEADLINE_THRESHOLDS = {"PCK": 0.2, "PCKh": 0.5}  # what the LSP and MPII papers report


def pair_distance(joints, valid, pairs):
    """Size of every person: the distance of the first pair of joints of which both are valid.

    Args:
        joints: ``(S, K, 2)``.
        valid: ``(S, K)`` bool.
        pairs: sequence of pairs of joint indices, tried in this order.

    Returns:
        ``(S,)`` float64, NaN where no pair is valid.
    """
    size = torch.full((len(joints),), torch.nan, dtype=torch.float64, device=joints.device)
    for a, b in pairs:
        distance = torch.linalg.vector_norm(joints[:, a].double() - joints[:, b].double(), dim=-1)
        usable = torch.isnan(size) & (valid[:, a] != 0) & (valid[:, b] != 0)
        size = torch.where(usable, distance, size)
    return size


def head_size(head_boxes):
    """PCKh's size, 0.6 x the diagonal of the head box: ``(S, 4)`` (x1, y1, x2, y2) -> ``(S,)`` float64."""
    corners = head_boxes.double().reshape(-1, 2, 2)
    return 0.6 * torch.linalg.vector_norm(corners[:, 1] - corners[:, 0], dim=-1)


def head_size_from_joints(joints, valid, skeleton):
    """PCKh's size where no head box is known, from neck and head top; ``(S,)`` float64, NaN where one is not valid."""
    skeleton = get_skeleton(skeleton)
    if skeleton.head_segment is None or skeleton.head_factor is None:
        raise ValueError(f"skeleton: expected one whose head segment gives a head size, got {skeleton.name!r}")
    return skeleton.head_factor * pair_distance(joints, valid, [skeleton.head_segment])


class PCK(Metric):
    """Percentage of correct keypoints (Eq. 21) at many thresholds: by joint, by group, mean, area under the curve.

    Args:
        skeleton: a :class:`~amil_fast.pose.skeletons.Skeleton` or its name.
        pair: two joints whose distance is the person's size, by name or index, or a name of the skeleton's
            ``normalizer_pairs``: ``"paper"`` (left hip - right shoulder) or ``"lsp"`` (left shoulder - right hip).
        either: where that pair is not annotated, take its mirror image. Otherwise such samples can't be measured; they
            are counted in ``unmeasured``.
        thresholds: ascending; the area under the curve is taken from the first to the last.

    ``compute()`` returns a dict: ``thresholds (T,)``, ``joints (T, K)``, ``groups`` name -> ``(T,)``, ``mean (T,)``
    (over the skeleton's scored joints, weighted by their number, as the MPII and LSP papers do), ``mean_of_joints
    (T,)`` (their plain average), ``auc`` name -> scalar for the mean and each group, all float64 fractions;
    ``counted (K,)``, ``samples``, ``unmeasured``, int64. (With a single threshold torchmetrics makes every ``(1,)``
    of it a scalar.)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self, skeleton, pair="paper", *, either=False, thresholds=CURVE_THRESHOLDS, **options):
        super().__init__(**options)
        self.skeleton = get_skeleton(skeleton)
        pair = self.skeleton.normalizer_pair(pair)
        mirror = self.skeleton.flip_index
        self.pairs = [pair, (mirror[pair[0]], mirror[pair[1]])] if either else [pair]
        self.thresholds = torch.as_tensor(thresholds, dtype=torch.float64)
        if len(self.thresholds) < 1 or (self.thresholds.diff() <= 0).any():
            raise ValueError(f"thresholds: expected at least one, ascending, got {list(thresholds)}")
        T, K = len(self.thresholds), self.skeleton.num_joints
        self.add_state("correct", torch.zeros(T, K, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("counted", torch.zeros(K, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("unmeasured", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions, targets, valid, normalizer=None):
        """Adds S samples: ``(S, K, 2)``, ``(S, K, 2)``, ``(S, K)`` bool, and ``(S,)`` sizes instead of the pair's."""
        if normalizer is None:
            normalizer = self.sizes(targets, valid)
        errors, counted = normalized_errors(predictions, targets, normalizer, valid)
        self.correct += count_correct(errors, self.thresholds.to(errors.device))
        self.counted += counted.sum(0)
        self.samples += counted.any(1).sum()
        self.unmeasured += ((valid != 0).any(1) & ~counted.any(1)).sum()

    def sizes(self, targets, valid):
        """The sizes ``(S,)`` this metric divides by where none are given."""
        return pair_distance(targets, valid, self.pairs)

    def compute(self):
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
    """PCK in units of the head size (0.6 x the head box's diagonal), MPII's measure.

    ``update`` takes head boxes ``(S, 4)``, (x1, y1, x2, y2); without them the head size comes from neck and head top.
    """

    def __init__(self, skeleton="mpii16", *, thresholds=CURVE_THRESHOLDS, **options):
        super().__init__(skeleton, thresholds=thresholds, **options)

    def update(self, predictions, targets, valid, head_boxes=None, normalizer=None):
        if normalizer is None and head_boxes is not None:
            normalizer = head_size(head_boxes)
        super().update(predictions, targets, valid, normalizer)

    def sizes(self, targets, valid):
        return head_size_from_joints(targets, valid, self.skeleton)


class JointConfusion(Metric):
    """Which joint a prediction actually landed on (the paper's Fig. 7).

    Row k: the predictions of joint k, in samples where k is annotated. Column j: those whose nearest annotated joint is
    j, no farther away than ``radius`` x the person's size; the last column: those near no joint at all (NaN predictions
    too). A swap of left and right is off the diagonal at the mirror pair. Ties go to the joint predicted, then to the
    smaller index. ``compute()`` returns the counts ``(K, K + 1)`` int64.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, skeleton, radius=0.2, **options):
        super().__init__(**options)
        self.skeleton = get_skeleton(skeleton)
        self.radius = radius
        K = self.skeleton.num_joints
        self.add_state("counts", torch.zeros(K, K + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions, targets, valid, normalizer):
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

    def compute(self):
        return self.counts.clone()


class JointErrors(Metric):
    """Histogram of each joint's error in units of the person's size.

    ``bins`` equal bins from 0 to ``limit`` and one more for everything beyond. ``compute()`` returns ``edges (bins +
    1,)`` and ``counts (K, bins + 1)`` int64.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, skeleton, bins=50, limit=1.0, **options):
        super().__init__(**options)
        self.skeleton = get_skeleton(skeleton)
        self.bins, self.limit = bins, limit
        self.add_state(
            "counts", torch.zeros(self.skeleton.num_joints, bins + 1, dtype=torch.int64), dist_reduce_fx="sum"
        )

    def update(self, predictions, targets, valid, normalizer):
        """Adds S samples; arguments as in :func:`amil_fast.metrics.pck`."""
        errors, counted = normalized_errors(predictions, targets, normalizer, valid)
        bins = (errors.nan_to_num(posinf=torch.inf) * (self.bins / self.limit)).clamp(max=self.bins).long()
        cells = (torch.arange(len(self.counts), device=errors.device) * (self.bins + 1) + bins)[counted]
        self.counts += torch.bincount(cells, minlength=self.counts.numel()).view_as(self.counts)

    def compute(self):
        return {
            "edges": torch.linspace(0, self.limit, self.bins + 1, dtype=torch.float64),
            "counts": self.counts.clone(),
        }
