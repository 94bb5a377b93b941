"""Laws, and the error of a broken one."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .._errors import Copyable
from ._claims._base import Claim
from ._diagnosis import diagnose
from ._subject import Subject, require_subject

SLACK = 1e-9  # of the scale of the numbers compared, in float64


class LawBroken(Copyable, AssertionError):
    """An optimizer breaks a law.

    Attributes:
        law: the name of the check.
        step: the first step at which the law is broken, counted from 1; 0 if it is about no single step.
        value: what was measured.
        bound: what it must equal, or must not exceed.
        ratio: value / bound.
        slack: the tolerance, as a share of the scale of the numbers compared.
        formula: the law, with its numbers put in.
        diagnosis: what else would explain the value. It takes seconds, and is made when it is first read.
        repeat: one line that repeats the failure.
        source: where the law comes from.
    """

    def __init__(
        self,
        *,
        formula: str,
        value: float,
        bound: float,
        relation: str = "must equal",
        step: int = 0,
        where: str = "",
        slack: float = SLACK,
    ) -> None:
        super().__init__(formula)
        self.formula, self.value, self.bound, self.relation = formula, value, bound, relation
        self.step, self.where, self.slack = step, where, slack
        self.ratio = value / bound if bound else float("nan") if value == 0 else float("inf")
        self.law = self.repeat = self.source = ""
        self.explain: Callable[[], str] = str

    @functools.cached_property
    def diagnosis(self) -> str:
        """Return what else would explain the value."""
        return self.explain()

    def __reduce__(self) -> tuple[Any, ...]:
        make, args, state = super().__reduce__()
        return make, args, {**state, "diagnosis": self.diagnosis, "explain": str}

    def __str__(self) -> str:
        at = f" at step {self.step}" if self.step else ""
        ratio = f"ratio {self.ratio:.6g}, " if np.isfinite(self.ratio) else ""
        lines = [
            f"{self.law or 'law'} broken{at}{', ' + self.where if self.where else ''}",
            f"  {self.value:.10g} {self.relation} {self.bound:.10g}   ({ratio}slack {self.slack:.3g})",
            f"  {self.formula}",
        ]
        named = {"diagnosis": self.diagnosis, "to repeat": self.repeat, "source": self.source}
        return "\n".join([*lines, *(f"  {name}: {text}" for name, text in named.items() if text)])


class NotApplicable(ValueError):
    """A law says nothing about such a claim; the message says why."""


LAWS: dict[str, Callable[..., None]] = {}  # every law about optimizers, by its name


def law(source: str, *, of_optimizers: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare a law: a function `(subject, claim, ...)` that raises `LawBroken`.

    The decorator adds the law's name, its source, the line that repeats the failure, and a diagnosis.
    Called with a subject and a claim alone, a law tries problems of its own. A law that is not of
    optimizers takes what it judges as its first argument, has no diagnosis, and is not in `LAWS`.
    """

    def declare(check: Callable[..., None]) -> Callable[..., None]:
        name = check.__name__

        @functools.wraps(check)
        def checked(*args: Any, **options: Any) -> None:
            try:
                with np.errstate(all="ignore"):  # overflow breaks a law, and needs no warning
                    check(*args, **options)
            except NotApplicable:
                raise
            except Exception as error:
                shown = [*map(repr, args), *(f"{key}={value!r}" for key, value in options.items())]
                repeat = f"{name}({', '.join(shown)})"
                if isinstance(error, LawBroken):
                    error.law, error.source, error.repeat = name, source, repeat
                else:
                    error.add_note(f"in {repeat}")
                raise

        @functools.wraps(check)
        def diagnosed(subject: Subject, claim: Claim, *args: Any, **options: Any) -> None:
            require_subject(subject)
            if not isinstance(claim, Claim):
                raise TypeError(f"claim is {claim!r}, not a Claim; give an object, as in gt.Momentum(0.9)")
            try:
                checked(subject, claim, *args, **options)
            except LawBroken as broken:
                broken.explain = functools.partial(diagnose, subject, claim)
                raise

        if not of_optimizers:
            return checked
        LAWS[name] = diagnosed
        return diagnosed

    return declare


def require_equal(
    value: Any,
    expected: Any,
    formula: str,
    *,
    scale: Any = 0.0,
    slack: float = SLACK,
    where: str = "",
    first: int = 1,
) -> None:
    """Require |value − expected| ≤ slack·max(|expected|, scale), entry by entry.

    Args:
        value, expected: arrays whose leading axis counts steps; 0-d arrays are about no step.
        formula: the law with its numbers, for the message.
        scale: the size of the numbers that were added, which broadcasts to expected.
        slack: the tolerance.
        where: what is compared, such as a leaf.
        first: the step of the first row.
    """
    value, expected = np.asarray(value, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # 0·∞: an infinity equals itself alone
        error, allowed = np.abs(value - expected), slack * np.maximum(np.abs(expected), scale)
        is_equal = (
            ((error <= allowed) & np.isfinite(error))
            | (value == expected)
            | (np.isnan(value) & np.isnan(expected))
        )
    _report(~is_equal, value, expected, formula, "must equal", slack, where, first)


def require_at_most(
    value: Any,
    bound: Any,
    formula: str,
    *,
    scale: Any = 0.0,
    slack: float = SLACK,
    where: str = "",
    first: int = 1,
) -> None:
    """Require value ≤ bound + slack·max(|bound|, scale), entry by entry; see `require_equal`."""
    value, bound = np.asarray(value, dtype=np.float64), np.asarray(bound, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        is_below = value <= bound + slack * np.maximum(np.abs(bound), scale)
    _report(~is_below, value, bound, formula, "must be at most", slack, where, first)


def _report(
    broken: np.ndarray,
    value: np.ndarray,
    bound: np.ndarray,
    formula: str,
    relation: str,
    slack: float,
    where: str,
    first: int,
) -> None:
    """Raise for the first step that breaks the law, at its worst entry."""
    broken, value, bound = np.broadcast_arrays(broken, value, bound)
    if not broken.any():
        return
    step = 0
    if broken.ndim:
        row = int(np.flatnonzero(broken.reshape(len(broken), -1).any(axis=1))[0])
        broken, value, bound, step = broken[row], value[row], bound[row], first + row
    with np.errstate(invalid="ignore"):
        error = np.where(broken, np.nan_to_num(np.abs(value - bound), nan=np.inf), -1.0)
    entry = np.unravel_index(int(np.argmax(error)), error.shape)
    at = f"{where}, entry {[int(i) for i in entry]}".strip(", ") if error.ndim else where
    raise LawBroken(
        formula=formula,
        value=float(value[entry]),
        bound=float(bound[entry]),
        relation=relation,
        step=step,
        where=at,
        slack=slack,
    )
