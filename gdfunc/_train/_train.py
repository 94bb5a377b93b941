"""A training run: a scan of steps over batches, in segments that can be watched and stopped."""

from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Any

from torch import Tensor

from .. import _tree
from .._errors import StuckWarning, TrainingInterrupted, warn
from .._lazy import LazyBatches
from .._progress import Progress
from .._scan._adjoint import Adjoint, Reverse
from .._step import StepLike
from .._torch._modes import is_tracing
from .._torch._transforms import is_transforming
from .._tree import Tree
from ..stops import Stop
from ._body import carry_of
from ._drive import Log, check_log, drive
from ._keep import kept
from ._plan import make_plan
from ._trajectory import Trajectory


def train(
    step: StepLike,
    init: Any,
    data: Tree,
    index: Tensor | LazyBatches,
    lr: float | Tensor,
    *,
    record: Any = ("loss",),
    every: int = 1,
    evaluate: Any = None,
    evaluate_every: int = 1,
    backend: str = "auto",
    progress: Progress = False,
    check_finite: str = "off",
    stop: Stop | Callable[[Any, Any], Tensor] | None = None,
    adjoint: Adjoint = Reverse(),
    resume: TrainingInterrupted | None = None,
    checkpoint_to: str | PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    checkpoint_keep: int = 1,
    log: Log | None = None,
) -> tuple[Any, Trajectory]:
    """Run a step over the batches of a plan.

        for t in range(T):
            carry, loss[t] = step(carry, take(data, index[t]), lr[t])

    It is a `scan`, so `torch.func.grad`, `jvp` and `vmap` go through a whole run, with respect to lr,
    the initial parameters and the data.

    Args:
        step: a `Step`, or a function `(carry, batch, lr) -> (carry, loss)` with any tree of tensors as its
            carry.
        init: the first carry, from `step.init(params)`; for a plain `make_step(loss_fn)` the parameters.
            It is detached from autograd's graph, so differentiate with `torch.func.grad`, not with
            `backward`.
        data: tree of tensors or NumPy arrays [n, ...]; None for a loss without data. A `TensorDataset` is
            the tuple of its tensors, a DataFrame of numbers the dict of its columns. A file that is mapped
            into memory, `np.load(path, mmap_mode="r")` or a tensor of safetensors, is read where it lies,
            without a copy, if it is contiguous. `check_mean_loss` tells whether the loss is a mean over the
            data. Any other map-style `Dataset` is collated by
            the plan. Or a source of batches: a `DataLoader`, a generator or another iterable of trees of
            tensors, all of one shape, or a function `(step) -> batch` of a 0-d int64, which is part of the
            loop. A thread reads iterables and data sets a few batches ahead.
        index: the plan int64 [T, B], from `epoch_batches`, `sample_batches` or `full_batch`, or from
            `lazy_batches`, which is never held as a whole. For a source of batches the number of steps T,
            and no more batches than that are read.
        lr: a number or 0-d tensor for all steps, or a schedule [T], one value a step. Values are checked
            unless they are on a GPU or under a transformation.
        record: what to keep of each step: names among `loss` (the second value that the step returns),
            `params` (the carry's field of that name, or the carry), `lr`, `grad_norm`, `state` (the
            carry), and functions `(carry, loss) -> tree` of the carry before the step, kept under their
            `__name__`. A dict gives other names.
        every: keep only the steps 0, k, 2k, …
        evaluate: a function `(carry) -> tree`, several, or a dict of them by name, such as the loss on held
            out data, which the function closes over. It is called with the carry after the steps k, 2k, …
            of k = `evaluate_every`, and never in between.
        evaluate_every: k, a multiple of `every`. Segments are whole multiples of k steps, so that Ctrl-C
            and progress may wait for one.
        backend: who runs the loop, `"auto"`, `"eager"`, `"native"`, `"inductor"` or `"cudagraph"`;
            see `scan`.
        progress: True for a bar (tqdm if installed, else a line on stderr), or a function that is called
            with the finished steps and T after every segment, about ten times a second. If it changes
            what the step reads, a compiled loop does not see the change. Of ranks that take steps together,
            the first shows the bar, and all call a function, `log` too.
        check_finite: `"loss"`, or `"all"` for the carry too, stops at the first NaN or infinity, and names
            the sample if it came from the data; `"off"` lets it spread. Reads values, so not under vmap,
            grad or jvp. A run that should not end skips such a step with
            `apply_if_finite(transform)`. A run that should end without an error has
            `stop=`.
        stop: `(carry, loss) -> 0-d bool`, called with the carry after a step and the loss that the step
            returned, or a stop with memory from `gd.stops`, such as `patience`. The step (or evaluation)
            for which it holds is the last. A loss that is not finite ends the run too,
            with the carry before its step; reverse-mode derivatives of such a run are NaN. Under vmap each
            member ends on its own. Its later records repeat its last carry, until all have ended.
        adjoint: how derivatives go back through the run, one of `gd.adjoints`: `Reverse()`,
            `Checkpoint("sqrt")`, `Truncated(last)`, `Implicit("cg", 100)`.
        resume: the `TrainingInterrupted` of the same run, given the same arguments. Its steps are not
            taken again, and the results have the bits of a run that was not interrupted. For that an
            iterable of batches needs `state_dict` and `load_state_dict`, as torchdata's
            `StatefulDataLoader` has.
        checkpoint_to: a file for all that is done: the carry, the records, the position in the plan. It is
            written between segments, at the end, and on Ctrl-C, SIGTERM or an error. If it is there, the
            same call goes on from it, to the same bits; a file of another run is refused. The plan and lr
            after the step where it stopped may be others, so that a finished run can be made longer. See
            `help(gd.checkpoint)`. The file knows its data by their SHA-256, so they are read once, at one
            or two GB/s, and none are held. Of ranks that take steps together (`gd.distributed`), the first
            writes it, and all read it.
        checkpoint_every: write at least every so many steps; None for about once a minute.
        checkpoint_keep: how many files to keep. Those before the last have the number of their step in
            their name.
        log: called with the finished steps and a dict of numbers after every segment, about ten times a
            second: lr, and the last value of each record and evaluation that is one number.

    Returns:
        `(final, trajectory)`: the carry after the last step, and the records, [⌈T/every⌉, ...] each, of the
        T steps that were taken. With evaluate, what was evaluated, [⌊T/k⌋, ...], and `trajectory.evaluated`
        [⌊T/k⌋], the numbers of steps taken by then. With stop, `trajectory.steps` is how many a run took,
        `trajectory.diverged` whether a loss that is not finite ended it, and `trajectory.best` the best
        carry, if `patience` kept it. Member i of a vmapped run ended with `loss[i, steps[i] - 1]`.

    Raises:
        TypeError: index is not int64; a leaf of data is no tensor (of a `DataLoader`, the message says what
            to pass); stop gives no 0-d bool tensor; see `batch_grad`.
        ValueError: data, index and lr do not fit; a source of batches ends early, gives a batch unlike the
            first, is used under a transformation, or cannot go on where a run was stopped; an unknown
            record; a name for two; evaluate_every is no multiple of every; stop= judges what is not
            evaluated; stop= with an adjoint that counts from the planned end, `Truncated` or `Implicit`;
            resume= of another run; checkpoint_to= or log= under vmap, grad, jvp or jit.
        CheckpointError: (a ValueError) the file is damaged, or of another run; it names what differs.
        IndexError: index points outside the data.
        BackendError: (a RuntimeError) the backend cannot run this step; see `scan`.
        NonFiniteError: (a GdfuncError) `check_finite` found NaN or infinity; it holds the last good carry.
        TrainingInterrupted: (a KeyboardInterrupt) Ctrl-C; it holds the carry and the records so far, of
            all members of a vmapped run along leading axes.

    Example:
        >>> x = torch.linspace(-1, 1, 50)
        >>> data = x, 3 * x
        >>> def loss_fn(w, batch):
        ...     x, y = batch
        ...     return ((x * w - y) ** 2).mean()
        >>> index = gd.epoch_batches(gd.random.key(0), n=50, batch_size=10, epochs=20)
        >>> final, trajectory = gd.train(gd.make_step(loss_fn), torch.tensor(0.0), data, index, lr=0.5)
        >>> final
        tensor(3.)
        >>> trajectory.loss.shape
        torch.Size([100])

        Writers of logs take the numbers as they are, here csv's `DictWriter`.

        >>> import csv, sys
        >>> table = csv.DictWriter(sys.stdout, ["step", "lr", "loss"], lineterminator="\\n")
        >>> def write(step, numbers):
        ...     table.writerow({"step": step} | numbers)
        >>> _ = gd.train(gd.make_step(loss_fn), torch.tensor(3.0), data, index[:1], lr=0.5, log=write)
        1,0.5,0.0

        For Weights & Biases and TensorBoard (`run` from `wandb.init()`, `writer` a `SummaryWriter`):

        >>> def to_wandb(step, numbers):
        ...     run.log(numbers, step=step)
        >>> def to_tensorboard(step, numbers):
        ...     for name, number in numbers.items():
        ...         writer.add_scalar(name, number, step)

    References:
        H. Robbins, S. Monro, "A stochastic approximation method", 1951.
    """
    where, log = kept(checkpoint_to, checkpoint_every, checkpoint_keep), check_log(log)
    plan = make_plan(
        step,
        init,
        data,
        index,
        lr,
        record,
        every,
        evaluate,
        evaluate_every,
        backend,
        check_finite,
        stop,
        adjoint,
    )
    final, trajectory = drive(plan, progress, log, resume, where)
    _tell_trouble(step, final)
    return adjoint.end(partial(plan.last_step, final), carry_of(plan.state), final), trajectory


def _tell_trouble(step: StepLike, final: Any) -> None:
    """Warn of a last carry that the step cannot move, where it has values to be read."""
    trouble = getattr(step, "trouble", None)
    if trouble is None or is_transforming() or is_tracing():
        return
    has_values = not any(leaf.is_meta for leaf in _tree.tensors(final))
    if has_values and (message := trouble(final)):
        warn(message, StuckWarning)
