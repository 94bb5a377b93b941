"""Reductions of per-sample gradients."""

from ._reduce import explain as explain
from ._reduce import reduce_per_sample as reduce_per_sample
