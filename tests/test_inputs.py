"""Inputs stay as they are, whatever a user's function writes, and a refusal names the remedy."""

import re
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding, embedding_bag, scaled_dot_product_attention

import gdfunc as gd
from tests.references import fingerprint, normal

ROWS = torch.tensor([0, 2, 2])


def renormed(params, batch):
    return embedding(batch, params["w"], max_norm=0.5).square().mean()


def renormed_bags(params, batch):
    return embedding_bag(batch[:, None], params["w"], max_norm=0.5).square().mean()


def written(params, batch):
    with torch.no_grad():
        params["w"].mul_(2)
    return params["w"][batch].square().mean()


def batch_written(params, batch):
    loss = params["w"][batch].square().mean()
    batch.zero_()
    return loss


def _step(step, w, rows):
    return step(step.init({"w": w}), rows, 0.1)


LOSSES = [renormed, renormed_bags, written, batch_written]
DOORS = {
    "batch_grad": lambda loss, w, rows: gd.batch_grad(loss)({"w": w}, rows),
    "per_sample_grad": lambda loss, w, rows: gd.per_sample_grad(loss)({"w": w}, rows),
    "reduce_per_sample": lambda loss, w, rows: gd.reduce_per_sample(loss, gd.reducers.mean())(
        {"w": w}, rows
    ),
    "a step": lambda loss, w, rows: gd.make_step(loss)({"w": w}, rows, 0.1),
    "train": lambda loss, w, rows: gd.train(gd.make_step(loss), {"w": w}, rows, gd.full_batch(3, 2), 0.1),
    "line search": lambda loss, w, rows: _step(gd.methods.line_search(loss), w, rows),
    "hvp": lambda loss, w, rows: gd.curvature.hvp(loss)({"w": w}, rows, {"w": torch.ones_like(w)}),
    "ggn_vp": lambda loss, w, rows: gd.curvature.ggn_vp(
        lambda params, x: loss(params, x).reshape(1), lambda predictions, _: predictions.sum()
    )({"w": w}, (rows, rows), {"w": torch.ones_like(w)}),
    "scan, its carry": lambda loss, w, rows: gd.scan(lambda p, x: (p, loss(p, rows)), {"w": w}, length=2),
    "scan, its x": lambda loss, w, rows: gd.scan(lambda p, x: (p, loss({"w": w}, x)), None, rows[None]),
    "grad of a run": lambda loss, w, rows: torch.func.grad(
        lambda w: gd.train(gd.make_step(loss), {"w": w}, rows, gd.full_batch(3, 1), 0.1)[0]["w"].sum()
    )(w),
}


# A body of scan that closes over the tensor that it writes into is the user's own business.
CLOSED_OVER = {"scan, its carry": [batch_written], "scan, its x": [renormed, renormed_bags, written]}
CASES = [(door, loss) for door in DOORS for loss in LOSSES if loss not in CLOSED_OVER.get(door, ())]


@pytest.mark.parametrize("from_numpy", [False, True])
@pytest.mark.parametrize(("door", "loss"), CASES)
def test_writes_of_a_function_do_not_reach_its_inputs(door, loss, from_numpy):
    w, rows = normal(0, 5, 3, dtype=torch.float32), ROWS.clone()
    if from_numpy:  # the memory is NumPy's, which torch cannot share on write
        w, rows = torch.from_numpy(w.numpy().copy()), torch.from_numpy(rows.numpy().copy())
    before = fingerprint([w, rows])
    with pytest.raises((RuntimeError, ValueError), match=r"wrote into|in-?place|embedding"):
        DOORS[door](loss, w, rows)
    assert fingerprint([w, rows]) == before


@pytest.mark.parametrize("module", [nn.Embedding(5, 3, max_norm=0.5), nn.EmbeddingBag(5, 3, max_norm=0.5)])
def test_a_module_that_writes_into_its_parameters_writes_into_copies(module):
    apply, params, _ = gd.modules.functional(module)
    before = fingerprint([*params.values()])
    output = apply(params, ROWS[:, None])
    assert fingerprint([*params.values()]) == before
    assert torch.equal(output, module(ROWS[:, None]))  # which does write
    assert not torch.equal(params["weight"], module.weight)


@dataclass
class Pair:
    w: torch.Tensor


def _square(params, batch):
    return (params["w"] * batch).square().mean()


W, X = {"w": torch.tensor(0.5)}, torch.ones(4)
REMEDIES = {
    "torch.export.register_dataclass(Pair)": lambda: gd.batch_grad(_square)(Pair(torch.tensor(0.5)), X),
    "a dataclass becomes a tree by torch.export": lambda: gd.batch_grad(_square)(W, Pair(X)),
    ".astype('float32')": lambda: gd.batch_grad(_square)(W, np.ones(4)),
    "torch.view_as_real": lambda: gd.batch_grad(_square)({"w": torch.tensor(1j)}, X),
    "with a key in the carry": lambda: gd.train(
        gd.make_step(lambda params, batch: _square(params, batch) + torch.rand(())),
        W,
        X,
        gd.full_batch(4, 2),
        0.1,
        backend="native",
    ),
    "return (carry, loss)": lambda: gd.train(lambda carry, batch, lr: None, W, X, gd.full_batch(4, 2), 0.1),
    "let it return (carry, loss)": lambda: gd.train(
        lambda carry, batch, lr: (None, batch.sum()), W, X, gd.full_batch(4, 2), 0.1
    ),
}


@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_refusal_names_the_remedy(remedy):
    with pytest.raises((TypeError, ValueError, gd.BackendError), match=re.escape(remedy)):
        REMEDIES[remedy]()


def test_a_refusal_speaks_of_the_adjoint_only_where_one_was_given():
    def run(adjoint):
        return gd.scan(lambda c, x: (c if c > 0 else -c, c), torch.tensor(1.0), length=2, adjoint=adjoint)

    with pytest.raises(gd.BackendError) as refusal:
        gd.scan(lambda c, x: (c if c > 0 else -c, c), torch.tensor(1.0), length=2, backend="native")
    assert "adjoint" not in str([refusal.value, *getattr(refusal.value, "__notes__", ())])
    with pytest.raises(gd.BackendError) as refusal:
        run(gd.adjoints.Checkpoint(1))
    assert "adjoint=Reverse()" in refusal.value.__notes__[0]
    assert run(gd.adjoints.Reverse())[0] == 1


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_recurrent_cells_have_per_sample_gradients_from_a_state_of_the_batch(cell):
    with torch.random.fork_rng():
        apply, params, _ = gd.modules.functional(cell(3, 4))
    sequences = normal(1, 6, 5, 3, dtype=torch.float32)

    def loss_from(first):
        def loss(params, batch):
            def body(state, x):
                state = apply(params, x, (state, state) if cell is nn.LSTMCell else state)
                state = state[0] if cell is nn.LSTMCell else state
                return state, None

            return gd.scan(body, first(batch), batch.movedim(1, 0))[0].square().mean()

        return loss

    loss = loss_from(lambda batch: batch.new_zeros(len(batch), 4))
    mean = {name: leaf.mean(0) for name, leaf in gd.per_sample_grad(loss)(params, sequences)[0].items()}
    torch.testing.assert_close(mean, gd.batch_grad(loss)(params, sequences)[0])
    if cell is nn.GRUCell:  # which writes into its state
        with pytest.raises(RuntimeError) as refusal:
            gd.per_sample_grad(loss_from(lambda batch: torch.zeros(len(batch), 4)))(params, sequences)
        assert "x.new_zeros" in refusal.value.__notes__[0]


def test_forward_mode_goes_through_fused_attention():
    def predict(params, batch):
        heads = (batch @ params["w"]).unflatten(-1, (2, 4)).transpose(1, 2)
        return scaled_dot_product_attention(heads, heads, heads)

    def loss(params, batch):
        return predict(params, batch).square().mean()

    def run(lr):
        return loss(gd.train(gd.make_step(loss), params, batch, gd.full_batch(3, 2), lr)[0], batch)

    params, batch = {"w": 0.3 * normal(2, 8, 8)}, normal(3, 3, 5, 8)
    vector, zeros = {"w": normal(4, 8, 8)}, torch.zeros(3, 2, 5, 4, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        _, hessian = torch.func.jvp(lambda w: torch.func.grad(loss)(w, batch), (params,), (vector,))
        slope = torch.func.grad(run)(torch.tensor(0.1, dtype=torch.float64))
    torch.testing.assert_close(gd.curvature.hvp(loss)(params, batch, vector), hessian)
    gauss_newton = gd.curvature.ggn_vp(predict, lambda out, target: (out - target).square().mean())
    assert gauss_newton(params, (batch, zeros), vector)["w"].isfinite().all()
    torch.testing.assert_close(gd.hypergrad(run, adjoint=gd.adjoints.Forward())(0.1).grads, slope)
    torch.testing.assert_close(gd.hypergrad(run)(0.1).grads, slope)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_writes_of_a_body_reach_neither_carry_nor_x_where_it_is_called_for_its_shapes(backend):
    """With no steps, and where a trace failed and the mistake is raised from real tensors."""

    def body(c, x):
        c.add_(1)
        x.mul_(7)
        return c @ x[:1], None

    init, xs = torch.ones(2), torch.ones(2, 2)
    for rows in (xs[:0], xs):
        before = fingerprint([init, xs])
        with pytest.raises((RuntimeError, ValueError)):
            gd.scan(body, init, rows, backend=backend)
        assert fingerprint([init, xs]) == before


def test_a_loop_keeps_no_carries_where_gradients_are_off():
    init = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        final, _ = gd.scan(lambda c, x: (c * 2, None), init, length=3, backend="native")
    assert not final.requires_grad
    assert torch.equal(final, torch.full((3,), 8.0))


def test_a_refusal_that_is_raised_again_says_the_same():
    def notes():
        options = {"adjoint": gd.adjoints.Checkpoint(2), "backend": "native"}
        with pytest.raises(gd.BackendError) as refusal:
            gd.scan(lambda c, x: (torch.linalg.inv(c), None), torch.eye(2), length=3, **options)
        return getattr(refusal.value, "__notes__", [])

    assert notes() == notes() != []


X = torch.linspace(-1, 1, 12)
PAIR = X, 3 * X
WEIGHT = {"w": torch.tensor(0.0)}
PLAN = gd.full_batch(12, 3)


def slope_loss(params, batch):
    x, y = batch
    return ((x * params["w"] - y) ** 2).mean()


def swapped_loss(batch, params):
    return slope_loss(params, batch)


def swapped_step(batch, carry, lr):
    return carry, lr


NOT_A_STEP = r"; make one of a loss with gd\.make_step\(loss_fn, transform\)$"
NOT_A_LOSS = r"; pass a function loss_fn\(params, batch\) that returns a 0-d mean, as in gd\.make_step"
SWAPS = {
    "a loss for a step": (
        lambda: gd.train(slope_loss, WEIGHT, PAIR, PLAN, 0.1),
        r"step takes \(params, batch\), not \(carry, batch, lr\)" + NOT_A_STEP,
    ),
    "a loss of three arguments for a step": (
        lambda: gd.train(lambda p, b, power: slope_loss(p, b) ** power, WEIGHT, PAIR, PLAN, 0.1),
        r"step must return \(carry, loss\); got one Tensor, as of a loss" + NOT_A_STEP,
    ),
    "a transformation for a step": (
        lambda: gd.train(gd.adam(), WEIGHT, PAIR, PLAN, 0.1),
        "step is GradientTransformation, not a Step or a function .*" + NOT_A_STEP,
    ),
    "an uncalled transformation for a step": (
        lambda: gd.train(gd.adam, WEIGHT, PAIR, PLAN, 0.1),
        r"step takes \(betas, eps, amsgrad\), not \(carry, batch, lr\)" + NOT_A_STEP,
    ),
    "a loss for the step of ema": (
        lambda: gd.methods.ema(slope_loss, 0.9),
        r"step takes \(params, batch\), not \(carry, batch, lr\)" + NOT_A_STEP,
    ),
    "a transformation before the loss": (
        lambda: gd.make_step(gd.adam(), slope_loss),
        r"loss_fn is GradientTransformation, not a function \(params, batch\) -> loss" + NOT_A_LOSS,
    ),
    "a transformation for a loss": (
        lambda: gd.per_sample_grad(gd.adam()),
        r"loss_fn is GradientTransformation, not a function .*" + NOT_A_LOSS,
    ),
    "data before the loss": (
        lambda: gd.methods.saga(PAIR, slope_loss),
        r"loss_fn is tuple, not a function .*" + NOT_A_LOSS,
    ),
    "a step for a loss": (
        lambda: gd.make_step(gd.make_step(slope_loss)),
        r"loss_fn takes \(carry, batch, lr\), not \(params, batch\)" + NOT_A_LOSS,
    ),
    "a module for a loss": (
        lambda: gd.batch_grad(nn.Flatten()),
        r"loss_fn takes \(input\), not \(params, batch\); the loss of a module is gd.modules.functional",
    ),
    "a loss of swapped arguments": (
        lambda: gd.make_step(swapped_loss),
        r"loss_fn takes \(batch, params\), but is called with \(params, batch\); swap the first two$",
    ),
    "a step of swapped arguments": (
        lambda: gd.train(swapped_step, WEIGHT, PAIR, PLAN, 0.1),
        r"step takes \(batch, carry, lr\), but is called with \(carry, batch, lr\); swap the first two$",
    ),
}


@pytest.mark.parametrize("name", SWAPS)
def test_a_swapped_argument_is_named_with_the_line_that_works(name):
    call, message = SWAPS[name]
    with pytest.raises(TypeError, match=message):
        call()


def test_parameters_given_as_data_are_named():
    with pytest.raises(ValueError, match=r"data\['w'\] is 0-d; .*, and params come first$"):
        gd.train(gd.make_step(slope_loss), PAIR, WEIGHT, PLAN, 0.1)


@pytest.mark.parametrize("steps", [3, 400])
@pytest.mark.parametrize("backend", ["eager", "auto", "native"])
def test_one_tensor_for_a_loss_that_unpacks_a_pair_is_named(steps, backend):
    with pytest.raises(ValueError, match=r"values to unpack") as caught:
        gd.train(gd.make_step(slope_loss), WEIGHT, X, gd.full_batch(12, steps), 0.1, backend=backend)
    assert any(note.endswith("needs the pair data=(x, y)") for note in caught.value.__notes__)


def test_losses_and_steps_of_any_form_pass_the_door():
    class Loss:
        def __call__(self, *args):
            return slope_loss(*args)

    for loss_fn in (Loss(), Loss().__call__, partial(slope_loss), lambda *args: slope_loss(*args)):
        assert gd.batch_grad(loss_fn)(WEIGHT, PAIR)[1] > 0
    final, _ = gd.train(lambda *args: (args[0], args[2]), WEIGHT, PAIR, PLAN, 0.1)
    assert final == WEIGHT
