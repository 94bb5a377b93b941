"""From a user's scan to the primitive and back: flat lists in, trees out."""

from collections.abc import Callable

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .. import _tree
from .._errors import BackendError, untraceable
from .._tree import Tree
from . import _auto, _cudagraph, _inductor, _replay, native
from ._auto import step_back as step_back
from ._primitive import Loop, Runner, checkpointed
from ._scan import Read, check_step, within
from ._trace import trace

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
    """Trace the user's function, with the checks around it, and run the loop over what was traced."""
    token = within.set(backend)
    try:
        traced = trace(f, body, init, xs, read and read())
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
    carry, structure = _tree.flatten(init)
    loop = Loop(traced.body, length, RUNNERS[backend], reverse, unroll)
    tensors = [traced.closed_over, carry, _tree.leaves(xs)]
    if get_proxy_mode() is not None:
        tensors = [[_shown(leaf) for leaf in leaves] for leaves in tensors]
    results = loop(*tensors) if checkpoint is None else checkpointed(loop, checkpoint, *tensors)
    ys = results[len(carry) :]
    return _tree.unflatten(structure, results[: len(carry)]), _tree.unflatten(traced.y_structure, ys)


def _shown(leaf: Tensor) -> Tensor:
    """Let the trace under way find a tensor from outside of it: it sees what an operation is given."""
    return leaf if is_fake(leaf) else leaf.view_as(leaf)
