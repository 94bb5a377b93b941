"""Laws about changes that must not matter: of scale, of coordinates, of the process, to a batch of runs."""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import _tree
from ..._step import params_of
from ..._tree import Tree
from .._claims._adaptive import Adam
from .._claims._base import Arrays, Claim
from .._feeds import LRS, feeds, observe
from .._law import LawBroken, NotApplicable, law, require_equal
from .._problems import reflection
from .._subject import Subject, feed, linear_loss

_STEPS = 6


@law("scaling by a power of two is exact in floating point")
def check_scale(subject: Subject, claim: Claim) -> None:
    """Check that a loss multiplied by 2ᵏ multiplies the moves by 2ᵏ, or leaves them alone, bit for bit.

    The claim's closed form decides which: Adam without ε, or a sign, forgets the scale, and methods that
    are linear in the gradients keep it. A hidden constant, such as an ε, shows here however small it is.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_scale(gt.from_transform(gd.adam(eps=0.0)), gt.Adam(eps=0.0))
    """
    grads = _gradients(claim)
    zero = _tree.map(lambda g: torch.zeros_like(g[0]), grads)
    for factor in (2.0**-200, 2.0**200):
        scaled = _tree.map(lambda g, c=factor: c * g, grads)
        power = _power_of_scale(claim, grads, factor)
        # The parameters are added to what is scaled, so they begin at zero.
        start = zero if power else None
        before, after = (observe(subject, g, params=start).moves for g in (grads, scaled))
        for leaf, (a, b) in enumerate(zip(before, after, strict=True)):
            formula = f"moves of {factor:.6g} g = {factor**power:.6g} times those of g, bit for bit"
            require_equal(b, factor**power * a, formula, slack=0.0, where=f"leaf {leaf}")


def _power_of_scale(claim: Claim, grads: Tree, factor: float) -> int:
    """Return p in {0, 1} with moves(c·g) = cᵖ·moves(g), by the claim's closed form."""
    g = [leaf.numpy() for leaf in _tree.leaves(grads)]
    before = _closed_form(claim, g, _points(g))
    after = _closed_form(claim, [factor * leaf for leaf in g], _points(g))
    for power in (0, 1):
        if _is_close(after, [factor**power * leaf for leaf in before]) and any(u.any() for u in before):
            return power
    raise NotApplicable("its moves neither keep nor forget the scale of gradients")


@law("gradients and parameters turn alike")
def check_rotation(subject: Subject, claim: Claim) -> None:
    """Check that an orthogonal mixing of the entries of every leaf, or of its rows, mixes the moves alike.

    The claim's closed form decides which. Methods that are linear in the gradients, or divide by norms of
    leaves, commute with both, and Muon with a mixing of rows. It is I − 2vvᵀ/‖v‖² with v = (1, 2, …).

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_rotation(gt.from_transform(gd.momentum(0.5)), gt.Momentum(0.5))
    """
    grads = _gradients(claim)
    g = [leaf.numpy() for leaf in _tree.leaves(grads)]
    points = _points(g)
    wanted = _closed_form(claim, g, points)
    mixings = {
        name: mix
        for name, mix in {"entries": _mix_entries, "rows": _mix_rows}.items()
        if _is_close(_closed_form(claim, *([mix(x) for x in xs] for xs in (g, points))), map(mix, wanted))
    }
    if not mixings:
        raise NotApplicable("its moves depend on the coordinates")
    before = observe(subject, grads, params=_like(grads, [x[0] for x in points]))
    for name, mix in mixings.items():
        start = _like(grads, [mix(x)[0] for x in points])
        after = observe(subject, _like(grads, map(mix, g)), params=start)
        for leaf, (a, b, x) in enumerate(zip(before.moves, after.moves, before.points, strict=True)):
            scale = max(np.abs(x).max(), np.abs(a).max())
            formula = f"moves of Q g from Q x = Q times those of g from x, Q a mixing of {name}"
            require_equal(b, mix(a), formula, scale=scale, slack=claim.slack, where=f"leaf {leaf}")


@law("S. Reddi, S. Kale, S. Kumar 2018; the limit of the averages in closed form")
def check_drift(subject: Subject, claim: Claim) -> None:
    """Check how far Adam without memory of gradients drifts on Reddi, Kale and Kumar's example.

    Gradients C, −1, −1 for ever, β₁ = 0, β₂ = 1/(1 + C²), ε = 0. The mean gradient is (C − 2)/3, so x
    should fall if C > 2. One period moves it by −lr·(C/√v₁ − 1/√v₂ − 1/√v₃) > 0, the wrong way, with
    v₁ = (1 − β₂)(C² + β₂ + β₂²)/(1 − β₂³), v₂ = β₂v₁ + 1 − β₂ and v₃ = β₂v₂ + 1 − β₂. AMSGrad moves it by
    −lr·(C − 2)/√v₁ if it keeps the largest raw average, and by −lr·(C − 2)/C if the largest corrected one.

    Example:
        >>> from gdfunc import testing as gt
        >>> amsgrad = gt.from_transform(gd.adam((0.0, 0.2), eps=0.0, amsgrad=True))
        >>> gt.check_drift(amsgrad, gt.Adam((0.0, 0.2), eps=0.0, amsgrad="raw"))
    """
    if not isinstance(claim, Adam) or claim.betas[0] or claim.eps or claim.weight_decay:
        raise NotApplicable("it is about Adam with beta1 = 0, eps = 0 and no weight decay")
    beta2, lr = claim.betas[1], 0.5
    if not 0 < beta2 <= 0.5:
        raise NotApplicable("it is about beta2 = 1/(1 + C^2) <= 1/2")
    c = np.sqrt(1 / beta2 - 1)
    v1 = (1 - beta2) * (c**2 + beta2 + beta2**2) / (1 - beta2**3)
    v2 = beta2 * v1 + 1 - beta2
    v3 = beta2 * v2 + 1 - beta2
    drifts = {
        None: c / np.sqrt(v1) - 1 / np.sqrt(v2) - 1 / np.sqrt(v3),
        "raw": (c - 2) / np.sqrt(v1),
        "corrected": (c - 2) / c,
    }
    periods = 2 + int(np.ceil(np.log(1e-17) / np.log(beta2) / 3))
    gradients = np.tile([c, -1.0, -1.0], periods)
    moves = feed(subject, torch.from_numpy(gradients), lr).numpy()
    formula = f"drift of a period of gradients C, -1, -1 with C = {c:.6g}, beta2 = {beta2:.6g}"
    require_equal(moves[-3:].sum(), -lr * drifts[claim.amsgrad], formula, scale=lr)


@law("gdfunc's contract of a step: the carry is all there is")
def check_resume(subject: Subject, claim: Claim) -> None:
    """Check that a run continued from a copy of its carry, by a step made again, has the same bits.

    Six steps, the last three also from a deep copy. A count or a buffer outside the carry shows here.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_resume(gt.from_transform(gd.momentum(0.5)), gt.Momentum(0.5))
    """
    if subject.of_rows:
        raise NotApplicable("its batches are row numbers")
    grads = _random(claim)
    step = subject.make(linear_loss)
    carry = step.init(_start(grads))
    for t in range(_STEPS):
        if t == _STEPS // 2:
            kept = _copy(carry, t)
        carry, _ = step(carry, _batch(grads, t), LRS[t % 4])
    again = subject.make(linear_loss)
    again.init(_start(grads))  # as a new process does before it loads a carry
    for t in range(_STEPS // 2, _STEPS):
        kept, _ = again(kept, _batch(grads, t), LRS[t % 4])
    whole, resumed = _tree.named_leaves(params_of(carry), "x"), _tree.leaves(params_of(kept))
    for (path, a), b in zip(whole, resumed, strict=True):
        formula = f"{_STEPS} steps = {_STEPS // 2} steps, a copy of the carry, and {_STEPS // 2} steps"
        require_equal(b.detach().numpy(), a.detach().numpy(), formula, slack=0.0, where=path, first=0)


def _copy(carry: Any, step: int) -> Any:
    try:
        return copy.deepcopy(carry)
    except (RuntimeError, TypeError) as error:  # such as a tensor with a history, or a generator
        formula = f"the carry can be copied: {str(error).split('.')[0]}"
        raise LawBroken(formula=formula, value=0, bound=1, step=step) from error


@law("gdfunc's contract of a step: it can be vmapped")
def check_vmap(subject: Subject, claim: Claim) -> None:
    """Check that two runs in one `torch.func.vmap` equal two runs, from two starts, to 1e-12.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_vmap(gt.from_transform(gd.momentum(0.5)), gt.Momentum(0.5))
    """
    if not subject.is_pure:
        raise NotApplicable(f"{subject!r} changes its state in place by design")
    if subject.of_rows:
        raise NotApplicable("its batches are row numbers")
    grads = _random(claim)
    step = subject.make(linear_loss)

    def end(start: Tree, scale: Tensor) -> Tree:
        carry = step.init(start)
        for t in range(_STEPS):
            carry, _ = step(carry, _tree.map(lambda g: scale * g, _batch(grads, t)), LRS[t % 4])
        return params_of(carry)

    scales = torch.tensor([1.0, -0.5], dtype=torch.float64)
    starts = _tree.map(lambda x: torch.stack([x, 2 * x]), _start(grads))
    try:
        together = torch.func.vmap(end)(starts, scales)
    except (RuntimeError, TypeError, ValueError) as error:
        raise NotApplicable(f"{subject!r} cannot be vmapped: {str(error).splitlines()[0]}") from error
    for i in range(2):
        alone = end(_tree.map(lambda x, i=i: x[i], starts), scales[i])
        for (path, row), x in zip(_tree.named_leaves(together, "x"), _tree.leaves(alone), strict=True):
            scale = float(x.abs().max())
            formula = f"row {i} of a vmap over two runs = the run alone"
            require_equal(row[i].numpy(), x.numpy(), formula, scale=scale, slack=1e-12, where=path, first=0)


def _gradients(claim: Claim) -> Tree:
    """Return random gradients, leaves [T, ...], for claims that are about gradients."""
    if not claim.is_of_gradients():
        raise NotApplicable("it has no closed form of the gradients alone")
    return _random(claim)


def _random(claim: Claim) -> Tree:
    return _tree.map(lambda g: g[:_STEPS], feeds(claim)["random"])


def _start(grads: Tree) -> Tree:
    """Return parameters away from zero."""
    return _like(grads, [x[0] for x in _points([g.numpy() for g in _tree.leaves(grads)])])


def _points(g: Arrays) -> Arrays:
    """Return points away from zero, the same before every step."""
    rows = [np.linspace(-1.0, 2.0, leaf[0].size).reshape(leaf.shape[1:]) for leaf in g]
    return [np.broadcast_to(row, leaf.shape) for row, leaf in zip(rows, g, strict=True)]


def _like(tree: Tree, arrays: Iterable[np.ndarray]) -> Tree:
    """Return a tree of the given structure with other leaves."""
    return _tree.unflatten(_tree.flatten(tree)[1], [torch.from_numpy(np.array(x)) for x in arrays])


def _batch(grads: Tree, t: int) -> Tree:
    return _tree.map(lambda g: g[t : t + 1], grads)


def _closed_form(claim: Claim, g: Arrays, points: Arrays) -> Arrays:
    return claim.moves(g, points, np.resize(LRS, len(g[0])))


def _is_close(a: Arrays, b: Iterable[np.ndarray]) -> bool:
    return all(
        bool(np.isfinite(x).all()) and np.allclose(x, y, rtol=1e-12, atol=1e-13 * np.abs(y).max())
        for x, y in zip(a, b, strict=True)
    )


def _mix_entries(x: np.ndarray) -> np.ndarray:
    """Reflect the entries of every row of the leading axis: [T, ...] to [T, ...]."""
    flat = x.reshape(len(x), -1)
    return (flat @ _mixing(flat.shape[1])).reshape(x.shape)


def _mix_rows(x: np.ndarray) -> np.ndarray:
    """Reflect the rows of matrices, [T, m, n], and the entries of others."""
    return np.einsum("ij,tj...->ti...", _mixing(x.shape[1]), x) if x.ndim > 2 else _mix_entries(x)


def _mixing(size: int) -> np.ndarray:
    return reflection(np.arange(1.0, size + 1))
