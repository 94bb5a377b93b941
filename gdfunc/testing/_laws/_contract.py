"""The contract of every optimizer: purity, and one dtype."""

import math
from typing import Any

import numpy as np
import torch

from ... import _tree
from ..._sampling import take
from ..._step import params_of
from .._claims._base import Claim
from .._law import LawBroken, NotApplicable, law, require_equal
from .._subject import Subject, linear_loss, run


def _gradients(claim: Claim) -> dict[str, torch.Tensor]:
    """Return a gradient of the first and the last of the claim's shapes."""
    ends = {"a": claim.shapes[0], "b": claim.shapes[-1]}
    entries = torch.tensor([0.7, 1.1, -2.3, 0.6, 0.3, -0.9, 1.6, -0.4, 2.1])
    return {
        name: entries.repeat(math.prod(shape) // 9 + 1)[: math.prod(shape)].reshape(shape)
        for name, shape in ends.items()
    }


def _samples(claim: Claim, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """Return the gradients g, 2g and 3g, and a plan of six batches of equal samples."""
    data = _tree.map(lambda g: torch.stack([g, 2 * g, 3 * g]).to(dtype), _gradients(claim))
    batch_size = getattr(claim, "batch_size", 1)
    return data, (torch.arange(6) % 3)[:, None].repeat(1, batch_size)


def _bits(tree: Any) -> list[bytes]:
    return [
        leaf.detach().contiguous().numpy().tobytes() for leaf in _tree.leaves(tree) if torch.is_tensor(leaf)
    ]


@law("gdfunc's contract of a step: equal arguments give equal bits, and no argument changes")
def check_purity(subject: Subject, claim: Claim) -> None:
    """Check that a step repeated from the same carry gives the same bits, and writes into nothing.

    Three steps, each made twice. A buffer outside the carry, or an update in place, shows here.

    Example:
        >>> from gdfunc import testing as gt
        >>> def in_place(g, buffer, p, lr):
        ...     return p - lr * buffer.mul_(0.9).add_(g), buffer
        >>> try:
        ...     gt.check_purity(gt.subject(torch.zeros_like, in_place), gt.Momentum(0.9))
        ... except gt.LawBroken as broken:
        ...     print(broken.formula)
        a step writes into its carry or its batch
    """
    if not subject.is_pure:
        raise NotApplicable(f"{subject!r} changes its state in place by design")
    data, plan = _samples(claim, torch.float64)
    step = subject.make(linear_loss, data) if subject.of_rows else subject.make(linear_loss)
    carry = step.init(_tree.map(lambda g: torch.ones_like(g[0]), data))
    for t in range(1, 4):
        batch = plan[t] if subject.of_rows else take(data, plan[t])
        before = _bits((carry, batch))
        (once, _), (again, _) = step(carry, batch, 0.5), step(carry, batch, 0.5)
        if _bits((carry, batch)) != before:
            raise LawBroken(formula="a step writes into its carry or its batch", value=1, bound=0, step=t)
        if _bits(once) != _bits(again):
            raise LawBroken(
                formula="a step gives something else when it is repeated", value=1, bound=0, step=t
            )
        carry = once


@law("gdfunc's contract of a step: parameters keep their dtype")
def check_dtype(subject: Subject, claim: Claim) -> None:
    """Check that float32 parameters stay float32, and move as in float64 up to rounding.

    |x₃₂ − x₆₄| ≤ 512·ε·scale over six steps, with ε = 2⁻²³. The scale is that of the parameters and moves.
    The factor leaves room for methods that subtract gradients.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_dtype(gt.from_step(gd.make_step), gt.GradientDescent())
    """
    ends = []
    for dtype in (torch.float32, torch.float64):
        data, plan = _samples(claim, dtype)
        start = _tree.map(lambda g: torch.ones_like(g[0]), data)
        # Because a promoted parameter refuses the next batch, the first step is looked at alone.
        carry = run(subject, linear_loss, start, plan, 0.125, 1, data).carry
        for path, leaf in _tree.named_leaves(params_of(carry), "params"):
            if leaf.dtype != dtype:
                formula = f"{path} is {dtype} and becomes {leaf.dtype}"
                raise LawBroken(formula=formula, value=leaf.dtype.itemsize * 8, bound=dtype.itemsize * 8)
        ends.append(run(subject, linear_loss, start, plan, 0.125, 6, data).points)
    for single, double in zip(*ends, strict=True):
        scale = np.abs(double).max() + np.abs(np.diff(double, axis=0)).sum(0).max()
        formula = "x in float32 must equal x in float64 up to rounding"
        require_equal(single, double, formula, scale=scale, slack=512 * 2.0**-23, first=0)
