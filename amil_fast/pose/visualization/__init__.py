"""Poses drawn over images, contact sheets, and plots of scores."""

from amil_fast.pose.visualization.drawing import draw_box, draw_pose, pose_tile
from amil_fast.pose.visualization.plots import plot_confusion, plot_curves, plot_errors
from amil_fast.pose.visualization.sheets import comparison_sheet, contact_sheet, sample_sheet

__all__ = [
    "comparison_sheet",
    "contact_sheet",
    "draw_box",
    "draw_pose",
    "plot_confusion",
    "plot_curves",
    "plot_errors",
    "pose_tile",
    "sample_sheet",
]
