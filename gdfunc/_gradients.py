"""Gradients of losses: of a batch, and of every sample in it."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from . import _tree, random
from ._data import as_data
from ._errors import check_function, check_options
from ._inputs import check_inputs, check_samples, kind
from ._stateful import Bound, Evaluated, Stateful
from ._torch._autograd import copies, gradient, serves, share_storage, written
from ._torch._modes import lent, versions
from ._torch._transforms import differentiable_attention, is_transforming
from ._tree import Tree

LossFn = Callable[[Tree, Tree], Tensor]
GradFn = Callable[[Tree, Tree], tuple[Tree, Any]]


class SharedLoss:
    """A loss whose samples several processes share out; see `gd.distributed.data_parallel`."""

    def __call__(self, params: Tree, batch: Tree) -> Any:
        """Evaluate the loss of all samples."""
        raise NotImplementedError

    def gradients(self, params: Tree, batch: Tree) -> tuple[Tree, Any]:
        """Compute what the function that `unchecked_grad` makes of a loss computes."""
        raise NotImplementedError

    def sums(self, of_part: Callable[..., Tree], batch: Tree, *given: Tree) -> Tree:
        """Sum over the processes what each computes of its part: `of_part(loss_fn, part, *given)`."""
        raise NotImplementedError


def batch_grad(loss_fn: LossFn) -> GradFn:
    """Turn a loss into the function that gives its gradient over a batch, and its value.

    g = ∇θ L(θ, batch)

    Args:
        loss_fn: `(params, batch) -> loss`, the mean over the batch as a 0-d real tensor. `params` is a
            tree of float tensors; `batch` a tree of tensors or NumPy arrays [B, ...], or None for a loss
            without data.

    Returns:
        `(params, batch) -> (grads, loss)`: a tree like params, and 0-d. Gradients come before the
        value, as in `torch.func.grad_and_value`. A leaf that the loss does not use has gradient zero.

    Raises:
        TypeError: a leaf of params is not a float tensor; the loss is not a tensor.
        ValueError: params is empty, holds one tensor twice, or lives on another device or in another
            float dtype than the batch; the batch is empty or ragged; the loss is not a real 0-d
            tensor, depends on no leaf, or writes into params or the batch, which then stay as they were.

    Example:
        >>> def loss_fn(params, batch):
        ...     x, y = batch
        ...     return ((x * params["w"] - y) ** 2).mean()
        >>> batch = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
        >>> gd.batch_grad(loss_fn)({"w": torch.tensor(1.0)}, batch)
        ({'w': tensor(-10.)}, tensor(10.))
    """
    unchecked = unchecked_grad(loss_fn)

    def gradients(params: Tree, batch: Tree) -> tuple[Tree, Tensor]:
        _, batch, _ = check_inputs(params, batch)
        return unchecked(params, batch)

    return gradients


def unchecked_grad(loss_fn: LossFn) -> GradFn:
    """Make `batch_grad` without its checks of params and batch, whose leaves must be tensors.

    `torch.func.grad_and_value` defines the result. Where no transformation, mode or subclass is involved,
    autograd computes the same in a third of the time.
    """
    if isinstance(loss_fn, SharedLoss):
        return loss_fn.gradients
    check_loss_fn(loss_fn)
    evaluate = evaluated(loss_fn)

    def by_func(params: Tree, batch: Tree) -> tuple[Tree, Any]:
        return _simplified(*apart(grad_and_value(evaluate, has_aux=True), params=params, batch=batch))

    def gradients(params: Tree, batch: Tree) -> tuple[Tree, Any]:
        leaves, structure = _tree.flatten(params)
        rows, shape = _tree.flatten(batch)
        given = [*leaves, *rows]
        if not serves(given):
            return by_func(params, batch)
        lent_inputs = copies(given)
        inputs, lent_batch = lent_inputs[: len(leaves)], _tree.unflatten(shape, lent_inputs[len(leaves) :])
        found = gradient(lambda inputs: evaluate(_tree.unflatten(structure, inputs), lent_batch), inputs)
        if found is None:
            with differentiable_attention():
                return by_func(params, batch)
        if True in (writes := written(lent_inputs, given)):
            _refuse_writes(writes, params=params, batch=batch)
        loss, buffers, grads = found
        result = _simplified(_tree.unflatten(structure, grads), (loss, buffers))
        return _tree.unshare(result, []) if share_storage([*grads, loss, *buffers]) else result

    return gradients


def _simplified(grads: Tree, value: tuple[Tensor, list[Tensor]]) -> tuple[Tree, Any]:
    """Give the loss alone where no buffers have changed."""
    loss, buffers = value
    return grads, Evaluated(loss, buffers) if buffers else loss


def per_sample_grad(
    loss_fn: LossFn,
    *,
    chunk_size: int | None = None,
    randomness: str = "error",
    memory_limit: int | None = None,
) -> GradFn:
    """Turn a loss into the function that gives the gradient and the loss of every sample.

    gᵢ = ∇θ L(θ, {sample i}),  i = 1 … B

    The loss meets each sample as a batch of one, so the same loss, and an ordinary `nn.Module` in it,
    serve here and in `batch_grad`. For a loss that is a mean over the batch, the mean of the gᵢ is the
    batch gradient; for a sum it is the batch gradient over B.

    Args:
        loss_fn: as in `batch_grad`.
        chunk_size: how many samples to differentiate at once; None: all. It bounds the memory of the
            intermediate values; the result is [B, ...] all the same.
        randomness: what dropout and other random operations of torch do in the loss: `"error"`,
            `"different"` for every sample, or the `"same"`.
        memory_limit: how many bytes the gradients may take; None: the device's whole memory.

    Returns:
        `(params, batch) -> (grads, loss)`: a tree like params with leaves [B, ...], and [B].

    Raises:
        TypeError, ValueError: as in `batch_grad`.
        MemoryError: the gradients would take more than `memory_limit`; raised before anything is
            allocated. `reduce_per_sample` needs no [B, ...].
        RuntimeError: a random operation, while `randomness="error"`.

    Example:
        >>> def loss_fn(params, batch):
        ...     x, y = batch
        ...     return ((x * params["w"] - y) ** 2).mean()
        >>> batch = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
        >>> gd.per_sample_grad(loss_fn)({"w": torch.tensor(1.0)}, batch)
        ({'w': tensor([ -4., -16.])}, tensor([ 4., 16.]))
    """
    check_loss_fn(loss_fn)
    check_options(chunk_size, randomness, memory_limit)
    of_sample = checked(sample_loss(loss_fn))

    def gradients(params: Tree, batch: Tree) -> tuple[Tree, Tensor]:
        leaves, batch, size = check_samples(params, batch)
        needed, limit = sample_bytes(leaves), available(memory_limit, leaves[0].device)
        if size * needed > limit:
            few, hint = limit // needed, "one sample's alone take more"
            if few:
                hint = f"take at most {few} samples at a time, or reduce_per_sample(..., chunk_size={few})"
            raise MemoryError(
                f"gradients of {size} samples would take {size * needed} bytes, over the limit of {limit}; "
                f"{hint}"
            )
        in_dims = None, _tree.map(lambda leaf: 0, batch)
        each = vmap(grad_and_value(of_sample), in_dims, chunk_size=chunk_size, randomness=randomness)
        return apart(each, params=params, batch=batch)

    return gradients


def low_precision(loss_fn: LossFn, dtype: torch.dtype) -> LossFn:
    """Evaluate a loss in a narrower dtype, while its parameters stay in their own.

    L'(θ, batch) = L(round(θ), round(batch)), with gradients in the dtype of θ

    The float32 parameters are the master weights: steps far below the narrow dtype's resolution add up in
    them, where parameters in bfloat16 or float16 themselves would stall.

    Args:
        loss_fn: as in `batch_grad`.
        dtype: of the evaluation, such as `torch.bfloat16`; integers in the batch are left alone.

    Returns:
        A loss whose value is in float32, or in `dtype` if that is wider.

    Raises:
        ValueError: dtype is no real floating-point dtype.

    Example:
        >>> narrow = gd.low_precision(lambda w, x: ((w * x) ** 2).mean(), torch.bfloat16)
        >>> gd.batch_grad(narrow)(torch.tensor(1.0), torch.tensor([1.0, 3.0]))
        (tensor(10.), tensor(5.))

    References:
        P. Micikevicius et al., "Mixed precision training", 2018.
    """
    check_loss_fn(loss_fn)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a real floating-point torch.dtype; got {dtype!r}")

    def narrow(leaf: Tensor) -> Tensor:
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    def rounded(params: Tree, batch: Tree) -> Tensor:
        loss = loss_fn(_tree.map(narrow, params), _tree.map(narrow, as_data(batch, "batch")))
        return loss.to(torch.promote_types(loss.dtype, torch.float32)) if isinstance(loss, Tensor) else loss

    return rounded


def check_mean_loss(loss_fn: LossFn, params: Tree, batch: Tree, *, rtol: float = 1e-3) -> None:
    """Check that a loss is a mean over the batch, as everything in gdfunc takes it to be.

    L(θ, batch) = 1/B Σᵢ L(θ, {sample i})

    It finds the sum in place of the mean, and predictions [B, 1] that silently broadcast against
    targets [B]. A loss that mixes samples (batch normalisation, contrastive losses) is no such mean. Nor is
    one that divides by the class weights or the unpadded entries of a batch; see `gd.losses`.

    Args:
        loss_fn: as in `batch_grad`.
        params: where to check, and near where: at zero all predictions may be equal, and hide it.
        batch: at least two samples, which differ in class and length where the loss weighs these.
        rtol: the allowed relative difference.

    Raises:
        ValueError: it is not; the message has both values.

    Example:
        >>> batch = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
        >>> gd.check_mean_loss(lambda w, b: ((b[0] * w - b[1]) ** 2).sum(), torch.tensor(1.0), batch)
        Traceback (most recent call last):
        ...
        ValueError: loss is not a mean over the batch: it is 20, but its 2 samples alone average 10; \
        use mean in place of sum, and give predictions and targets one shape
    """
    key = random.key(0)
    nearby = _tree.map(lambda p: p + 0.1 * random.normal(key, p.shape, p.dtype).to(p.device), params)
    for point in (params, nearby):
        sample_losses = per_sample_grad(loss_fn, randomness="different")(point, batch)[1].double()
        loss, average = batch_grad(loss_fn)(point, batch)[1].double(), sample_losses.mean()
        if torch.isclose(loss, average, rtol=rtol, atol=0.0, equal_nan=True):
            continue
        remedy = "use mean in place of sum"
        low, high = sample_losses.aminmax()
        if average.isnan() or low < loss < high:
            remedy = (
                "it is a mean over something else than the samples; divide what is weighted by classes or "
                "padded by the number of samples, as gd.losses.cross_entropy(class_weights=) and "
                "gd.losses.masked_mean do"
            )
        raise ValueError(
            f"loss is not a mean over the batch: it is {loss:.6g}, but its {len(sample_losses)} "
            f"samples alone average {average:.6g}; {remedy}, and give predictions and targets one shape"
        )


def available(limit: int | None, device: torch.device) -> int:
    """Return the limit in bytes, by default the whole memory of the device if it is known."""
    if limit is not None:
        return limit
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    known = device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else sys.maxsize


def sample_bytes(param_leaves: Sequence[Tensor]) -> int:
    """Return the bytes of one sample's gradient."""
    return sum(leaf.numel() * leaf.element_size() for leaf in param_leaves)


def apart(function: Callable[..., Tree], **given: Tree) -> Tree:
    """Keep inputs and outputs apart: the user's code cannot write into the inputs, no memory is shared."""
    copies = _tree.map(lent, given)
    leaves = _tree.leaves(copies)
    before = versions(leaves)
    is_followed = is_transforming() or any(leaf.requires_grad for leaf in leaves)
    with differentiable_attention() if is_followed else nullcontext():
        result = function(*copies.values())
    after = versions(leaves)
    if after != before:
        _refuse_writes([old != new for old, new in zip(before, after, strict=True)], **given)
    return _tree.unshare(result, _tree.leaves(given))


def _refuse_writes(written: list[bool], **given: Tree) -> NoReturn:
    paths = [path for name, tree in given.items() for path, _ in _tree.named_leaves(tree, name)]
    raise ValueError(
        f"the loss wrote into {paths[written.index(True)]}, as Embedding(max_norm=) does; it must return "
        f"new tensors instead, and a constraint belongs after the update"
    )


def sample_loss(loss_fn: LossFn) -> LossFn:
    """Make the loss of one sample without its batch axis, which is given to the loss as a batch of one."""

    def of_sample(params: Tree, sample: Tree) -> Tensor:
        with differentiable_attention():
            return loss_fn(params, _tree.map(lambda leaf: leaf[None], sample))

    return of_sample


def checked(loss_fn: LossFn) -> LossFn:
    """Check what a loss returns, where no buffers can be handed on."""
    evaluate = evaluated(loss_fn)

    def with_checks(params: Tree, batch: Tree) -> Tensor:
        value = evaluate(params, batch)
        return check_loss(value if value.buffers else value.loss)

    return with_checks


def evaluated(loss_fn: LossFn) -> Callable[[Tree, Tree], Evaluated]:
    """Check what a loss under differentiation returns, and say more where torch says less."""
    evaluate = evaluated_loss(loss_fn)

    def differentiated(params: Tree, batch: Tree) -> Evaluated:
        value = evaluate(params, batch)
        check_dependence(value.loss)
        return value

    return differentiated


def evaluated_loss(loss_fn: LossFn) -> Callable[[Tree, Tree], Evaluated]:
    """Check what a loss returns, and say more where torch says less."""

    def evaluate(params: Tree, batch: Tree) -> Evaluated:
        try:
            value: Any = loss_fn(params, batch)
        except RuntimeError as error:
            for word, note in _NOTES.items():
                if word in str(error):
                    error.add_note(f"gdfunc: {note}")
            raise
        except ValueError as error:
            if "values to unpack" in str(error) and isinstance(batch, Tensor):
                error.add_note(f"gdfunc: {_ONE_TENSOR}")
            raise
        result = value if isinstance(value, Evaluated) else Evaluated(value, [])
        check_loss(result.loss)
        return result

    return evaluate


def check_loss_fn(loss_fn: Any) -> None:
    """Refuse what is no loss: a transformation, a step, a module, a function of other arguments."""
    if isinstance(loss_fn, Bound | SharedLoss):  # made in every step
        return
    kind, remedy = "a function (params, batch) -> loss", "as in gd.make_step(loss_fn, gd.adam())"
    remedy = f"pass a function loss_fn(params, batch) that returns a 0-d mean, {remedy}"
    if isinstance(loss_fn, Stateful):
        remedy = "fix its state: lambda params, batch: loss_fn(params, batch, buffers, key)[0]"
        raise TypeError(f"loss_fn is made by gd.stateful, which only makers of steps take; {remedy}")
    remedy += "; mark a loss (params, batch, buffers, key) with gd.stateful"
    if isinstance(loss_fn, torch.nn.Module) or hasattr(loss_fn, "buffers"):
        remedy = "the loss of a module is gd.modules.functional(module).loss(gd.losses.cross_entropy)"
    check_function("loss_fn", loss_fn, ("params", "batch"), kind, remedy)


def check_loss(loss: Any) -> Tensor:
    """Refuse what cannot be differentiated as a loss."""
    if isinstance(loss, Evaluated):
        raise ValueError(
            "the loss changes its buffers, which are lost where samples are differentiated one by one; "
            "use nn.GroupNorm in place of batch normalisation, or the module in eval mode"
        )
    if not isinstance(loss, Tensor):
        hints = {
            float: "; .item() and float() cut the gradient",
            tuple: "; mark a loss that returns buffers too with gd.stateful",
        }
        hint = hints.get(type(loss), "")
        raise TypeError(f"loss must return a real floating-point scalar; got {kind(loss)}{hint}")
    if loss.shape or not loss.is_floating_point():
        got = f"shape {tuple(loss.shape)}" if loss.shape else kind(loss)
        raise ValueError(f"loss must return a real floating-point scalar; got {got}")
    return loss


def check_dependence(loss: Tensor) -> Tensor:
    """Refuse a loss under differentiation that no leaf reaches."""
    if not loss.requires_grad:
        raise ValueError(
            "loss does not depend on params: no leaf reaches it "
            "(detach, .item() and comparisons cut the path)"
        )
    return loss


_ONE_TENSOR = "the batch is one tensor; a loss that unpacks x, y = batch needs the pair data=(x, y)"
_NOTES = {
    "in-place": "a loss must not write into params or batch",
    "inplace": "a loss must not write into params or batch",
    "broadcast shape": "under vmap a tensor that the loss makes is the same for all samples, and cannot be "
    "written to for each: make the first state of a cell from the batch, as x.new_zeros(...)",
    "randomness": 'per_sample_grad(loss_fn, randomness="different") draws separately for each sample',
}
