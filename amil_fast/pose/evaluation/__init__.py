"""Evaluation: ground truth and predictions in, PCK / PCKh, confusion and error histograms out."""

from amil_fast.pose.evaluation.evaluate import predict_batches, predict_people
from amil_fast.pose.evaluation.ground_truth import GroundTruth, read_ground_truth, read_predictions
from amil_fast.pose.evaluation.scoring import Result, headline, score, scores_of_groups

__all__ = [
    "GroundTruth",
    "Result",
    "headline",
    "predict_batches",
    "predict_people",
    "read_ground_truth",
    "read_predictions",
    "score",
    "scores_of_groups",
]
