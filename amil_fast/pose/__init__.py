"""Human poses: skeletons, heatmaps, and the networks that find them."""
