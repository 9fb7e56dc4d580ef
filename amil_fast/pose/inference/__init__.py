"""Prediction: crops to joints, and images and videos to joints and overlays."""

from amil_fast.pose.inference.predict import PredictionSummary, boxes_of, predict
from amil_fast.pose.inference.predictor import Predictor, load_model

__all__ = ["PredictionSummary", "Predictor", "boxes_of", "load_model", "predict"]
