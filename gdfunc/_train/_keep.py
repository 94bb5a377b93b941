"""The files of a run: what is done of it, written between segments, and found again."""

import os
import re
import time
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import _tree
from .._errors import TrainingInterrupted, check_int, warn
from .._shown import shown
from .._torch._modes import is_tracing
from .._torch._transforms import is_transforming
from ..checkpoint import CheckpointError, check_known, opened, save
from ..checkpoint._file import file_path
from . import _probe as probe
from ._batches import RowsDigest
from ._done import NO_WAY_BACK, Done
from ._plan import Plan

_ADDRESS = re.compile(" at 0x[0-9a-fA-F]+")  # of an object, which is another in each process
_SECONDS = 60.0  # between two files, unless the steps between them are given


class Kept(NamedTuple):
    """The file of a run, and how often it is written.

    Attributes:
        path: the file.
        every: at least so many steps lie between two files; None for about a minute.
        keep: how many files there are: the last, and those before it under the number of their step.
    """

    path: Path
    every: int | None
    keep: int


def kept(path: str | PathLike[str] | None, every: int | None, keep: int) -> Kept | None:
    """Check where a run is to be written."""
    if path is None:
        if every is not None or keep != 1:
            raise ValueError("checkpoint_every and checkpoint_keep need checkpoint_to, the path of a file")
        return None
    if is_transforming() or is_tracing():
        raise ValueError(
            "checkpoint_to writes files, which a run inside vmap, grad, jvp or jit cannot, because it has "
            "no values there; leave it out, and save what the whole returns"
        )
    every = None if every is None else check_int("checkpoint_every", every, 1)
    return Kept(file_path(path, "checkpoint_to"), every, check_int("checkpoint_keep", keep, 1))


def found(where: Kept, plan: Plan, resume: Any) -> TrainingInterrupted | None:
    """Return the run that is on disk, if there is one; refuse another run.

    Raises:
        CheckpointError: the file is damaged, or of another run.
        ValueError: there is a file, and `resume` besides.
    """
    if plan.batches.go_on is None:
        raise ValueError(NO_WAY_BACK.format("checkpoint_to"))
    if not where.path.exists():
        return resume
    if resume is not None:
        raise ValueError(f"both resume= and {where.path} hold a run; pass one, or remove the file")
    with opened(where.path) as whole:
        parts = whole.parts()
        if "run" not in parts:
            raise CheckpointError("it holds no run of gd.train(..., checkpoint_to=)")
        step, written = parts["step"].build(), parts["run"].build()
        differences = _differences(written, _description(plan, step, RowsDigest(plan.lrs)))
        try:
            state = parts["state"].build(plan.state)
        except CheckpointError as error:
            differences.append(str(error))
        values = parts["values"].build()
        if not differences:
            measured = parts["measured"].build() | probe.last(plan, step, values)
            differences = probe.differences(measured, lambda: probe.measure_all(plan, state))
        if differences:
            raise CheckpointError(
                f"{'; '.join(differences)}: pass what was passed then, or remove the file"
            )
        done = Done(
            step=step,
            state=state,
            backend=parts["backend"].build(),
            records=parts["records"].build(),
            values=values,
            source=parts["source"].build(),
        )
        written_by = parts["torch"].build()
    if written_by != str(torch.__version__):
        warn(
            f"{where.path} was written under torch {written_by}, and this is {torch.__version__}: the run "
            f"goes on, but its bits may differ from those of a run that was not stopped"
        )
    return TrainingInterrupted(step=step, state=None, trajectory=None, done=done)


def _differences(written: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """Say in what another run differs."""
    said = []
    for name in (name for name in own if written.get(name) != own[name]):
        if name in ("data", "index", "lr"):
            until = "" if name == "data" else " up to the step where it stopped"
            said.append(f"its {name} is not that of this run{until}")
        else:
            said.append(f"its {name} is {written.get(name)}, but that of this run is {own[name]}")
    return said


def _description(plan: Plan, step: int, of_lrs: Callable[[int], str]) -> dict[str, Any]:
    """Describe a run by what its first steps depend on."""
    return {**settings(plan), **plan.batches.fingerprint(step), "lr": of_lrs(step)}


def settings(plan: Plan) -> dict[str, Any]:
    """Describe what a run does in every step."""
    body = plan.body
    return {
        "step": _ADDRESS.sub("", shown(plan.given)),
        "record": [*body.recorders],
        "every": plan.every,
        "evaluate": [*body.evaluators],
        "evaluate_every": plan.block,
        "stop": _ADDRESS.sub("", shown(body.stop)),
        "check_finite": body.check_finite,
    }


class Keeper:
    """Writes what is done of a run.

    Attributes:
        step: after how many steps it was last written; None before that.
        written: when this process last wrote it; None before that.
        failure: why it could not be written the last time.
        mark: of the file that this process read or wrote; another's has another.
    """

    def __init__(self, where: Kept, plan: Plan, step: int | None) -> None:
        self.where, self.plan, self.step = where, plan, step
        self.written: float | None = None
        self.failure: BaseException | None = None
        self.mark = _mark(where.path)
        self.of_lrs = RowsDigest(plan.lrs)

    def __call__(self, done: Done) -> None:
        """Write what is done if it is time."""
        if self.written is None:  # at once, so that a path that cannot be written is told at the start
            self.write(done)
        elif self.where.every is not None:
            if done.step // self.where.every > (self.step or 0) // self.where.every:
                self.try_to_write(done)
        elif time.monotonic() - self.written > _SECONDS:
            self.try_to_write(done)

    def try_to_write(self, done: Done) -> None:
        """Write what is done; a disk that is full costs a file, not the run."""
        try:
            self.write(done)
        except OSError as error:
            warn(f"the run goes on without a file of step {done.step}: {error}")
            self.written = time.monotonic()

    def save_from(self, error: BaseException, done: Done) -> None:
        """Write what is done before an error, which tells where it is."""
        if done.records and error is not self.failure:
            self.try_to_write(done)
            if self.step is not None:
                error.add_note(f"gdfunc: {self.where.path} holds the run after {self.step} steps")

    def write(self, done: Done) -> None:
        """Write what is done, unless the file has it."""
        if done.step == self.step:
            return
        tree = {
            "run": _description(self.plan, done.step, self.of_lrs),
            "measured": probe.measure(self.plan, done.state),
            "torch": str(torch.__version__),
            "step": done.step,
            "backend": done.backend,
            "state": done.state,
            "records": (_tree.cat(done.records),),
            "values": (_tree.cat(done.values),) if done.values else (),
            "source": done.source,
        }
        path = self.where.path
        try:
            if _mark(path) not in (None, self.mark):
                raise OSError(
                    f"{path} was written by another process since; give each run a file of its own"
                )
            if self.written is None:
                check_known({name: tree[name] for name in ("records", "values")})
            try:
                save(path, tree)
            finally:  # because Ctrl-C may come when the file has taken its place
                self.mark = _mark(path)
            if self.where.keep > 1:
                self._keep_earlier(tree)
        except Exception as error:
            self.failure = error
            raise
        self.step, self.written = done.step, time.monotonic()

    def _keep_earlier(self, tree: dict[str, Any]) -> None:
        """Keep the file under the number of its step too, and remove the oldest of these."""
        path = self.where.path
        numbered = path.with_name(f"{path.stem}.{tree['step']:012}{path.suffix}")
        numbered.unlink(missing_ok=True)
        try:
            os.link(path, numbered)  # a second name, because each file that follows is a new one
        except OSError:  # of a file system without links
            save(numbered, tree)
        is_earlier = re.compile(rf"{re.escape(path.stem)}\.[0-9]{{12}}{re.escape(path.suffix)}")
        earlier = sorted(old for old in path.parent.iterdir() if is_earlier.fullmatch(old.name))
        for old in earlier[: -self.where.keep]:
            old.unlink(missing_ok=True)


def _mark(path: Path) -> tuple[int, int] | None:
    """Tell one file at a path from another."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
