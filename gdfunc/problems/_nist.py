"""Nonlinear regressions with certified solutions: NIST's Statistical Reference Datasets."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, atan, cos, exp, sin

from .._errors import check_choice
from .._numerics import finite_tensor
from .._shown import shown
from ..losses import mse

Model = Callable[[Tensor, Tensor], Tensor]


class CertifiedFit(NamedTuple):
    """A nonlinear regression, two places to start, and its certified solution.

    Attributes:
        name: NIST's name.
        level: of difficulty, "lower", "average" or "higher".
        model_fn: `(params, x) -> predictions`, [n].
        residual_fn: `(params, (x, y)) -> predictions − y`, [n].
        loss_fn: `(params, (x, y)) -> loss`, the mean of the squared residuals.
        data: x [n], or [n, 2] for Nelson, and y [n].
        starts: [2, P], the one far from the solution and the one near it.
        minimizer: [P], certified to eleven digits.
        deviations: [P], the certified standard deviations of the parameters.
        minimum: the certified loss, the sum of squares over n.

    Example:
        >>> fit = gd.problems.nist("Misra1a")
        >>> bool(fit.loss_fn(fit.minimizer, fit.data) / fit.minimum - 1 < 1e-10)
        True
    """

    name: str
    level: str
    model_fn: Model
    residual_fn: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]
    loss_fn: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]
    data: tuple[Tensor, Tensor]
    starts: Tensor
    minimizer: Tensor
    deviations: Tensor
    minimum: float

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={shown(value)}" for name, value in self._asdict().items())
        return f"CertifiedFit({fields})"

    def digits(self, params: Tensor) -> Tensor:
        """Count the certified digits that the worst parameter has.

        min over i of −log₁₀ |θᵢ − cᵢ| / |cᵢ|,  in [0, 11]

        Args:
            params: θ, [..., P].

        Returns:
            [...], 11 where all agree to the last certified digit, and 0 for a wrong or non-finite fit.

        Example:
            >>> fit = gd.problems.nist("Misra1a")
            >>> fit.digits(fit.minimizer * 1.001)
            tensor(3.0000, dtype=torch.float64)

        References:
            B. D. McCullough, "Assessing the reliability of statistical software", 1998.
        """
        certified = self.minimizer.to(params)
        error = ((params - certified) / certified).abs().amax(-1)
        return 0.0 - error.nan_to_num(1.0).clamp(1e-11, 1.0).log10()


def nist_names(level: str | None = None) -> tuple[str, ...]:
    """List the names of NIST's nonlinear regressions, the easy ones first.

    Args:
        level: of difficulty, "lower", "average" or "higher"; None: all.

    Raises:
        ValueError: there is no such level.

    Example:
        >>> gd.problems.nist_names("lower")
        ('Misra1a', 'Chwirut2', 'Chwirut1', 'Lanczos3', 'Gauss1', 'Gauss2', 'DanWood', 'Misra1b')
    """
    return _NAMES if level is None else _LEVELS[check_choice("level", level, tuple(_LEVELS))]


def nist(name: str, *, dtype: torch.dtype = torch.float64) -> CertifiedFit:
    """Load a nonlinear regression whose solution NIST has certified to eleven digits.

    L(θ) = mean (model(θ, x) − y)²

    The 27 problems are those of the Statistical Reference Datasets. Their Jacobians have condition numbers
    up to 10¹³, and from the first start many programs end elsewhere, so they tell how many digits a method
    can be trusted with. For Nelson y is the logarithm of the response. The data of Lanczos1 are
    generated: its certified sum of squares, 1.4e-25, is that of the thirteenth digit of the data.

    Args:
        name: of NIST, such as "Misra1a"; `nist_names` lists them.
        dtype: of the problem. float32 cannot hold the certified digits.

    Returns:
        The problem, with parameters b1, b2, … as a vector [P].

    Raises:
        ValueError: there is no such problem.
        TypeError: the dtype is not a floating one.

    Example:
        >>> gd.problems.nist("Misra1a").starts
        tensor([[5.0000e+02, 1.0000e-04],
                [2.5000e+02, 5.0000e-04]], dtype=torch.float64)

    References:
        National Institute of Standards and Technology, "Statistical reference datasets", 1998.
    """
    check_choice("name", name, tuple(_MODELS))
    model_fn, (total, rows) = _MODELS[name], _tables()[name]
    (level,) = (level for level, names in _LEVELS.items() if name in names)
    first, second, certified, deviations, y, *x = (finite_tensor(name, row, dtype) for row in rows)

    def residual_fn(params: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return model_fn(params, inputs) - targets

    def loss_fn(params: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return mse(model_fn(params, inputs), targets)

    data = x[0] if len(x) == 1 else torch.stack(x, dim=1), y.log() if name == "Nelson" else y
    starts = torch.stack([first, second])
    return CertifiedFit(
        name, level, model_fn, residual_fn, loss_fn, data, starts, certified, deviations, total / len(y)
    )


@cache
def _tables() -> dict[str, tuple[float, list[list[float]]]]:
    """Read the file: the sum of squares and the rows of numbers of each problem."""
    text = (Path(__file__).parent / "nist.txt").read_text(encoding="utf-8")
    tables: dict[str, tuple[float, list[list[float]]]] = {}
    for line in text.splitlines():
        words = line.split()
        if words[0] in _MODELS:
            name, total = words
            tables[name] = float(total), []
        elif words[0] != "#":
            tables[name][1].append([float(word) for word in words])
    return tables


def _exponentials(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * exp(-b[1] * x) + b[2] * exp(-b[3] * x) + b[4] * exp(-b[5] * x)


def _peaks(b: Tensor, x: Tensor) -> Tensor:
    first, second = (exp(-(((x - b[i]) / b[i + 1]) ** 2)) for i in (3, 6))
    return b[0] * exp(-b[1] * x) + b[2] * first + b[5] * second


def _cubics(b: Tensor, x: Tensor) -> Tensor:
    return (b[0] + x * (b[1] + x * (b[2] + x * b[3]))) / (1 + x * (b[4] + x * (b[5] + x * b[6])))


def _chwirut(b: Tensor, x: Tensor) -> Tensor:
    return exp(-b[0] * x) / (b[1] + b[2] * x)


def _saturation(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (1 - exp(-b[1] * x))


def _cycles(b: Tensor, x: Tensor) -> Tensor:
    angles = [2 * math.pi * x / period for period in (12.0, b[3], b[6])]
    pairs = ((b[1], b[2]), (b[4], b[5]), (b[7], b[8]))
    waves = [c * cos(at) + s * sin(at) for (c, s), at in zip(pairs, angles, strict=True)]
    return b[0] + waves[0] + waves[1] + waves[2]


_MODELS: dict[str, Model] = {
    "Misra1a": _saturation,
    "Chwirut2": _chwirut,
    "Chwirut1": _chwirut,
    "Lanczos3": _exponentials,
    "Gauss1": _peaks,
    "Gauss2": _peaks,
    "DanWood": lambda b, x: b[0] * x ** b[1],
    "Misra1b": lambda b, x: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
    "Kirby2": lambda b, x: (b[0] + x * (b[1] + x * b[2])) / (1 + x * (b[3] + x * b[4])),
    "Hahn1": _cubics,
    "Nelson": lambda b, x: b[0] - b[1] * x[..., 0] * exp(-b[2] * x[..., 1]),
    "MGH17": lambda b, x: b[0] + b[1] * exp(-x * b[3]) + b[2] * exp(-x * b[4]),
    "Lanczos1": _exponentials,
    "Lanczos2": _exponentials,
    "Gauss3": _peaks,
    "Misra1c": lambda b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda b, x: b[0] * b[1] * x / (1 + b[1] * x),
    "Roszman1": lambda b, x: b[0] - b[1] * x - atan(b[2] / (x - b[3])) / math.pi,
    "ENSO": _cycles,
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "Thurber": _cubics,
    "BoxBOD": _saturation,
    "Rat42": lambda b, x: b[0] / (1 + exp(b[1] - b[2] * x)),
    "MGH10": lambda b, x: b[0] * exp(b[1] / (x + b[2])),
    "Eckerle4": lambda b, x: b[0] / b[1] * exp(-0.5 * ((x - b[2]) / b[1]) ** 2),
    "Rat43": lambda b, x: b[0] / (1 + exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "Bennett5": lambda b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
}
_NAMES = tuple(_MODELS)
_LEVELS = {"lower": _NAMES[:8], "average": _NAMES[8:19], "higher": _NAMES[19:]}
