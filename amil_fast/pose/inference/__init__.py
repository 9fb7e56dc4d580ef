"""Prediction: crops to keypoints, and images and videos to keypoints and overlays."""

from amil_fast.pose.inference.predictor import Predictor, load_model

__all__ = ["Predictor", "load_model"]
