"""L-BFGS with a search for Wolfe's conditions, with one fault each."""

from typing import Any

from torch import Tensor
from torch.func import grad_and_value

from ... import _tree
from .._claims._curved import Wolfe
from .._subject import Subject
from ._base import Leaves, controls, watching
from ._curved import two_loops


def wolfe(claim: Wolfe, fault: str) -> Subject:
    c1, c2 = claim.decrease, claim.curvature
    if fault == "constants swapped":
        c1, c2 = c2, c1
    c1 = {"decrease halved": c1 / 2, "decrease doubled": 2 * c1, "decrease left out": 0.0}.get(fault, c1)
    c2 = {"curvature halved": c2 / 2, "curvature squared": c2**2}.get(fault, c2)

    def judge(
        size: float, f0: float, slope0: float, f: float, slope: float, length: float
    ) -> tuple[bool, bool]:
        lower = f <= f0 + c1 * (1.0 if fault == "decrease without the step" else size) * slope0
        if fault == "decrease by the size alone":
            lower = f <= f0 - c1 * size
        flat = abs(slope) <= -c2 * slope0
        if fault == "weak conditions":
            flat = slope >= c2 * slope0
        if fault == "slope uphill alone":
            flat = slope <= -c2 * slope0
        if fault == "norm in place of the slope":
            flat = length <= -c2 * slope0
        return lower, flat or fault == "curvature left out"

    def search(value_at: Any, lr: float) -> float:
        """Double the step until it is too long, and then halve the bracket."""
        f0, slope0, _ = value_at(0.0)
        low, high, size = 0.0, float("inf"), lr
        for _ in range(16):
            f, slope, length = value_at(size)
            lower, flat = judge(size, f0, slope0, f, slope, length)
            if lower and flat:
                return size
            if not lower or slope > 0:
                high = size
            else:
                low = size
            size = 2 * low if high == float("inf") else (low + high) / 2
        return size

    def rule(loss: Any, xs: Leaves, state: Any, lr: Any, t: int) -> Any:
        pairs = state
        x = _tree.ravel(xs)

        def at(v: Tensor) -> tuple[Tensor, Tensor]:
            slopes, f = grad_and_value(loss)(_tree.unravel(v, xs))
            return f, _tree.ravel(slopes)

        g = at(x)[1]
        if not g.any():
            return xs, state
        used = pairs[:-1] if fault == "newest pair left out" else pairs
        u = two_loops(used, g, fault) if used and fault != "gradient's direction" else g / g.norm()

        def value_at(size: float) -> tuple[float, float, float]:
            f, slope = at(x - size * u)
            return float(f), -float(slope @ u), float(slope.norm() * u.norm())

        size = search(value_at, float(lr))
        if fault == "half the step that was found":
            size = size / 2
        if fault == "last but one trial":
            size = 2 * size
        new = x - size * u
        s, y = new - x, at(new)[1] - g
        history = claim.history + (fault == "one pair too many")
        kept = [*pairs, (s, y)][-history:] if s @ y > 0 else pairs
        return _tree.unravel(new, xs), kept

    return watching([], rule, f"strong wolfe, {fault or 'right'}")


CONTROLS = controls(
    Wolfe(0.125, 0.625, 2),
    wolfe,
    "constants swapped",
    "decrease halved",
    "decrease doubled",
    "decrease left out",
    "decrease without the step",
    "decrease by the size alone",
    "curvature halved",
    "curvature squared",
    "curvature left out",
    "weak conditions",
    "slope uphill alone",
    "norm in place of the slope",
    "gradient's direction",
    "newest pair left out",
    "one pair too many",
    "gamma left out",
    "pairs in reverse order",
    "half the step that was found",
    "last but one trial",
)
