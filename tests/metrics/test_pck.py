"""PCK, PCKh, confusion and histograms: by hand, against MPII's published numbers, and across processes."""

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

import amil_fast
from amil_fast.metrics import area_under_curve, pck
from amil_fast.metrics.modules import (
    PCK,
    JointConfusion,
    JointErrors,
    PCKh,
    head_size,
    head_size_from_joints,
    pair_distance,
)
from amil_fast.pose.skeletons import COCO17, LSP14, MPII16, SKELETONS, Skeleton, get_skeleton
from tests.helpers import SHARED, exit_worker

MPII = SHARED / "data" / "mpii"
needs_mpii = pytest.mark.skipif(not MPII.exists(), reason=f"{MPII} is not here")


@pytest.mark.parametrize("skeleton", SKELETONS.values(), ids=SKELETONS)
def test_skeletons_agree_with_themselves(skeleton):
    K = skeleton.num_joints
    assert len(set(skeleton.joints)) == K == len(set(skeleton.short_names))
    flip = skeleton.flip_index
    assert sorted(flip) == list(range(K))
    assert [flip[flip[k]] for k in range(K)] == list(range(K))
    for k, name in enumerate(skeleton.joints):
        swapped = name.replace("left", "L").replace("right", "left").replace("L", "right")
        assert skeleton.joints[flip[k]] == swapped
    # the limbs connect all joints to one body (COCO's face hangs on nothing)
    assert {joint for limb in skeleton.limbs for joint in limb} == set(range(K))
    for a, b in skeleton.normalizer_pairs.values():
        assert {skeleton.joints[a].split()[1], skeleton.joints[b].split()[1]} == {"hip", "shoulder"}
        assert skeleton.joints[a].split()[0] != skeleton.joints[b].split()[0]


def test_paper_colors():
    def color(name):
        return LSP14.joint_colors[LSP14.index(name)]

    r, g, b = color("right wrist")
    assert b > 200 and b > r and b > g  # blue
    r, g, b = color("right ankle")
    assert g > 1.5 * r and g > 1.5 * b  # green
    r, g, b = color("left ankle")
    assert r > 200 and 100 < g < 180 and b < 40  # orange
    r, g, b = color("neck")
    assert r > 200 and g < 80 and b < 80  # red


def test_skeleton_errors():
    with pytest.raises(ValueError, match="skeleton: expected one of 'lsp14'"):
        get_skeleton("lsp")
    with pytest.raises(ValueError, match="pair: expected one of 'paper', 'lsp'"):
        LSP14.normalizer_pair("hips")
    with pytest.raises(ValueError, match="joint: expected one of right ankle"):
        LSP14.normalizer_pair(("left hip", "tail"))
    assert LSP14.normalizer_pair("paper") == (3, 8)
    assert LSP14.normalizer_pair(("left shoulder", 2)) == (9, 2) == LSP14.normalizer_pair("lsp")


def test_pck_by_hand():
    targets = torch.zeros(2, 3, 2)
    predictions = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [9.0, 0.0]], [[0.0, 2.0], [torch.nan, 0.0], [0.0, 0.0]]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    by_joint, pooled = pck(predictions, targets, torch.tensor([10.0, 10.0]), valid, torch.tensor([0.1, 0.2, 0.5]))
    # errors: 0.5, 0.1, -; 0.2, NaN (wrong), 0
    assert by_joint.tolist() == [[0, 0.5, 1], [0.5, 0.5, 1], [1, 0.5, 1]]
    assert pooled.tolist() == [2 / 5, 3 / 5, 4 / 5]
    assert amil_fast.metrics.pck is pck


def test_error_equal_to_the_threshold_is_correct():
    """Eq. 21 says <=; 7/10, 0.7 and the float32 nearest to 0.7 are three different numbers."""
    targets = torch.zeros(1, 1, 2)
    predictions = torch.tensor([[[7.0, 0.0]]])
    for thresholds in ([0.7], torch.tensor([0.7]), torch.tensor([0.7], dtype=torch.float64)):
        assert pck(predictions, targets, torch.tensor([10.0]), torch.ones(1, 1).bool(), thresholds)[1].item() == 1


def test_samples_without_a_size_are_excluded():
    targets, predictions = torch.zeros(4, 1, 2), torch.zeros(4, 1, 2)
    predictions[0] += 100
    valid = torch.ones(4, 1, dtype=torch.bool)
    sizes = torch.tensor([1.0, torch.nan, 0.0, torch.inf])
    by_joint, pooled = pck(predictions, targets, sizes, valid, [0.5])
    assert by_joint.item() == 0 and pooled.item() == 0  # only the wrong one is counted
    assert pck(predictions[1:], targets[1:], sizes[1:], valid[1:], [0.5])[1].isnan().all()


def test_pck_ignores_what_invalid_targets_hold():
    torch.manual_seed(0)
    targets, predictions, valid = torch.rand(20, 5, 2), torch.rand(20, 5, 2), torch.rand(20, 5) > 0.4
    sizes, r = torch.rand(20) + 0.5, [0.1, 0.3, 0.5]
    expected = pck(predictions, targets, sizes, valid, r)
    for garbage in (torch.nan, 1e30, 0.0):
        spoiled = torch.where(valid[..., None], targets, garbage)
        for one, other in zip(pck(predictions, spoiled, sizes, valid, r), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": torch.zeros(2, 3)}, r"predictions: expected shape \(S, K, 2\), got \(2, 3\)"),
        ({"targets": torch.zeros(2, 4, 2)}, r"targets: expected the shape of predictions"),
        ({"normalizer": torch.zeros(3)}, r"normalizer: expected shape \(2,\), got \(3,\)"),
        ({"valid": torch.zeros(2, 2)}, r"valid: expected shape \(2, 3\), got \(2, 2\)"),
        ({"thresholds": torch.tensor(0.5)}, r"thresholds: expected shape \(T,\)"),
    ],
)
def test_pck_errors(change, message):
    arguments = {
        "predictions": torch.zeros(2, 3, 2),
        "targets": torch.zeros(2, 3, 2),
        "normalizer": torch.ones(2),
        "valid": torch.ones(2, 3).bool(),
        "thresholds": [0.5],
    }
    with pytest.raises(ValueError, match=message):
        pck(**(arguments | change))


def test_area_under_curve():
    r = torch.tensor([0.0, 0.25, 0.5])
    assert area_under_curve(r, torch.tensor([0.0, 0.5, 1.0])).item() == 0.5
    assert area_under_curve(r, torch.ones(3, 2)).tolist() == [1, 1]


def mpii_detections():
    from scipy.io import loadmat

    mat = loadmat(MPII / "detections_our_format.mat")
    predictions, targets = (
        torch.from_numpy(mat[key].transpose(2, 0, 1).astype(np.float64)) for key in ("pos_pred_src", "pos_gt_src")
    )
    valid = torch.from_numpy(mat["jnt_missing"].T == 0)
    boxes = torch.from_numpy(mat["headboxes_src"].transpose(2, 0, 1).reshape(-1, 4).astype(np.float64))
    return predictions, targets, valid, boxes


@needs_mpii
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mpii_detections_score_as_published(dtype):
    predictions, targets, valid, boxes = mpii_detections()
    metric = PCKh()
    for part in torch.arange(len(predictions)).split(700):
        metric.update(predictions[part].to(dtype), targets[part].to(dtype), valid[part], boxes[part])
    result = metric.compute()
    with open(MPII / "pckh_expected.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    for row in rows:
        t = next(i for i, r in enumerate(metric.thresholds) if abs(r - float(row["threshold"])) < 1e-9)
        for k, name in enumerate(MPII16.short_names):
            if name in row:
                assert 100 * result["joints"][t, k].item() == pytest.approx(float(row[name]), abs=1e-5), (row, name)
        assert 100 * result["mean_of_joints"][t].item() == pytest.approx(float(row["mean"]), abs=1e-5)
    assert 100 * result["mean"][-1].item() == pytest.approx(82.3367, abs=1e-4)  # weighted by the number of joints
    groups = {name: round(100 * values[-1].item(), 2) for name, values in result["groups"].items()}
    assert groups == {
        "head": 95.60,
        "shoulder": 92.71,
        "elbow": 83.36,
        "wrist": 76.74,
        "hip": 81.93,
        "knee": 73.36,
        "ankle": 65.45,
    }
    assert result["samples"] == 2958 and result["unmeasured"] == 0

    predictions, targets = predictions.to(dtype), targets.to(dtype)
    by_joint, _ = pck(predictions, targets, head_size(boxes), valid, metric.thresholds)
    torch.testing.assert_close(by_joint, result["joints"], rtol=0, atol=0, equal_nan=True)


@needs_mpii
def test_head_size_from_joints_agrees_with_the_boxes():
    _, targets, valid, boxes = mpii_detections()
    ratio = head_size_from_joints(targets, valid, MPII16) / head_size(boxes)
    ratio = ratio[ratio.isfinite()]
    assert len(ratio) > 2900
    assert ((ratio - 1).abs() < 0.01).double().mean() > 0.97


def random_people(seed, S=40, K=14):
    generator = torch.Generator().manual_seed(seed)
    targets = 100 * torch.rand(S, K, 2, generator=generator)
    predictions = targets + 12 * torch.randn(S, K, 2, generator=generator)
    valid = torch.rand(S, K, generator=generator) > 0.2
    return predictions, targets, valid


def test_pair_and_flipped_pair():
    _, targets, valid = random_people(3)
    paper = pair_distance(targets, valid, [LSP14.normalizer_pair("paper")])
    assert paper.isnan().tolist() == (~(valid[:, 3] & valid[:, 8])).tolist()
    torch.testing.assert_close(
        paper[~paper.isnan()], (targets[:, 3] - targets[:, 8]).norm(dim=-1)[~paper.isnan()].double()
    )
    strict, either = PCK(LSP14), PCK(LSP14, either=True)
    for metric in (strict, either):
        metric.update(targets, targets, valid)
    strict, either = strict.compute(), either.compute()
    assert strict["unmeasured"] > either["unmeasured"] > 0
    assert strict["samples"] + strict["unmeasured"] == 40 == either["samples"] + either["unmeasured"]
    assert strict["mean"].tolist() == [1] * 51  # ground truth scores 100 %
    assert either["auc"]["mean"] == 1


def test_an_arbitrary_pair():
    predictions, targets, valid = random_people(4)
    metric = PCK(COCO17, pair=("nose", "left knee"), thresholds=[0.2])
    targets, predictions = (torch.cat([x, x[:, :3]], 1) for x in (targets, predictions))
    valid = torch.cat([valid, valid[:, :3]], 1)
    metric.update(predictions, targets, valid)
    sizes = torch.where(valid[:, 0] & valid[:, 13], (targets[:, 0] - targets[:, 13]).norm(dim=-1), torch.nan)
    expected = pck(predictions, targets, sizes, valid, [0.2])
    torch.testing.assert_close(metric.compute()["joints"], expected[0])
    torch.testing.assert_close(metric.compute()["mean"], expected[1][0])


def test_confusion_shows_a_swap():
    targets = torch.arange(28.0).reshape(1, 14, 2) * 10
    swapped = targets[:, list(LSP14.flip_index)]
    valid = torch.ones(1, 14, dtype=torch.bool)
    metric = JointConfusion(LSP14)
    metric.update(swapped, targets, valid, torch.tensor([50.0]))
    expected = torch.zeros(14, 15, dtype=torch.int64)
    expected[torch.arange(14), list(LSP14.flip_index)] = 1
    assert torch.equal(metric.compute(), expected)

    metric.reset()
    nowhere = targets.clone()
    nowhere[0, 2] += 1000
    nowhere[0, 4] = torch.nan
    valid[0, 6] = False  # neither counted as a row nor landed on
    nowhere[0, 7] = targets[0, 6]
    metric.update(nowhere, targets, valid, torch.tensor([50.0]))
    counts = metric.compute()
    assert counts[2, 14] == counts[4, 14] == 1
    assert counts[6].sum() == 0 and counts[:, 6].sum() == 0
    assert counts[7, 14] == 1  # 28 px from the joints beside the hidden one, more than 0.2 x 50
    assert counts.diagonal().sum() == 10


def test_error_histogram():
    targets = torch.zeros(3, 14, 2)
    predictions = torch.zeros(3, 14, 2)
    predictions[0, 0, 0], predictions[1, 0, 0], predictions[2, 0, 0] = 1.0, 99.0, torch.nan
    metric = JointErrors(LSP14, bins=4, limit=1.0)
    metric.update(predictions, targets, torch.ones(3, 14).bool(), torch.full((3,), 10.0))
    result = metric.compute()
    assert result["edges"].tolist() == [0, 0.25, 0.5, 0.75, 1.0]
    assert result["counts"][0].tolist() == [1, 0, 0, 0, 2]
    assert result["counts"][1].tolist() == [3, 0, 0, 0, 0]


def all_metrics():
    return PCK(LSP14, either=True), JointConfusion(LSP14), JointErrors(LSP14)


def flat(metrics):
    score, confusion, errors = (metric.compute() for metric in metrics)
    return [score["joints"], score["mean"], score["auc"]["mean"], score["samples"], confusion, errors["counts"]]


def one_of_two(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    predictions, targets, valid = random_people(11)
    mine = slice(0, 13) if rank == 0 else slice(13, 40)  # unequal shares
    metrics = all_metrics()
    sizes = pair_distance(targets, valid, metrics[0].pairs)
    metrics[0].update(predictions[mine], targets[mine], valid[mine])
    for metric in metrics[1:]:
        metric.update(predictions[mine], targets[mine], valid[mine], sizes[mine])
    torch.save(flat(metrics), folder / f"{rank}.pt")
    exit_worker(folder, rank)


def test_two_processes_give_what_one_gives(tmp_path):
    mp.spawn(one_of_two, (tmp_path,), nprocs=2)
    predictions, targets, valid = random_people(11)
    metrics = all_metrics()
    metrics[0].update(predictions, targets, valid)
    for metric in metrics[1:]:
        metric.update(predictions, targets, valid, pair_distance(targets, valid, metrics[0].pairs))
    for rank in range(2):
        for one, other in zip(flat(metrics), torch.load(tmp_path / f"{rank}.pt", weights_only=True), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_skeletons_are_picklable():
    import copy
    import pickle

    for skeleton in SKELETONS.values():
        assert pickle.loads(pickle.dumps(skeleton)) is skeleton is copy.deepcopy(skeleton)
    own = Skeleton("own", ("left a", "right a"), ("la", "ra"), ((0, 1),), {"head": (0,)}, (0, 1), {})
    again = pickle.loads(pickle.dumps(own))
    assert again.joints == own.joints and again.flip_pairs == ((0, 1),)


def test_metrics_need_torch_only():
    """``amil_fast.metrics`` is part of the library; torchmetrics, OpenCV, SciPy and Matplotlib are extras."""
    code = (
        "import sys, amil_fast, amil_fast.metrics, amil_fast.pose, amil_fast.nn;"
        "print(sorted({'torchmetrics', 'cv2', 'scipy', 'matplotlib', 'typer', 'rich', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
