"""How tests compile natively."""

from unittest import mock

from gdfunc._scan.backends.native import _build


def quick():
    """Compile in half the time, for what is run once."""
    return mock.patch.object(_build, "_FLAGS", ["-O1", *_build._FLAGS[1:]])
