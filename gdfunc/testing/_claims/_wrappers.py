"""Claims made of other claims. Directions compose: the inner claim's are the gradients of the outer one."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ._base import Arrays, Claim, join
from ._linear import GradientDescent

_PLAIN = GradientDescent()


@dataclass(frozen=True)
class Chain(Claim):
    """u = uₖ(… u₂(u₁(g))): claims one after the other, the first one of the gradient.

    Attributes:
        claims: any number.
    """

    family: ClassVar[str] = "chain"
    formula: ClassVar[str] = "u = u_k(.. u_2(u_1(g)))"

    claims: tuple[Claim, ...]

    def __init__(self, *claims: Claim) -> None:
        object.__setattr__(self, "claims", claims)
        strangers = [claim for claim in claims if not isinstance(claim, Claim)]
        if strangers:
            raise TypeError(f"Chain takes claims, such as gt.Adam(); got {strangers[0]!r}")

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.claims))})"

    def own_feeds(self) -> dict[str, Arrays]:
        return {name: feed for claim in self.claims for name, feed in claim.own_feeds().items()}

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        *firsts, last = self.claims or (GradientDescent(),)
        return last.moves(Chain(*firsts).directions(grads, points), points, lrs)

    def directions(self, grads: Arrays, points: Arrays) -> Arrays:
        for claim in self.claims:
            grads = claim.directions(grads, points)
        return grads


@dataclass(frozen=True)
class WeightDecay(Claim):
    """u = then(g + λ·θ): a penalty that the rest transforms as part of the gradient.

    Decoupled decay, as AdamW's, is `Chain(then, WeightDecay(rate))`.

    Attributes:
        rate: λ.
        then: the claim that follows; by default gradient descent.
    """

    family: ClassVar[str] = "weight decay"
    formula: ClassVar[str] = "u = then(g + lambda x)"
    source: ClassVar[str] = "I. Loshchilov, F. Hutter 2019"

    rate: float
    then: Claim = _PLAIN

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        return self.then.moves(self._decayed(grads, points), points, lrs)

    def directions(self, grads: Arrays, points: Arrays) -> Arrays:
        return self.then.directions(self._decayed(grads, points), points)

    def _decayed(self, grads: Arrays, points: Arrays) -> Arrays:
        return [g + self.rate * x for g, x in zip(grads, points, strict=True)]


@dataclass(frozen=True)
class Partition(Claim):
    """Groups of leaves with a claim each. Each claim sees its own leaves alone.

    Attributes:
        claims: one per group.
        labels: the group of each leaf, in the order of the tree. A shorter tree takes the first labels.
    """

    family: ClassVar[str] = "partition"
    formula: ClassVar[str] = "each group of leaves keeps its own claim"

    claims: tuple[Claim, ...]
    labels: tuple[int, ...] = (0, 1, 1)

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        return self._split(lambda claim, *group: claim.moves(*group, lrs), grads, points)

    def directions(self, grads: Arrays, points: Arrays) -> Arrays:
        return self._split(lambda claim, *group: claim.directions(*group), grads, points)

    def _split(self, rule: object, grads: Arrays, points: Arrays) -> Arrays:
        labels = self.labels[: len(grads)]
        if len(labels) < len(grads) or any(label not in range(len(self.claims)) for label in labels):
            raise ValueError(
                f"a law tries {len(grads)} leaves, and each needs the number of one of the "
                f"{len(self.claims)} claims; got {self.labels!r}"
            )
        result: dict[int, np.ndarray] = {}
        for label, claim in enumerate(self.claims):
            places = [i for i, own in enumerate(labels) if own == label]
            if places:
                found = rule(claim, [grads[i] for i in places], [points[i] for i in places])  # type: ignore[operator]
                result.update(zip(places, found, strict=True))
        return [result[i] for i in range(len(grads))]


@dataclass(frozen=True)
class Masked(Claim):
    """A claim for some leaves; the gradients of the others pass as they are.

    Attributes:
        inner: the claim.
        mask: True for its leaves, in the order of the tree. A shorter tree takes the first entries.
    """

    family: ClassVar[str] = "masked"
    formula: ClassVar[str] = "u = inner(g) where the mask is True, else g"

    inner: Claim
    mask: tuple[bool, ...] = (False, True, True)

    def moves(self, grads: Arrays, points: Arrays, lrs: np.ndarray) -> Arrays:
        return self._parts().moves(grads, points, lrs)

    def directions(self, grads: Arrays, points: Arrays) -> Arrays:
        return self._parts().directions(grads, points)

    def _parts(self) -> Partition:
        return Partition((GradientDescent(), self.inner), tuple(map(int, self.mask)))


@dataclass(frozen=True)
class Accumulate(Claim):
    """u = inner((g₁ + … + gₖ)/k) in every k-th step, else 0.

    Attributes:
        inner: the claim about the means.
        steps: k.
    """

    family: ClassVar[str] = "accumulate"
    formula: ClassVar[str] = "u = inner(mean of k gradients) in every k-th step, else 0"
    counts: ClassVar[tuple[str, ...]] = ("steps",)

    inner: Claim = _PLAIN
    steps: int = 2

    def directions(self, grads: Arrays, points: Arrays) -> Arrays:
        k, count = self.steps, len(grads[0]) // self.steps
        ends = np.arange(k - 1, count * k, k)
        means = [g[: count * k].reshape(count, k, *g.shape[1:]).mean(1) for g in grads]
        return _at(ends, self.inner, means, grads, points)


@dataclass(frozen=True)
class ApplyIfFinite(Claim):
    """u = inner(g) if all of g is finite, else 0, and the inner claim never sees that step.

    Attributes:
        inner: the claim about the finite steps.
    """

    family: ClassVar[str] = "apply if finite"
    formula: ClassVar[str] = "u = inner(g) where all leaves of g are finite, else 0"

    inner: Claim = _PLAIN

    def own_feeds(self) -> dict[str, Arrays]:
        """Return gradients with NaN or infinity in one leaf at a time."""
        a, b = (np.random.default_rng(1).standard_normal((12, *shape)) for shape in ((3,), ()))
        infinite = a.copy(), b.copy()
        a[2, 1], b[6], a[7] = np.nan, np.nan, np.nan
        infinite[0][3, 0], infinite[1][5] = np.inf, -np.inf
        return {"NaN": [a, b], "infinite": list(infinite)}

    def directions(self, grads: Arrays, points: Arrays) -> Arrays:
        kept = np.flatnonzero(np.isfinite(join(grads)).all(1))
        return _at(kept, self.inner, [g[kept] for g in grads], grads, points)


def _at(steps: np.ndarray, inner: Claim, seen: Arrays, grads: Arrays, points: Arrays) -> Arrays:
    """Return the inner directions at some steps, and zeros at the others."""
    result = [np.zeros_like(g) for g in grads]
    if len(steps):
        for u, found in zip(result, inner.directions(seen, [x[steps] for x in points]), strict=True):
            u[steps] = found
    return result
