"""Reductions of per-sample gradients."""

from ._reduce import explain_per_sample as explain_per_sample
from ._reduce import reduce_per_sample as reduce_per_sample
