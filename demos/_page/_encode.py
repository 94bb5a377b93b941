"""Numbers for the page: small integers in base64, and percentages in words."""

import base64
import math

import numpy as np

MOST, MISSING = 32767, -32768  # the page's script has the same
SPACE = "\u00a0"  # at which no line is broken


def encode(values: np.ndarray) -> str:
    """Write numbers as 16-bit integers in base64: [-1, 1] in steps of 1/32767, others at its ends.

    NaN is written as -32768.
    """
    scaled = np.where(np.isnan(values), MISSING, np.round(np.clip(values, -1, 1) * MOST))
    return base64.b64encode(scaled.astype("<i2").tobytes()).decode()


def decode(text: str, *shape: int) -> np.ndarray:
    """Return the numbers that `encode` wrote."""
    values = np.frombuffer(base64.b64decode(text), "<i2").reshape(shape)
    return np.where(values == MISSING, np.nan, values / MOST)


def percent(share: float) -> str:
    """Write a share in per cent with two digits; below 0.01 % the number is of no interest."""
    if not math.isfinite(share):
        return f"∞{SPACE}%"
    value = float(f"{100 * share:.2g}")
    if value < 0.01:
        return f"<{SPACE}0.01{SPACE}%"
    return f"{value:g}{SPACE}%" if value < 1e6 else f">{SPACE}10⁶{SPACE}%"
