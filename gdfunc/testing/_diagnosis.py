"""What else would explain the moves of an optimizer that breaks a law."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from .. import _tree
from ._claims._base import Arrays, Claim
from ._subject import Subject, linear_loss, run

_AGREE = 1e-9  # relative: what a diagnosis calls agreement, beyond the rounding of the points
_LRS = np.array([0.5, 0.25, 1.0, 0.125])


class _Observed:
    """The moves of a subject on each of the kernel law's feeds, and what a claim expects of them."""

    def __init__(self, subject: Subject, claim: Claim) -> None:
        from ._laws._kernel import feeds

        self.grads, self.points, self.moves, self.lrs = [], [], [], []
        for tree in feeds(claim).values():
            leaves = _tree.leaves(tree)
            steps = len(leaves[0])
            lrs = np.resize(_LRS, steps)
            start = _tree.map(
                lambda g: torch.linspace(-1.0, 2.0, max(g[0].numel(), 1), dtype=g.dtype).reshape(
                    g[0].shape
                ),
                tree,
            )
            done = run(subject, linear_loss, start, _tree.map(lambda g: g[:, None], tree), lrs, steps)
            self.grads.append([leaf.double().numpy() for leaf in leaves])
            self.points.append([x[:-1] for x in done.points])
            self.moves.append(done.moves)
            self.lrs.append(lrs)

    def expected(self, claim: Claim) -> list[Arrays]:
        """Return the moves that a claim expects at the observed points."""
        with np.errstate(all="ignore"):
            return [claim.moves(*given) for given in zip(self.grads, self.points, self.lrs, strict=True)]


def _ratio(seen: _Observed, expected: list[Arrays]) -> float | None:
    """Return c with moves = c·expected, or None."""
    rows = []
    for moves, wanted, points in zip(seen.moves, expected, seen.points, strict=True):
        a, b = (np.concatenate([leaf.ravel() for leaf in leaves]) for leaves in (moves, wanted))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return None
        # Each feed is weighed by its own size, so that a large one does not hide the others.
        size = max(np.abs(a).max(), np.abs(b).max())
        if size > 0:
            noise = 4 * np.finfo(float).eps * max(np.abs(x).max() for x in points) / size
            rows.append((a / size, b / size, np.full(a.shape, _AGREE + noise)))
    if not rows:
        return None
    a, b, allowed = (np.concatenate(column) for column in zip(*rows, strict=True))
    weight = 1 / allowed**2
    c = float((weight * a) @ b / ((weight * b) @ b)) if b.any() else 0.0
    return c if (np.abs(a - c * b) <= allowed * max(1.0, abs(c))).all() else None


def _plain(value: float) -> str:
    return f"{value:.9g}"


def diagnose(subject: Subject, claim: Claim) -> str:
    """Say what would explain the moves of a subject on linear losses.

    Tried in order: another learning rate; a negative control of the family, alone or with another learning
    rate; another value of one hyperparameter; the leaf or the step where the moves first differ.
    """
    from ._controls import WRONG

    try:
        seen = _Observed(subject, claim)
    except NotImplementedError:
        return ""
    expected = seen.expected(claim)
    if not all(np.isfinite(leaf).all() for feed in seen.moves for leaf in feed):
        return "some moves are NaN or infinite"
    ratio = _ratio(seen, expected)
    if ratio is not None:
        if abs(ratio - 1) <= _AGREE:
            return "the moves on linear losses agree with the claim to 1e-9"
        return f"the effective learning rate is {_plain(ratio)} lr"
    for control in WRONG.values():
        if isinstance(claim, type(control.claim)):
            try:
                planted = _Observed(control.build(claim, control.fault), claim).moves
            except Exception:  # a control need not know every option of the claim
                continue
            ratio = _ratio(seen, planted)
            if ratio is not None and ratio != 0:
                also = (
                    ""
                    if abs(ratio - 1) <= _AGREE
                    else f", and the effective learning rate is {_plain(ratio)} lr"
                )
                return f"agrees with: {control.fault}{also}"
    return _other_hyperparameter(seen, claim) or _place(seen, expected)


def _other_hyperparameter(seen: _Observed, claim: Claim) -> str:
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
                    ratio = _ratio(seen, seen.expected(replace(claim, **{field.name: changed})))
                except Exception:  # the value may be out of range
                    continue
                if ratio is not None and ratio != 0:
                    name = field.name if place is None else f"{field.name}[{place}]"
                    also = "" if abs(ratio - 1) <= _AGREE else f" at {_plain(ratio)} lr"
                    shown = candidate if isinstance(candidate, bool) else _plain(candidate)
                    return f"agrees with {name} = {shown}{also}"
    return ""


def _place(seen: _Observed, expected: list[Arrays]) -> str:
    """Say which leaves, or which steps, are wrong."""
    wrong = []
    for moves, wanted in zip(seen.moves, expected, strict=True):
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
