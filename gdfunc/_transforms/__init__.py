"""Gradient transformations: what stands between a gradient and the step along it."""
