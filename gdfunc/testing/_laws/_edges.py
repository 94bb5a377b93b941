"""Laws about the one step at which something turns, stops or begins."""

import numpy as np
import torch

from ... import _tree
from .._claims._base import Claim, along, join
from .._claims._norms import ClipByGlobalNorm, ClipByValue, norm_of
from .._claims._signs import Lion, flip_step
from .._claims._wrappers import Accumulate, ApplyIfFinite
from .._feeds import feeds, observe
from .._law import NotApplicable, law, require_at_most, require_equal
from .._subject import Subject, feed


@law("X. Chen et al. 2023; the average's closed form")
def check_flip(subject: Subject, claim: Claim, ones: int = 20) -> None:
    """Check when Lion turns: after k ones, how many minus ones leave its sign.

    It turns at the first j with β₁·mⱼ < 1 − β₁, where mⱼ = (1 − β₂ᵏ)·β₂ʲ − (1 − β₂ʲ). The law is about an
    integer, so that no tolerance hides a wrong β.

    Args:
        subject: the subject.
        claim: `Lion`; the law says nothing about others.
        ones: k.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_flip(gt.from_transform(gd.lion((0.5, 0.75))), gt.Lion((0.5, 0.75)), ones=10)
    """
    if not isinstance(claim, Lion):
        raise NotApplicable("it is about the sign of an average")
    kept = flip_step(claim.betas, ones)
    g = torch.ones(ones + kept + 2, dtype=torch.float64)
    g[ones:] = -1.0
    moves = feed(subject, g).numpy()[ones:]
    turned = np.flatnonzero(moves > 0)
    formula = f"first j with beta1 m_j < 1 - beta1, betas = {claim.betas}, after {ones} ones"
    seen = turned[0] if turned.size else len(moves)
    require_equal(seen, kept, formula, where="minus ones that keep the sign")


@law("R. Pascanu, T. Mikolov, Y. Bengio 2013: a projection onto a ball")
def check_clip(subject: Subject, claim: Claim) -> None:
    """Check that a clip is a projection: nothing changes inside, and outside the size is the limit.

    ‖u‖ = min(‖g‖, C) and ⟨u, g⟩ = ‖u‖·‖g‖ for a norm over all leaves; |uᵢ| = min(|gᵢ|, c) for entries. The
    sizes lie below, at and above the limit.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_clip(gt.from_transform(gd.clip_by_global_norm(2.0)), gt.ClipByGlobalNorm(2.0))
    """
    if not isinstance(claim, ClipByValue | ClipByGlobalNorm):
        raise NotApplicable("it is about clips")
    grads = {k: torch.from_numpy(g) for k, g in zip("ab", claim.own_feeds()["at the limit"], strict=True)}
    zero = _tree.map(lambda g: torch.zeros_like(g[0]), grads)
    for t in range(len(grads["a"])):
        seen = observe(subject, {k: g[t : t + 1] for k, g in grads.items()}, 1.0, zero)
        g, u = seen.grads, [-move for move in seen.moves]
        if isinstance(claim, ClipByValue):
            sizes, moved, limit = np.abs(g[0]).ravel(), np.abs(u[0]).ravel(), claim.limit
        else:
            sizes, moved, limit = norm_of(g), norm_of(u), claim.max_norm
            inner = (join(g) * join(u)).sum(1)
            require_equal(inner, sizes * moved, "<u, g> = |u| |g|: the direction is kept")
        formula = f"|u| = min(|g|, {limit:.6g})"
        require_at_most(moved, np.full_like(moved, limit), formula)
        require_equal(moved, np.minimum(sizes, limit), formula)


@law("a step that is skipped leaves the parameters' bits")
def check_rest(subject: Subject, claim: Claim) -> None:
    """Check that parameters keep their bits in the steps in which nothing may move.

    Accumulate(k): all steps but every k-th. ApplyIfFinite: steps with NaN or infinity in any leaf.

    Example:
        >>> from gdfunc import testing as gt
        >>> accumulated = gt.from_transform(gd.accumulate(gd.momentum(0.5), 3))
        >>> gt.check_rest(accumulated, gt.Accumulate(gt.Momentum(0.5), 3))
    """
    if not isinstance(claim, Accumulate | ApplyIfFinite):
        raise NotApplicable("it moves in every step")
    for name, grads in feeds(claim).items():
        seen = observe(subject, grads)
        steps = np.arange(1, len(seen.lrs) + 1)
        if isinstance(claim, Accumulate):
            rests, formula = steps % claim.steps != 0, f"x_t = x_(t-1) unless {claim.steps} divides t"
        else:
            rests, formula = ~np.isfinite(join(seen.grads)).all(1), "x_t = x_(t-1) where g_t is not finite"
        for move in seen.moves:
            still = np.where(along(rests, move), move, 0.0)
            require_equal(still, np.zeros_like(move), f"{formula}, {name} gradients", slack=0.0)
