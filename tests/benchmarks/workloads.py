"""What is timed: the problems, and how gdfunc solves them on each of its backends.

A run takes a size (the number of steps, or of samples) and returns its results: the losses, or a dict of
gradients. It runs where its problem lies. gdfunc's backends are taken from where they are listed, so a new
one is measured with no change here.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map_only

import gdfunc as gd
from gdfunc._scan._scan import BACKENDS

Run = Callable[[int], Any]


class Problem(NamedTuple):
    """A loss and what to train it on; `name` finds the same loss among the peers."""

    name: str
    loss_fn: Callable[[Any, Any], Tensor]
    params: dict[str, Tensor]
    data: tuple[Tensor, Tensor]
    index: Tensor | None = None
    lr: float | Tensor | None = None
    clip: float | None = None  # the mean of clipped per-sample gradients is wanted, not these
    method: str = "sgd"  # or "adam", or "per-sample": sgd along the mean of per-sample gradients

    @property
    def device(self) -> torch.device:
        return self.data[0].device

    def to(self, device: str) -> "Problem":
        """The same problem with all its tensors on that device."""
        return tree_map_only(Tensor, lambda leaf: leaf.to(device), self)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def regression(steps: int) -> Problem:
    """W1: 100 rows, 1 feature, batches of 10."""

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return ((x @ params["w"] + params["b"] - y) ** 2).mean()

    x = normal(0, 100, 1)
    data = x, 3 * x + 2 + 0.1 * normal(1, 100, 1)
    index = gd.sample_batches(gd.random.key(0), n=100, batch_size=10, steps=steps)
    return Problem("regression", loss_fn, {"w": torch.zeros(1, 1), "b": torch.zeros(1)}, data, index, 0.01)


@cache
def digits(steps: int, method: str = "sgd", batch_size: int = 32) -> Problem:
    """W2: the 1797 digits, an MLP 64-64-10, batches of 32."""
    net = network("mlp", 64, 64, 10)
    apply, params, _ = gd.modules.functional(net)
    x, y = gd.datasets.digits(dtype=torch.float32)[:2]
    index = gd.sample_batches(gd.random.key(0), n=len(x), batch_size=batch_size, steps=steps)

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(apply(params, batch[0]), batch[1])

    lr = 1e-3 if method == "adam" else 0.1
    return Problem("mlp", loss_fn, params, (x, y), index, lr, method=method)


@cache
def digits_cnn(steps: int) -> Problem:
    """W12: the digits as images, the small CNN, batches of 64."""
    apply, params, _ = gd.modules.functional(network("cnn", 64))
    x, y = gd.datasets.digits(dtype=torch.float32)[:2]
    index = gd.sample_batches(gd.random.key(0), n=len(x), batch_size=64, steps=steps)

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(apply(params, batch[0]), batch[1])

    return Problem("cnn", loss_fn, params, (x.reshape(-1, 1, 8, 8), y), index, 0.1)


def sweep(models: int, steps: int) -> Problem:
    """W3: the digits for many learning rates at once."""
    return digits(steps)._replace(lr=torch.logspace(-3, -0.5, models))


def network(name: str, *sizes: int) -> nn.Sequential:
    """An MLP of these sizes, or the small CNN: two strided 3 × 3 convolutions and two linear layers.

    The first size is the number of pixels, of a square image for the CNN.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "mlp":
            pairs = pairwise(sizes)
            layers = [layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())]
            return nn.Sequential(*layers[:-1])
        convolutions = nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()
        side = -(-math.isqrt(sizes[0]) // 4)
        linear = nn.Flatten(), nn.Linear(32 * side**2, 32), nn.ReLU(), nn.Linear(32, 10)
        return nn.Sequential(*convolutions, *linear)


def images(name: str) -> nn.Sequential:
    """W4's network of that name, for images of 28 × 28."""
    return network(name, 784, 256, 256, 10)


def per_sample(name: str, batch_size: int) -> Problem:
    """W4: an MLP 784-256-256-10 or the CNN, on one batch of noise."""
    apply, params, _ = gd.modules.functional(images(name))

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(apply(params, batch[0]), batch[1])

    shape = (784,) if name == "mlp" else (1, 28, 28)
    labels = torch.randint(10, (batch_size,), generator=torch.Generator().manual_seed(3))
    return Problem(name, loss_fn, params, (normal(2, batch_size, *shape), labels))


def clipped(name: str, batch_size: int) -> Problem:
    """W5: the mean of W4's gradients, each clipped to norm 1."""
    return per_sample(name, batch_size)._replace(clip=1.0)


def backends(device: torch.device | str) -> tuple[str, ...]:
    """Who can run a loop there; `auto` is left out, as it only chooses one of the others."""
    absent = {"auto"} if torch.device(device).type == "cuda" else {"auto", "cudagraph"}
    return tuple(name for name in BACKENDS if name not in absent)


def ours(problem: Problem) -> dict[str, Run]:
    """gdfunc on each backend: `gd.train` along the problem's plan; without one, per-sample gradients."""
    run = gradient_run(problem) if problem.index is None else training_run(problem)
    runs = {f"gdfunc {backend}": partial(run, backend) for backend in backends(problem.device)}
    if problem.method == "adam":  # whose averages of what stays zero become denormal
        runs["gdfunc native, flush to zero"] = flushed(runs["gdfunc native"])
    return runs


def flushed(run: Run) -> Run:
    """The same with 0 for all denormal numbers, as JAX has it on a CPU at all times."""

    def flushing(size: int) -> Any:
        torch.set_flush_denormal(True)
        try:
            return run(size)
        finally:
            torch.set_flush_denormal(False)

    return flushing


def stepping(problem: Problem) -> tuple[Callable[..., Any], Any]:
    """The problem's step, and the state that it begins with."""
    if problem.method == "adam":
        transform = gd.adam()
        step = gd.make_step(problem.loss_fn, transform)
        return step, step.init(problem.params)
    if problem.method == "per-sample":
        gradients = gd.per_sample_grad(problem.loss_fn)

        def averaged(params: dict[str, Tensor], batch: Any, lr: Any) -> tuple[dict[str, Tensor], Tensor]:
            grads, losses = gradients(params, batch)
            means = {name: leaf.mean(0) for name, leaf in grads.items()}
            return gd.apply_updates(params, means, lr), losses.mean()

        return averaged, problem.params
    return gd.make_step(problem.loss_fn), problem.params


def training_run(problem: Problem) -> Callable[[str, int], Tensor]:
    """`gd.train`, under vmap where lr holds several rates."""
    step, init = stepping(problem)

    def run(backend: str, steps: int) -> Tensor:
        def losses(lr: float | Tensor) -> Tensor:
            index = problem.index[:steps]
            return gd.train(step, init, problem.data, index, lr, backend=backend)[1].loss

        return vmap(losses)(problem.lr) if isinstance(problem.lr, Tensor) else losses(problem.lr)

    return run


ADJOINTS = {
    "reverse": gd.adjoints.Reverse(),
    "checkpoint": gd.adjoints.Checkpoint("sqrt"),
    "forward": gd.adjoints.Forward(),
}


def final_loss(problem: Problem, backend: str, steps: int) -> Callable[..., Tensor]:
    """W6: the loss on all data after a run, as a function of its learning rate."""
    loss_fn, init, data, index = problem.loss_fn, problem.params, problem.data, problem.index[:steps]
    step = gd.make_step(loss_fn)

    def run(lr: Tensor, adjoint: Any = ADJOINTS["reverse"]) -> Tensor:
        params, _ = gd.train(step, init, data, index, lr, backend=backend, record=(), adjoint=adjoint)
        return loss_fn(params, data)

    return run


def hypergradients(problem: Problem, mode: str) -> dict[str, Run]:
    """The derivative of that loss on each backend, or with mode `"value"` the loss itself.

    Natively the derivative is compiled as a whole, as JAX's is; each function is made once, as JAX's is.
    """
    lr = torch.tensor(problem.lr)

    @cache
    def made(backend: str, steps: int) -> Callable[[Tensor], Any]:
        f = final_loss(problem, backend, steps)
        if mode == "value":
            return f
        gradient = gd.hypergrad(f, adjoint=ADJOINTS[mode])
        return gd.jit(gradient, backend="native") if backend == "native" else gradient

    def run(backend: str, steps: int) -> Tensor:
        result = made(backend, steps)(lr)
        return result if mode == "value" else result.grads

    return {f"gdfunc {backend}": partial(run, backend) for backend in backends(problem.device)}


def gradient_run(problem: Problem) -> Callable[[str, int], dict[str, Tensor]]:
    """`gd.per_sample_grad` or what W5 makes of it."""
    gradients = gd.per_sample_grad(problem.loss_fn)
    if problem.clip is not None:
        total = gd.reduce_per_sample(
            problem.loss_fn, gd.reducers.clipped_sum(problem.clip), chunk_size=None
        )

    def once(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        if problem.clip is None:
            return gradients(params, batch)[0]
        return {name: leaf / len(batch[0]) for name, leaf in total(params, batch)[0].items()}

    return one_step(problem, once)


def statistics(problem: Problem, reducer: str) -> dict[str, Run]:
    """A streamed reduction of W4's gradients on each backend."""
    reduced = gd.reduce_per_sample(
        problem.loss_fn, {reducer: getattr(gd.reducers, reducer)()}, chunk_size=None
    )

    def once(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        result = reduced(params, batch)[0]
        return result[reducer] if isinstance(result[reducer], dict) else result

    run = one_step(problem, once)
    return {f"gdfunc {backend}": partial(run, backend) for backend in backends(problem.device)}


def one_step(problem: Problem, once: Callable[..., dict[str, Tensor]]) -> Callable[[str, int], Any]:
    """A function of a batch; on a backend other than eager it runs in a scan of one step."""

    def run(backend: str, size: int) -> dict[str, Tensor]:
        batch = tuple(leaf[:size] for leaf in problem.data)
        if backend == "eager":
            return once(problem.params, batch)
        rows = tuple(leaf[None] for leaf in batch)
        scanned = gd.scan(
            lambda params, x: (params, once(params, x)), problem.params, rows, backend=backend
        )
        return {name: leaf[0] for name, leaf in scanned[1].items()}

    return run
