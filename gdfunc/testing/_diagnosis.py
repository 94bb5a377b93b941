"""What else would explain the moves of an optimizer that breaks a law."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from ._claims._base import Arrays, Claim
from ._controls import WRONG, Control
from ._feeds import LRS, Seen, feeds, observe
from ._subject import Subject, run

_AGREE = 1e-9  # relative: what a diagnosis calls agreement, beyond the rounding of the points


def _observed(subject: Subject, claim: Claim) -> list[Seen]:
    return [observe(subject, grads) for grads in feeds(claim).values()]


def _expected(seen: list[Seen], claim: Claim) -> list[Arrays]:
    """Return the moves that a claim expects at the observed points."""
    with np.errstate(all="ignore"):
        return [claim.moves(feed.grads, feed.points, feed.lrs) for feed in seen]


def _ratio(seen: list[Seen], expected: list[Arrays]) -> float | None:
    """Return c with moves = c·expected, or None."""
    rows = []
    for feed, wanted in zip(seen, expected, strict=True):
        a, b = (np.concatenate([leaf.ravel() for leaf in leaves]) for leaves in (feed.moves, wanted))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return None
        # Each feed is weighed by its own size, so that a large one does not hide the others.
        size = max(np.abs(a).max(), np.abs(b).max())
        if size > 0:
            noise = 4 * np.finfo(float).eps * max(np.abs(x).max() for x in feed.points) / size
            rows.append((a / size, b / size, np.full(a.shape, _AGREE + noise)))
    if not rows:
        return None
    a, b, allowed = (np.concatenate(column) for column in zip(*rows, strict=True))
    weight = 1 / allowed**2
    c = float((weight * a) @ b / ((weight * b) @ b)) if b.any() else 0.0
    return c if (np.abs(a - c * b) <= allowed * max(1.0, abs(c))).all() else None


def _plain(value: float) -> str:
    return f"{value:.9g}"


def _at(ratio: float) -> str:
    """Return the words for another learning rate, if it is another."""
    return "" if abs(ratio - 1) <= _AGREE else f", and the effective learning rate is {_plain(ratio)} lr"


def _controls_of(claim: Claim) -> list[Control]:
    """Return the controls that claim the same."""
    return [control for control in WRONG.values() if type(control.claim) is type(claim)]


def _on_a_sum(subject: Subject, claim: Claim) -> str:
    """Find a control that agrees on a small sum of losses: for claims about more than gradients."""
    seen = _watch(subject)
    for control in _controls_of(claim):
        planted = _watch(control.build(claim, control.fault))
        if planted.shape == seen.shape and np.allclose(planted, seen, rtol=1e-8, atol=1e-10):
            return f"agrees with: {control.fault}"
    return ""


def _watch(subject: Subject) -> np.ndarray:
    """Return the points and averages of a run on three smooth losses, all in one vector."""
    data = torch.tensor([[1.0, 0.5], [-0.5, 2.0], [1.5, 1.0]], dtype=torch.float64)

    def loss_fn(x: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return ((batch @ x - 1) ** 2 / 2).mean() + (x**4).sum() / 16 + x.square().sum() / 4

    plan = torch.tensor([[0], [2], [2], [1], [0], [1], [1], [2]])
    start = torch.tensor([1.5, -1.0], dtype=torch.float64)
    done = run(subject, loss_fn, start, plan, 0.5 * np.resize(LRS, len(plan)) ** 0.5, len(plan), data)
    ends = [getattr(done.carry, name, start) for name in ("average", "slow")]
    return np.concatenate([done.points[0].ravel(), *(end.detach().numpy().ravel() for end in ends)])


def diagnose(subject: Subject, claim: Claim) -> str:
    """Say what would explain the moves of a subject on linear losses.

    Tried in order: another learning rate; a negative control of the family, alone or with another learning
    rate; another value of one hyperparameter; the leaf or the step where the moves first differ.
    """
    if not claim.is_of_gradients():
        return _on_a_sum(subject, claim)
    seen = _observed(subject, claim)
    expected = _expected(seen, claim)
    if not all(np.isfinite(leaf).all() for feed in seen for leaf in feed.moves):
        return "some moves are NaN or infinite"
    ratio = _ratio(seen, expected)
    if ratio is not None:
        if abs(ratio - 1) <= _AGREE:
            return "the moves on linear losses agree with the claim to 1e-9"
        return f"the effective learning rate is {_plain(ratio)} lr"
    for control in _controls_of(claim):
        built = control.build(claim, control.fault)
        # The first feed alone rules out most controls.
        first = observe(built, next(iter(feeds(claim).values())))
        if _ratio(seen[:1], [first.moves]) is not None:
            ratio = _ratio(seen, [feed.moves for feed in _observed(built, claim)])
            if ratio:
                return f"agrees with: {control.fault}{_at(ratio)}"
    return _other_hyperparameter(seen, claim) or _place(seen, expected)


def _other_hyperparameter(seen: list[Seen], claim: Claim) -> str:
    """Find another value of one number of the claim with which the moves agree."""
    for field in fields(claim):
        value = getattr(claim, field.name)
        places = range(len(value)) if isinstance(value, tuple) else [None]
        for place in places:
            number = value if place is None else value[place]
            if isinstance(number, bool):
                candidates: list[Any] = [not number]
            elif isinstance(number, float):
                other = [v for v in (value if isinstance(value, tuple) else ()) if v != number]
                candidates = [*other, 1 - number, number**2, number**0.5, number / 2, 2 * number, 0.0]
                candidates += [0.5, 0.9, 0.95, 0.99, 0.999, 1.0, 1e-3, 1e-6, 1e-8, 1e-10, 1e-16]
            else:
                continue
            for candidate in candidates:
                changed = candidate if place is None else (*value[:place], candidate, *value[place + 1 :])
                try:
                    ratio = _ratio(seen, _expected(seen, replace(claim, **{field.name: changed})))
                except Exception:  # the value may be out of range
                    continue
                if ratio is not None and ratio != 0:
                    name = field.name if place is None else f"{field.name}[{place}]"
                    shown = candidate if isinstance(candidate, bool) else _plain(candidate)
                    return f"agrees with {name} = {shown}{_at(ratio)}"
    return ""


def _place(seen: list[Seen], expected: list[Arrays]) -> str:
    """Say which leaves, or which steps, are wrong."""
    wrong = []
    for moves, wanted in zip([feed.moves for feed in seen], expected, strict=True):
        wrong.append(
            [
                np.abs(a - b) > _AGREE * max(np.abs(b).max(), 1e-300)
                for a, b in zip(moves, wanted, strict=True)
            ]
        )
    leaves = {i for feed in wrong for i, leaf in enumerate(feed) if leaf.any()}
    count = max(len(feed) for feed in wrong)
    if leaves and len(leaves) < count:
        return f"only the leaves {sorted(leaves)} of {count} move wrongly"
    first = min(
        int(np.flatnonzero(leaf.reshape(len(leaf), -1).any(1))[0])
        for feed in wrong
        for leaf in feed
        if leaf.any()
    )
    return f"the first {first} steps are right" if first else "already the first step is wrong"
