"""Diagnosis: another explanation of the moves of an optimizer that breaks a law."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from .._tree import Tree
from ._claims._base import Arrays, Claim
from ._claims._curved import Wolfe
from ._claims._fits import GaussNewton, LevenbergMarquardt
from ._claims._sums import SumClaim
from ._controls import WRONG
from ._feeds import ALL_LRS, Seen, feeds, observe
from ._problems import Fit, Hermite, Problem, Waves
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


def diagnose(subject: Subject, claim: Claim) -> str:
    """Say what would explain the moves of a subject on linear losses.

    Tried in order: another learning rate; a negative control of the family; another value of one
    hyperparameter; one of the two with another learning rate; the leaf or the step where the moves first
    differ. Where linear losses say nothing, a control that walks alike on mini-batches, or on another loss.
    """
    if isinstance(claim, SumClaim):
        return _on_sums(subject, claim)
    if not claim.is_of_gradients():
        return _twin(subject, claim)
    trees = list(feeds(claim).values())
    seen = _observed(subject, trees)
    expected = _expected(seen, claim)
    if not all(np.isfinite(leaf).all() for feed in seen for leaf in feed.moves):
        return _on_feeds(subject, claim, trees) or "some moves are NaN or infinite"
    ratio = _ratio(seen, expected)
    if ratio is not None:
        if abs(ratio - 1) <= _AGREE:
            found = _on_sums(subject, claim) or _twin(subject, claim)
            return found or "the moves on linear losses agree with the claim to 1e-9"
        return f"the effective learning rate is {_plain(ratio)} lr"
    controls = list(_controls(seen, trees, claim))
    exact = [words for words, ratio in controls if abs(ratio - 1) <= _AGREE]
    if exact:  # of several, the one whose answers agree too
        twin = _twin(subject, claim) if exact[1:] else ""
        return twin if twin in exact else exact[0]
    other = ""
    for words, ratio in itertools.chain(controls, _hyperparameters(seen, claim)):
        if abs(ratio - 1) <= _AGREE:
            return words
        other = other or f"{words}, and the effective learning rate is {_plain(ratio)} lr"
    return other or _place(seen, expected)


def _controls(seen: list[Seen], trees: list[Tree], claim: Claim) -> Iterator[tuple[str, float]]:
    """Yield the controls of the family whose moves agree up to a factor, and the factor."""
    for control in WRONG.values():
        if type(control.claim) is not type(claim):
            continue
        wrong, right = (control.build(claim, fault) for fault in (control.fault, ""))
        # The first feed alone rules out most controls.
        if _ratio(seen[:1], [observe(wrong, trees[0]).moves]) is None:
            continue
        moves, without = ([feed.moves for feed in _observed(built, trees)] for built in (wrong, right))
        ratio = _ratio(seen, moves)
        # With some hyperparameters a fault does nothing.
        if ratio and _ratio(seen, without) != ratio:
            yield f"agrees with: {control.fault}", ratio


def _twin(subject: Subject, claim: Claim) -> str:
    """Name the control whose points and answers on a wavy loss, or on curves to fit, are the subject's."""
    if subject.of_rows:
        return ""
    starts = [[2.0, 1.0, 0.5, -2.5, -1.0], [0.2, 0.1, 0.05, -0.25, -0.1], [3.0] * 5]
    # On a slope, near the minimum, and near a maximum, where the loss is large and its slope small.
    runs: list[tuple[Problem, list[float]]] = [
        (Waves((0.5, 0.875, 1.25, 1.625, 2.0)), start) for start in starts
    ]
    lrs = np.resize(ALL_LRS[::-1], 9)
    if isinstance(claim, GaussNewton):
        runs += [(Fit((3.0, 1.0, 2.5), is_linear=True), start) for start in ([1.0, 2.0], starts[0])]
    if isinstance(claim, LevenbergMarquardt):
        curves = [-1.0, 0.125], [-1.0, 0.75], [1.0, 0.5]
        targets = (3.0, 1.0, 2.5, 1.0, 0.875), (1.0, -2.0, 0.5, 1.0, 0.25)
        runs = [(Fit(y), start) for y in targets for start in curves]
        lrs = np.resize((1.0, 1.0, 1.0, 0.5), 9)

    if isinstance(claim, Wolfe):
        values = (-share * claim.decrease for share in (0.25, 0.75, 1.5))
        runs += [(Hermite(value, 0.5 * claim.curvature), [1.0, 0.0]) for value in values]
        lrs = np.ones(4)

    def walk(other: Subject) -> Arrays:
        found: Arrays = []
        for problem, entries in runs:
            x = torch.tensor(entries, dtype=torch.float64)
            start = {"a": x[0], "b": x[1:].reshape(2, 2) if len(x) == 5 else x[1:]}
            done = run(other, problem.loss_fn, start, torch.ones(len(lrs), 1).double(), lrs, len(lrs))
            found += [*done.points, *done.results]
        return found

    return _alike(subject, claim, walk)


def _on_feeds(subject: Subject, claim: Claim, trees: list[Tree]) -> str:
    """Name the control whose moves on the feeds are the subject's, NaN and infinity among them."""
    return _alike(subject, claim, lambda other: [m for seen in _observed(other, trees) for m in seen.moves])


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


def _hyperparameters(seen: list[Seen], claim: Claim) -> Iterator[tuple[str, float]]:
    """Yield other values of one hyperparameter with which the moves agree up to a factor, and it."""
    for field in fields(claim):
        value = getattr(claim, field.name)
        for place in range(len(value)) if isinstance(value, tuple) else [None]:
            name = field.name if place is None else f"{field.name}[{place}]"

            def change(to: Any, field: Any = field, value: Any = value, place: int | None = place) -> Claim:
                whole = to if place is None else (*value[:place], to, *value[place + 1 :])
                return replace(claim, **{field.name: whole})

            for candidate in _candidates(seen, claim, field.name, value, place, change):
                try:
                    ratio = _ratio(seen, _expected(seen, change(candidate)))
                except Exception:  # the value may be out of range
                    continue
                if ratio:
                    shown = _plain(candidate) if type(candidate) is float else repr(candidate)
                    yield f"agrees with {name} = {shown}", ratio


def _candidates(
    seen: list[Seen],
    claim: Claim,
    field: str,
    value: Any,
    place: int | None,
    change: Callable[[Any], Claim],
) -> list[Any]:
    """List the values that a hyperparameter might have instead."""
    number = value if place is None else value[place]
    if isinstance(number, bool):
        return [not number]
    if field in claim.choices:
        return [choice for choice in claim.choices[field] if choice != number]
    if not isinstance(number, float):
        return []
    others = [v for v in value if v != number] if isinstance(value, tuple) else []
    common = [0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0, 1e-3, 1e-6, 1e-8, 1e-10, 1e-16]
    near = [1 - number, number**2, number**0.5, number / 2, 2 * number]
    return [*others, *near, *common, *_fitted(seen, change)]


def _fitted(seen: list[Seen], change: Callable[[Any], Claim]) -> list[float]:
    """Return the number between 0 and 1 that fits the first feed best, to six digits."""

    def residual(value: float) -> float:
        try:
            moves = _expected(seen[:1], change(value))[0]
        except Exception:  # the value may be out of range
            return np.inf
        return float(sum(np.abs(a - b).sum() for a, b in zip(seen[0].moves, moves, strict=True)))

    low, high = 0.0, 1.0
    for _ in range(7):
        grid = np.linspace(low, high, 17)
        best = int(np.argmin(np.nan_to_num([residual(value) for value in grid], nan=np.inf)))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 16)]
    return [round(float((low + high) / 2), 6)]


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
