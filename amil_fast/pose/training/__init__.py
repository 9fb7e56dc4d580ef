"""Training of the pose model: configuration, trainer, checkpoints, ablation."""
