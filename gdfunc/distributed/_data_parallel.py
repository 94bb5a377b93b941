"""Losses whose samples the ranks share out: each evaluates its rows of a batch, and sums are over all."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .. import _tree
from .._gradients import LossFn, SharedLoss, check_loss_fn, evaluated_loss, unchecked_grad
from .._shown import shown
from .._stateful import Evaluated, Stateful, loss_of
from .._tree import Tree
from ._gather import agree, forms
from ._group import check_group, check_ranks, rank, world_size
from ._norms import SharedNorms
from ._sums import check_backend, replicated, total


def data_parallel(loss_fn: Any) -> Any:
    """Share the samples of every batch out among the ranks, and sum over them.

    L(θ, batch) = Σ_r B_r/B · loss_fn(θ, batch_r),  and so its gradient; batch_r are the rows of rank r

    The result is a loss for `make_step` and every method, with state or without. All ranks call `train`
    with the same arguments, the whole plan included. Rank r of W takes the rows ⌊rB/W⌋ … ⌊(r+1)B/W⌋ − 1 of
    each batch, so B need not be a multiple of W. A gradient costs one sum over the ranks, of P + 1 numbers.
    The parameters are those of one process, up to rounding, and have the same bits on every rank.

        # torchrun --nproc-per-node 2 script.py
        torch.distributed.init_process_group("gloo")
        step = gd.make_step(gd.distributed.data_parallel(loss_fn), gd.adam())
        final, trajectory = gd.train(step, step.init(params), data, index, lr)
        torch.distributed.destroy_process_group()

    Keys of dropout belong to rows of the whole batch, and a private step draws its noise once. A loss with
    buffers gives all ranks B_r/B-weighted means of their new values, counters included. Batch normalisation
    takes its statistics from the whole batch, at two more sums a layer; in training mode it is refused by
    name inside `grad`, `jvp` and `vmap` of a whole run. A plain function around such a step counts as each
    rank's own step: its ranks are not compared, and each writes `checkpoint_to=`. Methods around it do not.

    Args:
        loss_fn: as in `batch_grad`, or from `stateful`: a mean over the batch. A loss without data is the
            same on every rank.

    Returns:
        The loss of all ranks, with its `grad`, `jvp` and `vmap`. Tensors that it closes over and that are
        differentiated need `replicated`.

    Raises:
        TypeError: loss_fn is no loss.
        RankError: torchrun started this process, but there is no process group; (in the step) a rank has
            ended, or has other parameters or batches.
        GdfuncError: (in the step) a derivative would be that of one rank alone.

    Example:
        >>> loss_fn = gd.distributed.data_parallel(lambda w, x: (w * x).square().mean())
        >>> gd.make_step(loss_fn)(torch.tensor(1.0), torch.tensor([1.0, 3.0]), 0.05)
        (tensor(0.5000), tensor(5.))

    References:
        J. Dean et al., "Large scale distributed deep networks", 2012.
        S. Li et al., "PyTorch distributed: experiences on accelerating data parallel training", 2020.
    """
    check_group("data_parallel")
    if isinstance(loss_fn, Stateful):
        return DataParallelStateful(loss_fn.loss_fn, world_size())
    check_loss_fn(loss_fn)
    return DataParallel(loss_fn, world_size(), set())


@dataclass(frozen=True, repr=False)
class DataParallelStateful(Stateful):
    """A loss with state, whose samples the ranks share out; the attributes are those of `DataParallel`."""

    ranks: int
    agreed: set[Any] = field(default_factory=set, compare=False)

    def __repr__(self) -> str:
        return f"data_parallel({super().__repr__()})"

    def bound(self, buffers: Tree) -> LossFn:
        return DataParallel(Stateful(self.loss_fn), self.ranks, self.agreed, buffers)


@dataclass(frozen=True, repr=False)
class DataParallel(SharedLoss):
    """A loss whose samples the ranks share out.

    Attributes:
        loss_fn: of the samples of one rank.
        ranks: how many there are.
        agreed: forms of params and batches that the ranks have found to be the same.
        buffers: those of a loss with state.
    """

    loss_fn: Any
    ranks: int
    agreed: set[Any] = field(compare=False)
    buffers: Tree = None

    def __repr__(self) -> str:
        return f"data_parallel({shown(self.loss_fn)})"

    def __call__(self, params: Tree, batch: Tree) -> Any:
        if self._is_alone():
            return self._bound(self.buffers)(params, batch)
        loss_fn, part, params, buffers, weight = self._enter(batch, params)
        return self._whole((), loss_fn(params, part), buffers, weight)[1]

    def gradients(self, params: Tree, batch: Tree) -> tuple[Tree, Any]:
        if self._is_alone():
            return unchecked_grad(self._bound(self.buffers))(params, batch)
        loss_fn, part, params, buffers, weight = self._enter(batch, params)
        return self._whole(*unchecked_grad(loss_fn)(params, part), buffers, weight)

    def sums(self, of_part: Callable[..., Tree], batch: Tree, *given: Tree) -> Tree:
        if self._is_alone():
            return of_part(self._bound(self.buffers), batch, *given)
        self._agree(given, batch)
        batch, given, buffers = replicated((batch, given, self.buffers))
        first, last, _ = _rows(batch)
        return total(of_part(self._bound(buffers), _slice(batch, first, last), *given))

    def _is_alone(self) -> bool:
        """Tell whether there is one rank."""
        check_ranks(self.ranks)
        return self.ranks == 1

    def _bound(self, buffers: Tree) -> LossFn:
        return self.loss_fn.bound(buffers) if isinstance(self.loss_fn, Stateful) else self.loss_fn

    def _enter(self, batch: Tree, params: Tree) -> tuple[LossFn, Tree, Tree, Tree, float]:
        """Make the loss of this rank's part of a batch, times its share of the samples, and its inputs."""
        self._agree(params, batch)
        batch, params, buffers = replicated((batch, params, self.buffers))
        first, last, size = _rows(batch)
        weight = 1 / self.ranks if size is None else (last - first) / size
        of_part = evaluated_loss(self._bound(buffers))
        last = max(last, first + 1)  # a rank without samples evaluates one of another's, with weight zero
        norms = SharedNorms(size or 1, last - first, weight)

        def weighted(params: Tree, part: Tree) -> Any:
            with norms:
                value = of_part(params, part)
            return value._replace(loss=value.loss * weight)

        return weighted, _slice(batch, first, last), params, buffers, weight

    def _whole(self, grads: Tree, value: Any, buffers: Tree, weight: float) -> tuple[Tree, Any]:
        """Sum gradients and losses over the ranks, and average the moves of buffers that have changed."""
        if not isinstance(value, Evaluated) or not value.buffers:
            return total((grads, loss_of(value)))
        before, after, given = _tree.leaves(buffers), [*value.buffers], _tree.leaves(self.buffers)
        changed = [i for i, leaf in enumerate(after) if leaf is not before[i]]
        floats = [i for i in changed if after[i].is_floating_point()]
        counts = [i for i in changed if i not in floats]
        moves = [(after[i] - before[i]) * weight for i in floats]
        grads, loss, moves = total((grads, value.loss, moves))
        # In float64 the mean of equal whole numbers is that number.
        jumps = total([(after[i].long() - before[i].long()).double() * weight for i in counts])
        after = [*given]
        for i, move in zip(floats, moves, strict=True):
            after[i] = given[i] + move
        for i, jump in zip(counts, jumps, strict=True):
            after[i] = (given[i].long() + jump.round().long()).to(given[i].dtype)
        return grads, Evaluated(loss, after)

    def _agree(self, params: Tree, batch: Tree) -> None:
        """Compare the form of what this rank is given with that of the others, the first time."""
        check_backend()
        form = tuple([shown(leaf) for leaf in _tree.leaves((params, batch))])
        if form not in self.agreed:
            agree(forms(params, "params") + forms(batch, "batch"), "the shapes of params and batch")
            self.agreed.add(form)


def _rows(batch: Tree) -> tuple[int, int, int | None]:
    """Find the rows of this rank, first … last − 1 of how many; None for a loss without data."""
    size = next((len(leaf) for leaf in _tree.leaves(batch)), None)
    count = world_size() if size is None else size
    return rank() * count // world_size(), (rank() + 1) * count // world_size(), size


def _slice(batch: Tree, first: int, last: int) -> Tree:
    return _tree.map(lambda leaf: leaf[first:last], batch)
