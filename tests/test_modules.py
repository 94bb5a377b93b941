"""Modules in and out."""

import pytest
import torch
from torch import nn

import gdfunc as gd

from .references import fingerprint, normal, relative_error


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


def test_apply_is_the_module():
    module = build(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    apply, params, buffers = gd.modules.functional(module)
    x = normal(0, 5, 3)
    assert apply(params, x).equal(module(x).detach())
    assert list(params) == [name for name, _ in module.named_parameters()]
    assert buffers == {}
    assert not any(leaf.requires_grad for leaf in params.values())
    assert apply({name: 0 * leaf for name, leaf in params.items()}, x).eq(0).all()


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
    module = build(Tied)
    apply, params, buffers = gd.modules.functional(module)
    assert sorted(params) == ["first.weight", "second.bias"]
    assert sorted(buffers) == ["first.bias", "scale"]
    final, _ = gd.train(gd.make_step(squares(apply)), params, normal(0, 8, 3), gd.full_batch(8, 4), 0.1)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    start = module.first.weight.detach().clone()
    for _ in range(4):
        optimizer.zero_grad()
        (module(normal(0, 8, 3)) ** 2).mean().backward()
        optimizer.step()
    trained = module.first.weight.detach()
    assert relative_error(final["first.weight"], trained, start) < 1e-12
    state = gd.modules.state_dict(module, final, buffers)
    assert sorted(state) == sorted(module.state_dict())
    assert state["second.weight"].equal(state["first.weight"])
    fresh = build(Tied)
    fresh.load_state_dict(state)
    assert fresh(normal(1, 2, 3)).detach().equal(apply(final, normal(1, 2, 3)))


def test_state_dict_without_buffers_takes_the_modules_own():
    module = build(lambda: nn.BatchNorm1d(3))
    module(normal(0, 4, 3))
    _, params, _ = gd.modules.functional(module)
    state = gd.modules.state_dict(module, params)
    assert state["running_mean"].equal(module.running_mean)
    assert state["running_mean"].data_ptr() != module.running_mean.data_ptr()


def test_running_statistics_are_updated_in_a_copy():
    module = build(lambda: nn.BatchNorm1d(3))
    apply, params, buffers = gd.modules.functional(module)
    x = normal(0, 8, 3) + 1
    before = fingerprint(list(buffers.values()))
    output, updated = apply(params, x, buffers=buffers, return_buffers=True)
    assert fingerprint(list(buffers.values())) == before
    assert apply(params, x).equal(output)
    assert output.equal(module(x).detach())
    for name, buffer in module.named_buffers():
        assert updated[name].equal(buffer)
    assert not updated["running_mean"].equal(buffers["running_mean"])


def test_several_and_named_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x, *, shift):
            return self.layer(x) + shift

    module = build(Two)
    apply, params, _ = gd.modules.functional(module)
    x, shift = normal(0, 3, 2), normal(1, 3, 1)
    assert apply(params, x, shift=shift).equal(module(x, shift=shift).detach())


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


@pytest.mark.parametrize(
    ("make", "shape", "name"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), (4, 3), "nn.BatchNorm1d '1'"),
        (lambda: nn.BatchNorm2d(2, track_running_stats=False), (4, 2, 3, 3), "nn.BatchNorm2d ''"),
    ],
)
def test_batch_norm_in_training_mode_is_refused_per_sample(make, shape, name):
    module = build(make)
    apply, params, _ = gd.modules.functional(module)
    x = normal(0, *shape)
    gd.batch_grad(squares(apply))(params, x)
    with pytest.raises(ValueError, match=f"{name} in training mode .* use nn.GroupNorm, or module.eval"):
        gd.per_sample_grad(squares(apply))(params, x)


def test_batch_norm_in_eval_mode_is_welcome_per_sample():
    apply, params, _ = gd.modules.functional(build(lambda: nn.BatchNorm1d(3)).eval())
    grads, _ = gd.per_sample_grad(squares(apply))(params, normal(0, 4, 3))
    torch.testing.assert_close(
        grads["weight"].mean(0), gd.batch_grad(squares(apply))(params, normal(0, 4, 3))[0]["weight"]
    )


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_networks_are_refused_per_sample(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = kind(2, 3, batch_first=True)

        def forward(self, x):
            return self.memory(x)[0]

    apply, params, _ = gd.modules.functional(build(Recurrent))
    x = normal(0, 4, 5, 2)
    gd.batch_grad(squares(apply))(params, x)
    with pytest.raises(ValueError, match=f"nn.{kind.__name__} 'memory' cannot run under vmap.*nn.GRUCell"):
        gd.per_sample_grad(squares(apply))(params, x)


def test_a_cell_in_a_scan_takes_their_place():
    cell = build(lambda: nn.GRUCell(2, 3))
    apply, params, _ = gd.modules.functional(cell)

    def loss_fn(params, x):  # x [B, time, 2]
        start = x.new_zeros(len(x), 3)
        _, states = gd.scan(lambda h, now: (apply(params, now, h),) * 2, start, x.transpose(0, 1))
        return (states**2).mean()

    x = normal(0, 4, 5, 2)
    grads, _ = gd.per_sample_grad(loss_fn)(params, x)
    torch.testing.assert_close(
        grads["weight_ih"].mean(0), gd.batch_grad(loss_fn)(params, x)[0]["weight_ih"]
    )


def test_dropout_names_the_option():
    apply, params, _ = gd.modules.functional(build(lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout())))
    with pytest.raises(RuntimeError, match="randomness") as caught:
        gd.per_sample_grad(squares(apply))(params, normal(0, 4, 2))
    assert 'per_sample_grad(loss_fn, randomness="different")' in caught.value.__notes__[0]


def test_what_is_no_module_or_has_no_parameters_yet_raises():
    with pytest.raises(TypeError, match="module is function, not a torch"):
        gd.modules.functional(lambda x: x)
    with pytest.raises(ValueError, match="parameter 'weight' is lazy: call the module on a batch once"):
        gd.modules.functional(nn.LazyLinear(2))
