"""The gradient that batch_grad takes by autograd is that of torch.func."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, grad_and_value, hessian, jvp, vmap

import gdfunc as gd
from gdfunc import _gradients, _tree

from .references import linear_data, linear_loss, normal

PARAMS = {"w": normal(0, 3), "v": normal(1, 3), "b": normal(2, 1)[0]}
BATCH = linear_data(3, 6, 3)
NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
INDEX = gd.full_batch(6, 3)
CLOSED = normal(7, 3)


def by_hand(params, batch, factor=1.0):
    """Use two of three leaves."""
    x, y = batch
    return (((x * params["w"]).tanh().sum(1) + factor * params["b"] - y) ** 2).mean()


class Square(torch.autograd.Function):
    """With a context of its own, as torch.func wants it."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, slope):
        return 2 * ctx.saved_tensors[0] * slope


class Passing(Square):
    """Give the leaf itself as the gradient."""

    @staticmethod
    def backward(ctx, slope):
        return ctx.saved_tensors[0]


class Silent(Square):
    """Give no gradient."""

    @staticmethod
    def backward(ctx, slope):
        return None


def with_nested_gradient(params, batch):
    inner = by_hand(params, batch)
    (slope,) = torch.autograd.grad(inner, params["w"], create_graph=True)
    return inner + (slope**2).sum()


def with_hooks(params, batch):
    params["w"].register_hook(lambda slope: 2 * slope)
    middle = params["b"] * 3
    middle.register_hook(lambda slope: slope + 1)
    return by_hand(params | {"b": middle}, batch)


def with_module_hooks(params, batch):
    weights = {"0.weight": params["w"].expand(4, 3)}
    with nn.modules.module.register_module_forward_hook(lambda module, args, output: output * 2):
        pass
    return functional_call(NET, weights, (batch[0],)).mean()


def in_autocast(params, batch):
    with torch.autocast("cpu", torch.bfloat16):
        x = batch[0].float() @ params["w"].float()[:, None]
    return x.double().tanh().mean()


def with_no_grad(params, batch):
    with torch.no_grad():
        constant = params["w"] ** 2
    return (params["w"] ** 2 - constant).sum() + (params["w"].detach() * params["b"]).sum()


def with_writes(params, batch):
    y = params["w"] * 2
    y.mul_(params["b"])
    z = torch.zeros(3, dtype=torch.float64)
    z[1] = y.sum()
    return z.sum() + y[:2].add_(1).sum()


def with_indexing(params, batch):
    column = nn.functional.embedding(torch.tensor([1]), params["w"][:, None])
    return params["w"][torch.tensor([0, 0, 2])].prod() + column.sum()


def with_functions(params, batch):
    return Square.apply(params["w"]).sum() + Passing.apply(params["b"]) + Silent.apply(params["v"]).sum()


def checkpointed(params, batch):
    return with_training(params, batch, adjoint=gd.adjoints.Checkpoint("sqrt"))


def writing(write, loss=by_hand):
    def loss_fn(params, batch):
        write(params, batch)
        return loss(params, batch)

    return loss_fn


def writing_what_is_needed(params, batch):
    middle = params["w"].exp()
    square = middle * middle
    middle.add_(1)
    return square.sum()


def with_transformations(params, batch):
    x, _ = batch
    rows = vmap(lambda row: (row * params["w"]).sin().sum())(x)
    _, slope = jvp(lambda w: (w * params["b"]).cos(), (params["w"],), (x[0],))
    slopes = grad(lambda w: (w**3 * params["v"]).sum())(params["w"])
    return rows.sum() + slope.sum() + (slopes**2).sum() + hessian(lambda b: b**4)(params["b"])


def inner_step(params):
    return gd.make_step(lambda p, batch: by_hand(p | {"b": params["b"]}, batch))


def with_training(params, batch, **options):
    """The loss after a run whose first parameters, learning rate and loss are differentiated."""
    start = {"w": params["w"] * 2, "v": params["v"]}
    rate = params["b"] ** 2 / 10
    final, _ = gd.train(inner_step(params), start, batch, INDEX, rate, **options)
    return by_hand(final | {"b": params["b"]}, batch)


def with_init(params, batch):
    step = gd.make_step(linear_loss, gd.adam())
    carry = step.init({"w": params["w"], "b": params["b"]})
    carry, _ = step(carry, batch, 0.1)
    return linear_loss(carry.params, batch)


def with_negative_lr(params, batch):
    final, _ = gd.train(
        gd.make_step(linear_loss), {"w": CLOSED, "b": CLOSED[0] * 1}, batch, INDEX, -params["b"].abs()
    )
    return linear_loss(final, batch)


def with_tied_start(params, batch):
    start = {"a": params["w"], "b": params["w"]}
    final, _ = gd.train(gd.make_step(lambda p, _: (p["a"] * p["b"] ** 2).sum()), start, batch, INDEX, 0.1)
    return final["a"].sum()


def with_scan(params, batch):
    carry, ys = gd.scan(lambda c, x: (c * params["b"] + x.sum(), c), params["w"], batch[0])
    return carry.sum() + (ys**2).mean()


def with_hypergradient(params, batch):
    def run(lr):
        final, _ = gd.train(inner_step(params), {"w": params["w"], "v": params["v"]}, batch, INDEX, lr)
        return by_hand(final | {"b": params["b"]}, batch)

    return (gd.hypergrad(run, "lr")(torch.tensor(0.1, dtype=torch.float64)).grads ** 2).sum()


def with_attention(params, batch):
    """The slope of a layer of attention, which only torch's plain kernel gives."""
    inputs = batch[0].reshape(1, 1, 6, 3)

    def inner(w, _):
        q = inputs * w["w"]
        return nn.functional.scaled_dot_product_attention(q, q * params["b"], inputs).mean()

    slopes, _ = gd.batch_grad(inner)({"w": CLOSED}, None)
    return (slopes["w"] ** 2).sum() * 1e3


def with_sample_gradients(params, batch):
    slopes, losses = gd.per_sample_grad(by_hand)(params, batch)
    return (slopes["w"] ** 2).sum() + losses.mean()


LOSSES = {
    "a leaf is unused": by_hand,
    "the loss is a leaf": lambda p, batch: p["b"],
    "leaves share a gradient": lambda p, batch: (p["w"] + p["v"]).sum(),
    "a gradient is expanded": lambda p, batch: p["w"].sum() + p["b"],
    "a leaf is used twice": lambda p, batch: (p["w"] * p["w"]).dot(p["w"]) + p["w"][0],
    "indexing": with_indexing,
    "functions": with_functions,
    "a function without gradient": lambda p, batch: Silent.apply(p["v"]).sum(),
    "a function that gives the leaf": lambda p, batch: Passing.apply(p["b"]),
    "nested": with_nested_gradient,
    "hooks": with_hooks,
    "autocast": in_autocast,
    "no_grad": with_no_grad,
    "writes": with_writes,
    "transformations": with_transformations,
    "a run": with_training,
    "a run with a checkpoint": checkpointed,
    "a truncated run": lambda p, batch: with_training(p, batch, adjoint=gd.adjoints.Truncated(2)),
    "an implicit run": lambda p, batch: with_training(p, batch, adjoint=gd.adjoints.Implicit("cg", 5)),
    "a run with an end": lambda p, batch: with_training(p, batch, stop=lambda carry, loss: loss < 0),
    "a native run": lambda p, batch: with_training(p, batch, backend="native"),
    "init": with_init,
    "a negative lr": with_negative_lr,
    "a tied start": with_tied_start,
    "a scan": with_scan,
    "a hypergradient": with_hypergradient,
    "attention": with_attention,
    "sample gradients": with_sample_gradients,
}  # fmt: skip
WRONG = {
    "no path": lambda p, batch: batch[0].sum(),
    "a path to another leaf": lambda p, batch: CLOSED.clone().requires_grad_().sum(),
    "no tensor": lambda p, batch: p["b"].item(),
    "a leaf is written": writing(lambda p, batch: p["w"].add_(1)),
    "a leaf is written under no_grad": writing(lambda p, batch: torch.no_grad()(p["w"].add_)(1)),
    "a leaf is written by way of detach": writing(lambda p, batch: p["w"].detach().add_(1)),
    "a leaf is written by way of data": writing(lambda p, batch: p["w"].data.add_(1)),
    "the batch is written": writing(lambda p, batch: batch[0].add_(1)),
    "the batch is written by way of data": writing(lambda p, batch: batch[1].data.add_(1)),
    "the batch is written after its use": lambda p, batch: [by_hand(p, batch), batch[0].add_(1)][0],
    "what is needed is written": writing_what_is_needed,
    "the graph is used up": lambda p, batch: [
        loss := (p["w"] ** 2).sum(),
        torch.autograd.grad(loss, p["w"]),
    ][0],
}


def reference(loss_fn):
    """The same, by torch.func alone."""
    return lambda params, batch: _gradients.apart(
        grad_and_value(_gradients.checked(loss_fn)), params=params, batch=batch
    )


def outcome(call):
    """The results and the warnings of a call, or its error."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = error = None
        try:
            result = call()
        except Exception as raised:
            error = type(raised), str(raised).splitlines()[0], getattr(raised, "__notes__", None)
    return result, error, [str(warning.message) for warning in warned]


def both(loss_fn, params=PARAMS, batch=BATCH):
    """The outcomes of `batch_grad` and of torch.func, from equal inputs that are left alone."""
    found = []
    for make in (gd.batch_grad, reference):
        given = _tree.map(
            lambda leaf: leaf.detach().clone().requires_grad_(leaf.requires_grad), (params, batch)
        )
        found.append(outcome(lambda make=make, given=given: make(loss_fn)(*given)))
        for leaf, before in zip(_tree.leaves(given), _tree.leaves((params, batch)), strict=True):
            assert torch.equal(leaf, before)
    return found


@pytest.fixture(autouse=True, scope="module")
def _torch_loads_its_rules():
    """Because torch warns where its rules of forward mode are first loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jvp(torch.sin, (CLOSED,), (CLOSED,))


@pytest.fixture
def by_autograd(monkeypatch):
    """List what autograd is asked, one entry for each gradient."""
    results, gradient = [], _gradients.gradient

    def noted(*args):
        results.append(gradient(*args))
        return results[-1]

    monkeypatch.setattr(_gradients, "gradient", noted)
    return results


def described(tree):
    return [(leaf.requires_grad, leaf.stride(), type(leaf)) for leaf in _tree.leaves(tree)]


def agree(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    assert described(got) == described(expected)


def assert_same(found):
    (got, *said), (expected, *also_said) = found
    assert said == also_said
    assert said[0] is None
    agree(got, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_autograd_and_torch_func_agree(name, by_autograd):
    assert_same(both(LOSSES[name]))
    assert by_autograd
    assert None not in by_autograd or name == "attention"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", LOSSES)
def test_they_agree_where_gradients_are_off(name, mode):
    with mode():
        assert_same(both(LOSSES[name]))


@pytest.mark.parametrize("name", WRONG)
def test_they_refuse_the_same_in_the_same_words(name):
    (_, *said), (_, *expected) = both(WRONG[name])
    assert said == expected
    assert said[0] is not None


FIRST = {
    "hooks",
    "an implicit run",
}  # a hook of a loss sees outer derivatives too; Implicit has no second ones


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in FIRST])
def test_a_tensor_that_the_loss_closes_over_gets_the_same_derivatives(name, by_autograd):
    """As a leaf, and as the result of other operations, whose graph is not used up."""
    results = []
    for make in (gd.batch_grad, reference):
        outer = CLOSED.clone().requires_grad_()
        middle = outer.exp()

        def loss_fn(params, batch, outer=outer, middle=middle):
            scaled = {"w": params["w"] * outer, "v": params["v"] * middle, "b": params["b"] + outer.sum()}
            return LOSSES[name](scaled, batch) + (params["w"] ** 2 * middle).sum() + outer.prod()

        grads, loss = make(loss_fn)(PARAMS, BATCH)
        total = sum((leaf**2).sum() for leaf in grads.values()) + loss
        (first,) = torch.autograd.grad(total, outer, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), outer)
        with torch.no_grad():
            constant = make(loss_fn)(PARAMS, BATCH)
        results.append((grads, loss, first, second, middle.sum(), constant))
    assert by_autograd
    agree(*results)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in FIRST])
def test_parameters_that_require_a_gradient_get_the_same_derivatives(name):
    results = []
    for make in (gd.batch_grad, reference):
        params = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
        grads, loss = make(LOSSES[name])(params, BATCH)
        total = sum((leaf**2).sum() for leaf in grads.values()) + loss
        results.append((grads, loss, torch.autograd.grad(total, list(params.values()), allow_unused=True)))
    agree(*results)


def test_no_graph_outlives_a_gradient():
    """A later run cuts what came of an earlier gradient, though its graph leads to the leaves of it."""
    outer = CLOSED.clone().requires_grad_()
    grads, _ = gd.batch_grad(lambda p, batch: (p["w"] * outer).exp().sum())(PARAMS, None)
    assert grads["w"].requires_grad
    final, _ = gd.train(gd.make_step(lambda w, batch: (w**2).sum()), grads["w"], None, INDEX, 0.1)
    assert not final.requires_grad


def test_an_inference_tensor_may_be_closed_over():
    with torch.inference_mode():
        features = normal(8, 3)
    assert_same(both(lambda p, batch: (p["w"] * features).exp().sum()))


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("cpu"),
        lambda: torch.autograd.forward_ad.dual_level(),
        Watching,
        torch.overrides.BaseTorchFunctionMode,
    ],
)
def test_torch_func_serves_where_a_mode_may_see_a_difference(context, by_autograd):
    with context():
        assert_same(both(by_hand))
    assert not by_autograd


def test_torch_func_serves_a_subclass_and_every_transformation(by_autograd):
    class Labelled(torch.Tensor):
        pass

    labelled = {name: leaf.as_subclass(Labelled) for name, leaf in PARAMS.items()}
    gd.batch_grad(by_hand)(labelled, BATCH)
    vmap(lambda w: gd.batch_grad(by_hand)(PARAMS | {"w": w}, BATCH))(torch.ones(2, 3, dtype=torch.float64))
    grad(lambda w: gd.batch_grad(by_hand)(PARAMS | {"w": w}, BATCH)[1])(PARAMS["w"])
    assert not by_autograd


@pytest.mark.long
def test_the_first_gradient_imports_no_compiler():
    code = """
import sys, torch, gdfunc as gd
step = gd.make_step(lambda w, x: ((x @ w) ** 2).mean(), gd.adam())
gd.train(step, step.init(torch.ones(2)), torch.ones(4, 2), gd.full_batch(4, 3), 0.1, backend="eager")
print([name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor", "sympy"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
