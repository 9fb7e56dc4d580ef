"""Training loops, configuration and checkpoints."""
