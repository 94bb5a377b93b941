"""The same work in other hands. No peer is a dependency; each is imported where it is used."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad, grad_and_value, jvp, vmap
from torch.utils._pytree import tree_map, tree_map_only

from .workloads import Problem, Run, images

JAX = "JAX jit(scan) + Optax"
JAX_GRADIENTS = "JAX jit(vmap(grad))"
JAX_SCAN = "JAX jit(scan)"
BY_HAND = "hand-written C"
PACKAGES = {  # module -> (distribution, the peers that need it)
    "jax": ("jax", (JAX, JAX_GRADIENTS, JAX_SCAN)),
    "optax": ("optax", (JAX,)),
    "opacus": ("opacus", ("Opacus hooks", "Opacus ghost clipping")),
    "backpack": ("backpack-for-pytorch", ("BackPACK",)),
}

# Beside torch on a GPU: take memory as it is needed, and multiply float32 as float32.
JAX_SETTINGS = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}


def versions() -> dict[str, str]:
    """The versions of the packages that are installed."""
    return {name: version(dist) for name, (dist, _) in PACKAGES.items() if find_spec(name)}


def preload(peer: str) -> None:
    """Import what a peer needs, so that its import is not timed."""
    os.environ |= JAX_SETTINGS
    for name, (_, peers) in PACKAGES.items():
        if peer in peers:
            import_module(name)


@cache
def missing(peer: str, device: str = "cpu") -> str:
    """Why a peer cannot run there: a package that is not installed, or that knows no such device."""
    if peer == BY_HAND and not shutil.which("gcc"):
        return "needs gcc"
    numpys = np.random.get_state()  # noqa: NPY002  imports draw from it
    try:
        preload(peer)
        if peer in PACKAGES["jax"][1]:
            import_module("jax").devices(device)
    except (ImportError, RuntimeError) as error:
        return str(error)
    finally:
        np.random.set_state(numpys)  # noqa: NPY002
    return ""


def torch_optim(problem: Problem) -> Run:
    """The loop of the tutorials, one run after the other."""

    def once(lr: float, steps: int) -> Tensor:
        params = {name: leaf.clone().requires_grad_() for name, leaf in problem.params.items()}
        rule = torch.optim.Adam if problem.method == "adam" else torch.optim.SGD
        optimizer = rule(params.values(), lr=lr)
        x, y = problem.data
        losses = []
        for rows in problem.index[:steps]:
            optimizer.zero_grad()
            loss = problem.loss_fn(params, (x[rows], y[rows]))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    def run(steps: int) -> Tensor:
        if isinstance(problem.lr, Tensor):
            return torch.stack([once(lr, steps) for lr in problem.lr.tolist()])
        return once(problem.lr, steps)

    return run


def torch_func(problem: Problem) -> Run:
    """A step on torch.func by hand, under vmap where lr holds several rates."""
    gradient = grad_and_value(problem.loss_fn)
    if problem.method == "per-sample":
        each = partial(vmap, in_dims=(None, 0, 0))
        gradient = averaged(lambda f: each(grad_and_value(f)), tree_map, problem.loss_fn)

    def step(params: dict[str, Tensor], batch: Any, lr: Any) -> tuple[dict[str, Tensor], Tensor]:
        grads, loss = gradient(params, batch)
        return {name: params[name] - lr * grads[name] for name in params}, loss

    def run(steps: int) -> Tensor:
        params, advance = problem.params, step
        if isinstance(problem.lr, Tensor):
            models = len(problem.lr)
            params = {name: leaf.expand(models, *leaf.shape) for name, leaf in params.items()}
            advance = vmap(step, in_dims=(0, None, 0))
        x, y = problem.data
        losses = []
        for rows in problem.index[:steps]:
            params, loss = advance(params, (x[rows], y[rows]), problem.lr)
            losses.append(loss)
        return torch.stack(losses, dim=-1)

    return run


def averaged(each: Callable[[Any], Any], tree_map: Any, loss_fn: Any) -> Callable[[Any, Any], Any]:
    """The gradients of all samples and their losses, then the mean of each."""
    gradients = each(lambda params, x, y: loss_fn(params, (x[None], y[None])))
    return lambda params, batch: tree_map(lambda leaf: leaf.mean(0), gradients(params, *batch))


def hand_written(problem: Problem) -> Run:
    """W1 in C."""
    (x, y), params, index = problem.data, problem.params, problem.index
    source = Path(__file__).with_name("by_hand.c")
    with tempfile.TemporaryDirectory() as directory:
        made = f"{directory}/by_hand.so"
        flags = ["-O3", "-march=native", "-fPIC", "-shared", f"-DBATCH={index.shape[1]}"]
        subprocess.run(["gcc", *flags, str(source), "-o", made], check=True)
        train = ctypes.CDLL(made).train
    number, pointer = ctypes.c_float, ctypes.c_void_p
    train.argtypes = [ctypes.c_int64, pointer, pointer, pointer, number, number, number, pointer]

    def run(steps: int) -> Tensor:
        losses = torch.empty(steps)
        start = problem.lr, params["w"].item(), params["b"].item()
        train(steps, index.data_ptr(), x.data_ptr(), y.data_ptr(), *start, losses.data_ptr())
        return losses

    return run


def jax_loss(name: str) -> Callable[[Any, Any], Any]:
    """The losses of the workloads, in JAX."""
    import jax
    import optax

    def regression(params: Any, batch: Any) -> Any:
        x, y = batch
        return ((x @ params["w"] + params["b"] - y) ** 2).mean()

    def linear(params: Any, names: list[str], x: Any) -> Any:
        for name in names:
            x = x @ params[f"{name}.weight"].T + params[f"{name}.bias"]
            x = x if name == names[-1] else jax.nn.relu(x)
        return x

    def mlp(params: Any, batch: Any) -> Any:
        names = sorted({name.split(".")[0] for name in params})
        return cross_entropy(linear(params, names, batch[0]), batch[1])

    def cnn(params: Any, batch: Any) -> Any:
        x = batch[0]
        for name in ("0", "2"):
            x = jax.lax.conv_general_dilated(x, params[f"{name}.weight"], (2, 2), ((1, 1), (1, 1)))
            x = jax.nn.relu(x + params[f"{name}.bias"][:, None, None])
        return cross_entropy(linear(params, ["5", "7"], x.reshape(len(x), -1)), batch[1])

    def cross_entropy(logits: Any, labels: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return {"regression": regression, "mlp": mlp, "cnn": cnn}[name]


def in_jax(tree: Any) -> Any:
    """The same tree in JAX, each tensor on the device that it is on."""
    import jax

    def place(leaf: Tensor) -> Any:
        return jax.device_put(leaf.cpu().numpy(), jax.devices(leaf.device.type)[0])

    return tree_map_only(Tensor, place, tree)


def jax_optax(problem: Problem) -> Run:
    """One jitted scan, under vmap where lr holds several rates."""
    import jax
    import optax

    loss_fn, rule = jax_loss(problem.name), optax.adam if problem.method == "adam" else optax.sgd
    gradient = jax.value_and_grad(loss_fn)
    if problem.method == "per-sample":
        each = partial(jax.vmap, in_axes=(None, 0, 0))
        gradient = averaged(lambda f: each(jax.value_and_grad(f)), jax.tree.map, loss_fn)
    params, (x, y), lr = in_jax((problem.params, problem.data, problem.lr))
    plan = cache(lambda steps: in_jax(problem.index[:steps]))

    def losses(lr: Any, params: Any, x: Any, y: Any, index: Any) -> Any:
        optimizer = rule(lr)

        def step(carry: Any, rows: Any) -> Any:
            params, state = carry
            loss, grads = gradient(params, (x[rows], y[rows]))
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, optimizer.init(params)), index)[1]

    many = isinstance(problem.lr, Tensor)
    compiled = jax.jit(jax.vmap(losses, (0, None, None, None, None)) if many else losses)

    def run(steps: int) -> Any:
        return jax.block_until_ready(compiled(lr, params, x, y, plan(steps)))

    return run


def torch_func_hypergradient(problem: Problem, mode: str) -> Run:
    """The derivative of the final loss through a loop on torch.func."""
    gradient, (x, y) = grad(problem.loss_fn), problem.data

    def run(steps: int) -> Tensor:
        def final_loss(lr: Tensor) -> Tensor:
            params = problem.params
            for rows in problem.index[:steps]:
                grads = gradient(params, (x[rows], y[rows]))
                params = {name: params[name] - lr * grads[name] for name in params}
            return problem.loss_fn(params, problem.data)

        lr = torch.tensor(problem.lr)
        if mode == "value":
            return final_loss(lr)
        if mode == "forward":
            return jvp(final_loss, (lr,), (torch.ones_like(lr),))[1]
        return grad(final_loss)(lr)

    return run


def jax_hypergradient(problem: Problem, mode: str) -> Run:
    """The same through a jitted scan."""
    import jax

    loss_fn = jax_loss(problem.name)
    params, (x, y), lr = in_jax((problem.params, problem.data, problem.lr))
    plan = cache(lambda steps: in_jax(problem.index[:steps]))

    def final_loss(lr: Any, params: Any, x: Any, y: Any, index: Any) -> Any:
        def step(params: Any, rows: Any) -> Any:
            grads = jax.grad(loss_fn)(params, (x[rows], y[rows]))
            return jax.tree.map(lambda p, g: p - lr * g, params, grads), None

        return loss_fn(jax.lax.scan(step, params, index)[0], (x, y))

    def forward(lr: Any, *rest: Any) -> Any:
        return jax.jvp(lambda lr: final_loss(lr, *rest), (lr,), (1.0,))[1]

    compiled = jax.jit({"value": final_loss, "forward": forward}.get(mode, jax.grad(final_loss)))
    return lambda steps: jax.block_until_ready(compiled(lr, params, x, y, plan(steps)))


def vmap_grad(problem: Problem) -> Run:
    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return problem.loss_fn(params, (x[None], y[None]))

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))
    return lambda size: gradients(problem.params, *(leaf[:size] for leaf in problem.data))


def plain(problem: Problem) -> Run:
    """No per-sample gradients at all: what W5 is measured by."""
    gradient = grad_and_value(problem.loss_fn)
    return lambda size: gradient(problem.params, tuple(leaf[:size] for leaf in problem.data))[0]


def vmap_clip(problem: Problem) -> Run:
    gradients = vmap_grad(problem)

    def run(size: int) -> dict[str, Tensor]:
        grads = gradients(size)
        norms = torch.stack([leaf.flatten(1).norm(dim=1) for leaf in grads.values()]).norm(dim=0)
        factors = (problem.clip / norms).clamp(max=1) / size
        return {name: torch.tensordot(factors, leaf, 1) for name, leaf in grads.items()}

    return run


def opacus_ghost(problem: Problem) -> Run:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    net = GradSampleModuleFastGradientClipping(
        images(problem.name).to(problem.device), max_grad_norm=problem.clip, use_ghost_clipping=True
    )

    def run(size: int) -> dict[str, Tensor]:
        x, y = (leaf[:size] for leaf in problem.data)
        net.enable_hooks()
        losses = nn.functional.cross_entropy(net(x), y, reduction="none")
        losses.mean().backward(retain_graph=True)
        factors = (problem.clip / net.get_norm_sample()).clamp(max=1)
        for leaf in net.parameters():
            leaf.grad = None
        net.disable_hooks()
        (factors * losses).mean().backward()
        grads = {name.removeprefix("_module."): leaf.grad for name, leaf in net.named_parameters()}
        for leaf in net.parameters():
            leaf.grad = None
        return grads

    return run


def jax_vmap_grad(problem: Problem) -> Run:
    import jax

    loss = jax_loss(problem.name)
    params = in_jax(problem.params)
    batch = cache(lambda size: in_jax([leaf[:size] for leaf in problem.data]))
    gradients = jax.jit(
        jax.vmap(jax.grad(lambda params, x, y: loss(params, (x[None], y[None]))), (None, 0, 0))
    )
    return lambda size: jax.block_until_ready(gradients(params, *batch(size)))


def opacus(problem: Problem) -> Run:
    from opacus import GradSampleModule

    net = GradSampleModule(images(problem.name).to(problem.device), loss_reduction="sum")

    def run(size: int) -> dict[str, Tensor]:
        x, y = (leaf[:size] for leaf in problem.data)
        nn.functional.cross_entropy(net(x), y, reduction="sum").backward()
        grads = {name.removeprefix("_module."): leaf.grad_sample for name, leaf in net.named_parameters()}
        for leaf in net.parameters():
            leaf.grad = leaf.grad_sample = None
        return grads

    return run


def backpack(problem: Problem) -> Run:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    net = extend(images(problem.name).to(problem.device))
    loss_fn = extend(nn.CrossEntropyLoss(reduction="sum"))

    def run(size: int) -> dict[str, Tensor]:
        x, y = (leaf[:size] for leaf in problem.data)
        with backpack(BatchGrad()):
            loss_fn(net(x), y).backward()
        grads = {name: leaf.grad_batch for name, leaf in net.named_parameters()}
        for leaf in net.parameters():
            del leaf.grad, leaf.grad_batch
        return grads

    return run


TRAINERS = {"torch.optim loop": torch_optim, "torch.func eager step": torch_func, JAX: jax_optax}
METHODS = {
    "sgd": TRAINERS,
    "adam": {name: TRAINERS[name] for name in ("torch.optim loop", JAX)},
    "per-sample": {name: TRAINERS[name] for name in ("torch.func eager step", JAX)},
}
GRADIENTS = {
    "torch vmap(grad)": vmap_grad,
    "Opacus hooks": opacus,
    "BackPACK": backpack,
    JAX_GRADIENTS: jax_vmap_grad,
}
HYPERGRADIENTS = {"torch.func loop": torch_func_hypergradient, JAX_SCAN: jax_hypergradient}


CLIPPED = {
    "torch vmap(grad), clipped": vmap_clip,
    "Opacus ghost clipping": opacus_ghost,
    "plain batch gradient": plain,
}
YARDSTICKS = {"plain batch gradient"}  # less work: their results are others


def table(problem: Problem) -> dict[str, Callable[[Problem], Run]]:
    """Who does the same work; the first is the reference for all results."""
    if problem.clip is not None:
        return CLIPPED
    if problem.index is None:
        return GRADIENTS
    in_c = problem.name == "regression" and problem.device.type == "cpu"
    return METHODS[problem.method] | ({BY_HAND: hand_written} if in_c else {})
