"""Reductions of per-sample gradients: folded chunk by chunk, never [B, P]."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from .. import _tree
from .._errors import check_choice, check_options
from .._gradients import GradFn, LossFn, apart, available, check_loss_fn, sample_bytes
from .._inputs import check_samples
from .._per_sample import PerSample, Reducer
from .._tree import Tree
from ._program import Uses, tapped

_AT_ONCE = 2**26  # bytes: larger chunks leave the caches, and are no faster


def reduce_per_sample(
    loss_fn: LossFn,
    reducers: Tree,
    *,
    chunk_size: int | str | None = "auto",
    randomness: str = "error",
    memory_limit: int | None = None,
) -> GradFn:
    """Turn a loss into the function that reduces the gradients of all samples, and gives their losses.

    result = finish(add(… add(init(θ), g₁ … gₖ) …)),  gᵢ = ∇θ L(θ, {sample i})

    The gradients [B, ...] of `per_sample_grad` are never stored: chunks of them are folded into
    accumulators. For weights of products, convolutions and embeddings, norms and sums follow from two
    factors, the activations and the errors of back-propagation. No gradient is made where these factors are
    smaller than the weight, and they are multiplied out where they are not. All other leaves are
    differentiated directly. `reducers.explain` tells the way of each leaf.

    Args:
        loss_fn: as in `batch_grad`. Each sample is a batch of one.
        reducers: a `reducers.Reducer`, or a tree of them, which share one pass.
        chunk_size: the number of samples to differentiate at once, which bounds the memory. `"auto"`: as
            many as fit well into memory. None: all.
        randomness: as in `per_sample_grad`.
        memory_limit: the bytes that the gradients of a chunk may take. None: the device's whole memory.

    Returns:
        `(params, batch) -> (results, losses)`: a tree like reducers, each with what its `finish` returns,
        and [B].

    Raises:
        TypeError: as in `batch_grad`, or a leaf of reducers is no Reducer.
        ValueError: as in `batch_grad`, or an option is out of range.
        MemoryError: a chunk would exceed `memory_limit`. The error is raised before allocating, and names a
            `chunk_size` that fits.

    Example:
        >>> def loss_fn(params, batch):
        ...     x, y = batch
        ...     return ((x * params["w"] - y) ** 2).mean()
        >>> reducers = {"mean": gd.reducers.mean(), "norms": gd.reducers.norms()}
        >>> reduced = gd.reduce_per_sample(loss_fn, reducers)
        >>> batch = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
        >>> reduced({"w": torch.tensor(1.0)}, batch)
        ({'mean': {'w': tensor(-10.)}, 'norms': tensor([ 4., 16.])}, tensor([ 4., 16.]))

    References:
        I. Goodfellow, "Efficient per-example gradient computations", 2015.
        X. Li et al., "Large language models can be strong differentially private learners", 2022.
        Z. Bu et al., "Differentially private optimization on large model at small cost", 2022.
    """
    folds, structure = _tree.flatten(reducers)
    for path, reducer in _tree.named_leaves(reducers, "reducers"):
        if not isinstance(reducer, Reducer):
            remedy = "; call the function that makes it" if callable(reducer) else ""
            raise TypeError(f"{path} is {type(reducer).__name__}, not a Reducer{remedy}")
    if isinstance(chunk_size, str):
        check_choice("chunk_size", chunk_size, ("auto",))
    check_loss_fn(loss_fn)
    check_options(None if chunk_size == "auto" else chunk_size, randomness, memory_limit)
    entries = any(fold.entries for fold in folds)

    def reduced(params: Tree, batch: Tree) -> tuple[Tree, Tensor]:
        leaves, batch, size = check_samples(params, batch)
        program = tapped(loss_fn, params, batch)
        each = sample_bytes(leaves) if entries else program.sample_bytes(leaves)
        limit = available(memory_limit, leaves[0].device)
        chunk = _fitting(chunk_size, size, each, limit)

        def fold_all(params: Tree, batch: Tree) -> tuple[Tree, Tensor]:
            flat, like_params = _tree.flatten(params)
            flat = [leaf.contiguous() for leaf in flat]
            samples = [leaf.contiguous() for leaf in _tree.leaves(batch)]

            def one_chunk(start: int, earlier: tuple[Callable[[], PerSample], ...] = ()) -> PerSample:
                rows = [leaf[start : start + chunk] for leaf in samples]
                losses, grads = program.run(flat, rows, randomness)
                return PerSample(losses, start, grads, like_params, earlier)

            states = [fold.init(params) for fold in folds]
            losses: list[Tensor] = []
            earlier: list[Callable[[], PerSample]] = []
            for start in range(0, size, chunk):
                grads = one_chunk(start, tuple(earlier))
                states = [fold.add(state, grads) for fold, state in zip(folds, states, strict=True)]
                losses.append(grads.losses)
                earlier.append(partial(one_chunk, start))
                del grads  # before the next chunk takes memory
            results = [fold.finish(state) for fold, state in zip(folds, states, strict=True)]
            return _tree.unflatten(structure, results), _tree.cat(losses)

        return apart(fold_all, params=params, batch=batch)

    return reduced


def explain(loss_fn: LossFn) -> Callable[[Tree, Tree], dict[str, str]]:
    """Make the function `(params, batch) -> dict` that tells how the gradients of each leaf are computed.

    Args:
        loss_fn: as in `reduce_per_sample`.

    Returns:
        `(params, batch) -> ways`, a text for the path of each leaf. `"factors: …"` (no gradient is made)
        and `"products: …"` (factors are multiplied out) name the operations that use the leaf.
        `"direct: …"` names the reason.

    Raises:
        TypeError, ValueError: as in `batch_grad`.

    Example:
        >>> loss_fn = lambda p, x: ((x @ p["w"] + p["b"]) ** 2).mean()
        >>> params = {"w": torch.ones(8, 8), "b": torch.ones(8)}
        >>> for path, way in gd.reducers.explain(loss_fn)(params, torch.ones(3, 8)).items():
        ...     print(path, way)
        params['w'] factors: mm
        params['b'] direct: enters through add
    """

    def explained(params: Tree, batch: Tree) -> dict[str, str]:
        _, batch, _ = check_samples(params, batch)
        ways = tapped(loss_fn, params, batch).ways
        told = [str(way) if isinstance(way, Uses) else f"direct: {way}" for way in ways]
        return dict(zip([path for path, _ in _tree.named_leaves(params, "params")], told, strict=True))

    return explained


def _fitting(chunk_size: Any, size: int, each: int, limit: int) -> int:
    """Return the chunk size, and refuse chunks whose gradients of `each` bytes exceed the limit."""
    if chunk_size == "auto":
        chunk = max(1, min(size, min(limit, _AT_ONCE) // each))
    else:
        chunk = min(size, chunk_size or size)
    if chunk * each > limit:
        few = limit // each
        remedy = f"chunk_size={few} fits" if few else f"one sample takes {each}: raise memory_limit"
        raise MemoryError(
            f"gradients of a chunk of {chunk} samples would take {chunk * each} bytes, over the limit of "
            f"{limit}; {remedy}"
        )
    return chunk
