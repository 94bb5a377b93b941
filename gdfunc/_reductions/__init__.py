"""Reductions of per-sample gradients."""
