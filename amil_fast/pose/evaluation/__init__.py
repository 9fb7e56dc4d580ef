"""Scores of predictions: ground truth and predictions in, PCK / PCKh, confusion and error histograms out."""

from amil_fast.pose.evaluation.scoring import GroundTruth, Result, read_ground_truth, read_predictions, score

__all__ = ["GroundTruth", "Result", "read_ground_truth", "read_predictions", "score"]
