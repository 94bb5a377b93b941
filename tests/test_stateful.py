"""Losses with state: buffers and keys travel beside the parameters through every step and every backend."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap

import gdfunc as gd
from gdfunc import _tree

from .assertions import assert_agrees, assert_pure, assert_same_bits
from .references import COMPILED, few, linear_data, linear_loss, normal, relative_error
from .tables import LEAST_SQUARES, STEPS

PARAMS = {"w": normal(0, 2), "b": normal(1, 1)[0]}
DATA = linear_data(2, 12, 2)
INDEX = gd.epoch_batches(gd.random.key(3), n=12, batch_size=4, epochs=3)
KEY = gd.random.key(4)
WITH_STATE = [name for name, row in STEPS.items() if not row.has_data and name not in LEAST_SQUARES]
SUMS = [name for name, row in STEPS.items() if row.has_data]


def make(name, loss_fn, data=None):
    row = STEPS[name]
    return row.make(loss_fn, data, **row.hyperparameters)


def state_of(carry):
    """Find the state in the carries of steps that wrap the step of the loss."""
    return carry if isinstance(carry, gd.StatefulState) else state_of(carry.carry)


@gd.stateful
def passing(params, batch, buffers, key):
    return linear_loss(params, batch), buffers


@gd.stateful
def adding(params, batch, buffers, key):
    """Add up the points at which the loss was measured, and count them."""
    return linear_loss(params, batch), {
        "sum": _tree.map(torch.add, buffers["sum"], params),
        "count": buffers["count"] + 1,
    }


SUM = {"sum": _tree.map(torch.zeros_like, PARAMS), "count": torch.tensor(0)}


@pytest.mark.parametrize("name", WITH_STATE)
def test_state_that_a_loss_does_not_use_changes_no_bit(name):
    plain, step = make(name, linear_loss), make(name, passing)
    expected = gd.train(plain, plain.init(PARAMS), DATA, INDEX, 0.1, backend="eager")
    init = step.init(PARAMS, {"unused": torch.tensor(3)}, KEY)
    final, trajectory = gd.train(step, init, DATA, INDEX, 0.1, backend="eager")
    assert_same_bits(trajectory, expected[1])
    assert state_of(final).buffers["unused"] == 3
    leaves = _tree.leaves(final)
    assert all(any(torch.equal(leaf, found) for found in leaves) for leaf in _tree.leaves(expected[0]))


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", *COMPILED])
# The search of lbfgs evaluates points that are not recorded, because it does not accept them.
@pytest.mark.parametrize("name", [name for name in WITH_STATE if name not in ("private", "lbfgs")])
def test_buffers_are_those_of_the_evaluation_where_the_loss_is_measured(name, backend):
    step = make(name, adding)
    run = {"record": ("params", "loss"), "backend": backend}
    final, trajectory = gd.train(step, step.init(PARAMS, SUM), DATA, INDEX, 0.1, **run)
    buffers = state_of(final).buffers
    assert buffers["count"] == len(INDEX)
    assert_agrees(buffers["sum"], _tree.map(lambda leaf: leaf.sum(0), trajectory.params), 1e-12)
    assert trajectory.loss.shape == (len(INDEX),)


@pytest.mark.parametrize("name", SUMS)
def test_methods_of_finite_sums_refuse_losses_with_state(name):
    with pytest.raises(TypeError, match="this method is for a finite sum"):
        make(name, passing, DATA)


@pytest.mark.parametrize("make", [gd.methods.gauss_newton, gd.methods.levenberg_marquardt])
def test_methods_of_residuals_refuse_losses_with_state(make):
    with pytest.raises(TypeError, match="this method is for residuals"):
        make(passing)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_sample_i_of_step_t_has_a_key_of_its_own_that_follows_from_the_runs_key(backend):
    @gd.stateful
    def noting(params, batch, buffers, key):
        row = torch.arange(3) == buffers["step"]
        noted = torch.where(row[:, None, None], key, buffers["keys"])
        return linear_loss(params, batch), {"keys": noted, "step": buffers["step"] + 1}

    step = gd.make_step(noting)
    buffers = {"keys": torch.zeros(3, 4, 2, dtype=torch.int64), "step": torch.tensor(0)}
    final, _ = gd.train(step, step.init(PARAMS, buffers, KEY), DATA, INDEX[:3], 0.1, backend=backend)
    key, expected = KEY, []
    for _ in range(3):
        expected.append(gd.random.fold_in(key, torch.arange(4)))
        key = gd.random.fold_in(key, 2**32 - 1)
    assert torch.equal(final.buffers["keys"], torch.stack(expected))
    assert torch.equal(final.key, key)
    assert len(torch.stack(expected).flatten(0, 1).unique(dim=0)) == 12


def noisy(params, x, keys):
    """A loss with noise [B, 2] on its features, each sample's from its own key."""
    noise = vmap(lambda key: gd.random.normal(key, (2,), torch.float64))(keys)
    return linear_loss(params, (x[0] + noise, x[1]))


@pytest.mark.long
@pytest.mark.parametrize("chunk_size", [1, 2, "auto", None])
def test_a_sample_draws_the_same_alone_in_chunks_and_in_its_batch(chunk_size):
    @gd.stateful
    def loss_fn(params, batch, buffers, key):
        return noisy(params, batch, key), buffers

    step = gd.make_step(loss_fn)
    settings = {"max_norm": 1e9, "noise_multiplier": 0.0, "divisor": 4.0, "chunk_size": chunk_size}
    private = gd.privacy.make_private_step(loss_fn, key=gd.random.key(9), **settings)
    batch = gd.take(DATA, INDEX[0])
    expected, loss = step(step.init(PARAMS, {}, KEY), batch, 0.1)
    got, private_loss = private(private.init(PARAMS, {}, KEY), batch, 0.1)
    assert_agrees(got.params, expected.params, 1e-12)
    assert_agrees(private_loss, loss, 1e-12)


@pytest.mark.long
def test_padded_batches_have_keys():
    @gd.stateful
    def loss_fn(params, batch, buffers, key):
        return noisy(params, batch, key), buffers

    settings = {"max_norm": 1e9, "noise_multiplier": 0.0, "divisor": 4.0}
    step = gd.privacy.make_private_step(loss_fn, key=gd.random.key(9), **settings)
    batch = gd.take(DATA, INDEX[0])
    padded = gd.privacy.Padded(batch, torch.tensor([True] * 4))
    assert_same_bits(*(step(step.init(PARAMS, {}, KEY), b, 0.1) for b in (batch, padded)))


def test_per_sample_gradients_of_a_loss_that_changes_its_buffers_are_refused():
    settings = {"max_norm": 1.0, "noise_multiplier": 1.0, "divisor": 4.0}
    step = gd.privacy.make_private_step(adding, key=KEY, **settings)
    with pytest.raises(ValueError, match="changes its buffers, which are lost where samples"):
        step(step.init(PARAMS, SUM), gd.take(DATA, INDEX[0]), 0.1)


def net(momentum=0.1):
    with torch.random.fork_rng():
        first, second = nn.Linear(3, 8, bias=False), nn.Linear(8, 8, bias=False)
        norms = nn.BatchNorm1d(8), nn.BatchNorm1d(8, momentum=momentum)
        layers = first, norms[0], nn.ReLU(), second, norms[1], nn.Tanh(), nn.Linear(8, 2)
        return filled(nn.Sequential(*layers).double())


def filled(module):
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(0.5 * normal(i, *p.shape))
    return module


X, Y = normal(5, 30, 3), (normal(6, 30) > 0).long()
ROWS = gd.epoch_batches(gd.random.key(7), n=30, batch_size=10, epochs=4)


def loss_of_net(apply):
    @gd.stateful
    def loss_fn(params, batch, buffers, key):
        output, buffers = apply(params, batch[0], buffers=buffers, return_buffers=True)
        return nn.functional.cross_entropy(output, batch[1]), buffers

    return loss_fn


def torch_loop(module, optimizer, rows):
    losses = []
    for row in rows:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(X[row]), Y[row])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, 0.02, 0.9), lambda loss: gd.make_step(loss, gd.momentum(0.9))),
    "adam": (lambda p: torch.optim.Adam(p, 0.02), lambda loss: gd.make_step(loss, gd.adam())),
}


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", *COMPILED])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_net_with_batch_normalisation_is_that_of_a_plain_torch_loop(name, backend):
    make_optimizer, make_step = OPTIMIZERS[name]
    module, reference = net(), net()
    apply, params, buffers = gd.modules.functional(module)
    step = make_step(loss_of_net(apply))
    final, trajectory = gd.train(step, step.init(params, buffers), (X, Y), ROWS, 0.02, backend=backend)
    losses = torch_loop(reference, make_optimizer(reference.parameters()), ROWS)
    # Because Adam divides rounding errors by small gradients, where a compiler rounds otherwise.
    tolerance = 1e-10 if name == "adam" and backend != "eager" else 1e-12
    assert_agrees(trajectory.loss, losses, tolerance)
    tensors = gd.modules.state_dict(module, final.params, final.buffers)
    start, expected = module.state_dict(), reference.state_dict()
    assert list(tensors) == list(expected)
    moved = {name: (expected[name] - start[name]).double().norm() for name in expected}
    for name in expected:
        assert (tensors[name] - expected[name]).double().norm() <= tolerance * max(moved.values()), name
        assert moved[name] > 0


def test_batch_normalisation_sees_each_of_the_batches_that_are_accumulated_as_in_torch():
    module, reference = net(), net()
    apply, params, buffers = gd.modules.functional(module)
    step = gd.make_step(loss_of_net(apply), gd.accumulate(gd.chain(), 3))
    final, _ = gd.train(step, step.init(params, buffers), (X, Y), ROWS, 0.02)
    optimizer = torch.optim.SGD(reference.parameters(), 0.02)
    for thrice in ROWS.split(3):
        optimizer.zero_grad()
        for row in thrice:
            (nn.functional.cross_entropy(reference(X[row]), Y[row]) / 3).backward()
        optimizer.step()
    got, expected = gd.modules.state_dict(module, final.params, final.buffers), reference.state_dict()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-11, atol=1e-13)
    assert expected["1.num_batches_tracked"] == len(ROWS)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_a_sweep_of_a_net_with_batch_normalisation_is_its_runs_one_by_one(backend):
    apply, params, buffers = gd.modules.functional(net())
    step = gd.make_step(loss_of_net(apply), gd.momentum(0.5))

    def run(lr):
        return gd.train(step, step.init(params, buffers, KEY), (X, Y), ROWS, lr, backend=backend)

    lrs = torch.tensor([0.05, 0.1, 0.4], dtype=torch.float64)
    swept = vmap(run)(lrs)
    for i, lr in enumerate(lrs):
        assert_agrees(_tree.map(lambda leaf, i=i: leaf[i], swept), run(lr), 1e-9)


@pytest.mark.long
def test_an_ensemble_with_batch_normalisation_trains_under_vmap():
    apply, params, buffers = gd.modules.init(net, gd.random.split(KEY, 3))
    step = gd.make_step(loss_of_net(apply))

    def run(params, buffers):
        return gd.train(step, step.init(params, buffers), (X, Y), ROWS, 0.1)[0]

    final = vmap(run)(params, buffers)
    for i in range(3):
        alone = run(*gd.modules.member((params, buffers), i))
        assert_agrees(gd.modules.member(final, i), alone, 1e-9)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_derivatives_go_through_the_buffers_of_a_run(backend):
    @gd.stateful
    def pulled(params, batch, buffers, key):
        """Pull towards a moving average of the parameters."""
        loss = linear_loss(params, batch) + (params["w"] - buffers).square().sum()
        return loss, 0.5 * buffers + 0.5 * params["w"]

    step = gd.make_step(pulled)

    def run(lr):
        init = step.init(PARAMS, torch.zeros(2).double())
        final, _ = gd.train(step, init, DATA, INDEX, lr, backend=backend)
        return linear_loss(final.params, DATA)

    def by_hand(lr):
        params, average = PARAMS, torch.zeros(2).double()
        for row in INDEX:
            batch = gd.take(DATA, row)
            grads, _ = torch.func.grad(pulled.loss_fn, has_aux=True)(params, batch, average, None)
            average = 0.5 * average + 0.5 * params["w"]
            params = {name: params[name] - lr * grads[name] for name in params}
        return linear_loss(params, DATA)

    lr = torch.tensor(0.1, dtype=torch.float64)
    assert_agrees(torch.func.grad_and_value(run)(lr), torch.func.grad_and_value(by_hand)(lr), 1e-10)


@pytest.mark.long
@few
@given(seed=st.integers(0, 2**32), stop_at=st.integers(1, 8))
def test_a_run_goes_on_from_its_carry_to_the_same_bits(seed, stop_at):
    @gd.stateful
    def loss_fn(params, batch, buffers, key):
        return noisy(params, batch, key), {"sum": buffers["sum"] + params["w"]}

    step = gd.make_step(loss_fn, gd.adam())
    init = step.init(PARAMS, {"sum": torch.zeros(2).double()}, gd.random.key(seed))
    whole, _ = gd.train(step, init, DATA, INDEX, 0.1, backend="eager")
    half, _ = gd.train(step, init, DATA, INDEX[:stop_at], 0.1, backend="eager")
    rest, _ = gd.train(step, half, DATA, INDEX[stop_at:], 0.1, backend="eager")
    assert_same_bits(tuple(rest), tuple(whole))


@pytest.mark.parametrize("name", WITH_STATE)
def test_a_step_writes_into_no_input_and_shares_no_memory_with_it(name):
    step = make(name, passing)
    carry = step.init(PARAMS, {"unused": torch.tensor(3)}, KEY)
    assert_pure(step, carry, gd.take(DATA, INDEX[0]), torch.tensor(0.1, dtype=torch.float64))


def test_a_tensor_that_requires_grad_and_that_the_loss_closes_over_is_followed_into_the_buffers():
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    step = gd.make_step(gd.stateful(lambda w, batch, buffers, key: (w**2, buffers + scale * w)))
    state, _ = step(step.init(torch.tensor(3.0).double(), torch.tensor(0.0).double()), None, 0.1)
    (slope,) = torch.autograd.grad(state.buffers, scale)
    assert slope == 3


REFUSED = {
    "a loss of two arguments": (
        lambda: gd.stateful(linear_loss),
        "takes .params, batch., not .*buffers, key",
    ),
    "a loss of four arguments that is not marked": (
        lambda: gd.make_step(lambda params, batch, buffers, key: 0),
        "mark a loss .params, batch, buffers, key. with gd.stateful",
    ),
    "a gradient of it": (lambda: gd.batch_grad(passing), "fix its state: lambda params, batch: loss_fn"),
    "samples of it": (lambda: gd.per_sample_grad(passing), "fix its state: lambda params, batch: loss_fn"),
    "no pair": (
        lambda: call(lambda p, batch, buffers, key: linear_loss(p, batch)),
        "must return .loss, buffers.",
    ),
    "other buffers": (
        lambda: call(lambda p, batch, buffers, key: (linear_loss(p, batch), {})),
        r"buffers.*missing state.buffers\['count'\]",
    ),
    "another dtype": (
        lambda: call(lambda p, b, buffers, key: (linear_loss(p, b), {"count": torch.tensor(0.5)})),
        r"buffers\['count'\] was torch.int64 and became torch.float32",
    ),
    "many keys": (
        lambda: gd.make_step(passing).init(PARAMS, {}, gd.random.split(KEY, 3)),
        r"key must be an int64 tensor \[2\]",
    ),
    "no key": (lambda: gd.make_step(passing).init(PARAMS, {}, 3), "key must be an int64 tensor"),
    "no tensors": (lambda: gd.make_step(passing).init(PARAMS, {"n": 3}), r"buffers\['n'\] is int"),
    "another device": (
        lambda: gd.make_step(passing).init(PARAMS, {"n": torch.zeros(1, device="meta")}),
        r"buffers\['n'\] is on meta but params is on cpu",
    ),
    "the carry of another step": (lambda: gd.make_step(passing)(PARAMS, DATA, 0.1), "needs StatefulState"),
}


def call(loss_fn):
    step = gd.make_step(gd.stateful(loss_fn))
    return step(step.init(PARAMS, {"count": torch.tensor(0)}), DATA, 0.1)


@pytest.mark.parametrize("name", REFUSED)
def test_misuse_is_refused_with_its_remedy(name):
    call, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_loss_and_its_step_print_as_they_were_made():
    step = gd.make_step(adding, gd.scale(2.0))
    assert repr(step) == "make_step(loss_fn=stateful(adding), transform=scale(factor=2.0))"


class Residual(nn.Module):
    """A block of a residual network, as torchvision lays it out."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.downsample = None
        if stride > 1:
            shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu_()))
        y += x if self.downsample is None else self.downsample(x)
        return y.relu_()


def residual_net():
    with torch.random.fork_rng():
        stem = nn.Conv2d(1, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        blocks = Residual(4, 4, 1), Residual(4, 8, 2)
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        return filled(nn.Sequential(*stem, *blocks, *head).double())


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", *COMPILED])
def test_a_residual_network_is_that_of_a_plain_torch_loop(backend):
    images, labels = normal(8, 12, 1, 6, 6), torch.arange(12) % 3
    rows = gd.epoch_batches(gd.random.key(7), n=12, batch_size=6, epochs=3)
    module, reference = residual_net(), residual_net()
    model = gd.modules.functional(module)
    step = gd.make_step(model.loss(nn.functional.cross_entropy), gd.momentum(0.9))
    init = step.init(model.params, model.buffers)
    final, trajectory = gd.train(step, init, (images, labels), rows, 0.02, backend=backend)
    optimizer = torch.optim.SGD(reference.parameters(), 0.02, 0.9)
    for row, loss in zip(rows, trajectory.loss, strict=True):
        optimizer.zero_grad()
        expected = nn.functional.cross_entropy(reference(images[row]), labels[row])
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        expected.backward()
        optimizer.step()
    module.load_state_dict(gd.modules.state_dict(module, final.params, final.buffers))
    assert_agrees(module.state_dict(), dict(reference.state_dict()), 1e-11)
    module.eval(), reference.eval()
    assert_agrees(module(images).detach(), reference(images).detach(), 1e-11)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)

    def forward(self, tokens):
        return self.head(self.layer(self.embedding(tokens))).mT


@pytest.mark.long
@pytest.mark.parametrize("backend", COMPILED)
def test_a_transformer_with_dropout_draws_alike_on_every_backend(backend):
    with torch.random.fork_rng():
        model = gd.modules.functional(filled(Transformer().double()))
    tokens = gd.random.randint(KEY, (12, 5), 0, 11)
    step = gd.make_step(model.loss(nn.functional.cross_entropy), gd.adam())
    init = step.init(model.params, model.buffers, KEY)

    def run(backend, init):
        return gd.train(step, init, (tokens, tokens.roll(1, 1)), INDEX, 0.01, backend=backend)

    expected = run("eager", init)
    assert_agrees(run(backend, init), expected, 1e-9)
    other = run("eager", init._replace(key=gd.random.key(5)))
    assert relative_error(other[1].loss, expected[1].loss) > 0.01


NET = gd.modules.functional(net())
STEP = gd.make_step(NET.loss(nn.functional.cross_entropy))
STATE = STEP.init(NET.params, NET.buffers)
MISUSED = {
    "a key in the place of buffers": (
        lambda: STEP.init(NET.params, KEY),
        "buffers is a key; pass step.init",
    ),
    "no buffers": (
        lambda: STEP(STEP.init(NET.params), (X, Y), 0.1),
        r"step.init\(model.params, model.buffers",
    ),
    "params as the carry": (
        lambda: gd.train(STEP, NET.params, (X, Y), ROWS, 0.1),
        r"step.init\(params, buffers, key\)",
    ),
    "a carry as params": (lambda: NET.apply(STATE, X), "params is StatefulState.*pass its .params"),
    "a carry into a module": (lambda: gd.modules.state_dict(net(), STATE), "params is StatefulState"),
    "statistics of before": (
        lambda: NET.apply(STATE.params, X, training=False),
        r"'1' has running statistics.*buffers=state.buffers",
    ),
    "statistics of before in a module": (
        lambda: gd.modules.state_dict(net(), STATE.params),
        "'1' has running statistics.*state.buffers",
    ),
    "columns": (lambda: STEP(STATE, ({"a": X[:, 0]}, Y), 0.1), "x is a dict of columns.*to_numpy"),
    "a triple": (lambda: STEP(STATE, (X, Y, Y), 0.1), "got tuple of 3.*gd.stateful"),
    "a class of criteria": (
        lambda: NET.loss(nn.CrossEntropyLoss),
        "is the class CrossEntropyLoss; call it",
    ),
    "no criterion": (lambda: NET.loss(3), "criterion is int, not a function"),
    "a module": (lambda: gd.make_step(net()), r"gd.modules.functional\(module\).loss"),
    "a module taken apart": (lambda: gd.make_step(NET), r"gd.modules.functional\(module\).loss"),
    "a pair that is not marked": (
        lambda: gd.make_step(lambda w, batch: (w, w))(torch.tensor(1.0), None, 0.1),
        "got tuple; mark a loss that returns buffers too with gd.stateful",
    ),
    "an evaluation that never comes": (
        lambda: gd.train(
            STEP,
            STATE,
            (X, Y),
            ROWS,
            0.1,
            evaluate={"zero": lambda state: torch.tensor(0.0)},
            evaluate_every=700,
            stop=gd.stops.patience("zero", 3),
        ),
        "every 700 steps, but the run has 12",
    ),
}


@pytest.mark.parametrize("name", MISUSED)
def test_misuse_of_a_module_is_refused_with_its_remedy(name):
    call, message = MISUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("adjoint", [gd.adjoints.Reverse(), gd.adjoints.Checkpoint("sqrt")], ids=str)
def test_derivatives_go_through_a_run_with_batch_normalisation(backend, adjoint):
    def make_net():
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()

    model = gd.modules.init(make_net, gd.random.key(0))
    data = torch.arange(36.0, dtype=torch.float64).sin().reshape(12, 3), torch.ones(12, 1).double()
    step, plan = gd.make_step(model.loss(gd.losses.mse)), gd.sample_batches(gd.random.key(1), 12, 6, 4)

    def run(lr):
        state = step.init(model.params, model.buffers)
        state, _ = gd.train(step, state, data, plan, lr, backend=backend, adjoint=adjoint)
        in_eval = model.apply(state.params, data[0], buffers=state.buffers, training=False)
        return model.loss(gd.losses.mse)(state.params, data, state.buffers, None)[0], in_eval

    lr = torch.tensor(0.1, dtype=torch.float64)
    for i in range(2):
        slope = torch.func.grad(lambda lr, i=i: run(lr)[i].sum())(lr)
        differences = (run(lr + 1e-5)[i] - run(lr - 1e-5)[i]).sum() / 2e-5
        assert torch.isclose(slope, differences, rtol=1e-5)


@pytest.mark.parametrize("make", [gd.make_step, gd.methods.sam, gd.methods.line_search])
def test_a_loss_that_writes_into_its_buffers_is_refused_and_leaves_them(make):
    @gd.stateful
    def loss_fn(w, batch, buffers, key):
        buffers += 1
        return w**2, buffers

    state = (step := make(loss_fn)).init(torch.tensor(1.0), torch.tensor(0.0))
    with pytest.raises(ValueError, match="wrote into its buffers"):
        step(state, None, 0.1)
    assert state.buffers == 0


def test_buffers_that_change_places_have_storage_of_their_own():
    step = gd.make_step(
        gd.stateful(lambda w, batch, buffers, key: (w**2, (buffers[1], buffers[0].view(2))))
    )
    first = step.init(torch.tensor(1.0), (torch.zeros(2), torch.ones(2)))
    second, _ = step(first, None, 0.1)
    storages = {leaf.untyped_storage().data_ptr() for leaf in (*first.buffers, *second.buffers)}
    assert len(storages) == 4
    assert_same_bits(second.buffers, first.buffers[::-1])


class Keeping(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.register_buffer("late", None)
        self.kept, self.what = first, first

    def forward(self, x):
        self.seen = x  # for a look at it later, which changes nothing
        if isinstance(self.what, str):
            self.late = x
        elif self.what is not None:
            self.kept = self.kept + 1
        return x


@pytest.mark.parametrize("first", [None, "late", 1, 0.5, torch.tensor(2.0)], ids=str)
@pytest.mark.parametrize("transform", [lambda f: f, vmap, torch.func.jacrev], ids=["", "vmap", "jacrev"])
def test_a_module_keeps_nothing_between_the_calls_of_its_function(first, transform):
    module = Keeping(first)
    apply, params, buffers = gd.modules.functional(module)
    for _ in range(2):
        if first is None:
            assert transform(lambda x: apply(params, x, buffers=buffers))(X) is not None
            continue
        message = "makes its buffer 'late'" if first == "late" else "changes its attribute 'kept'"
        with pytest.raises(ValueError, match=f"Keeping '' {message}"):
            transform(lambda x: apply(params, x, buffers=buffers))(X)
    assert module.kept is first
