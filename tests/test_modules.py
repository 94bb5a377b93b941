"""Modules in and out."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, jvp, vmap

import gdfunc as gd

from .assertions import assert_pure, assert_refused, assert_same_bits
from .references import COMPILED, few, fingerprint, normal, relative_error, storages


class Tied(nn.Module):
    """Two layers with one weight, a buffer that is not persistent, and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.scale


def build(make):
    """Make a module in float64 without touching the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def squares(apply):
    return lambda params, batch: (apply(params, batch) ** 2).mean()


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x, *, shift):
        return self.layers(x) + shift


def test_apply_is_the_module_with_several_and_named_inputs():
    module = build(Shifted)
    apply, params, buffers = gd.modules.functional(module)
    x, shift = normal(0, 5, 3), normal(1, 5, 2)
    assert apply(params, x, shift=shift).equal(module(x, shift=shift).detach())
    assert list(params) == [name for name, _ in module.named_parameters()]
    assert buffers == {}
    assert not any(leaf.requires_grad for leaf in params.values())
    assert apply({name: 0 * leaf for name, leaf in params.items()}, x, shift=shift).equal(shift)


def test_the_module_is_left_alone_and_can_go_on():
    module = build(lambda: nn.Linear(3, 2))
    before = fingerprint(list(module.parameters()))
    apply, params, _ = gd.modules.functional(module)
    expected = apply(params, normal(0, 5, 3))
    gd.train(gd.make_step(squares(apply)), params, normal(1, 6, 3), gd.full_batch(6, 3), 0.1)
    assert fingerprint(list(module.parameters())) == before
    with torch.no_grad():
        module.weight.add_(1)
    module.eval()
    assert apply(params, normal(0, 5, 3)).equal(expected)


def test_tied_weights_stay_tied_and_frozen_ones_frozen():
    module, x = build(Tied), normal(0, 8, 3)
    apply, params, buffers = gd.modules.functional(module)
    assert sorted(params) == ["first.weight", "second.bias"]
    assert sorted(buffers) == ["first.bias", "scale"]
    final, _ = gd.train(gd.make_step(squares(apply)), params, x, gd.full_batch(8, 4), 0.1)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (module(x) ** 2).mean().backward()
        optimizer.step()
    trained = module.first.weight.detach()
    assert relative_error(final["first.weight"], trained, params["first.weight"]) < 1e-12
    state = gd.modules.state_dict(module, final, buffers)
    assert sorted(state) == sorted(module.state_dict())
    assert state["second.weight"].equal(state["first.weight"])
    fresh = build(Tied)
    fresh.load_state_dict(state)
    assert fresh(x).detach().equal(apply(final, x))


def test_running_statistics_are_updated_in_a_copy():
    module = build(lambda: nn.BatchNorm1d(3))
    apply, params, buffers = gd.modules.functional(module)
    x = normal(0, 8, 3) + 1
    before = fingerprint(list(buffers.values()))
    output, updated = apply(params, x, buffers=buffers, return_buffers=True)
    assert fingerprint(list(buffers.values())) == before
    assert_refused(lambda: apply(params, x, buffers=buffers), "nn.BatchNorm1d '' in training mode writes")
    assert output.equal(module(x).detach())
    for name, buffer in module.named_buffers():
        assert updated[name].equal(buffer)
    assert not updated["running_mean"].equal(buffers["running_mean"])
    assert_refused(lambda: gd.modules.state_dict(module, params), "has running statistics.*state.buffers")
    module.eval()
    state = gd.modules.state_dict(module, params)  # without buffers: the module's own
    assert state["running_mean"].equal(module.running_mean)
    assert state["running_mean"].data_ptr() != module.running_mean.data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"weight": p["weight"]}, r"missing \['bias'\], unexpected \[\]"),
        (lambda p: p | {"wieght": p["weight"]}, r"missing \[\], unexpected \['wieght'\]"),
    ],
)
def test_wrong_names_raise(change, message):
    module = build(lambda: nn.Linear(2, 1))
    apply, params, _ = gd.modules.functional(module)
    with pytest.raises(ValueError, match="names do not match the module's: " + message):
        apply(change(params), normal(0, 3, 2))
    with pytest.raises(ValueError, match=message):
        gd.modules.state_dict(module, change(params), {})


def recurrent(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = kind(2, 3, batch_first=True)

        def forward(self, x):
            return self.memory(x)[0]

    message = f"nn.{kind.__name__} 'memory' cannot run under vmap.*nn.GRUCell"
    return Recurrent, (4, 5, 2), message


NORMS = " in training mode .* use nn.GroupNorm, or module.eval"


def without_statistics():
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (without_statistics, (4, 3), f"nn.BatchNorm1d '1'{NORMS}"),
        (lambda: nn.BatchNorm2d(2, track_running_stats=False), (4, 2, 3, 3), f"nn.BatchNorm2d ''{NORMS}"),
        *map(recurrent, [nn.RNN, nn.GRU, nn.LSTM]),
    ],
)
def test_layers_that_mix_samples_or_cannot_be_mapped_are_refused_per_sample(make, shape, message):
    apply, params, _ = gd.modules.functional(build(make))
    x = normal(0, *shape)
    gd.batch_grad(squares(apply))(params, x)
    assert_refused(lambda: gd.per_sample_grad(squares(apply))(params, x), message)


def test_batch_norm_in_eval_mode_and_a_cell_in_a_scan_take_their_places():
    norm, norm_params, _ = gd.modules.functional(build(lambda: nn.BatchNorm1d(3)).eval())
    cell, cell_params, _ = gd.modules.functional(build(lambda: nn.GRUCell(2, 3)))

    def scanned(params, x):  # x [B, time, 2]
        start = x.new_zeros(len(x), 3)
        _, states = gd.scan(lambda h, now: (cell(params, now, h),) * 2, start, x.transpose(0, 1))
        return (states**2).mean()

    for loss_fn, params, x in (
        (squares(norm), norm_params, normal(0, 4, 3)),
        (scanned, cell_params, normal(0, 4, 5, 2)),
    ):
        grads, _ = gd.per_sample_grad(loss_fn)(params, x)
        mean = {name: leaf.mean(0) for name, leaf in grads.items()}
        torch.testing.assert_close(mean, gd.batch_grad(loss_fn)(params, x)[0])


def test_what_is_no_module_or_has_no_parameters_yet_raises():
    assert_refused(lambda: gd.modules.functional(len), "TypeError: module is .*, not a torch")
    with pytest.raises(ValueError, match="parameter 'weight' is lazy: call the module on a batch once"):
        gd.modules.functional(nn.LazyLinear(2))


KEYS = gd.random.split(gd.random.key(0), 4)


def make_mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class Attentive(nn.Module):
    """Layers of many kinds; a draw into a buffer; an attention with a frozen projection."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=2)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.attend.in_proj_weight.requires_grad_(False)
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4)])
        self.token = nn.Parameter(torch.randn(1, 4) * 0.02)
        self.register_buffer("frequencies", torch.rand(4, dtype=torch.float64))

    def forward(self, words):
        x = self.embed(words) + self.token
        x = self.norms[0](self.attend(x, x, x, need_weights=False)[0]).mean(1)
        return self.norms[2](self.norms[1](x)) * self.frequencies.float()


class Schemes(nn.Module):
    """Parameters from each of torch.nn.init's random schemes, some of which draw until they are content."""

    def __init__(self):
        super().__init__()
        init, empty, shape = nn.init, partial(torch.empty, 40, 10), (40, 10)
        schemes = {
            "uniform": init.uniform_(empty(), -3, 1),
            "normal": init.normal_(empty(), 2, 0.5),
            "truncated": init.trunc_normal_(empty()),
            "tail": init.trunc_normal_(empty(), std=1.0, a=1.0, b=3.0),
            "xavier": init.xavier_normal_(empty()),
            "kaiming": init.kaiming_normal_(empty(), mode="fan_out"),
            "sparse": init.sparse_(empty(), 0.25, std=0.1),
            "rand": torch.rand(shape),
            "randn_like": torch.randn_like(empty()),
            "rand_like": torch.rand_like(empty()),
            "of_numbers": torch.normal(-1.0, 0.1, shape),
        }
        for name, values in schemes.items():
            self.register_parameter(name, nn.Parameter(values))


ARCHITECTURES = {
    "mlp": make_mlp,
    "attentive": Attentive,
    "schemes": Schemes,
    "bilinear": lambda: nn.Bilinear(5, 6, 7),
    "convolutions": lambda: nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.Conv2d(2, 6, (3, 2), groups=2), nn.ConvTranspose2d(3, 4, 3), nn.PReLU(3)
    ),
    "cells": lambda: nn.ModuleList([nn.GRUCell(3, 5), nn.LSTM(3, 4, num_layers=2)]),
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "half": lambda: nn.Linear(9, 9, dtype=torch.bfloat16),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
}


def tensors_of(functional):
    return functional.params | functional.buffers


def kolmogorov(a, b):
    """The distance of two samples, in units in which above 2.8 has a chance of 3·10⁻⁷."""
    a, b = a.flatten().double().sort().values, b.flatten().double().sort().values
    both = torch.cat([a, b])
    below = [torch.searchsorted(x, both, right=True) / len(x) for x in (a, b)]
    return float((below[0] - below[1]).abs().max()) * (len(a) * len(b) / (len(a) + len(b))) ** 0.5


@pytest.mark.long
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_initial_values_have_torchs_own_distribution(name):
    make = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = [dict(make().named_parameters()) | dict(make().named_buffers()) for _ in range(30)]
    drawn = tensors_of(gd.modules.init(make, gd.random.split(gd.random.key(1), 30)))
    assert set(drawn) == set(own[0])
    for leaf, values in drawn.items():
        expected = torch.stack([one[leaf].detach() for one in own])
        assert (values.dtype, values.shape) == (expected.dtype, expected.shape)
        if (expected == expected[:1]).all():
            assert values.equal(expected), leaf
            continue
        # Entries that are the same in every member, such as a padding row, are the same here.
        fixed = (expected == expected[:1]).all(0)
        assert (values == values[:1]).all(0).equal(fixed), leaf
        assert values[:, fixed].equal(expected[:, fixed]), leaf
        values, expected = values[:, ~fixed], expected[:, ~fixed]
        assert kolmogorov(values, expected) < 2.8, leaf
        if values.numel() > 500:
            assert kolmogorov(values * 2, expected) > 2.8, leaf  # the test can tell
        if (values == 0).sum() == 0:
            assert len(values.unique(dim=0)) == 30


def initialised(layer, scheme, **options):
    scheme(layer.weight, **options)
    return layer


@pytest.mark.parametrize(
    ("make", "low", "high"),
    [
        (lambda: nn.Linear(16, 50), -0.25, 0.25),
        (lambda: nn.Conv2d(4, 50, 2), -0.25, 0.25),
        (lambda: initialised(nn.Linear(20, 50), nn.init.trunc_normal_, std=1.0, a=-0.5, b=1.5), -0.5, 1.5),
    ],
)
def test_bounds_are_reached_and_not_passed(make, low, high):
    values = gd.modules.init(make, KEYS).params["weight"]
    assert low <= values.min() < low + 0.02
    assert high - 0.02 < values.max() <= high


def test_an_orthogonal_scheme_stays_orthogonal():
    def make():
        return initialised(nn.Linear(5, 3, dtype=torch.float64), nn.init.orthogonal_, gain=2.0)

    weight = gd.modules.init(make, KEYS).params["weight"]
    torch.testing.assert_close(weight @ weight.mT, 4 * torch.eye(3, dtype=torch.float64).expand(4, 3, 3))
    assert len(weight.unique(dim=0)) == 4


@pytest.mark.long
@few
@given(st.integers(0, 2**64 - 1), st.integers(1, 4), st.data())
def test_a_member_depends_on_its_key_alone(seed, n, data):
    make = ARCHITECTURES[data.draw(st.sampled_from(["mlp", "attentive", "schemes", "weight_norm"]))]
    keys = gd.random.split(gd.random.key(seed), n)
    rows = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    single = [tensors_of(gd.modules.init(make, key)) for key in keys]
    together = tensors_of(gd.modules.init(make, keys[rows]))
    for name, leaf in together.items():
        assert leaf.equal(torch.stack([single[row][name] for row in rows]))


def test_the_draws_are_those_of_the_key():
    params = gd.modules.init(lambda: nn.Linear(16, 3), KEYS[0]).params
    for count, (name, shape) in enumerate({"weight": (3, 16), "bias": (3,)}.items()):
        key = gd.random.fold_in(KEYS[0], count)
        assert params[name].equal(gd.random.uniform(key, shape, torch.float32, -0.25, 0.25))


def flattened(f):
    return lambda keys: {k: v.flatten(0, 1) for k, v in f(keys).items()}


@pytest.mark.parametrize("make", [make_mlp, Attentive, Schemes], ids=["mlp", "attentive", "schemes"])
@pytest.mark.parametrize(
    ("mapped", "keys"),
    [
        (vmap, KEYS),
        (lambda f: vmap(f, in_dims=1), KEYS.T),
        (lambda f: vmap(f, chunk_size=3), KEYS),
        (lambda f: flattened(vmap(vmap(f))), KEYS.view(2, 2, 2)),
        (lambda f: flattened(vmap(f)), KEYS.view(2, 2, 2)),
    ],
    ids=["vmap", "in_dims", "chunks", "nested", "of_stacks"],
)
def test_keys_may_be_under_vmap(make, mapped, keys):
    def every_tensor(key):
        return tensors_of(gd.modules.init(make, key))

    assert_same_bits(mapped(every_tensor)(keys), every_tensor(KEYS))


def test_torchs_generators_are_neither_read_nor_written():
    with torch.random.fork_rng():
        values = []
        for seed in range(2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            values.append(tensors_of(gd.modules.init(Schemes, KEYS[0])))
            assert torch.get_rng_state().equal(before)
        for name, leaf in values[0].items():
            assert leaf.equal(values[1][name])


def test_a_generator_of_the_modules_own_is_not_drawn_from():
    generator = torch.Generator()
    state = generator.get_state()

    def make():
        module = nn.Linear(2, 2)
        nn.init.normal_(module.weight, generator=generator)
        module.register_buffer("drawn", torch.rand(3, generator=generator))
        return module

    _, params, buffers = gd.modules.init(make, KEYS)
    assert generator.get_state().equal(state)
    assert len(params["weight"].unique(dim=0)) == len(buffers["drawn"].unique(dim=0)) == 4


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda: torch.bernoulli(torch.full((3,), 0.5)), "bernoulli"),
        (lambda: torch.empty(3).random_(), "random_"),
        (lambda: torch.empty(3).exponential_(), "exponential_"),
        (lambda: torch.rand(3, out=torch.empty(3)), "rand.out"),
        (lambda: torch.multinomial(torch.ones(3), 2), "multinomial"),
    ],
)
def test_other_random_operations_are_refused_by_name(draw, name):
    def make():
        module = nn.Linear(2, 2)
        module.register_buffer("drawn", draw())
        return module

    message = f"NotImplementedError: random operation {name}, .* it can use uniform_, normal_"
    assert_refused(lambda: gd.modules.init(make, KEYS), message)


def test_initial_values_are_nobody_elses():
    _, params, _ = assert_pure(lambda keys: gd.modules.init(Attentive, keys), KEYS)
    assert not any(leaf.requires_grad for leaf in params.values())
    one = gd.modules.init(Attentive, KEYS[0])
    x = torch.tensor([[1, 2, 3]] * 5)
    expected = one.apply(one.params, x, return_buffers=True)
    for leaf in one.buffers.values():
        leaf.zero_()
    for leaf in one.apply(one.params, x, return_buffers=True)[1].values():
        leaf.zero_()
    assert_same_bits(one.apply(one.params, x, return_buffers=True), expected)


def test_derivatives_go_past_the_initial_values():
    def make():  # with integer buffers, and running statistics that each member updates for itself
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))

    x = normal(0, 6, 3).float()

    def loss(scale, key):
        apply, params, _ = gd.modules.init(make, key)
        scaled = {name: scale * leaf for name, leaf in params.items()}
        return apply(scaled, x, return_buffers=True)[0].square().sum()

    at = torch.tensor(1.5)
    slope = torch.stack([grad(loss)(at, key) for key in KEYS])
    assert slope.abs().min() > 0.1
    torch.testing.assert_close(vmap(grad(loss), (None, 0))(at, KEYS), slope)
    torch.testing.assert_close(grad(lambda s: vmap(loss, (None, 0))(s, KEYS).sum())(at), slope.sum())
    _, tangent = jvp(lambda s: vmap(loss, (None, 0))(s, KEYS), (at,), (torch.ones(()),))
    torch.testing.assert_close(tangent, slope)


@pytest.mark.parametrize(
    ("make", "keys", "message"),
    [
        (nn.Linear(2, 1), KEYS, "TypeError: make_module is Linear, not a function .* lambda: nn.Linear"),
        (5, KEYS, "TypeError: make_module is int"),
        (lambda: 5, KEYS, "TypeError: what make_module made is int, not a torch.nn.Module"),
        (make_mlp, 5, r"TypeError: keys must be int64 \[N, 2\] .* got 5"),
        (make_mlp, KEYS.float(), r"TypeError: got float32\[4, 2\] on cpu"),
        (make_mlp, KEYS[None], r"TypeError: got int64\[1, 4, 2\]"),
        (make_mlp, KEYS[:, :1], r"TypeError: got int64\[4, 1\]"),
        (make_mlp, KEYS[:0], "keys is empty"),
        (lambda: nn.LazyLinear(2), KEYS, "parameter 'weight' is lazy"),
    ],
)
def test_what_cannot_make_members_raises(make, keys, message):
    assert_refused(lambda: gd.modules.init(make, keys), message)


def test_a_module_made_before_or_unlike_the_others_raises():
    module, sizes = build(make_mlp), iter(range(1, 9))
    with pytest.raises(ValueError, match="the same module twice; it must make a new one at each call"):
        gd.modules.init(lambda: module, KEYS)
    with pytest.raises(
        ValueError, match=r"layer '' of members\[1\] is Linear\(in_features=2, .* members\[0\]"
    ):
        gd.modules.init(lambda: nn.Linear(next(sizes), 1), KEYS)


def regression(apply):
    return lambda params, batch: gd.losses.mse(apply(params, batch[0]), batch[1])


DATA = normal(0, 30, 3), normal(1, 30, 2)


def double_mlp():
    return make_mlp().double()


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", *COMPILED])
def test_four_members_trained_at_once_are_four_single_runs(backend):
    """Each has initial values, a learning rate and an order of the data of its own."""
    init_keys, order_keys = gd.random.split(gd.random.key(2), 8).view(2, 4, 2)
    lrs = torch.tensor([0.01, 0.03, 0.1, 0.3], dtype=torch.float64)
    transform = gd.adam()

    def run(lr, init_key, order_key, backend="eager"):
        apply, params, _ = gd.modules.init(double_mlp, init_key)
        step = gd.make_step(regression(apply), transform)
        index = gd.epoch_batches(order_key, n=30, batch_size=7, epochs=4)
        state, trajectory = gd.train(step, step.init(params), DATA, index, lr, backend=backend)
        return state.params, trajectory.loss

    final, losses = vmap(lambda *point: run(*point, backend=backend))(lrs, init_keys, order_keys)
    apply, start, _ = gd.modules.init(double_mlp, init_keys)
    for i in range(4):
        one, loss = run(lrs[i], init_keys[i], order_keys[i])
        assert relative_error(losses[i], loss) < 1e-12
        for name, leaf in gd.modules.member(final, i).items():
            assert relative_error(leaf, one[name], start[name][i]) < 1e-11
    assert len(losses[:, 0].unique()) == 4

    # The same from stacked parameters, as an ensemble that is made first and then trained.
    def train_member(params, lr, order_key):
        step = gd.make_step(regression(apply), transform)
        index = gd.epoch_batches(order_key, n=30, batch_size=7, epochs=4)
        return gd.train(step, step.init(params), DATA, index, lr)[0].params

    for name, leaf in vmap(train_member)(start, lrs, order_keys).items():
        assert relative_error(leaf, final[name], start[name]) < 1e-11


@few
@given(st.integers(1, 4), st.sampled_from([make_mlp, Tied, lambda: nn.Sequential(nn.BatchNorm1d(3))]))
def test_a_stack_is_its_modules(n, make):
    with torch.random.fork_rng():
        torch.manual_seed(n)
        modules = [make().double() for _ in range(n)]
    x = normal(2, 6, 3)
    apply, params, buffers = gd.modules.stack(modules)
    places = storages([*params.values(), *buffers.values(), *(p for m in modules for p in m.parameters())])
    assert len(set(places[: len(params) + len(buffers)])) == len(params) + len(buffers)
    outputs, updated = vmap(lambda params, buffers: apply(params, x, buffers=buffers, return_buffers=True))(
        params, buffers
    )
    for i, module in enumerate(modules):
        own_params, own_buffers = gd.modules.functional(module)[1:]
        for name, leaf in (own_params | own_buffers).items():
            assert (params | buffers)[name][i].equal(leaf)
        torch.testing.assert_close(outputs[i], module(x).detach())
        for name, buffer in module.named_buffers():
            torch.testing.assert_close(updated[name][i], buffer)


def test_a_member_goes_back_into_a_module():
    with torch.random.fork_rng():
        modules = [Attentive() for _ in range(3)]
    _, params, buffers = gd.modules.stack(modules)
    with torch.random.fork_rng():
        fresh = Attentive()
    for i, module in [*enumerate(modules), (-1, modules[2])]:
        taken = gd.modules.member((params, buffers), i)
        assert not set(storages(list(taken[0].values()))) & set(storages(list(params.values())))
        fresh.load_state_dict(gd.modules.state_dict(fresh, *taken))
        for name, leaf in module.state_dict().items():
            assert fresh.state_dict()[name].equal(leaf)
    assert gd.modules.member({}, 1) == {}


def test_parameters_of_finished_runs_stack_too():
    trees = [{"w": normal(i, 2), "inner": (normal(i + 9, 3, 1).requires_grad_(),)} for i in range(3)]
    stacked = gd.modules.stack(trees)
    assert stacked["w"].shape == (3, 2)
    assert not stacked["inner"][0].requires_grad
    for i, tree in enumerate(trees):
        back = gd.modules.member(stacked, i)
        assert back["w"].equal(tree["w"])
        assert back["inner"][0].equal(tree["inner"][0].detach())


def frozen_linear():
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ([], "members is empty"),
        ([lambda: nn.Linear(2, 2), lambda: 5], r"TypeError: members\[1\] is int, not a torch.nn.Module"),
        (
            [lambda: nn.Conv1d(2, 2, 3), lambda: nn.Conv1d(2, 2, 3, stride=2)],
            r"layer '' of members\[1\] is Conv1d.* stride=\(2,\)\) in train mode, but of members\[0\] Con",
        ),
        (
            [make_mlp, lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))],
            r"layer '1' of members\[1\] is ReLU\(\) in train mode, but of members\[0\] Tanh",
        ),
        ([make_mlp, lambda: make_mlp()[:2]], r"layer '2' of members\[1\] is missing"),
        ([make_mlp, lambda: make_mlp().eval()], "in eval mode, but of"),
        (
            [make_mlp, double_mlp],
            r"members\[1\].params\['0.weight'\] is float64.* on cpu but members\[0\].* is float32\[4, 3\]",
        ),
        (
            [lambda: nn.Linear(2, 2), frozen_linear],
            r"missing members\[0\].params\['bias'\]; unexpected members\[1\].buffers\['bias'\]",
        ),
        (
            [lambda: {"w": torch.ones(2)}, lambda: {"w": torch.ones(3)}],
            r"members\[1\]\['w'\] is float32\[3\] on cpu but members\[0\]\['w'\] is float32\[2\]",
        ),
        (
            [lambda: {"w": torch.ones(2)}, lambda: {"v": torch.ones(2)}],
            r"missing members\[0\]\['w'\]; unexpected members\[1\]\['v'\]",
        ),
        ([lambda: {"w": 1.0}] * 2, r"TypeError: members\[0\]\['w'\] is float, not a Tensor"),
    ],
)
def test_what_does_not_stack_raises(make, message):
    with torch.random.fork_rng():
        members = [one() for one in make]
    assert_refused(lambda: gd.modules.stack(members), message)


@pytest.mark.long
@given(st.integers(2, 5), st.sampled_from([None, 1, 2, 5]))
def test_mean_and_spread_are_over_the_members(n, chunk_size):
    apply, params, buffers = gd.modules.init(double_mlp, gd.random.split(gd.random.key(n), n))
    x = normal(3, 4, 3)
    members, mean, std = assert_pure(
        lambda params, x: gd.modules.predict(apply, params, x, buffers=buffers, chunk_size=chunk_size),
        params,
        x,
    )
    outputs = np.stack([apply(gd.modules.member(params, i), x).numpy() for i in range(n)])
    np.testing.assert_allclose(members, outputs, rtol=1e-12)
    np.testing.assert_allclose(mean, outputs.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, outputs.std(0, ddof=1), rtol=1e-10)


def test_one_member_has_no_spread():
    prediction = gd.modules.predict(lambda w, x: w * x, torch.tensor([2.0]), torch.ones(3))
    assert prediction.mean.equal(torch.full((3,), 2.0))
    assert prediction.std.isnan().all()
    assert prediction.std.shape == (3,)


def test_outputs_are_trees_and_inputs_have_names():
    def apply(params, x, *, shift):
        return {"value": x * params["w"] + shift, "pair": (params["w"], x)}

    params, x = {"w": torch.tensor([1.0, 3.0])}, torch.ones(2)
    members, mean, std = assert_pure(
        lambda params, x: gd.modules.predict(apply, params, x, shift=torch.tensor(1.0)), params, x
    )
    assert mean["value"].tolist() == [3.0, 3.0]
    assert members["value"].tolist() == [[2.0, 2.0], [4.0, 4.0]]
    assert mean["pair"][0].tolist() == 2.0
    assert std["pair"][1].tolist() == [0.0, 0.0]


def test_each_member_predicts_with_its_own_buffers():
    modules = [build(lambda: nn.BatchNorm1d(3)) for _ in range(3)]
    for i, module in enumerate(modules):
        module(normal(i, 9, 3) + i)
        module.eval()
    x = normal(7, 5, 3)
    apply, params, buffers = gd.modules.stack(modules)
    prediction = gd.modules.predict(apply, params, x, buffers=buffers)
    torch.testing.assert_close(prediction.members, torch.stack([module(x).detach() for module in modules]))
    with pytest.raises(ValueError, match=r"missing \['running_mean', 'running_var'"):
        gd.modules.predict(apply, params, x)
    shared = partial(apply, buffers=gd.modules.member(buffers, 1))
    torch.testing.assert_close(gd.modules.predict(shared, params, x).std, torch.zeros_like(x))


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_each_member_drops_out_by_a_key_of_its_own(chunk_size):
    apply, params, _ = gd.modules.init(lambda: nn.Sequential(nn.Linear(3, 50), nn.Dropout()), KEYS)
    x, key = normal(0, 2, 3).float(), gd.random.key(9)
    assert_refused(lambda: gd.modules.predict(apply, params, x), "nn.Dropout '1' in training mode draws")
    members = gd.modules.predict(apply, params, x, key=key, chunk_size=chunk_size).members
    for i, own in enumerate(gd.random.split(key, 4)):
        single = apply(gd.modules.member(params, i), x, key=own)
        assert (members[i] == 0).equal(single == 0)
        torch.testing.assert_close(members[i], single)
    assert len((members == 0).flatten(1).unique(dim=0)) == 4
    assert not (gd.modules.predict(apply, params, x, training=False).members == 0).any()


def test_predictions_have_derivatives():
    apply, params, _ = gd.modules.init(double_mlp, KEYS)
    x = normal(4, 5, 3)
    slope = grad(lambda x: gd.modules.predict(apply, params, x).mean.sum())(x)
    single = [grad(lambda x, i=i: apply(gd.modules.member(params, i), x).sum())(x) for i in range(4)]
    torch.testing.assert_close(slope, torch.stack(single).mean(0))
    # Four equal members: the spread is zero, and its slope is no NaN.
    equal = {name: leaf[:1].expand_as(leaf) for name, leaf in params.items()}
    assert grad(lambda p: gd.modules.predict(apply, p, x).std.sum())(equal)["0.weight"].isfinite().all()
    several = vmap(lambda x: gd.modules.predict(apply, params, x).std)(x)
    torch.testing.assert_close(several, gd.modules.predict(apply, params, x).std)


def predict(params, **options):
    return gd.modules.predict(lambda params, buffers=None: params, params, **options)


ONES = {"w": torch.ones(2)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: predict(ONES | {"b": torch.ones(3)}), r"params\['b'\] has shape \(3,\) and"),
        (lambda: predict({"w": torch.tensor(1.0)}), r"params\['w'\] has shape \(\).*leading axis \[N\]"),
        (lambda: predict(ONES, buffers={"b": torch.ones(3)}), r"buffers\['b'\]"),
        (lambda: predict({"w": 1.0}), r"TypeError: params\['w'\] is float, not a Tensor"),
        (lambda: predict({}), "params has no tensor leaves"),
        (lambda: predict(ONES, chunk_size=0), "chunk_size must be an int >= 1"),
        (lambda: predict(ONES, key=KEYS), r"TypeError: key must be an int64 tensor \[2\]"),
        (
            lambda: predict({"w": torch.arange(2)}),
            r"TypeError: output\['w'\] is torch.int64, which has no mean",
        ),
        (lambda: gd.modules.member(ONES, 2), r"i must be an int in \[-2, 1\]; got 2"),
        (lambda: gd.modules.member((torch.ones(2), torch.ones(3)), 0), r"stacked\[1\] has shape"),
    ],
)
def test_what_cannot_be_predicted_with_raises(call, message):
    assert_refused(call, message)


def test_the_params_of_an_ensemble_are_not_broadcast():
    apply, params, _ = gd.modules.init(lambda: nn.LayerNorm(3), KEYS)
    with pytest.raises(
        ValueError, match=r"params\['weight'\] has shape \(4, 3\), the module's \(3,\); map over"
    ):
        apply(params, torch.ones(4, 3))
    apply, params, _ = gd.modules.init(lambda: nn.BatchNorm1d(3).eval(), KEYS)
    with pytest.raises(
        ValueError, match=r"missing \['running_mean', 'running_var', 'num_batches_tracked'\]"
    ):
        vmap(apply, (0, None))(params, torch.ones(5, 3))
    # Rows of one module's weight are no members, though the sizes agree.
    one = gd.modules.init(lambda: nn.Linear(3, 2), KEYS[0])
    with pytest.raises(ValueError, match=r"params\['weight'\] has shape \(3,\), the module's \(2, 3\)"):
        gd.modules.predict(one.apply, one.params, torch.ones(5, 3))
