"""Prediction: crops to joints, and images and videos to joints and overlays."""

from amil_fast.pose.inference.predict import PredictionSummary, predict
from amil_fast.pose.inference.predictor import Predictor, load_model
from amil_fast.pose.inference.sides import separate_sides
from amil_fast.pose.inference.two_stage import boxes_of

__all__ = ["PredictionSummary", "Predictor", "boxes_of", "load_model", "predict", "separate_sides"]
