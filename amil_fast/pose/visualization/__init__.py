"""Poses drawn over images, contact sheets, and plots of scores."""

from amil_fast.pose.visualization.drawing import contact_sheet, draw_pose
from amil_fast.pose.visualization.plots import plot_confusion, plot_curves, plot_errors

__all__ = ["contact_sheet", "draw_pose", "plot_confusion", "plot_curves", "plot_errors"]
