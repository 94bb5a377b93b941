"""Laws about the answer of a run that is not its last point."""

import itertools

import numpy as np
import torch

from ... import _tree
from .._claims._averages import EMA, ScheduleFree
from .._claims._base import Claim
from .._claims._linear import GradientDescent
from .._feeds import LRS, away_from_zero, feeds
from .._law import NotApplicable, law, require_equal
from .._subject import Subject, run, run_linear


@law("the closed form of the average")
def check_answer(subject: Subject, claim: Claim) -> None:
    """Check the answers of a subject against the claim's average of its own points.

    Two runs on linear losses: random gradients with another lr at every step; and gradients of −1 with
    lr = 1 from zero, under which gradient descent walks along xⱼ = j.

    Example:
        >>> from gdfunc import testing as gt
        >>> ema = gt.from_step(
        ...     lambda loss_fn: gd.methods.ema(gd.make_step(loss_fn), 0.9),
        ...     result=lambda state: state.average,
        ... )
        >>> gt.check_answer(ema, gt.EMA(decay=0.9))
    """
    if type(claim).answers is Claim.answers:
        raise NotApplicable("its answer is its last point")
    random = feeds(claim)["random"]
    unit = _tree.map(lambda g: torch.full_like(g, -1.0), random)
    zero = _tree.map(lambda g: torch.zeros_like(g[0]), random)
    lrs = np.resize(LRS, len(random["a"]))
    runs = {
        "random gradients": (random, lrs, _tree.map(away_from_zero, random)),
        "gradients of -1, lr = 1": (unit, 1.0, zero),
    }
    for name, (grads, rates, start) in runs.items():
        done = run_linear(subject, grads, rates, start)
        arrays = [leaf.numpy() for leaf in _tree.leaves(grads)]
        expected = claim.answers(arrays, done.points, done.lrs)
        paths = [path for path, _ in _tree.named_leaves(grads, "params")]
        for path, answer, wanted, x in zip(paths, done.results, expected, done.points, strict=True):
            formula = f"{claim.formula}, {claim!r}, {name}"
            scale = np.abs(x).max(initial=0.0)
            require_equal(answer, wanted, formula, scale=scale, where=f"answer for {path}", first=0)


@law("B. T. Polyak, A. B. Juditsky 1992; D. Ruppert 1988; the variance over all sequences of signs")
def check_noise_average(subject: Subject, claim: Claim) -> None:
    """Check how much noise an average removes: its exact variance over all sequences of T = 8 signs ξ.

    x' = (1 − a)·x + a·ξ, which is gradient descent with lr = a on f = ½·(x − ξ)², from x = 0.
    The mean of x₁ … x_T, as of schedule-free learning with β = 0:  Var = Σₖ (1 − (1 − a)ᵏ)²/T²
    An EMA with a = 1:  Var aₜ = (1 − d)/(1 + d)·(1 − d²ᵗ)

    Example:
        >>> from gdfunc import testing as gt
        >>> ema = gt.from_step(
        ...     lambda loss_fn: gd.methods.ema(gd.make_step(loss_fn), 0.9),
        ...     result=lambda state: state.average,
        ... )
        >>> gt.check_noise_average(ema, gt.EMA(decay=0.9))
    """
    is_ema = isinstance(claim, EMA) and claim.inner == GradientDescent() and not claim.debias
    if not is_ema and claim != ScheduleFree(0.0):
        raise NotApplicable("it is about the mean and the EMA of gradient descent")
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)), dtype=torch.float64).T[:, None]
    lr = 1.0 if is_ema else 0.25
    start = torch.zeros_like(signs[0, 0])
    done = run(subject, lambda x, batch: 0.5 * ((x - batch[0]) ** 2).sum(), start, signs, lr, 8)
    variance, t = (done.results[0] ** 2).mean(1), np.arange(9.0)
    if isinstance(claim, EMA):
        d = claim.decay
        wanted = (1 - d) / (1 + d) * (1 - d ** (2 * t))
        formula = f"Var a_t = (1 - d)/(1 + d)(1 - d^(2t)), d = {d}"
    else:
        wanted = np.cumsum((1 - (1 - lr) ** t) ** 2) / np.maximum(t, 1) ** 2
        formula = f"Var mean_t = sum_k (1 - (1 - a)^k)^2 / t^2, a = {lr}"
    require_equal(variance, wanted, formula, scale=1.0, where="variance", first=0)
