"""Multiple-instance learning on feature vectors: bag files, training, cross-validation."""
