"""Evaluation: reading predictions and ground truth from files, and scoring."""

import json

import numpy as np
import pytest
from scipy.io import savemat

from amil_fast.pose.data import DataError, load_coco, load_lsp, load_lspet, load_mpii
from amil_fast.pose.evaluation import GroundTruth, read_ground_truth, read_predictions, score
from amil_fast.pose.visualization.sheets import best_median_worst
from tests.helpers import SHARED
from tests.pose import layouts as make

MPII = SHARED / "data" / "mpii"


def truth_of_lsp(tmp_path):
    make.lsp(tmp_path)
    return GroundTruth.of(load_lsp(tmp_path, "all"))


def test_ground_truth_scores_100(tmp_path):
    """For every data set, its own joints as predictions score 100 % in all metrics."""
    make.lspet(tmp_path / "lspet", S=12)
    rows = make.mpii_rows(tmp_path / "mpii")
    make.mpii_gt(tmp_path / "mpii/annot/gt_valid.mat", rows)
    make.coco(tmp_path / "coco")
    for people, either in (
        (load_lspet(tmp_path / "lspet", "all"), True),
        (load_mpii(tmp_path / "mpii", "valid"), False),
        (load_coco(tmp_path / "coco"), True),
    ):
        truth = GroundTruth.of(people)
        np.save(tmp_path / "predictions.npy", people.joints)
        summary = score(read_predictions(tmp_path / "predictions.npy", truth), truth, either=either).summary
        name = summary["metric"]
        assert name == ("PCKh" if people.skeleton.name == "mpii16" else "PCK")
        assert summary["samples"] > 0 and summary["auc"] == 100
        for r in ("0.05", "0.2", "0.5"):
            scores = summary[f"{name}@{r}"]
            assert scores["mean"] == 100 == scores["mean_of_joints"]
            assert set(scores["joints"].values()) <= {100, None}
        counts = np.array(summary["confusion"]["counts"])
        assert np.diag(counts).sum() == counts.sum() == sum(summary["counted"].values())
        json.dumps(summary, allow_nan=False)


def test_summary_keys(tmp_path):
    truth = truth_of_lsp(tmp_path)
    summary = score(truth.joints + 3, truth).summary
    groups = {"head", "shoulder", "elbow", "wrist", "hip", "knee", "ankle"}
    assert set(summary["PCK@0.2"]) == {"mean", "mean_of_joints", "joints", *groups}
    assert summary["normalizer"] == [["left hip", "right shoulder"]]
    other = score(truth.joints + 3, truth, pair="lsp", either=True).summary
    assert other["normalizer"] == [["left shoulder", "right hip"], ["right shoulder", "left hip"]]
    assert {f"PCK@{r:g}" for r in np.arange(1, 11) / 20} <= set(summary)
    # hand-computed: errors of 3 * sqrt(2) px, normalized by the distance of the pair
    sizes = np.linalg.norm(truth.joints[:, 3] - truth.joints[:, 8], axis=-1)
    expected = 100 * np.mean(np.hypot(3, 3) / sizes <= 0.2)
    assert summary["PCK@0.2"]["mean"] == pytest.approx(expected, abs=1e-3)


def test_coco_rows_are_matched_to_people(tmp_path):
    content = make.coco(tmp_path)
    truth = GroundTruth.of(load_coco(tmp_path))
    rows = [
        {"image_id": row["image_id"], "category_id": 1, "keypoints": row["keypoints"], "score": 0.5}
        for row in (content["annotations"][i] for i in (4, 3, 0))  # in a different order
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(rows))
    found = read_predictions(path, truth)
    np.testing.assert_allclose(found[truth.valid], truth.joints[truth.valid])
    # a missing person, a surplus person, and file names instead of ids
    rows = [{**rows[1], "file_name": "000000000007.jpg"}, rows[0], {**rows[0], "keypoints": [500, 500, 1] * 17}]
    del rows[0]["image_id"]
    path.write_text(json.dumps(rows))
    found = read_predictions(path, truth)
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1:][truth.valid[1:]], truth.joints[1:][truth.valid[1:]])


def test_predictions_without_joints_are_assigned_last(tmp_path):
    """A row of NaN has the largest possible distance to every person, not the smallest."""
    content = make.coco(tmp_path)
    truth = GroundTruth.of(load_coco(tmp_path))
    row = content["annotations"][0]  # one of two people of its image
    offset = np.array([0.5, 0, 0])
    shifted = (np.reshape(row["keypoints"], (17, 3)) + offset).reshape(-1).tolist()
    rows = [{"image_id": row["image_id"], "keypoints": k} for k in ([None] * 51, [None] * 51, shifted)]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(rows))
    found = read_predictions(path, truth)
    np.testing.assert_allclose(found[0][truth.valid[0]], truth.joints[0][truth.valid[0]] + offset[:2])


def test_errors_of_people_are_clipped_at_one(tmp_path):
    """One distant joint of 14 counts as an error of 1."""
    truth = truth_of_lsp(tmp_path)
    found = truth.joints.copy()
    joint = int(np.flatnonzero(truth.valid[0])[0])
    found[0, joint] += 1e4
    result = score(found, truth)
    expected = np.zeros(len(found))
    expected[0] = 1 / truth.valid[0].sum()
    counted = np.isfinite(result.sample_errors)
    assert counted[0]
    np.testing.assert_allclose(result.sample_errors[counted], expected[counted])


def test_image_names(tmp_path):
    truth = truth_of_lsp(tmp_path)
    path = tmp_path / "results.json"
    for name in ("3", 3, "im0003.jpg", "images/im0003.jpg", "/elsewhere/im0003.jpg", "im0003"):
        path.write_text(json.dumps([{"image_id": name, "keypoints": [7, 8, 1] * 14}]))
        found = read_predictions(path, truth)
        assert (found[2] == (7, 8)).all() and np.isnan(found[[0, 1, 3, 4, 5]]).all()


def test_npz_with_predictions_and_ground_truth(tmp_path):
    rng = np.random.default_rng(0)
    targets = rng.uniform(0, 100, (5, 14, 2))
    content = {"predictions": np.concatenate([targets + 5, np.ones((5, 14, 1))], -1), "targets": targets}
    path = tmp_path / "all.npz"
    np.savez(path, **content, normalizer=np.full(5, 40.0), valid=rng.random((5, 14)) < 0.7)
    truth = read_ground_truth(path)
    result = score(read_predictions(path, truth), truth)
    assert result.summary["normalizer"] == "given"
    # 5 * sqrt(2) / 40 = 0.177
    assert result.summary["PCK@0.15"]["mean"] == 0 and result.summary["PCK@0.2"]["mean"] == 100
    assert result.summary["auc"] == pytest.approx(100 * (0.5 - 0.175) / 0.5, abs=0.1)
    np.testing.assert_allclose(result.sample_errors, 5 * 2**0.5 / 40)
    np.savez(path, **content)
    assert read_ground_truth(path).valid.all()
    np.savez(path, predictions=content["predictions"])
    assert read_ground_truth(path) is None


def test_mpii_mat_of_hrnet(tmp_path):
    """HRNet's pred.mat has 1-based coordinates, like gt_valid.mat; those of the JSON annotations are 0-based."""
    rows = make.mpii_rows(tmp_path)
    boxes = make.mpii_gt(tmp_path / "annot/gt_valid.mat", rows)
    savemat(tmp_path / "pred.mat", {"preds": np.array([row["joints"] for row in rows])})
    for truth in (GroundTruth.of(load_mpii(tmp_path, "valid")), read_ground_truth(tmp_path / "annot/gt_valid.mat")):
        found = read_predictions(tmp_path / "pred.mat", truth)
        np.testing.assert_allclose(found[truth.valid], truth.joints[truth.valid])
        np.testing.assert_allclose(
            truth.head_sizes, 0.6 * np.hypot(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
        )
        assert score(found, truth).summary["PCKh@0.05"]["mean"] == 100


@pytest.mark.skipif(not MPII.exists(), reason=f"{MPII} not found")
def test_mpii_detections_mat():
    truth = read_ground_truth(MPII / "detections_our_format.mat")
    summary = score(read_predictions(MPII / "detections_our_format.mat", truth), truth).summary
    scores = summary["PCKh@0.5"]
    expected = {"head": 95.6003, "shoulder": 92.714, "elbow": 83.3646, "wrist": 76.7357, "hip": 81.9283}
    assert {name: scores[name] for name in expected} == expected
    assert scores["mean_of_joints"] == 81.4584 and scores["mean"] == 82.3367
    assert scores["joints"]["pelvis"] == 0  # not predicted by this system and excluded from the means
    swap = summary["confusion"]["counts"][0]
    assert swap[5] > 0.1 * sum(swap)  # right ankles predicted at left ankles, a typical error


def test_invalid_prediction_files(tmp_path):
    truth = truth_of_lsp(tmp_path)

    def expect_error(name, message, write):
        path = tmp_path / name
        write(path)
        with pytest.raises(DataError, match=f"{name}: {message}"):
            read_predictions(path, truth)

    expect_error("a.npy", r"expected predictions for 6 people x 14 joints", lambda p: np.save(p, np.zeros((5, 14, 2))))
    expect_error("b.npy", "expected a NumPy file of numbers", lambda p: p.write_bytes(b"x"))
    expect_error("c.npy", "expected a NumPy file", lambda p: np.save(p, np.array([{}]), allow_pickle=True))
    expect_error("d.npy", "expected a NumPy file of numbers: dtype", lambda p: np.save(p, np.array(["a"])))
    expect_error("e.npz", "expected a variable 'predictions', found x", lambda p: np.savez(p, x=1))
    expect_error("f.mat", "expected a variable 'pos_pred_src' or 'preds'", lambda p: savemat(p, {"x": 1}))
    expect_error("g.json", "expected a JSON file", lambda p: p.write_text("x"))
    expect_error("h.json", "expected a list of COCO result rows, got dict", lambda p: p.write_text("{}"))
    expect_error("i.json", "row 0: expected image_id and keypoints", lambda p: p.write_text("[{}]"))
    rows = [{"image_id": 1, "keypoints": [1, 2]}]
    expect_error("j.json", "row 0: expected 42 numbers as keypoints, got 2", lambda p: p.write_text(json.dumps(rows)))
    rows = [{"image_id": 99, "keypoints": [1] * 42}]
    expect_error("k.json", "row 0: the data set has no image 99", lambda p: p.write_text(json.dumps(rows)))
    expect_error("l.csv", "expected predictions as .json, .npy, .npz or .mat", lambda p: p.write_text(""))
    expect_error("m.npy", "no such file", lambda p: None)


def test_unavailable_metrics(tmp_path):
    truth = truth_of_lsp(tmp_path)
    with pytest.raises(ValueError, match="metric: PCKh needs head sizes"):
        score(truth.joints, truth, metric="pckh")
    with pytest.raises(ValueError, match="metric: expected 'pck'"):
        score(truth.joints, truth, metric="oks")


def test_best_median_worst():
    errors = np.array([0.5, np.nan, 0.1, 0.9, 0.3, 0.2])
    assert best_median_worst(errors, 2) == {"best": [2, 5], "median": [5, 4], "worst": [3, 0]}
    assert best_median_worst(errors, 9)["best"] == [2, 5, 4, 0, 3]
    assert best_median_worst(np.array([np.nan]), 3) == {"best": [], "median": [], "worst": []}
