"""Laws of stochastic gradients: small sums, taken whole.

With n = 3 samples and T = 3 steps there are 27 plans. An expectation is the mean over all of them, free of
statistical errors.
"""

import itertools
from typing import Any

import numpy as np

from .._claims._base import Claim
from .._claims._linear import GradientDescent
from .._claims._sums import SAG, SAGA, SARAH, SVRG, Pass, SumClaim
from .._law import NotApplicable, law, require_at_most, require_equal
from .._subject import Subject
from .._sums import (
    LRS,
    FiniteSum,
    all_batches,
    all_plans,
    least_squares,
    moves_on,
    moves_on_sums,
    path_on,
    sharp_pair,
)

# The ridge correlates the Hessians and the gradients at the minimum.
SMALL = least_squares([[1.0, 0.5], [-0.5, 1.0], [0.25, -1.5]], [1.0, -0.5, 2.0], ridge=0.25)
START = np.array([1.5, -1.0])


# ---------------------------------------------------------------- every move


@law("the rule on every mini-batch of a plan")
def check_batches(
    subject: Subject, claim: Claim, problem: FiniteSum | None = None, plan: Any = None, lrs: Any = LRS
) -> None:
    """Check every move on plans of mini-batches against the claim's closed form.

    The strongest law of finite sums. The gradient of a batch is the mean over its samples, also where it
    holds one of them twice. A claim about gradients is tried at the gradients that the subject has seen.
    SVRG, SARAH, SAGA and SAG have paths in closed form, over steps enough to use what they remember.

    Args:
        subject: the subject.
        claim: what it says that it is.
        problem: a sum; None: one of four quadratics, with plans of its own.
        plan: for a given problem, the rows of every step, int64 [T, B], or [T, m·B] for passes.
        lrs: for a given problem, repeated over the steps.

    Example:
        >>> from gdfunc import testing as gt
        >>> problem = gt.FiniteSum(hessians=(((1.0,),), ((3.0,),)), offsets=((1.0,), (1.0,)))
        >>> plan = torch.tensor([[0], [1], [1]])
        >>> descent = gt.from_step(gd.make_step)
        >>> gt.check_batches(descent, gt.GradientDescent(), problem, plan, lrs=(0.5, 0.25, 0.125))
    """
    if not isinstance(claim, SumClaim) and not claim.is_of_gradients():
        raise NotApplicable("it has no closed form of the gradients alone")
    if problem is None:
        found = moves_on_sums(subject, claim)
    else:
        found = {"given plan": moves_on(subject, claim, problem, plan, lrs)}
    for name, (moves, expected) in found.items():
        scale = max(1.0, np.abs(expected).max())
        require_equal(moves, expected, f"{claim.formula}, {name}", scale=scale, slack=claim.slack)


# ---------------------------------------------------------------- means and second moments


def _require_last(claim: Claim, *others: type[Claim]) -> None:
    """Refuse claims whose points within a pass cannot be seen, and those of no given class."""
    if not isinstance(claim, others):
        raise NotApplicable(f"it is about {', '.join(other.__name__ for other in others)}")
    if getattr(claim, "output", "last") != "last":
        raise NotApplicable("it is about the last point of a pass")


def shape_plan(claim: Claim, plan: np.ndarray) -> np.ndarray:
    """Return a plan of batches [T, B] as the claim takes it: a pass is one row."""
    return plan.reshape(1, -1) if isinstance(claim, Pass) else plan


@law("the definition of each estimate; small sums taken whole")
def check_unbiased(subject: Subject, claim: Claim, problem: FiniteSum = SMALL, lr: float = 0.25) -> None:
    """Check the mean of the next step over all batches, after a few steps.

    SGD, SVRG and SAGA:  E v = f'(x)
    SARAH:               E v = f'(w) − f'(w₋₁) + v₋₁
    SAG:                 E v = t̄ + B/n·(f'(x) − t̄) with the mean t̄ of the table

    Args:
        subject: the subject.
        claim: one of the five.
        problem: the sum.
        lr: a number.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_unbiased(gt.from_step(gd.methods.saga, of_rows=True), gt.SAGA())
    """
    _require_last(claim, GradientDescent, SVRG, SARAH, SAGA, SAG)
    n, size = len(problem.b), getattr(claim, "batch_size", min(2, len(problem.b)))
    start = np.resize(START, problem.b.shape[1])
    rows = np.random.default_rng(0).integers(n, size=(3, size))

    def end(plan: np.ndarray) -> np.ndarray:
        return path_on(subject, problem, shape_plan(claim, plan), lr, start)[-1]

    for count in (2, 3):
        before = rows[:count]
        here = end(before)
        ends = [end(np.vstack([before, batch])) for batch in all_batches(n, size)]
        full = problem.gradients(here).mean(0)
        expected, formula = full, "E v = grad f(x)"
        if isinstance(claim, SARAH):
            there = end(before[:-1])
            expected = full - problem.gradients(there).mean(0) + (there - here) / lr
            formula = "E v = grad f(w) - grad f(w_before) + v_before"
        if isinstance(claim, SAG):
            table = problem.gradients(start)
            for x, batch in zip(path_on(subject, problem, before, lr, start), before, strict=False):
                table[batch] = problem.gradients(x)[batch]
            mean = table.mean(0)
            expected = mean + size / n * (full - mean)
            formula = f"E v = tbar + {size}/{n} (grad f(x) - tbar)"
        estimate = (here - np.mean(ends, 0)) / lr
        scale = np.abs(here).max() / lr
        require_equal(
            estimate[None], expected[None], f"{formula}, lr = {lr:.6g}", scale=scale, first=count + 1
        )


def _lift(claim: Claim, problem: FiniteSum, e: np.ndarray, lr: float) -> np.ndarray:
    """Return the state z of a linear recursion that begins with the error e = x − x*, its first entries."""
    if isinstance(claim, GradientDescent):
        return np.append(e, 1.0)
    if isinstance(claim, SVRG):
        return np.concatenate([e, e])
    if isinstance(claim, SARAH):
        v = problem.H.mean(0) @ e
        return np.concatenate([e - lr * v, e, v])
    return np.tile(e, len(problem.b) + 1)


def _transition(claim: Claim, problem: FiniteSum, lr: float, batch: np.ndarray) -> np.ndarray:
    """Return the matrix with z' = M z for one batch.

    z is (e, 1) for SGD; (e, e of the snapshot) for SVRG; (e, e before, v) for SARAH; and e with the errors
    at which the samples were last visited for SAGA and SAG.
    """
    H, (n, d) = problem.H, problem.b.shape
    eye, zero, mean = np.eye(d), np.zeros((d, d)), problem.H[batch].mean(0)
    if isinstance(claim, GradientDescent):
        noise = problem.gradients(problem.minimizer)[batch].mean(0)
        return np.block([[eye - lr * mean, -lr * noise[:, None]], [np.zeros((1, d)), np.ones((1, 1))]])
    if isinstance(claim, SVRG):
        return np.block([[eye - lr * mean, lr * (mean - H.mean(0))], [zero, eye]])
    if isinstance(claim, SARAH):
        return np.block([[eye - lr * mean, lr * mean, -lr * eye], [eye, zero, zero], [mean, -mean, eye]])
    counts = np.bincount(batch, minlength=n)
    if isinstance(claim, SAGA):
        now, old = counts / len(batch), 1 / n - counts / len(batch)
    else:
        now, old = (counts > 0) / n, (counts == 0) / n
    direction = [np.tensordot(now, H, 1), *(old[:, None, None] * H)]
    visits = [
        [eye * (counts[i] > 0), *(eye * (i == j and counts[i] == 0) for j in range(n))] for i in range(n)
    ]
    first = [eye - lr * direction[0], *(-lr * part for part in direction[1:])]
    return np.block([first, *visits])


@law("the recursion of second moments, with its cross term; small sums taken whole")
def check_second_moment(
    subject: Subject,
    claim: Claim,
    problem: FiniteSum = SMALL,
    lrs: tuple[float, ...] = (0.3, 0.1, 0.2),
    batch_size: int | None = None,
    *,
    replace: bool = False,
) -> None:
    """Check E e and E eeᵀ of the error e = x − x* over all plans against their recursions.

    For a sum of quadratics a state z that begins with e obeys z' = M_b z, so E z' = E M_b·E z and
    E z'z'ᵀ = E[M_b·(E zzᵀ)·M_bᵀ]. For SGD z = (e, 1), which includes the cross term of the Hessians and
    the gradients at the minimum. In the mean alone SVRG and SGD are the same.

    Args:
        subject: the subject.
        claim: `GradientDescent`, or a method for finite sums.
        problem: the sum.
        lrs: of every step. A pass of SVRG or SARAH has one batch for each, and the first lr throughout.
        batch_size: B; None: that of the claim, or 1 in all steps and 2 in the first two.
        replace: whether a batch may hold a sample twice.

    Example:
        >>> from gdfunc import testing as gt
        >>> descent = gt.from_step(gd.make_step)
        >>> gt.check_second_moment(descent, gt.GradientDescent(), lrs=(0.25, 0.125), batch_size=2)
    """
    _require_last(claim, GradientDescent, SVRG, SARAH, SAGA, SAG)
    if batch_size is None and not hasattr(claim, "batch_size"):
        _check_moments(subject, claim, problem, lrs, 1, replace)
        _check_moments(subject, claim, problem, lrs[:2], 2, replace)
        return
    _check_moments(subject, claim, problem, lrs, batch_size or claim.batch_size, replace)  # type: ignore[attr-defined]


def _check_moments(
    subject: Subject, claim: Claim, problem: FiniteSum, lrs: tuple[float, ...], size: int, replace: bool
) -> None:
    n, d = problem.b.shape
    start, is_pass = np.resize(START, d), isinstance(claim, Pass)
    rates = (lrs[0],) * len(lrs) if is_pass else lrs
    plans = all_plans(n, len(lrs), size, replace=replace).numpy()
    paths = [
        path_on(subject, problem, shape_plan(claim, plan), lrs[0] if is_pass else lrs, start)
        for plan in plans
    ]
    errors = np.array(paths) - problem.minimizer
    z = _lift(claim, problem, start - problem.minimizer, lrs[0])
    means, moments = [z], [np.outer(z, z)]
    batches = all_batches(n, size, replace=replace)
    for lr in rates:
        matrices = np.array([_transition(claim, problem, lr, batch) for batch in batches])
        means.append(matrices.mean(0) @ means[-1])
        moments.append((matrices @ moments[-1] @ matrices.transpose(0, 2, 1)).mean(0))
    steps = [-1] if is_pass else list(range(1, len(lrs) + 1))
    where = f"{len(plans)} plans of batches of {size}"
    for value, expected, name in (
        (errors.mean(0), [mean[:d] for mean in means], "E e' = E[M_b] E e"),
        (np.einsum("pti,ptj->tij", errors, errors) / len(plans), [m[:d, :d] for m in moments], _SECOND),
    ):
        wanted = np.array([expected[t] for t in steps])
        scale = np.abs(wanted).max()
        require_equal(value[1:], wanted, f"{name}, lrs = {lrs}", scale=scale, where=where)


_SECOND = "E e'e'^T = E[M_b (E ee^T) M_b^T]"


@law("sampling with and without replacement; small sums taken whole")
def check_batch_variance(
    subject: Subject, claim: Claim, problem: FiniteSum = SMALL, lr: float = 0.25
) -> None:
    """Check the covariance of one step of SGD from the minimum, for every batch size.

    lr²·(n − B)/(B·(n − 1))·C without replacement, zero for B = n, and lr²·C/B with, where C is the
    covariance of the samples' gradients.

    Args:
        subject: the subject.
        claim: `GradientDescent`.
        problem: the sum.
        lr: a number.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_batch_variance(gt.from_step(gd.make_step), gt.GradientDescent(), lr=0.5)
    """
    _require_last(claim, GradientDescent)
    noise, n = problem.gradients(problem.minimizer), len(problem.b)
    C = noise.T @ noise / n
    for size, replace in itertools.product(range(1, n + 1), (False, True)):
        plans = all_plans(n, 1, size, replace=replace)
        moves = [np.diff(path_on(subject, problem, p, lr, problem.minimizer), axis=0)[0] for p in plans]
        factor = 1 / size if replace else (n - size) / (size * (n - 1))
        formula = (
            f"Cov = lr^2 {factor:.6g} C, lr = {lr:.6g}, B = {size}, {'with' if replace else 'without'}"
        )
        value = np.einsum("pi,pj->ij", moves, moves) / len(moves)
        require_equal(value, lr**2 * factor * C, formula, scale=lr**2 * np.abs(C).max())


@law("PESTO, A. B. Taylor, J. M. Hendrickx, F. Glineur 2017; the attaining pair is gdfunc's")
def check_sgd_bound(subject: Subject, claim: Claim, problem: FiniteSum | None = None) -> None:
    """Check the sharp bound of one step of SGD, below it and at the pair of functions that attains it.

    E‖x₁ − x*‖² ≤ (½ lr (L − μ) R + √((1 − ½ lr (L + μ))² R² + lr²v²))² with R = ‖x₀ − x*‖ and
    v² = E‖fᵢ'(x*)‖². Equality at `sharp_pair` leaves no room for a wrong factor of lr.

    Args:
        subject: the subject.
        claim: `GradientDescent`.
        problem: the sum that must stay below; None: a small one. The pairs are tried in any case.

    Example:
        >>> from gdfunc import testing as gt
        >>> gt.check_sgd_bound(gt.from_step(gd.make_step), gt.GradientDescent())
    """
    _require_last(claim, GradientDescent)

    def distance_and_bound(problem: FiniteSum, L: float, mu: float, lr: float, e: np.ndarray) -> Any:
        best, n = problem.minimizer, len(problem.b)
        ends = [path_on(subject, problem, [[i]], lr, best + e)[-1] - best for i in range(n)]
        noise = np.square(problem.gradients(best)).sum(1).mean()
        kept = np.hypot((1 - lr * (L + mu) / 2) * np.linalg.norm(e), lr * np.sqrt(noise))
        bound = (lr * (L - mu) / 2 * np.linalg.norm(e) + kept) ** 2
        return np.square(ends).sum(1).mean(), bound, f"L = {L:.6g}, mu = {mu:.6g}, lr = {lr:.6g}"

    formula = "E|x_1 - x*|^2 {} (lr (L-mu)/2 R + sqrt((1 - lr (L+mu)/2)^2 R^2 + lr^2 v^2))^2, {}"
    tried = SMALL if problem is None else problem
    for lr in (0.25 / tried.L, 1 / tried.L, 1.5 / tried.L):
        start = np.resize(START, tried.b.shape[1])
        value, bound, numbers = distance_and_bound(tried, tried.L, tried.mu, lr, start)
        require_at_most(value, bound, formula.format("<=", numbers))
    for L, mu, lr, noise in ((1.0, 0.25, 0.5, 1.0), (2.0, 0.5, 0.75, 0.5), (4.0, 1.0, 0.125, 3.0)):
        pair = sharp_pair(L, mu, lr, 1.5, noise)
        value, bound, numbers = distance_and_bound(pair, L, mu, lr, np.array([1.5, 0.0]))
        require_equal(value, bound, formula.format("=", numbers), where="the attaining pair")


@law("L. M. Nguyen et al. 2017, the variance of SARAH's estimate; small sums taken whole")
def check_variance_identity(
    subject: Subject, claim: Claim, problem: FiniteSum = SMALL, lr: float = 0.25
) -> None:
    """Check the variance of SARAH's estimate, which its steps show.

    E‖v_t − f'(w_t)‖² = Σⱼ E‖vⱼ − vⱼ₋₁‖² − Σⱼ E‖f'(wⱼ) − f'(wⱼ₋₁)‖² over j = 1, …, t, where
    w_{t+1} = w_t − lr·v_t and v₀ = f'(θ).

    Args:
        subject: the subject.
        claim: `SARAH`.
        problem: the sum.
        lr: a number.

    Example:
        >>> from gdfunc import testing as gt
        >>> sarah = gt.from_step(gd.methods.sarah, of_rows=True)
        >>> gt.check_variance_identity(sarah, gt.SARAH())
    """
    _require_last(claim, SARAH)
    start = np.resize(START, problem.b.shape[1])
    first = start - lr * problem.gradients(start).mean(0)
    batches = all_batches(len(problem.b), claim.batch_size)  # type: ignore[attr-defined]
    ends: dict[tuple[int, ...], np.ndarray] = {}
    for count in (1, 2, 3):
        for chosen in itertools.product(range(len(batches)), repeat=count):
            plan = batches[list(chosen)].reshape(1, -1)
            ends[chosen] = path_on(subject, problem, plan, lr, start)[-1]
    whole = [chosen for chosen in ends if len(chosen) == 3]
    w = np.array([[start, first, *(ends[chosen[:k]] for k in (1, 2, 3))] for chosen in whole])
    v = -np.diff(w, axis=1) / lr
    full = np.array([[problem.gradients(x).mean(0) for x in points] for points in w[:, :-1]])

    def squares(vectors: np.ndarray) -> np.ndarray:
        return np.square(vectors).sum(-1).mean(0)

    expected = np.cumsum(squares(np.diff(v, axis=1)) - squares(np.diff(full, axis=1)))
    formula = (
        f"E|v_t - grad f|^2 = sum E|v_j - v_(j-1)|^2 - sum E|grad f_j - grad f_(j-1)|^2, lr = {lr:.6g}"
    )
    require_equal(squares(v - full)[1:], expected, f"{formula}, lr = {lr:.6g}", scale=squares(v).max())
