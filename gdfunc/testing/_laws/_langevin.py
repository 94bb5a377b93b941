"""The law of methods that move their points by noise."""

import numpy as np
import torch

from ... import _tree
from .._claims._base import Claim, join
from .._claims._constrained import Langevin
from .._claims._linear import GradientDescent
from .._law import NotApplicable, law, require_equal
from .._subject import Subject, run, run_linear
from ._draws import require_normal, require_small, score_of_chi2

_LRS = (0.5, 0.25, 1.0, 0.125)
_WIDTH = 75_000  # entries of each of two leaves, in four steps


@law("M. Welling, Y. W. Teh 2011; the moments of a linear recursion")
def check_langevin(subject: Subject, claim: Claim, *, alpha: float = 1e-9) -> None:
    """Check that what a step adds to its move is N(0, 2·lr·T) exactly, and all that it adds.

    On linear losses the move is known, so that the noise is seen: with lr = 0 it is zero, and (θ' − θ −
    m)/√(2·lr·T) of four steps with different lr, over two leaves, keeps `check_noise`. Noise that steps,
    leaves or entries share, that enters a memory, or whose size follows another lr shows here. On
    λ/2·‖θ‖², for plain descent, the variance of 20,000 chains is that of the recursion v' = (1 − lr·λ)²·v +
    2·lr·T after every step, up to the stationary T/(λ·(1 − lr·λ/2)): the gradient is that before the noise.

    Example:
        >>> from gdfunc import testing as gt
        >>> key = gd.random.key(0)
        >>> sgld = gt.from_step(lambda loss_fn: gd.methods.add_noise(gd.make_step(loss_fn), 0.5, key=key))
        >>> gt.check_langevin(sgld, gt.Langevin(temperature=0.5))
    """
    if not isinstance(claim, Langevin):
        raise NotApplicable("it is about noise on the parameters")
    generator, steps = np.random.default_rng(0), len(_LRS)
    entries = generator.standard_normal((steps, 2, _WIDTH))
    grads = {"a": torch.from_numpy(entries[:, 0]), "b": torch.from_numpy(entries[:, 1]).view(steps, 3, -1)}
    start = _tree.map(lambda g: torch.ones_like(g[0]), grads)
    seen = run_linear(subject, grads, _LRS, start)
    g = [leaf.numpy() for leaf in _tree.leaves(grads)]
    moves = claim.inner.moves(g, [x[:-1] for x in seen.points], seen.lrs)
    noise = join(seen.moves) - join(moves)
    if claim.temperature == 0:
        require_equal(noise, 0 * noise, f"x' = x + m without a temperature, {claim!r}", scale=1.0)
    else:
        sizes = np.sqrt(2 * seen.lrs * claim.temperature)
        for size, row in zip(sizes, noise, strict=True):
            score = score_of_chi2(float(row @ row) / size**2, len(row))
            require_small(score, f"sum |x' - x - m|^2/(2 lr T) of a step, {claim!r}", alpha)
        require_normal((noise / sizes[:, None]).ravel(), alpha)
    still = run_linear(subject, grads, 0.0, start)
    require_equal(join(still.moves), 0 * noise, f"x' = x where lr = 0, {claim!r}", slack=0.0)
    if isinstance(claim.inner, GradientDescent):
        _require_variances(subject, claim, alpha)


def _require_variances(subject: Subject, claim: Langevin, alpha: float) -> None:
    curvature, lr, steps, chains = 2.0, 0.375, 12, 20_000

    def loss_fn(x: torch.Tensor, batch: None) -> torch.Tensor:
        return 0.5 * curvature * x.square().sum()

    points = run(subject, loss_fn, torch.zeros(chains).double(), None, lr, steps).points[0]
    variance = 0.0
    for t, row in enumerate(points[1:], 1):
        variance = (1 - lr * curvature) ** 2 * variance + 2 * lr * claim.temperature
        formula = f"Var x_{t} = {variance:.6g} on {curvature:g}/2 |x|^2, lr = {lr}, {claim!r}"
        if variance:
            require_small(score_of_chi2(float(row @ row) / variance, chains), formula, alpha)
