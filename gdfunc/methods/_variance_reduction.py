"""Steps for a finite sum, whose gradient estimates lose their variance on the way to the minimum.

They must know which samples are in a mini-batch. So the data belong to the step, and its batches are row
numbers: `train(step, init, torch.arange(n), index, lr)`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._data import as_data
from .._errors import check_choice, check_int
from .._gradients import LossFn, batch_grad, per_sample_grad
from .._inputs import check_batch, check_params
from .._numerics import Scalar
from .._sampling import take
from .._scan import scan
from .._stateful import Bound
from .._step import Step, apply_updates, copy_params, scalar, step_maker
from .._tree import Tree


@step_maker
def svrg(loss_fn: LossFn, data: Tree, *, batch_size: int = 1, output: str = "last") -> Step:
    """Make the step of SVRG, a pass of mini-batch descent that a full gradient at its start corrects.

    w = θ;  for every mini-batch b:  w ← w − lr·v  with v = ∇L(w, b) − ∇L(θ, b) + ∇L(θ, data);  θ' = w

    v is the full gradient in the mean, and both differences in it vanish at the minimum. A step of m
    mini-batches takes n + 2·m·B gradients of samples. With all samples in every mini-batch it is m steps
    of gradient descent.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        data: tree of tensors or NumPy arrays [n, ...].
        batch_size: B, an int >= 1.
        output: what θ' is: the `"last"` w, or the `"average"` of the w's at which gradients were taken,
            for which there is a theorem.

    Returns:
        A `Step`, `step(params, rows, lr) -> (params, loss)`. The rows int64 [m·B] are the numbers of the
        samples, one mini-batch after the other. The loss is that of the old parameters over all of the
        data. A plan of mini-batches becomes a plan of passes by `reshape(T, m·B)`.

    Raises:
        ValueError: batch_size or output is out of range; (in the step) the rows are not a whole number of
            mini-batches; as `make_step`.
        TypeError: (in the step) the batch is not row numbers; as `make_step`.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> data = x, torch.tensor([3.0, 5.0, 10.0])
        >>> step = gd.methods.svrg(lambda w, batch: ((batch[0] * w - batch[1]) ** 2).mean(), data)
        >>> index = gd.sample_batches(gd.random.key(0), n=3, batch_size=1, steps=60).reshape(10, 6)
        >>> w, trajectory = gd.train(step, torch.tensor(0.0), torch.arange(3), index, 0.03)
        >>> w, (x @ data[1]) / (x @ x)
        (tensor(3.0714), tensor(3.0714))

    References:
        R. Johnson, T. Zhang, "Accelerating stochastic gradient descent using predictive variance
        reduction", 2013.
    """
    return _pass_step(loss_fn, data, batch_size, output, recursive=False)


@step_maker
def sarah(loss_fn: LossFn, data: Tree, *, batch_size: int = 1, output: str = "last") -> Step:
    """Make the step of SARAH, a pass of mini-batch descent that updates its estimate of the gradient.

    v = ∇L(θ, data);  w' = θ;  w = θ − lr·v
    for every mini-batch b:  v ← ∇L(w, b) − ∇L(w', b) + v;  w' ← w;  w ← w − lr·v;  θ' = w

    v follows the full gradient with a bias. Unlike that of SVRG, it goes to zero within a pass. A step of
    m mini-batches takes n + 2·m·B gradients of samples. With all samples in every mini-batch it is m + 1
    steps of gradient descent.

    Args:
        loss_fn: `(params, batch) -> loss`; see `batch_grad`.
        data: tree of tensors or NumPy arrays [n, ...].
        batch_size: B, an int >= 1.
        output: what θ' is: the `"last"` w, or the `"average"` of the w's at which gradients were taken.

    Returns:
        A `Step`, as that of `svrg`.

    Raises:
        ValueError, TypeError: as `svrg`.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> data = x, torch.tensor([3.0, 5.0, 10.0])
        >>> step = gd.methods.sarah(lambda w, batch: ((batch[0] * w - batch[1]) ** 2).mean(), data)
        >>> index = gd.sample_batches(gd.random.key(0), n=3, batch_size=1, steps=60).reshape(10, 6)
        >>> w, trajectory = gd.train(step, torch.tensor(0.0), torch.arange(3), index, 0.03)
        >>> w, (x @ data[1]) / (x @ x)
        (tensor(3.0714), tensor(3.0714))

    References:
        L. M. Nguyen et al., "SARAH: a novel method for machine learning problems using stochastic
        recursive gradient", 2017.
    """
    return _pass_step(loss_fn, data, batch_size, output, recursive=True)


def _pass_step(loss_fn: LossFn, data: Tree, batch_size: int, output: str, recursive: bool) -> Step:
    """Make a step of many inner steps, compared with its start, or if recursive each with the last."""
    batch_size = check_int("batch_size", batch_size, 1)
    averaged = check_choice("output", output, ("last", "average")) == "average"
    _check_sum(loss_fn)
    gradients = batch_grad(loss_fn)
    data = as_data(data, "data")

    def advance(params: Tree, rows: Tensor, lr: Scalar) -> tuple[Tree, Tensor, Tree]:
        _samples(data, params)
        batches = _check_rows(rows, batch_size).unflatten(0, (-1, batch_size))
        grads, loss = gradients(params, data)

        def inner(carry: tuple[Tree, ...], x: tuple[Tensor, Tensor]) -> tuple[tuple[Tree, ...], None]:
            w, before, estimate, average = carry
            batch = take(data, x[0])
            here, there = gradients(w, batch)[0], gradients(before, batch)[0]
            v = _tree.map(lambda g, old, e: g - old + e, here, there, estimate)
            average = _tree.lerp(average, w, x[1]) if averaged else None
            before, estimate = (w, v) if recursive else (before, estimate)
            return (apply_updates(w, v, lr), before, estimate, average), None

        # The number of points so far, the average among them; SARAH has been at θ already.
        count = torch.arange(1, len(batches) + 1, device=rows.device) + recursive
        start = apply_updates(params, grads, lr) if recursive else params
        first = start, params, grads, params if averaged else None
        (w, _, _, average), _ = scan(inner, first, (batches, 1 / scalar(count, params)))
        return average if averaged else w, loss, grads

    return Step(copy_params, advance)


class SAGState(NamedTuple):
    """Parameters, and the gradient that every sample had when it was last visited."""

    params: Tree
    table: Tree  # leaves [n, ...]
    mean: Tree  # of the table


@step_maker
def sag(loss_fn: LossFn, data: Tree, *, chunk_size: int | None = None) -> Step:
    """Make the step of SAG, which goes along the mean of the last gradient of every sample.

    tᵢ ← ∇L(θ, {sample i}) for every sample i of the mini-batch;  θ' = θ − lr·1/n Σⱼ tⱼ

    The direction is biased towards the past. A step takes B gradients of samples; with all of them in
    every mini-batch it is gradient descent. The table holds n times the parameters.

    Args:
        loss_fn: `(params, batch) -> loss`, the mean over the batch; see `per_sample_grad`.
        data: tree of tensors or NumPy arrays [n, ...].
        chunk_size: how many samples to differentiate at once, also where `init` goes over all of them;
            None: all.

    Returns:
        A `Step`, `step(state, rows, lr) -> (state, loss)`, where rows int64 [B] are the numbers of the
        samples. `step.init(params)` takes n gradients. The fields of the state are `params`, `table`
        [n, ...] and `mean`, that of the table. The loss is that of the mini-batch.

    Raises:
        ValueError: chunk_size is out of range; the table is for another number of samples; as `make_step`.
        TypeError: (in the step) the state is that of another step, or the batch is not row numbers.

    Example:
        >>> data = torch.tensor([1.0, 2.0, 6.0])
        >>> step = gd.methods.sag(lambda w, y: 0.5 * ((w - y) ** 2).mean(), data)
        >>> state, loss = step(step.init(torch.tensor(0.0)), torch.tensor([2]), 1.0)
        >>> state.params, state.table
        (tensor(3.), tensor([-1., -2., -6.]))
        >>> index = gd.sample_batches(gd.random.key(0), n=3, batch_size=1, steps=60)
        >>> gd.train(step, state, torch.arange(3), index, 0.5)[0].params
        tensor(3.0000)

    References:
        M. Schmidt, N. Le Roux, F. Bach, "Minimizing finite sums with the stochastic average gradient",
        2017.
    """
    return _table_step(loss_fn, data, chunk_size, biased=True)


@step_maker
def saga(loss_fn: LossFn, data: Tree, *, chunk_size: int | None = None) -> Step:
    """Make the step of SAGA, which corrects a gradient by the last one of its samples.

    θ' = θ − lr·v  with v = 1/B Σᵢ (gᵢ − tᵢ) + 1/n Σⱼ tⱼ and gᵢ = ∇L(θ, {sample i});  tᵢ ← gᵢ

    v is the full gradient in the mean, and gᵢ − tᵢ vanishes at the minimum. A step takes B gradients of
    samples; with all of them in every mini-batch it is gradient descent. The table holds n times the
    parameters. A sample that a mini-batch holds twice counts twice in v and once in the table.

    Args:
        loss_fn: `(params, batch) -> loss`, the mean over the batch; see `per_sample_grad`.
        data: tree of tensors or NumPy arrays [n, ...].
        chunk_size: as in `sag`.

    Returns:
        A `Step`, as that of `sag`.

    Raises:
        ValueError, TypeError: as `sag`.

    Example:
        >>> data = torch.tensor([1.0, 2.0, 6.0])
        >>> step = gd.methods.saga(lambda w, y: 0.5 * ((w - y) ** 2).mean(), data)
        >>> state, loss = step(step.init(torch.tensor(0.0)), torch.tensor([2]), 0.5)
        >>> state.params, state.table
        (tensor(1.5000), tensor([-1., -2., -6.]))
        >>> index = gd.sample_batches(gd.random.key(0), n=3, batch_size=1, steps=60)
        >>> gd.train(step, state, torch.arange(3), index, 0.5)[0].params
        tensor(3.0000)

    References:
        A. Defazio, F. Bach, S. Lacoste-Julien, "SAGA: a fast incremental gradient method with support for
        non-strongly convex composite objectives", 2014.
    """
    return _table_step(loss_fn, data, chunk_size, biased=False)


def _table_step(loss_fn: LossFn, data: Tree, chunk_size: int | None, biased: bool) -> Step:
    """Make a step with a table of gradients: along its new mean if biased, else corrected by the old."""
    _check_sum(loss_fn)
    gradients = per_sample_grad(loss_fn, chunk_size=chunk_size)
    data = as_data(data, "data")

    def init(params: Tree) -> SAGState:
        params = copy_params(params)
        _samples(data, params)
        table, _ = gradients(params, data)
        return SAGState(params, table, _mean(table))

    def advance(state: SAGState, rows: Tensor, lr: Scalar) -> tuple[SAGState, Tensor, Tree]:
        params, table, mean = state
        n = _samples(data, params, table)
        grads, losses = gradients(params, take(data, _check_rows(rows)))
        change = _tree.map(lambda g, t: g - t[rows], grads, table)
        # A sample is replaced where it first stands in the batch. Elsewhere zero is added, so that the
        # result does not depend on the order in which a GPU adds.
        again = (rows[:, None] == rows).tril(-1).any(1)
        fresh = _tree.map(lambda c: c.masked_fill(again.view(-1, *[1] * (c.ndim - 1)), 0), change)
        new_mean = _tree.map(lambda m, c: m + c.sum(0) / n, mean, fresh)
        direction = new_mean if biased else _tree.map(lambda c, m: c.mean(0) + m, change, mean)
        table = _tree.map(lambda t, c: t.index_add(0, rows, c), table, fresh)
        return SAGState(apply_updates(params, direction, lr), table, new_mean), losses.mean(), _mean(grads)

    return Step(init, advance, SAGState)


def _check_sum(loss_fn: LossFn) -> None:
    """Refuse a loss with state."""
    if isinstance(loss_fn, Bound):
        raise TypeError(
            "loss_fn is made by gd.stateful, but this method is for a finite sum, in which the loss of a "
            "sample depends on params alone; pass a loss (params, batch), or use make_step"
        )


def _mean(tree: Tree) -> Tree:
    return _tree.map(lambda leaf: leaf.mean(0), tree)


def _samples(data: Tree, params: Tree, table: Tree = None) -> int:
    """Count the samples in data; they must fit the parameters, and the table if there is one."""
    n = check_batch(data, check_params(params), params, "data")
    if n is None:
        raise ValueError("data has no leaves, so there are no samples; pass tensors [n, ...]")
    for path, leaf in _tree.named_leaves(table, "state.table"):
        if len(leaf) != n:
            raise ValueError(
                f"{path} has {len(leaf)} rows but data has {n} samples; "
                f"make the state with step.init(params)"
            )
    return n


def _check_rows(rows: Tensor, batch_size: int = 1) -> Tensor:
    """Return row numbers, which must be a whole number of mini-batches."""
    is_tensor = isinstance(rows, Tensor)
    if not is_tensor or rows.dtype != torch.int64 or rows.ndim != 1 or not len(rows):
        got = f"{rows.dtype} {tuple(rows.shape)}" if is_tensor else type(rows).__name__
        raise TypeError(
            f"batch must be row numbers, int64 [B]; got {got}. The data belong to the step: give train "
            f"torch.arange(n) in their place"
        )
    if len(rows) % batch_size:
        raise ValueError(
            f"{len(rows)} row numbers are not a whole number of mini-batches of batch_size {batch_size}; "
            f"reshape the plan to [T, m·{batch_size}]"
        )
    return rows
