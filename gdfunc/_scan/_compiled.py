"""From a user's scan to the primitive and back: flat lists in, trees out."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import _tree
from .._errors import BackendError, untraceable
from .._torch._graphs import tracer
from .._torch._modes import has_no_value
from .._tree import Tree
from ._loop import Loop, Runner, checkpointed
from ._scan import Read, check_step, within
from .backends import _auto, _cudagraph, _inductor, _replay, native
from .backends._auto import step_back as step_back
from .trace._trace import Traced, trace

RUNNERS: dict[str, Runner] = {
    "eager": _replay.run,
    "native": native.run,
    "inductor": _inductor.run,
    "cudagraph": _cudagraph.run,
    "auto": _auto.run,
    "brief": _auto.run_brief,
}


def run(
    f: Callable[..., tuple[Tree, Tree]],
    body: Callable[..., tuple[Tree, Tree]],
    init: Tree,
    xs: Tree,
    length: int,
    reverse: bool,
    unroll: int,
    backend: str,
    checkpoint: int | None,
    read: Read | None,
) -> tuple[Tree, Tree]:
    """Run the loop over what was traced of the user's function."""
    traced = _traced(f, body, init, xs, backend, read)
    carry, structure = _tree.flatten(init)
    loop = Loop(traced.body, length, RUNNERS[backend], reverse, unroll)
    tensors = _shown(traced.closed_over, carry, _tree.leaves(xs))
    results = loop(*tensors) if checkpoint is None else checkpointed(loop, checkpoint, *tensors)
    ys = results[len(carry) :]
    return _tree.unflatten(structure, results[: len(carry)]), _tree.unflatten(traced.y_structure, ys)


def call(f: Callable[[], Tree], backend: str) -> Tree:
    """Run a function of nothing, as the one step of a loop."""
    traced = _traced(f, lambda carry, x: (carry, f()), None, None, backend)
    ys = Loop(traced.body, 1, RUNNERS[backend])(*_shown(traced.closed_over, [], []))
    return _tree.unflatten(traced.y_structure, [y.squeeze(0) for y in ys])


def _traced(
    f: Callable[..., Any],
    body: Callable[..., tuple[Tree, Tree]],
    init: Tree,
    xs: Tree,
    backend: str,
    read: Read | None = None,
) -> Traced:
    """Trace the user's function, with the checks around it, within the trace of this backend."""
    token = within.set(backend)
    try:
        return trace(f, body, init, xs, read and read())
    except (BackendError, ValueError):
        raise
    except Exception as error:
        within.set(None)
        check_step(body, init, xs)  # a mistake in f reads better on real tensors
        raise untraceable(
            f"f cannot be traced ({type(error).__name__}: {[*str(error).splitlines(), ''][0]})"
        ) from error
    finally:
        within.reset(token)


def _shown(*tensors: list[Tensor]) -> Sequence[list[Tensor]]:
    """Let a trace under way find tensors from outside of it: it sees what an operation is given."""
    if tracer() is None:
        return tensors
    return [[leaf if has_no_value(leaf) else leaf.view_as(leaf) for leaf in leaves] for leaves in tensors]
