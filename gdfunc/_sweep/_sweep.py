"""`sweep`: one function at many points, vmapped where they differ in data only."""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from .. import _tree, checkpoint
from .._errors import SweepInterrupted, check_options, check_type
from .._progress import Progress, reporter
from .._shown import dotted
from .._torch._modes import is_tracing
from .._torch._transforms import is_transforming
from .._tree import Tree
from ._folder import Folder, Piece
from ._grid import Grid
from ._memory import Memory
from ._ranks import Ranks, is_shared
from ._result import SweepResult

# Bytes that the members of a chunk may hold: one number, so that chunks, and bits, are the same everywhere.
AUTO_LIMIT = 2**30


def sweep(
    run: Callable[..., Tree],
    grid: Grid,
    *,
    chunk_size: int | str | None = None,
    randomness: str = "error",
    progress: Progress = False,
    resume: SweepInterrupted | None = None,
    checkpoint_to: str | PathLike[str] | None = None,
    shard: bool = True,
) -> SweepResult:
    """Call a function at every point of a grid, as many points at once as have the same shapes.

        outputs[i] = run(**grid[i]),  i = 0 … N−1

    Points with equal values on the looped axes (see `grid`) form a group. One `vmap` runs a group, and the
    groups run one after another. Diverged runs become NaN or inf, are counted, and never affect the others.
    `torch.func.grad`, `jvp` and `vmap` of a sweep work.

    Under torchrun, after `torch.distributed.init_process_group`, each rank runs an equal part of every
    group, without a word to the others; then all ranks have the whole result. torchrun gives a rank one
    thread, unless OMP_NUM_THREADS says otherwise. A rank that ends or is killed costs its members only if
    `checkpoint_to` names a folder: torchrun then ends the other ranks, and the same command runs what is
    not in the folder.

    Groups may differ in the length of a leaf's first own axis, such as loss curves of another number of
    steps. Shorter leaves are padded with NaN (−1 in leaves of ints, False in bools), `lengths` holds the
    lengths before padding, and `select` removes the padding. The records of a `Trajectory` after a member's
    `stop=` are padding too, so each row equals the record of a separate run. Differing dtypes are promoted.

    Args:
        run: `(**point) -> tree`, with the names of the axes as arguments. It returns tensors and numbers,
            such as the result of `train`. A vmapped argument is a slice without the leading axis (an lr is
            a 0-d tensor, a key [2]). A looped argument is the value itself.
        grid: from `grid`.
        chunk_size: the largest number of members that run at once. It bounds the memory, and the work lost
            to Ctrl-C or an error, and changes results within rounding. None: a whole group. `"auto"`: as
            many as hold 1 GiB at once. For this the first member of each group runs alone, and its live
            tensors are counted, except inside a compiled loop. 1: one after another without vmap, for code
            that vmap refuses. The results then have the bits of `run(**grid[i])`.
        randomness: the behaviour of torch's own random operations (dropout) under vmap: `"error"`,
            `"different"` for every member, or the `"same"`. Draw from a key for repeatable runs.
        progress: True for a bar (tqdm if installed, else a line on stderr), or a function that is called
            with the number of finished members and N after every chunk, on each of several ranks with its
            own.
        resume: the `SweepInterrupted` of the same sweep, whose members do not run again.
        checkpoint_to: a folder, which holds a file for each finished chunk. If some are there, the same
            call runs the others only, to the same bits, also on another number of ranks (then up to
            rounding). A grid with other points is refused; that run is the same is not checked.
        shard: whether the ranks of a process group share the members. False: each rank runs all of them,
            as members need that take their steps on all ranks together.

    Returns:
        The outputs, each leaf [N, ...], with the grid: see `SweepResult`.

    Raises:
        TypeError: grid is no `Grid`, or a leaf of run's result is neither tensor nor number.
        ValueError: the results of two groups differ in structure, or in shape beyond the first axis.
        RankError: (a RuntimeError) torchrun started this process, but there is no process group; another
            rank failed, or gave no sign of life for a minute after this one was done. The message names it
            and the members that are lost.
        CheckpointError: (a ValueError) a file in checkpoint_to is damaged, or of a sweep of another grid.
        SweepInterrupted: (a KeyboardInterrupt) Ctrl-C. It holds the result of the finished members, and
            `sweep(run, grid, resume=error)` runs the others, to the same bits.
        Exception: an error of run, with a note that names the point, or the group and its axes.

    Example:
        >>> problem = gd.problems.stock_regression()
        >>> step = gd.make_step(problem.loss_fn)
        >>> def run(batch_size, lr, key):
        ...     index = gd.epoch_batches(key, n=389, batch_size=batch_size, epochs=5)
        ...     params, _ = gd.train(step, problem.params, problem.data, index, lr)
        ...     return problem.loss_fn(params, problem.data) / problem.minimum
        >>> keys = gd.random.split(gd.random.key(0), 8)
        >>> result = gd.sweep(run, gd.grid(batch_size=[32, 128], lr=[0.01, 0.03, 0.1], key=keys))
        >>> result
        SweepResult(batch_size [2] × lr [3] × key [8], 0 of 48 diverged, outputs: float64[48])
        >>> result.reshape().median(dim=-1).values
        tensor([[1.1097, 1.0065, 1.0028],
                [1.7363, 1.1906, 1.0094]], dtype=torch.float64)
    """
    check_type("grid", grid, Grid, "call sweep(run, gd.grid(lr=[0.1, 0.2], …))")
    check_options(None if chunk_size == "auto" else chunk_size, randomness)
    folder = None if checkpoint_to is None else _folder(checkpoint_to, grid)
    before = [] if resume is None else _finished(resume, grid)
    before += _new(folder.pieces(), before) if folder else []
    single = chunk_size == 1 or not any(axis.vmapped for axis in grid.axes.values())
    run_chunk = partial(_run_chunk, run, grid, single, randomness)
    go_on = partial(_run_groups, run_chunk, grid, 1 if single else chunk_size, progress, before)
    if not is_shared(shard):
        return joined(grid, go_on(grid.groups(), folder))
    ranks = Ranks(grid, folder)
    with ranks.sharing():
        # A rank without members runs the first, which tells the shapes of a row, and which another writes.
        groups = ranks.groups_of(ranks.rank)
        pieces = go_on(groups, folder) if groups else go_on([[0]], None)
        return joined(grid, ranks.gathered(_whole(grid, pieces)))


checkpoint.register(SweepInterrupted)


def _finished(resume: Any, grid: Grid) -> list[Piece]:
    """Return the finished part of an interrupted sweep, as the first piece of the resumed one."""
    check_type("resume", resume, SweepInterrupted, "pass the one that was raised")
    if resume.result is None:
        return []
    done = resume.result
    known = [done.grid.labels(i) for i in range(len(done.grid))]
    if len(grid) != resume.total or [grid.labels(i) for i in resume.members] != known:
        raise ValueError(
            f"resume is of another grid, of {resume.total} points with {done.grid}; got {grid}"
        )
    return [Piece(resume.members, "the members done before", done.outputs, done.lengths, done.diverged)]


def _folder(path: str | PathLike[str], grid: Grid) -> Folder:
    """Open the folder of a sweep's chunks."""
    if is_transforming() or is_tracing():
        raise ValueError(
            "checkpoint_to writes values, which a sweep inside vmap, grad, jvp or jit has not; leave it out"
        )
    return Folder(path, grid)


def _run_groups(
    run_chunk: Callable[[list[int]], Piece],
    grid: Grid,
    chunk_size: int | str | None,
    progress: Progress,
    before: list[Piece],
    groups: list[list[int]],
    folder: Folder | None,
) -> list[Piece]:
    """Run the members that are not done, chunk by chunk; return the pieces of all that is done."""
    pieces = [*before]
    done = set(_members(pieces))
    count = len({member for group in groups for member in group} | done)

    def keep(piece: Piece) -> None:
        pieces.append(piece)
        done.update(piece.members)
        if folder:
            folder.write(piece)
        report(len(done))

    def ahead(members: list[int]) -> list[int]:
        return [member for member in members if member not in done]

    with reporter(progress, count, "run") as report:
        try:
            for group in filter(ahead, groups):
                size = chunk_size or len(group)
                if size == "auto":
                    with Memory() as memory:
                        first = run_chunk(group[:1])
                    size = max(1, AUTO_LIMIT // max(1, memory.peak))
                    if ahead(group[:1]):
                        keep(first)
                    group = group[1:]
                for start in range(0, len(group), int(size)):
                    if members := ahead(group[start : start + int(size)]):
                        keep(run_chunk(members))
        except KeyboardInterrupt as interrupt:
            members = sorted(done)
            result = joined(grid.part(members), pieces) if pieces else None
            stopped = SweepInterrupted(total=len(grid), members=members, result=result)
            for note in getattr(interrupt, "__notes__", []):
                stopped.add_note(note)
            if folder:
                stopped.add_note(f"gdfunc: {folder.path} holds them too, and the same call goes on from it")
            raise stopped from interrupt
    return pieces


def _whole(grid: Grid, pieces: list[Piece]) -> Piece:
    """Join pieces to one, in the order of its members."""
    members = sorted(_members(pieces))
    result = joined(grid.part(members), pieces)
    return Piece(members, "the members of this rank", result.outputs, result.lengths, result.diverged)


def _new(pieces: list[Piece], others: list[Piece]) -> list[Piece]:
    """Leave out pieces with a member that others have."""
    known = set(_members(others))
    return [piece for piece in pieces if not known.intersection(piece.members)]


def _members(pieces: list[Piece]) -> list[int]:
    return [member for piece in pieces for member in piece.members]


def _run_chunk(
    run: Callable[..., Tree], grid: Grid, single: bool, randomness: str, members: list[int]
) -> Piece:
    """Run members of one group under vmap, or a single member without."""
    looped, rows = grid.split(members)
    inputs, arguments = _tree.flatten(rows)
    seen: list[Any] = []

    def member(*leaves: Tensor) -> tuple[Tensor, ...]:
        tree, lengths, diverged = _member(run(**looped, **_tree.unflatten(arguments, leaves)))
        results, structure = _tree.flatten((tree, lengths, diverged))
        seen.append(structure)
        return tuple(results)

    try:
        if single:
            results = [leaf[None] for leaf in member(*(leaf[0] for leaf in inputs))]
        else:
            results = list(vmap(member, randomness=randomness)(*inputs))
    except (Exception, KeyboardInterrupt) as error:
        error.add_note(f"gdfunc: in the sweep, at {grid.place(members)}")
        if remedy := _remedy(error, grid, single):
            error.add_note(f"gdfunc: {remedy}")
        raise
    return Piece(members, grid.place(members), *_tree.unflatten(seen[0], results))


def _remedy(error: BaseException, grid: Grid, single: bool) -> str:
    said, axes = str(error), grid.axes.items()
    if "argument" in said and isinstance(error, TypeError):
        return f"a point is given by name: run takes the arguments {', '.join(grid.axes)}"
    if single or isinstance(error, KeyboardInterrupt):
        return ""
    if "randomness" in said:
        return "draw from a key, or choose sweep(..., randomness='different')"
    vmapped = ", ".join(name for name, axis in axes if axis.vmapped)
    return (
        f"{vmapped}: vmapped, all members at once; what shapes the program is to be a list of ints alone "
        f"(a tensor, or a float among them, makes it data); chunk_size=1 runs, and names, one at a time"
    )


def _member(result: Tree) -> tuple[Tree, dict[str, Tensor], Tensor]:
    """Return a member's result as tensors, the lengths of its leaves, and whether it diverged."""
    named = [(path, _as_tensor(path, leaf)) for path, leaf in _tree.named_leaves(result, "")]
    if not named:
        raise TypeError(f"run returned no tensor: {result!r}")
    floats = [leaf for _, leaf in named if leaf.is_floating_point() or leaf.is_complex()]
    flags = [~leaf.isfinite().all() for leaf in floats]
    flags += [leaf.any() for path, leaf in named if path.endswith(".diverged") and leaf.dtype == torch.bool]
    diverged = reduce(torch.logical_or, [flag.cpu() for flag in flags], torch.tensor(False))
    table = dict(named)
    lengths = {path: torch.tensor(len(leaf)) for path, leaf in named if leaf.ndim}
    # Under vmap, a run that has ended records its last state until the other runs end.
    for path, steps in named:
        start = path.removesuffix("steps")
        if path.endswith(".steps") and f"{start}step" in table:
            for inner, taken in _taken(table, start, steps).items():
                leaf = table[inner]
                keeps = taken.to(leaf.device).reshape(-1, *[1] * (leaf.ndim - 1))
                table[inner] = torch.where(keeps, leaf, leaf.new_tensor(_padding(leaf.dtype)))
                lengths[inner] = taken.sum()
    tree = _tree.unflatten(_tree.flatten(result)[1], list(table.values()))
    return tree, {dotted(path): length for path, length in lengths.items()}, diverged


def _taken(table: dict[str, Tensor], start: str, steps: Tensor) -> dict[str, Tensor]:
    """Tell of each record in a Trajectory at which of its entries the run had not ended."""
    masks: dict[str, Tensor] = {}
    taken = None
    for path, leaf in table.items():
        if path == f"{start}step":  # then come the records of steps
            taken = leaf.to(steps.device) < steps
        elif path == f"{start}evaluated":  # then come the evaluations
            taken = leaf.to(steps.device) <= steps
        elif path == f"{start}steps":  # then comes what a run has once
            taken = None
        if taken is not None and path.startswith(start):
            masks[path] = taken
    return masks


def _as_tensor(path: str, leaf: Any) -> Tensor:
    if not isinstance(leaf, Tensor | np.ndarray | np.generic | bool | int | float):
        raise TypeError(f"result{path} is {type(leaf).__name__}; run must return tensors and numbers")
    return leaf if isinstance(leaf, Tensor) else torch.tensor(leaf)


def _padding(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    return False if dtype == torch.bool else -1 if dtype.is_signed else torch.iinfo(dtype).max


def joined(grid: Grid, pieces: list[Piece]) -> SweepResult:
    """Join the chunks in the order of the grid. torch.cat copies, so the result shares no storage."""
    first, names = pieces[0], [f"what run returns at {piece.name}" for piece in pieces]
    matched = [
        _tree.check_structure(piece.tree, first.tree, name, names[0])
        for piece, name in zip(pieces, names, strict=True)
    ]
    order = _members(pieces)
    places = sorted(range(len(order)), key=order.__getitem__)
    ordered = places == list(range(len(places)))

    def in_order(leaves: Sequence[Tensor]) -> Tensor:
        whole = torch.cat(list(leaves))
        return whole if ordered else whole[places]

    columns = zip(_tree.named_leaves(first.tree, "result"), *matched, strict=True)
    outputs = [in_order(_padded(path, column, pieces)) for (path, _), *column in columns]
    lengths = {name: in_order([piece.lengths[name] for piece in pieces]) for name in first.lengths}
    diverged = in_order([piece.diverged for piece in pieces])
    return SweepResult(grid, _tree.unflatten(_tree.flatten(first.tree)[1], outputs), diverged, lengths)


def _padded(path: str, leaves: Sequence[Tensor], pieces: list[Piece]) -> list[Tensor]:
    """Pad leaves [n, t, ...] that differ in t alone to the largest t."""
    for leaf, piece in zip(leaves, pieces, strict=True):
        if leaf.ndim != leaves[0].ndim or leaf.shape[2:] != leaves[0].shape[2:]:
            raise ValueError(
                f"{path} has shape {tuple(leaves[0].shape[1:])} at {pieces[0].name}, but "
                f"{tuple(leaf.shape[1:])} at {piece.name}; only the first axis may differ in length; "
                f"let run return what has one shape at every point, such as the final loss"
            )
    longest = max((leaf.shape[1] for leaf in leaves if leaf.ndim > 1), default=0)

    def padded(leaf: Tensor) -> Tensor:
        if leaf.ndim == 1 or leaf.shape[1] == longest:
            return leaf
        shape = len(leaf), longest - leaf.shape[1], *leaf.shape[2:]
        return torch.cat([leaf, leaf.new_full(shape, _padding(leaf.dtype))], dim=1)

    return [padded(leaf) for leaf in leaves]
