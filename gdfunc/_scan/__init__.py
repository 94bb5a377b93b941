"""The loop: what it means, and who runs it."""

from ._scan import scan as scan
