"""`halving`: a sweep whose members are judged at rungs, and go on in a smaller vmap."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from numbers import Real
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tree
from .._errors import SweepInterrupted, check_choice, check_function, check_int, check_type
from .._progress import Progress, reporter
from .._shown import dotted, shown
from .._sweep._folder import Piece, digest
from .._sweep._grid import Axis, Grid
from .._sweep._sweep import joined, sweep
from .._torch._transforms import is_transforming
from .._train._trajectory import Trajectory
from .._tree import Tree
from ..checkpoint._file import file_path
from ..distributed._group import RankError
from ._file import File
from ._result import HalvingInterrupted, HalvingResult


def halving(
    run: Callable[..., tuple[Tree, Tree]],
    grid: Grid,
    rungs: Sequence[int],
    by: str | Callable[[Any, Any], Tensor] = "loss",
    *,
    eta: float = 3,
    mode: str = "min",
    chunk_size: int | str | None = None,
    randomness: str = "error",
    progress: Progress = False,
    resume: HalvingInterrupted | None = None,
    shard: bool = True,
    checkpoint_to: str | PathLike[str] | None = None,
) -> HalvingResult:
    """Run a sweep in which the worst members are dropped at rungs.

        Sᵣ₊₁ = the ⌊|Sᵣ| / η⌋ best of Sᵣ after rungs[r] steps,  S₀ = the whole grid

    Between two rungs the members that are left run as one vmap, so the work falls with their number. One
    is always left, unless all diverge. Members that diverged are dropped before all others, even where
    fewer than ⌊|Sᵣ| / η⌋ remain. Of equal members the first goes on. The whole is deterministic, and a
    member that is left has the results of a plain sweep, up to rounding.

    The best member need not be the best of the whole grid. Expect that where losses cross late: large
    constant learning rates lead early, but end at the noise of their batches, where a small one wins last.
    `demos/halving.py` has 27 rates for the stocks, and rungs of 1/9, 1/3 and all of the steps. It finds the
    best in 12 of 20 orders of the data with constant rates, and in 15 with rates that fall to zero; the
    choice ends 0.4% and 0.1% above it on average. With eta=2, which costs 37% of the steps instead of 26%,
    it finds it in 17 and 20. So let rates fall, judge by the loss on all data, and take a smaller eta or a
    later first rung.

    Args:
        run: `(**point, steps, carry) -> (carry, output)`, a part of a run. `steps` is the slice of the
            steps to take: `slice(0, rungs[0])`, then `slice(rungs[0], rungs[1])`, …, so `index[steps]` is
            their plan. `carry` is what run returned for the steps before, or None at the first. `train`
            returns such a pair. Of `output` the leaves with an axis are records, which the parts of a run
            continue. Of a leaf without an axis the last value counts.
        grid: from `grid`; no axis is named steps or carry.
        rungs: the numbers of steps after which the members are judged, increasing. The last is the length
            of a whole run. If run returns the trajectory of `train`, they are multiples of its `every` and
            `evaluate_every`. Otherwise any unit will do that run understands, such as epochs.
        by: the name of a record in `output`, whose last entry is judged (`"loss"`, or with a dotted path),
            or a function `(carry, output) -> 0-d`, such as the loss on held-out data.
        eta: η > 1. Of so many members one goes on.
        mode: `"min"` if small values are good, or `"max"`.
        chunk_size: see `sweep`.
        randomness: see `sweep`.
        progress: True for a bar, or a function that is called with the member-steps that are done and
            those that are planned.
        resume: the `HalvingInterrupted` of the same halving, whose work is not done again.
        shard: see `sweep`. Ranks share the members that are left after each rung, and decide alike.
        checkpoint_to: a file for all that is done, which rank 0 writes first, after every rung and on
            Ctrl-C. Until a rung is judged, a folder with the file's name and `.rungs` holds its finished
            chunks, as that of a `sweep` does: a rank that is killed costs its members of this rung only. If
            the file is there, the same call goes on from it, to the same bits. The file of a halving with
            another grid, rungs, eta or mode is refused; that run and by are the same is not checked.

    Returns:
        A `HalvingResult`: the records of all members, padded after the rung where they were dropped.

    Raises:
        TypeError: grid is no `Grid`; run returns no pair; what is judged is no 0-d real number.
        ValueError: rungs do not increase, or are no steps at which run's records can go on; an axis is
            named steps or carry; there is no record named `by`; run has `stop=`, whose memory would begin
            again at each rung; halving is under vmap, grad, jvp or jit, where no values decide; resume= of
            another halving.
        RankError: see `sweep`.
        CheckpointError: (a ValueError) checkpoint_to is damaged, or holds something else.
        HalvingInterrupted: (a KeyboardInterrupt) Ctrl-C. `halving(…, resume=error)` goes on to the same
            bits.
        Exception: an error of run, with a note that names the point, or the group and its axes.

    Example:
        >>> problem = gd.problems.stock_regression(standardize=False)
        >>> step, plan = gd.make_step(problem.loss_fn), gd.full_batch(389, 81)
        >>> def run(lr, steps, carry):
        ...     carry = problem.params if carry is None else carry
        ...     return gd.train(step, carry, problem.data, plan[steps], lr)
        >>> def loss(params, trajectory):
        ...     return problem.loss_fn(params, problem.data)
        >>> grid = gd.grid(lr=[0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0])
        >>> result = gd.search.halving(run, grid, rungs=[9, 27, 81], by=loss)
        >>> result.steps.tolist()
        [9, 9, 9, 9, 9, 27, 27, 81, 9]
        >>> result.cost, result.full_cost
        (189, 729)
        >>> result.grid[result.best]
        {'lr': tensor(2.)}

    References:
        K. Jamieson, A. Talwalkar, "Non-stochastic best arm identification and hyperparameter
        optimization", 2016.
    """
    check_type("grid", grid, Grid, "call halving(run, gd.grid(lr=[0.1, 0.2], …), rungs=…)")
    if is_transforming():
        raise ValueError("halving decides by values, which a run inside vmap, grad, jvp or jit has not")
    _check_run(run, grid)
    if not isinstance(by, str):
        check_function("by", by, ("carry", "output"), "a name or function", "such as by='loss'")
    race = _first(grid, rungs, eta, check_choice("mode", mode, ("min", "max")))
    planned = race.planned()
    file = None if checkpoint_to is None else File(file_path(checkpoint_to, "checkpoint_to"), shard)
    resume = file.found(resume) if file else resume
    race = race if resume is None else _resumed(race, resume)
    if file:
        file.write(race.stopped())
    options: dict[str, Any] = {"chunk_size": chunk_size, "randomness": randomness, "shard": shard}
    with reporter(progress, planned, "member-step", int(race.steps.sum())) as report:
        try:
            while race.groups:
                for at, group in enumerate(race.groups):
                    if group.rung == race.rung:
                        options["checkpoint_to"] = file.chunks(race.rung, at) if file else None
                        race = _climbed(race, at, partial(_part, run, by, race.rungs), options, report)
                race = _judged(race)
                if file:
                    file.write(race.stopped())
        except SweepInterrupted as interrupt:
            stopped = race._replace(inner=interrupt).stopped()
            if file:
                file.write(stopped)
            for note in getattr(interrupt, "__notes__", []):
                stopped.add_note(note)
            if file:
                stopped.add_note(f"gdfunc: {file.path} holds it too, and the same call goes on from it")
            raise stopped from interrupt
    whole = joined(grid, race.pieces)
    rest = {name: getattr(race, name) for name in ("rungs", "steps", "scores", "ranking", "finals")}
    return HalvingResult(**vars(whole) | {"diverged": race.diverged}, **rest)


class _Group(NamedTuple):
    """Members that run as one vmap, after equally many steps."""

    members: list[int]
    rung: int  # how many they have climbed
    carry: Tree  # leaves [n, ...]; None before the first step
    output: Tree  # leaves [n, ...], of all steps so far

    def part(self, places: list[int]) -> "_Group":
        rows = _tree.map(lambda leaf: leaf[places], (self.carry, self.output))
        return _Group([self.members[i] for i in places], self.rung, *rows)

    def carry_of(self, member: int) -> Tree:
        return _tree.map(lambda leaf: leaf[self.members.index(member)].clone(), self.carry)


class _Race(NamedTuple):
    """A halving, as far as it is done."""

    grid: Grid
    points: str  # the digest of the grid
    rungs: list[int]
    eta: float
    mode: str
    rung: int  # how many were judged
    groups: list[_Group]  # the members that are left
    pieces: list[Piece]  # the outputs of the others
    steps: Tensor  # int64 [N], that each member has taken
    scores: Tensor  # float64 [N, R]
    diverged: Tensor  # bool [N]
    ranking: list[int]  # of the others
    finals: dict[int, Tree]
    inner: SweepInterrupted | None  # of the group that was interrupted

    @property
    def members(self) -> list[int]:
        return sorted(member for group in self.groups for member in group.members)

    def stopped(self) -> HalvingInterrupted:
        return HalvingInterrupted(rungs=self.rung, members=self.members, done=self)

    def left(self, members: int) -> int:
        """Return how many of these go on."""
        return max(1, int(members // self.eta))

    def planned(self) -> int:
        """Count the member-steps if none diverges."""
        members, count = len(self.grid), 0
        for first, last in zip([0, *self.rungs], self.rungs, strict=False):
            members, count = self.left(members), count + members * (last - first)
        return count


def _first(grid: Grid, rungs: Sequence[int], eta: Any, mode: str) -> _Race:
    """Check the rungs; all members stand before the first."""
    rungs = [check_int(f"rungs[{i}]", rung, 1) for i, rung in enumerate(rungs)]
    if not rungs or any(a >= b for a, b in pairwise(rungs)):
        raise ValueError(f"rungs must be numbers of steps that increase, such as [10, 30, 90]; got {rungs}")
    if not isinstance(eta, int | float) or not 1 < eta < math.inf:
        raise ValueError(f"eta must be a number > 1: of so many members one goes on; got {eta!r}")
    groups, n = [_Group(members, 0, None, None) for members in grid.groups()], len(grid)
    steps, diverged = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.bool)
    scores = torch.full((n, len(rungs)), math.nan, dtype=torch.float64)
    return _Race(grid, digest(grid), rungs, eta, mode, 0, groups, [], steps, scores, diverged, [], {}, None)


def _resumed(race: _Race, resume: Any) -> _Race:
    """Check that a halving can go on where another run of it was interrupted."""
    check_type("resume", resume, HalvingInterrupted, "pass the one that was raised")
    done = resume.done
    for name in ("rungs", "eta", "mode"):
        if getattr(done, name) != getattr(race, name):
            raise ValueError(
                f"resume is of a halving with {name}={getattr(done, name)!r}; got {getattr(race, name)!r}"
            )
    if done.points != race.points:
        raise ValueError(f"resume is of a halving of another grid, {done.grid}; got {race.grid}")
    return done._replace(grid=race.grid)


def _check_run(run: Any, grid: Grid) -> None:
    """Refuse a function that does not take the axes, the steps and the carry by name."""
    for name in ("steps", "carry"):
        if name in grid.axes:
            raise ValueError(f"the grid has an axis {name}, which halving gives to run; use another name")
    if not callable(run):
        raise TypeError(f"run is {type(run).__name__}, not a function (**point, steps, carry)")
    names = [*grid.axes, "steps", "carry"]
    try:
        inspect.signature(run).bind(**dict.fromkeys(names))
    except TypeError as error:
        taken = ", ".join(inspect.signature(run).parameters)
        raise TypeError(f"run takes ({taken}), but is called with {', '.join(names)}: {error}") from None


def _part(
    run: Callable[..., Any], by: Any, rungs: list[int], steps: slice, carry: Tree = None, **point: Any
) -> tuple[Tree, Tree, Tensor]:
    """Take some steps of a member; return its carry, its output, and what it is judged by."""
    pair = run(**point, steps=steps, carry=carry)
    if not isinstance(pair, tuple) or len(pair) != 2 or pair[0] is None:
        raise TypeError(f"run must return (carry, output), as train does; got {shown(pair)}")
    carry, output = pair
    if isinstance(output, Trajectory):
        records = vars(output)
        if "steps" in records:
            raise ValueError("run has stop=, whose memory would begin again at each rung; leave it out")
        _check_rungs(rungs, steps, records)
        counts = {name: records[name] + steps.start for name in ("step", "evaluated") if name in records}
        output = Trajectory(**records | counts)
    return carry, output, _score(by, carry, output)


def _check_rungs(rungs: list[int], steps: slice, records: dict[str, Any]) -> None:
    """Refuse rungs after which the next part of a run would not record what a whole run does."""
    step, evaluated = records.get("step", ()), records.get("evaluated", ())
    every = int(step[1]) if len(step) > 1 else 1
    block = int(evaluated[0]) if len(evaluated) else 1
    count = -(-(steps.stop - steps.start) // every)
    if len(step) > 1 and len(step) != count:
        raise ValueError(
            f"from rung {steps.start} to {steps.stop} run records {len(step)} steps instead of {count}: "
            f"rungs are numbers of train's steps, and run takes those of its argument, as in index[steps]"
        )
    for name, size in (("every", every), ("evaluate_every", block)):
        for i, rung in enumerate(rungs[:-1]):
            if rung % size:
                raise ValueError(
                    f"rungs[{i}] is {rung}, no multiple of {name}={size} of run's train: after that rung "
                    f"other steps would be recorded than in a whole run; use one such as "
                    f"{-(-rung // size) * size}"
                )


def _score(by: Any, carry: Tree, output: Tree) -> Tensor:
    """Return what is judged, 0-d."""
    if isinstance(by, str):
        records = {dotted(path): leaf for path, leaf in _tree.named_leaves(output, "")}
        if by not in records:
            raise ValueError(f"run's output has no record {by!r}; it has {', '.join(map(repr, records))}")
        value = records[by]
        if isinstance(value, Tensor) and 0 in value.shape[:1]:
            raise ValueError(
                f"the record {by!r} is empty in a part of the run, so no member can be judged by it; "
                f"record or evaluate at least once between two rungs"
            )
        value = value[-1] if isinstance(value, Tensor) and value.ndim else value
    else:
        value = by(carry, output)
    value = torch.as_tensor(value) if isinstance(value, Real) else value
    if not isinstance(value, Tensor) or value.ndim or value.is_complex():
        raise TypeError(f"members are judged by a 0-d real number, but by={shown(by)} gives {shown(value)}")
    return value.double()


def _climbed(
    race: _Race, at: int, part: Callable[..., Any], options: dict[str, Any], report: Callable[[int], Any]
) -> _Race:
    """Let a group go on to the next rung."""
    group, taken = race.groups[at], int(race.steps.sum())
    first, last = [0, *race.rungs][race.rung : race.rung + 2]
    points = race.grid.part(group.members)
    if group.rung:
        carries = Axis(group.carry, True, list(range(len(points))))
        points = Grid({**points.axes, "carry": carries}, True)

    def told(members: int, _: int) -> None:
        report(taken + members * (last - first))

    try:
        result = sweep(
            partial(part, steps=slice(first, last)), points, progress=told, resume=race.inner, **options
        )
    except RankError as error:
        error.add_note(f"gdfunc: in the halving, where these members were left: {group.members}")
        raise
    carry, output, scores = result.outputs
    steps, all_scores, diverged = race.steps.clone(), race.scores.clone(), race.diverged.clone()
    steps[group.members] = last
    all_scores[group.members, race.rung] = scores.cpu()
    diverged[group.members] = result.diverged
    new = _Group(group.members, group.rung + 1, carry, _continued(group.output, output))
    groups = [*race.groups[:at], new, *race.groups[at + 1 :]]
    return race._replace(groups=groups, steps=steps, scores=all_scores, diverged=diverged, inner=None)


def _continued(before: Tree, output: Tree) -> Tree:
    """Continue the records [n, t, ...]; of a leaf [n] the last counts."""
    if before is None:
        return output
    return _tree.map(lambda old, new: torch.cat([old, new], dim=1) if old.ndim > 1 else new, before, output)


def _judged(race: _Race) -> _Race:
    """Drop the members that diverged and the worst of the others; after the last rung all leave."""
    sign, scores = 1 if race.mode == "min" else -1, race.scores[:, race.rung].tolist()
    diverged = [member for member in race.members if race.diverged[member]]
    order = sorted({*race.members} - {*diverged}, key=lambda member: (sign * scores[member], member))
    is_last = race.rung + 1 == len(race.rungs)
    left = [] if is_last else order[: race.left(len(race.members))]
    groups, pieces = [], [*race.pieces]
    finals: dict[int, Tree] = {}
    for group in race.groups:
        places = range(len(group.members))
        stay = [i for i in places if group.members[i] in left]
        leave = [i for i in places if group.members[i] not in left]
        if stay:
            groups.append(group.part(stay))
        if leave:
            leaving = group.part(leave)
            pieces.append(_piece(race, leaving))
            winners = [member for member in leaving.members if is_last and member in order]
            finals |= {member: leaving.carry_of(member) for member in winners}
    others = [member for member in order if member not in left]
    return race._replace(
        rung=race.rung + 1,
        groups=groups,
        pieces=pieces,
        ranking=[*others, *diverged, *race.ranking],
        finals=finals,
    )


def _piece(race: _Race, group: _Group) -> Piece:
    """Turn the members that leave into a part of the result."""
    sizes = {
        dotted(path): leaf.shape[1] for path, leaf in _tree.named_leaves(group.output, "") if leaf.ndim > 1
    }
    lengths = {name: torch.full((len(group.members),), size) for name, size in sizes.items()}
    name = race.grid.place(group.members)
    return Piece(group.members, name, group.output, lengths, race.diverged[group.members])
