"""`gd.interop`: torch's optimizers as steps with the same bits, transformations as torch's optimizers."""

import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import gdfunc as gd
from gdfunc import _tree

from .assertions import assert_pure, assert_same_bits
from .references import linear_data, linear_loss, normal
from .tables import TABLE, make, start_of

# `torch.optim` in.

CLASSES = {
    kind.__name__: kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
}
REFUSED = ("LBFGS", "SparseAdam")
OPTIONS = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adam": {"amsgrad": True},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "Adagrad": {"initial_accumulator_value": 0.1, "lr_decay": 0.01},
    "ASGD": {"t0": 3},
}
SIZES = (6, 4, 2)


def network(dtype):
    """Two matrices and, but for Muon, their vectors: parameters, a loss, and 100 batches."""
    x = normal(0, 100, 8, SIZES[0]).to(dtype)
    y = torch.tanh(x @ normal(1, SIZES[0], SIZES[2]).to(dtype))
    params = {
        "w": normal(2, SIZES[0], SIZES[1]).to(dtype) / 2,
        "v": normal(3, SIZES[1], SIZES[2]).to(dtype) / 2,
        "b": normal(4, SIZES[1]).to(dtype) / 2,
    }

    def loss_fn(params, batch):
        x, y = batch
        hidden = x @ params["w"] + params.get("b", 0.0)
        return ((torch.tanh(hidden) @ params["v"] - y) ** 2).mean()

    return params, loss_fn, (x, y)


def of_class(name, dtype=torch.float64):
    params, loss_fn, batches = network(dtype)
    if name == "Muon":
        del params["b"]
    return params, loss_fn, batches, CLASSES[name], OPTIONS.get(name, {})


def own_loop(optimizer, leaves, loss_fn, batches, schedule=None):
    """The loop of PyTorch's tutorials: the losses, and the lrs that a scheduler gives."""
    losses, lrs = [], []
    for batch in zip(*batches, strict=True):
        optimizer.zero_grad()
        loss = loss_fn(leaves, batch)
        loss.backward()
        lrs.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        losses.append(loss.detach())
        if schedule is not None:
            schedule.step()
    return torch.stack(losses), lrs


def as_leaves(params):
    return {name: leaf.clone().requires_grad_() for name, leaf in params.items()}


BITS = [
    pytest.param(name, dtype, marks=[pytest.mark.long] if "Muon" in name or dtype.itemsize == 4 else [])
    for name in CLASSES
    if name not in REFUSED
    for dtype in (torch.float64, torch.float32)
]


@pytest.mark.parametrize(("name", "dtype"), BITS)
def test_a_step_has_the_bits_of_the_class(name, dtype):
    params, loss_fn, batches, kind, options = of_class(name, dtype)
    leaves = as_leaves(params)
    optimizer = kind([*leaves.values()], lr=0.01, **options)
    losses, _ = own_loop(optimizer, leaves, loss_fn, batches)
    step = gd.interop.from_optim(loss_fn, kind, **options)
    carry = step.init(params)
    for t, expected in enumerate(losses):
        carry, loss = step(carry, _tree.map(lambda leaf, t=t: leaf[t], batches), 0.01)
        assert_same_bits(loss, expected)
    assert_same_bits(carry.params, {name: leaf.detach() for name, leaf in leaves.items()})
    assert int(carry.count) == 100
    for memory, leaf in zip(carry.opt_state, leaves.values(), strict=True):
        assert_same_bits(memory, dict(optimizer.state[leaf]))
    assert all((leaf - params[key]).abs().max() > 1e-4 for key, leaf in carry.params.items())


@pytest.mark.parametrize("name", ["Adam", "SGD", "Rprop", "ASGD"])
@pytest.mark.parametrize(
    "make_schedule",
    [
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=101, cycle_momentum=False),
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 100),
    ],
)
def test_a_schedulers_lr_is_data(name, make_schedule):
    params, loss_fn, batches, kind, options = of_class(name)
    leaves = as_leaves(params)
    optimizer = kind([*leaves.values()], lr=0.01, **options)
    losses, lrs = own_loop(optimizer, leaves, loss_fn, batches, make_schedule(optimizer))
    step = gd.interop.from_optim(loss_fn, kind, **options)
    data = _tree.map(lambda leaf: leaf.flatten(0, 1), batches)
    index = gd.epoch_batches(gd.random.key(0), 800, 8, 1, shuffle=False)
    final, trajectory = gd.train(step, step.init(params), data, index, lrs, record=("loss", "lr"))
    assert_same_bits(trajectory.loss, losses)
    assert_same_bits(final.params, {name: leaf.detach() for name, leaf in leaves.items()})


@pytest.mark.parametrize("name", ["Adam", "Adafactor", "SGD"])
def test_a_step_is_pure(name):
    params, loss_fn, batches, kind, options = of_class(name)
    step, batch = gd.interop.from_optim(loss_fn, kind, **options), _tree.map(lambda leaf: leaf[0], batches)
    carry = step.init(params)
    for _ in range(2):
        carry = assert_pure(lambda carry, batch: step(carry, batch, 0.1), carry, batch)[0]
    assert not any(leaf.requires_grad for leaf in _tree.leaves(carry))


def test_a_run_resumes_from_its_file(tmp_path):
    params, loss_fn, batches, kind, options = of_class("Adam")
    step = gd.interop.from_optim(loss_fn, kind, **options)
    data, index = _tree.map(lambda leaf: leaf[0], batches), gd.full_batch(8, 30)
    whole, _ = gd.train(step, step.init(params), data, index, 0.01)
    half, _ = gd.train(step, step.init(params), data, index[:10], 0.01)
    gd.save(tmp_path / "half.safetensors", half)
    half = gd.load(tmp_path / "half.safetensors", like=half)
    assert_same_bits(gd.train(step, half, data, index[10:], 0.01)[0], whole)


SHAPED = linear_data(3, 6, 3)
START = {"w": normal(0, 3), "b": normal(1, 1)[0]}


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_transformations_and_compiled_backends_refuse_the_class_by_its_name(name):
    step = gd.interop.from_optim(linear_loss, CLASSES[name])
    carry = step.init(START)

    def run(lr, params=None, **options):
        first = carry if params is None else step.init(params)
        return linear_loss(
            gd.train(step, first, SHAPED, gd.full_batch(6, 3), lr, **options)[0].params, SHAPED
        )

    lr, word = torch.tensor(0.1, dtype=torch.float64), f"torch.optim.{name} changes its parameters in place"
    for call in (
        lambda: torch.func.vmap(run)(torch.stack([lr, lr])),
        lambda: torch.func.grad(run)(lr),
        lambda: torch.func.jvp(run, (lr,), (lr,)),
        lambda: torch.func.vmap(lambda w: run(0.1, {"w": w, "b": START["b"]}))(
            torch.stack([START["w"]] * 2)
        ),
    ):
        with pytest.raises(
            ValueError, match=f"{word}.*vmap, grad and jvp do not go through its step; gdfunc's"
        ):
            call()
    for backend in ("native", "inductor"):
        with pytest.raises(gd.BackendError, match=f"{word}.*use backend='eager'"):
            run(lr, backend=backend)


def test_auto_takes_eager_without_a_word(nothing_said):
    step = gd.interop.from_optim(lambda w, batch: (w - batch).square().mean(), torch.optim.Adam)
    data, index = torch.ones(1), gd.full_batch(1, 30_000)
    calls = []

    def stop_early(done, total):
        calls.append(done)
        raise KeyboardInterrupt

    # So many steps take more than ten seconds, of which auto warns where another step would be compiled.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(gd.TrainingInterrupted):
            gd.train(step, step.init(torch.tensor(0.0)), data, index, 0.1, progress=stop_early)
    assert calls


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.LBFGS, r"torch.optim.LBFGS needs several losses .* use gd.methods.lbfgs\(loss_fn\)$"),
        (torch.optim.SparseAdam, r"torch.optim.SparseAdam needs sparse gradients, .* use torch.optim.Adam"),
        (
            torch.optim.SGD([torch.zeros(1)]),
            "optimizer is a SGD, which has its parameters already; pass the class SGD",
        ),
        (partial(torch.optim.Adam, differentiable=True), "^differentiable=True is for derivatives"),
        (partial(torch.optim.Adam, capturable=True), "^capturable=True is for CUDA graphs"),
        (lambda leaves: Counting(leaves, "group"), "Counting remembers numbers in its param_groups"),
        (lambda leaves: Counting(leaves, "state"), r"Counting remembers 'k' beside its parameters"),
        (lambda leaves: Counting(leaves, "text"), r"Counting.state\[leaf\]\['k'\] is str"),
    ],
)
def test_an_optimizer_that_no_step_can_be_is_refused(optimizer, message):
    def take_a_step():
        step = gd.interop.from_optim(linear_loss, optimizer)
        step(step.init(START), SHAPED, 0.1)

    with pytest.raises(TypeError, match=message):
        take_a_step()


class Counting(torch.optim.Optimizer):
    """Descent with lr/k in step k, where k is kept in a place of choice."""

    def __init__(self, params, place):
        self.place = place
        super().__init__(params, {"lr": 1.0, "k": 0})

    def step(self, closure):
        loss = closure()
        for group in self.param_groups:
            for leaf in group["params"]:
                state = self.state[leaf] if self.place in ("leaf", "text") else self.state
                state = group if self.place == "group" else state
                state["k"] = state.get("k", 0) + 1 if self.place != "text" else "one"
                leaf.detach().sub_(
                    leaf.grad, alpha=group["lr"] / (state["k"] if self.place != "text" else 1)
                )
        return loss


def test_a_number_in_the_state_of_a_leaf_is_carried():
    step = gd.interop.from_optim(lambda w, batch: w.sum(), lambda leaves: Counting(leaves, "leaf"))
    carry, points = step.init(torch.zeros(2)), []
    for _ in range(3):
        carry, _ = step(carry, None, 1.0)
        points.append(float(carry.params[0]))
    assert points == pytest.approx([-1.0, -1.5, -1.5 - 1 / 3])
    assert carry.opt_state[0]["k"].value.equal(torch.tensor(3))


def test_lr_is_no_option():
    with pytest.raises(TypeError, match="from_optim takes no lr: lr is an argument of the step"):
        gd.interop.from_optim(linear_loss, torch.optim.SGD, lr=0.1)


# Transformations out.

PARTS = ("w", "m", "s")


def loss_of(params, batch=None):
    return sum((0.25 + i / 2) * (leaf - 0.3).square().sum() for i, leaf in enumerate(params.values()))


def trained(transform, start, lrs):
    step = gd.make_step(loss_of, transform)
    return gd.train(step, step.init(start), None, gd.full_batch(1, len(lrs)), lrs, backend="eager")


def loop(optimizer, params, steps, schedule=None):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(params)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if schedule is not None:
            schedule.step()
    return torch.stack(losses)


def close(got, expected):
    torch.testing.assert_close(_tree.map(lambda leaf: leaf.detach(), got), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TABLE)
def test_a_loop_of_torchs_gives_the_run_of_train(name):
    row = TABLE[name]
    transform, params = make(row), as_leaves(start_of(row))
    optimizer = gd.interop.as_optimizer(transform, params.items(), row.lr)
    losses = loop(optimizer, params, 8)
    final, trajectory = trained(transform, start_of(row), torch.full((8,), row.lr, dtype=torch.float64))
    close(losses, trajectory.loss)
    close(params, final.params)
    assert losses[-1] != losses[0]


ROW = TABLE["adam"]


def made(transform=None, lr=0.05, params=None):
    params = as_leaves(start_of(ROW)) if params is None else params
    return params, gd.interop.as_optimizer(transform or make(ROW), params.items(), lr)


SCHEDULES = {
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=11, cycle_momentum=False
    ),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t),
    "sequence": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        [4],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_lr_schedulers_set_the_lr(name, as_tensor):
    params, optimizer = made(lr=torch.tensor(0.05, dtype=torch.float64) if as_tensor else 0.05)
    schedule, lrs = SCHEDULES[name](optimizer), []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: lrs.append(float(opt.param_groups[0]["lr"])))
    losses = loop(optimizer, params, 10, schedule)
    assert len(set(lrs)) > 5
    final, trajectory = trained(make(ROW), start_of(ROW), torch.tensor(lrs, dtype=torch.float64))
    close(losses, trajectory.loss)
    close(params, final.params)


def test_each_group_has_an_lr_of_its_own_and_a_norm_is_that_of_all():
    params = as_leaves(start_of(ROW))
    transform = gd.chain(gd.clip_by_global_norm(0.5), gd.momentum(0.9))
    groups = [{"params": [params["w"]], "lr": 0.2}, {"params": [params["m"], params["s"]]}]
    optimizer = gd.interop.as_optimizer(transform, groups, 0.1)
    loop(optimizer, params, 5)
    factors = gd.partition({True: gd.scale(2.0), False: gd.scale(1.0)}, {"w": True, "m": False, "s": False})
    final, _ = trained(
        gd.chain(transform, factors), start_of(ROW), torch.full((5,), 0.1, dtype=torch.float64)
    )
    close(params, final.params)


def test_a_closure_gives_the_loss_and_its_gradients():
    params, optimizer = made()
    others, expected = made()

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return loss

    with torch.inference_mode(False), torch.set_grad_enabled(False):
        losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert losses == loop(expected, others, 3).tolist()
    assert optimizer.step() is None
    close(params, _tree.map(lambda leaf: leaf.detach() - 0, params))


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
def test_a_state_dict_goes_on_where_it_was_taken(name, copied):
    row = TABLE[name]
    params, optimizer = made(make(row), row.lr, as_leaves(start_of(row)))
    loop(optimizer, params, 3)
    state = copied(
        {"optimizer": optimizer.state_dict(), "params": _tree.map(lambda leaf: leaf.detach(), params)}
    )
    others, other = made(make(row), 7.0, as_leaves(state["params"]))
    other.load_state_dict(state["optimizer"])
    assert other.param_groups[0]["lr"] == row.lr
    assert_same_bits(loop(other, others, 3), loop(optimizer, params, 3))
    assert_same_bits(opt_state_of(other), opt_state_of(optimizer))


def opt_state_of(optimizer):
    return optimizer.state_dict()["state"].get("opt_state")


def test_a_state_dict_keeps_what_it_was_when_the_optimizer_goes_on():
    params, optimizer = made()
    loop(optimizer, params, 2)
    state = opt_state_of(optimizer)
    before = copy.deepcopy(state)
    loop(optimizer, params, 2)
    assert_same_bits(state, before)
    assert opt_state_of(optimizer)["step"] == 4


@pytest.mark.parametrize("transform", [gd.adam(), gd.chain()])
def test_a_state_dict_of_another_order_reaches_the_parameters_by_their_names(transform):
    def start(order, values):
        params = {name: nn.Parameter(values[name].clone()) for name in order}
        return params, gd.interop.as_optimizer(transform, params.items(), 0.1)

    def descend(params, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            (params["a"].square().sum() + params["b"].sin().sum()).backward()
            optimizer.step()
        return {name: leaf.detach() for name, leaf in sorted(params.items())}

    params, optimizer = start("ab", {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])})
    others, other = start("ba", descend(params, optimizer))
    other.load_state_dict(optimizer.state_dict())
    assert_same_bits(descend(others, other), descend(params, optimizer))
    assert other.param_groups[0]["param_names"] == ["b", "a"]


def test_a_copied_optimizer_goes_on_with_its_copied_parameters():
    model = nn.Sequential(nn.Linear(3, 2, bias=False, dtype=torch.float64, device="meta")).to_empty(
        device="cpu"
    )
    nn.init.ones_(model[0].weight)
    optimizer = gd.interop.as_optimizer(gd.adam(), model.parameters(), 0.1)

    def descend(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(1, 3, dtype=torch.float64)).square().sum().backward()
        optimizer.step()

    descend(model, optimizer)
    other, others = copy.deepcopy((model, optimizer))
    descend(model, optimizer)
    descend(other, others)
    assert_same_bits(model.state_dict(), other.state_dict())
    assert repr(others) == repr(optimizer)
    assert repr(others).startswith(
        "as_optimizer of adam(betas=(0.9, 0.999), eps=1e-08) (\nParameter Group 0"
    )


@pytest.mark.parametrize("name", TABLE)
def test_a_pickled_optimizer_goes_on_where_it_was(name):
    row = TABLE[name]
    params, optimizer = made(make(row), row.lr, as_leaves(start_of(row)))
    loop(optimizer, params, 2)
    others, other = pickle.loads(pickle.dumps((params, optimizer)))
    assert repr(other) == repr(optimizer)
    assert_same_bits(loop(other, others, 2), loop(optimizer, params, 2))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (gd.momentum(0.9), r"it has 'exp_avg\[0\]', but momentum\(.*\) has step, momentum_buffer\[0\]$"),
        (gd.chain(), r"it has 'step', but chain\(\) has none"),
        (gd.adam(amsgrad=True), None),
    ],
)
def test_the_state_of_another_transformation_raises(transform, message):
    weight = nn.Parameter(torch.ones(3))
    optimizer = gd.interop.as_optimizer(gd.adam(), [weight], 0.1)
    weight.sum().backward()
    optimizer.step()
    other = gd.interop.as_optimizer(transform, [weight], 0.1)
    if message is None:
        other.load_state_dict(optimizer.state_dict())  # a part of the state: the rest begins
        return
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="it has 0, but"):
        other.load_state_dict(torch.optim.SGD([weight], momentum=0.9).state_dict() | {"state": {0: {}}})


def test_the_state_of_other_parameters_raises():
    weight = nn.Parameter(torch.ones(3))
    optimizer = gd.interop.as_optimizer(gd.adam(), [weight], 0.1)
    weight.sum().backward()
    optimizer.step()
    wider = nn.Parameter(torch.ones(4))
    other = gd.interop.as_optimizer(gd.adam(), [wider], 0.1)
    other.load_state_dict(optimizer.state_dict())
    wider.sum().backward()
    with pytest.raises(ValueError, match=r"loaded state has exp_avg\[0\] of shape \(3,\), .* need \(4,\)"):
        other.step()


def test_parameters_without_a_gradient_and_their_state_stay():
    params, optimizer = made(gd.chain(gd.momentum(0.9), gd.adam()))
    loop(optimizer, params, 2)
    before, state = _tree.clone(_tree.detach(params)), opt_state_of(optimizer)
    optimizer.zero_grad()
    (params["w"].sum() + params["s"]).backward()
    optimizer.step()
    after = opt_state_of(optimizer)
    moved = {name for name in params if not params[name].equal(before[name])}
    assert moved == {"w", "s"}
    for path, leaf in after.items():
        assert leaf.equal(state[path]) == ("'m'" in path)
    # The leaf that rested goes on from where it was.
    optimizer.zero_grad()
    loss_of(params).backward()
    optimizer.step()
    path = "[0].momentum_buffer['m']"
    assert opt_state_of(optimizer)[path].equal(0.9 * state[path] + params["m"].grad)


def test_a_state_of_all_parameters_begins_again_with_others():
    """The vectors of L-BFGS are those of the parameters that moved, not of others of the same size."""
    values = [torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([3.0, 4.0], dtype=torch.float64)]

    def descend(leaf, factor, optimizer):
        optimizer.zero_grad()
        (factor * leaf.square().sum()).backward()
        optimizer.step()
        return leaf.detach().clone()

    leaves = [nn.Parameter(value.clone()) for value in values]
    both = gd.interop.as_optimizer(gd.lbfgs(), leaves, 0.5)
    ends = [descend(leaf, factor, both) for leaf, factor in zip(leaves, (1.0, 100.0), strict=True)]
    for value, factor, end in zip(values, (1.0, 100.0), ends, strict=True):
        alone = nn.Parameter(value.clone())
        assert_same_bits(end, descend(alone, factor, gd.interop.as_optimizer(gd.lbfgs(), [alone], 0.5)))


def test_a_step_without_any_gradient_changes_nothing():
    params, optimizer = made()
    optimizer.step()
    assert_same_bits(_tree.detach(params), start_of(ROW))
    assert optimizer.state_dict()["state"] == {}


def test_a_group_that_is_added_later_begins_then():
    params = as_leaves(start_of(ROW))
    optimizer = gd.interop.as_optimizer(gd.momentum(0.9), [params["w"]], 0.1)
    loop(optimizer, params, 2)
    buffer = opt_state_of(optimizer)["momentum_buffer[0]"]
    optimizer.add_param_group({"params": [params["m"]], "lr": 0.2})
    before = params["m"].detach().clone()
    loop(optimizer, params, 1)
    state = opt_state_of(optimizer)
    assert_same_bits(state["momentum_buffer[1]"], params["m"].grad)
    assert_same_bits(
        params["m"].detach(),
        torch.addcmul(before, params["m"].grad, torch.tensor(-0.2, dtype=torch.float64)),
    )
    assert_same_bits(state["momentum_buffer[0]"], buffer * 0.9 + params["w"].grad)


def test_hooks_see_the_step():
    params, optimizer = made()
    seen = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append("before"))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda opt, state: seen.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    loop(optimizer, params, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saved", "loaded"]


def test_zero_grad_forgets_the_gradients():
    params, optimizer = made()
    loss_of(params).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(leaf.grad.eq(0).all() for leaf in params.values())
    optimizer.zero_grad()
    assert all(leaf.grad is None for leaf in params.values())


@pytest.mark.parametrize("bad", [False, True])
def test_a_grad_scaler_scales_and_skips(bad):
    params, optimizer = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loss = loss_of(params)
    scaler.scale(loss).backward()
    if bad:
        params["w"].grad[0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == (2.0**9 if bad else 2.0**10)
    lrs = torch.tensor([0.05], dtype=torch.float64)
    expected = start_of(ROW) if bad else trained(make(ROW), start_of(ROW), lrs)[0].params
    close(params, expected)


def test_gradients_are_accumulated_by_torch():
    params, optimizer = made()
    loss_of(params).backward()
    loss_of(params).backward()
    optimizer.step()
    step = gd.make_step(lambda params, batch: 2 * loss_of(params), make(ROW))
    close(params, step(step.init(start_of(ROW)), None, 0.05)[0].params)


def test_no_graph_is_kept():
    beta = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    params, optimizer = made(gd.momentum(beta))
    loop(optimizer, params, 2)
    assert not any(leaf.requires_grad for leaf in opt_state_of(optimizer).values())
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in params.values())


WEIGHT = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: gd.interop.as_optimizer(gd.adam, [WEIGHT], 0.1),
            TypeError,
            "not a GradientTransformation; call",
        ),
        (
            lambda: gd.interop.as_optimizer(gd.adam(), [WEIGHT], -0.1),
            ValueError,
            "lr must be a finite number >= 0",
        ),
        (
            lambda: gd.interop.as_optimizer(gd.adam(), [{"params": [WEIGHT], "lr": -1.0}], 0.1),
            ValueError,
            "lr must be a finite number",
        ),
        (
            lambda: gd.interop.as_optimizer(gd.adam(), [{"params": [WEIGHT], "weight_decay": 0.1}], 0.1),
            ValueError,
            r"param_groups\[0\] has 'weight_decay', but groups differ in lr alone; use gd.partition",
        ),
        (
            lambda: gd.interop.as_optimizer(gd.adam(), [torch.ones(2, dtype=torch.int64)], 0.1),
            TypeError,
            r"params\[0\] is int64; parameters must be floating point",
        ),
        (
            lambda: gd.interop.as_optimizer(
                gd.adam(), [("a", WEIGHT), ("a", nn.Parameter(torch.ones(2)))], 0.1
            ),
            ValueError,
            "two parameters have the name 'a'",
        ),
    ],
)
def test_arguments_that_do_not_fit_raise(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_sparse_gradient_raises():
    table = nn.Embedding(3, 2, sparse=True, _weight=torch.ones(3, 2))
    optimizer = gd.interop.as_optimizer(gd.adam(), table.named_parameters(), 0.1)
    table(torch.tensor([0, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"the gradient of params\['weight'\] is sparse; make it dense"):
        optimizer.step()
