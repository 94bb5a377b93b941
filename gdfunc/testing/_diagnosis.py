"""Diagnosis: another explanation of the moves of an optimizer that breaks a law."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _tree
from .._tree import Tree
from ._claims._base import Arrays, Claim
from ._claims._sums import SumClaim
from ._controls import WRONG
from ._feeds import LRS, Seen, feeds, observe
from ._subject import Subject, run
from ._sums import moves_on_sums

_AGREE = 1e-9  # relative: what a diagnosis calls agreement, beyond the rounding of the points


def _observed(subject: Subject, trees: list[Tree]) -> list[Seen]:
    return [observe(subject, grads) for grads in trees]


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


def diagnose(subject: Subject, claim: Claim) -> str:
    """Say what would explain the moves of a subject on linear losses.

    Tried in order: another learning rate; a negative control of the family, alone or with another learning
    rate; another value of one hyperparameter; the leaf or the step where the moves first differ. Where
    linear losses say nothing, a control that walks alike on mini-batches, or on another loss.
    """
    if isinstance(claim, SumClaim):
        return _on_sums(subject, claim)
    if not claim.is_of_gradients():
        return _twin(subject, claim)
    trees = list(feeds(claim).values())
    seen = _observed(subject, trees)
    expected = _expected(seen, claim)
    if not all(np.isfinite(leaf).all() for feed in seen for leaf in feed.moves):
        return "some moves are NaN or infinite"
    ratio = _ratio(seen, expected)
    if ratio is not None:
        if abs(ratio - 1) <= _AGREE:
            found = _on_sums(subject, claim) or _twin(subject, claim)
            return found or "the moves on linear losses agree with the claim to 1e-9"
        return f"the effective learning rate is {_plain(ratio)} lr"
    for control in WRONG.values():
        if type(control.claim) is not type(claim):
            continue
        built = control.build(claim, control.fault)
        # The first feed alone rules out most controls.
        if _ratio(seen[:1], [observe(built, trees[0]).moves]) is not None:
            ratio = _ratio(seen, [feed.moves for feed in _observed(built, trees)])
            if ratio:
                return f"agrees with: {control.fault}{_at(ratio)}"
    return _other_hyperparameter(seen, claim) or _place(seen, expected)


def _waves(params: Tree, batch: Tree) -> Tensor:
    """Return a loss that curves upwards here and downwards there, differently in every entry."""
    x = torch.cat([leaf.reshape(-1) for leaf in _tree.leaves(params)])
    return (torch.linspace(0.5, 2.0, len(x), dtype=x.dtype) * (1 - x.cos())).sum()


def _twin(subject: Subject, claim: Claim) -> str:
    """Name the control whose points and answers on a wavy loss are the subject's."""
    if subject.of_rows:
        return ""
    start = {"a": torch.tensor(2.0).double(), "b": torch.tensor([[1.0, 0.5], [-2.5, -1.0]]).double()}

    def walk(other: Subject) -> Arrays:
        done = run(other, _waves, start, torch.ones(9, 1).double(), np.resize(LRS, 9), 9)
        return [*done.points, *done.results]

    return _alike(subject, claim, walk)


def _on_sums(subject: Subject, claim: Claim) -> str:
    """Name the control whose moves on mini-batches are the subject's."""
    return _alike(
        subject, claim, lambda other: [moves for moves, _ in moves_on_sums(other, claim).values()]
    )


def _alike(subject: Subject, claim: Claim, walk: Callable[[Subject], Arrays]) -> str:
    """Name the control that walks as the subject does, and otherwise than it would without its fault."""

    def is_same(a: Arrays, b: Arrays) -> bool:
        pairs = zip(a, b, strict=True)
        return all(np.allclose(x, y, rtol=_AGREE, atol=_AGREE, equal_nan=True) for x, y in pairs)

    walked = walk(subject)
    for control in WRONG.values():
        if type(control.claim) is not type(claim):
            continue
        wrong, right = (control.build(claim, fault) for fault in (control.fault, ""))
        if is_same(walked, walk(wrong)) and not is_same(walked, walk(right)):
            return f"agrees with: {control.fault}"
    return ""


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
    wrong: list[tuple[int, int]] = []  # a leaf, and its first wrong step in a feed
    for feed, wanted in zip(seen, expected, strict=True):
        for leaf, (a, b, points) in enumerate(zip(feed.moves, wanted, feed.points, strict=True)):
            noise = 4 * np.finfo(float).eps * np.abs(points).max()
            differs = np.abs(a - b) > _AGREE * np.abs(b).max() + noise
            steps = np.flatnonzero(differs.reshape(len(a), -1).any(1))
            wrong += [(leaf, int(step)) for step in steps[:1]]
    if not wrong:
        return ""
    leaves, count = {leaf for leaf, _ in wrong}, max(len(feed.moves) for feed in seen)
    if len(leaves) < count:
        return f"only the leaves {sorted(leaves)} of {count} move wrongly"
    first = min(step for _, step in wrong)
    return f"the first {first} steps are right" if first else "already the first step is wrong"
