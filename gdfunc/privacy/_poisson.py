"""Poisson batches: every sample has the same chance to be in them, and their shape is static."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _tree, random
from .._data import as_data
from .._errors import check_int, check_scalar, check_type
from .._sampling import _as_range
from .._torch._autograd import is_readable
from .._torch._transforms import is_transformed
from .._tree import Tree

_NEVER = 1e-12  # the chance that we take for none


@dataclass(frozen=True)
class PoissonPlan:
    """Which samples, when, and with which chance; see `poisson_batches`.

    Attributes:
        index: int64 [T, max_batch]; n, one past the last sample, stands for nobody.
        rate: the chance of every sample to be in a batch.
        n: of how many samples.

    Example:
        >>> gd.privacy.poisson_batches(gd.random.key(0), n=4, rate=0.5, steps=2).rate
        0.5
    """

    index: Tensor
    rate: float
    n: int


def poisson_batches(
    key: Tensor, n: int, rate: float, steps: int | range, *, max_batch: int | None = None
) -> PoissonPlan:
    """Plan batches that every sample enters with the same chance, independently of all others.

    i ∈ batch t  with probability q, for every i and t

    Batches differ in size, and may be empty: what is left of a row is filled up with n, which stands for
    nobody. Train on `pad(data, plan)`, which has a place for nobody. Step t is drawn from `fold_in(key, t)`
    alone, so a range of steps gives those rows of the whole plan.

    Args:
        key: int64 [2].
        n: number of samples.
        rate: q in (0, 1]; the chance is a multiple of 2⁻⁵².
        steps: how many, or a range of which.
        max_batch: how many samples a row holds; None: so many that the chance of more is below 1e-12 a
            step, by Chernoff's bound.

    Returns:
        The `PoissonPlan`.

    Raises:
        ValueError: an argument is out of range; a batch has more than max_batch samples. Under vmap, where
            that cannot be seen, the last ones of such a batch are left out, which adds the chance that it
            happens to δ. So they are on a GPU without max_batch, where the chance is 1e-12 a step and the
            sizes are not read.

    Example:
        >>> gd.privacy.poisson_batches(gd.random.key(0), n=4, rate=0.5, steps=3, max_batch=4).index
        tensor([[1, 4, 4, 4],
                [0, 4, 4, 4],
                [2, 3, 4, 4]])

    References:
        M. Abadi et al., "Deep learning with differential privacy", 2016.
    """
    random._check_key(key)
    n = check_int("n", n, 1)
    if isinstance(rate, Tensor):
        raise ValueError(f"rate must be a number in (0, 1], for the accountant to know it; got {rate}")
    rate = check_scalar("rate", rate, "(0, 1]")
    width = _ample(n, rate) if max_batch is None else check_int("max_batch", max_batch, 1)
    steps = _as_range("steps", steps)
    if not steps:
        return PoissonPlan(torch.empty((0, width), dtype=torch.int64, device=key.device), rate, n)

    def draw(step: Tensor) -> tuple[Tensor, Tensor]:
        chosen = random.uniform(random.fold_in(key, step), (n,), torch.float64) < rate
        place = chosen.cumsum(0) - 1
        # The last place is for the samples that were not chosen.
        place = torch.where(chosen & (place < width), place, width)
        row = torch.full((width + 1,), n, device=key.device)
        return row.scatter(0, place, torch.arange(n, device=key.device))[:width], chosen.sum()

    counts = torch.arange(steps.start, steps.stop, device=key.device)
    index, sizes = torch.func.vmap(draw, chunk_size=max(1, 2**20 // n))(counts)
    asked = max_batch is not None and not is_transformed(sizes)
    if (asked or is_readable(sizes)) and int(sizes.max()) > width:
        late = int(sizes.argmax())
        raise ValueError(
            f"the batch of step {steps[late]} has {int(sizes[late])} samples, over max_batch = {width}; "
            f"raise max_batch (drawing with other keys until all fit is no longer Poisson sampling)"
        )
    return PoissonPlan(index, rate, n)


def history(plan: PoissonPlan, noise_multiplier: float) -> list[tuple[float, float, int]]:
    """Tell an accountant what a run on a Poisson plan did: noise, sampling rate, steps.

    gdfunc computes no ε itself. Set it as the `history` of one of Opacus' accountants; dp-accounting
    composes `PoissonSampledDpEvent(rate, GaussianDpEvent(noise_multiplier))` with itself, `steps` times.
    Neighbours differ by one sample more or less.

    Args:
        plan: from `poisson_batches`, all of whose steps were taken, or fewer.
        noise_multiplier: of the step, a number.

    Returns:
        `[(noise_multiplier, rate, steps)]`.

    Raises:
        TypeError: the plan is not a `PoissonPlan`: the guarantee does not hold for shuffled batches.
        ValueError: the noise multiplier is no positive number.

    Example:
        >>> plan = gd.privacy.poisson_batches(gd.random.key(0), n=50, rate=0.04, steps=10)
        >>> gd.privacy.history(plan, noise_multiplier=1.5)
        [(1.5, 0.04, 10)]

    References:
        I. Mironov, K. Talwar, L. Zhang, "Rényi differential privacy of the sampled Gaussian mechanism",
        2019.
    """
    remedy = "accountants bound Poisson sampling, not shuffled or hand-made batches: use poisson_batches"
    check_type("plan", plan, PoissonPlan, remedy)
    if isinstance(noise_multiplier, Tensor):
        raise ValueError(
            f"noise_multiplier must be a number, for an accountant to read; got {noise_multiplier}"
        )
    return [(check_scalar("noise_multiplier", noise_multiplier, "(0, inf)"), plan.rate, len(plan.index))]


class Padded(NamedTuple):
    """Samples of which some stand for nobody; see `pad`.

    Attributes:
        samples: tree of tensors [n, ...].
        real: bool [n], False for nobody, whatever stands there.

    Example:
        >>> gd.take(gd.privacy.pad(torch.tensor([5.0, 7.0])), torch.tensor([1, 2]))
        Padded(samples=tensor([7., 5.]), real=tensor([ True, False]))
    """

    samples: Tree
    real: Tensor

    def map_samples(self, f: Callable[[Tree], Tree]) -> "Padded":
        """Apply a function to the samples."""
        return self._replace(samples=f(self.samples))


def pad(data: Tree, plan: PoissonPlan | None = None) -> Padded:
    """Give data a place for nobody: entry n, to which a Poisson plan points.

    Args:
        data: tree of tensors or NumPy arrays [n, ...].
        plan: what is to be trained on it; checked to be of as many samples, or else a real one would stand
            for nobody, and no accountant's bound hold.

    Returns:
        `Padded`, of n + 1 entries. Nobody looks like sample 0, and adds nothing.

    Raises:
        ValueError: the data is empty, ragged, without leaves, or padded already; the plan has another n.

    Example:
        >>> gd.privacy.pad(torch.tensor([5.0, 7.0]))
        Padded(samples=tensor([5., 7., 5.]), real=tensor([ True,  True, False]))
    """
    if isinstance(data, Padded):
        raise ValueError("data is padded already: nobody would become a sample; pad the data itself")
    data = as_data(data, "data")
    leaves = _tree.named_leaves(data, "data")
    sizes = {path: len(leaf) if leaf.ndim else 0 for path, leaf in leaves}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(f"data must have leaves [n, ...] with one n of at least 1; got {sizes}")
    if plan is not None and plan.n != len(leaves[0][1]):
        raise ValueError(f"plan is of {plan.n} samples, but data has {len(leaves[0][1])}; plan with that n")
    real = torch.arange(len(leaves[0][1]) + 1, device=leaves[0][1].device) < len(leaves[0][1])
    return Padded(_tree.map(lambda leaf: torch.cat([leaf, leaf[:1]]), data), real)


def _ample(n: int, rate: float) -> int:
    """Find the smallest B for which Chernoff's bound on P(more than B of n) is 1e-12 or less."""

    def log_bound(count: int) -> float:
        share = count / n
        rest = (1 - share) * math.log((1 - share) / (1 - rate)) if count < n else 0.0
        return -n * (share * math.log(share / rate) + rest)

    size = max(1, math.ceil(n * rate))
    while size < n and log_bound(size + 1) > math.log(_NEVER):
        size += 1
    return size
