"""Transformations × laws, and steps × laws. Each stands in `tables`, a line in TABLE or STEPS."""

import pytest
import torch
from torch.func import grad, vmap

import gdfunc as gd
from gdfunc import _tree

from .assertions import assert_derivatives, assert_pure, assert_same_bits
from .references import fingerprint, flat, linear_data, linear_gradient, linear_loss, normal
from .tables import NUMBERED, STEPS, TABLE, WITH_HYPERPARAMETERS, make, start_of

everywhere = pytest.mark.parametrize("name", TABLE)


def gradients(params):
    """Of ½ Σ c·(θ − 0.3)², with a curvature of its own for every leaf."""
    return {
        name: ((0.5 + i) * (leaf - 0.3)).to(leaf.dtype) for i, (name, leaf) in enumerate(params.items())
    }


def descend(transform, params, lr, steps):
    state = transform.init(params)
    for _ in range(steps):
        updates, state = transform.update(gradients(params), state, params)
        params = gd.apply_updates(params, updates, lr)
    return params, state


def as_tensors(hyperparameters):
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in hyperparameters.items()}


def total(params):
    return sum((leaf.double() * (i + 1)).sum() for i, leaf in enumerate(params.values()))


# Problems of six numbers, and the part of the gap to the minimum that may be left.
PROBLEMS = {
    "quadratic": (
        lambda: gd.problems.quadratic([0.2, 0.5, 1.0, 1.0, 2.0, 4.0], key=gd.random.key(0)),
        0.05,
    ),
    "rosenbrock": (lambda: gd.problems.rosenbrock(6), 0.25),
    "stocks": (gd.problems.stock_regression, 0.05),
}


@everywhere
@pytest.mark.parametrize("problem_name", PROBLEMS)
def test_it_converges_on_a_known_problem(problem_name, name):
    """The best of eight learning rates leaves little of the gap to the known minimum."""
    row, (make_problem, allowed) = TABLE[name], PROBLEMS[problem_name]
    if problem_name == "stocks":
        pytest.importorskip("matplotlib")
    problem = make_problem()
    leaves, structure = _tree.flatten(problem.params)
    vector = torch.cat([leaf.reshape(-1) for leaf in leaves]) + 0.05 * normal(5, 6)
    # Off zero, where trust ratios have nothing to go by.
    if row.matrices:
        first = {"w": vector.reshape(3, 2)}
    else:
        first = {"w": vector[:3], "m": vector[3:5].reshape(1, 2), "s": vector[5]}

    def loss_fn(params, batch):
        parts = torch.cat([leaf.reshape(-1) for leaf in params.values()]).split([x.numel() for x in leaves])
        shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        return problem.loss_fn(_tree.unflatten(structure, shaped), problem.data)

    step = gd.make_step(loss_fn, make(row))

    def run(lr):
        state, _ = gd.train(step, step.init(first), None, gd.full_batch(1, 50), lr)
        return loss_fn(state.params, None)

    final = vmap(run)(torch.logspace(-3, 1, 9, dtype=torch.float64))
    gap = final[final.isfinite()].min() - problem.minimum
    assert gap < allowed * (loss_fn(first, None) - problem.minimum)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, None])
def test_it_keeps_structure_shape_dtype_device_and_stride(name, dtype):
    row = TABLE[name]
    mixed = (torch.float32, torch.float64, torch.bfloat16)
    start = start_of(row, (dtype,) * 3 if dtype else mixed)
    start["m"] = start["m"].mT.contiguous().mT
    # yogi's start and the like are numbers only; every entry of the table may be a tensor.
    for chosen in (row.hyperparameters, as_tensors(row.hyperparameters)):
        transform = row.make(**chosen)
        final, state = descend(transform, start, row.lr, 3)
        assert list(final) == list(start)
        first = transform.init(start)
        assert _tree.flatten(state)[1] == _tree.flatten(first)[1]
        pairs = [*zip(final.values(), start.values(), strict=True)]
        pairs += zip(_tree.leaves(state), _tree.leaves(first), strict=True)
        for got, expected in pairs:
            assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
            assert got.stride() == expected.stride()
            assert got.is_floating_point() or got.dtype == torch.int64
            assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "key"), NUMBERED)
def test_a_float64_hyperparameter_is_swept_over_parameters_of_few_bits(name, key, dtype):
    """Under vmap a 0-d tensor has a dimension in truth, for which torch has other rules of dtypes."""
    row = TABLE[name]
    start, value = start_of(row, (dtype,) * 3), as_tensors(row.hyperparameters)[key]

    def end(value):
        return _tree.leaves(descend(row.make(**{**row.hyperparameters, key: value}), start, row.lr, 2))

    together = vmap(end)(torch.stack([value, value]))
    alone = [torch.stack([leaf, leaf]) for leaf in end(value)]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(together, alone, rtol=8 * eps, atol=0.01 * eps)


@everywhere
def test_it_is_pure(name):
    row = TABLE[name]
    params, transform = start_of(row), make(row)
    _, state = descend(transform, params, row.lr, 2)
    grads = gradients(params)
    inputs = _tree.leaves((params, grads, state))
    before = fingerprint(inputs)
    updates, _ = transform.update(grads, state, params)
    assert fingerprint(inputs) == before
    assert_same_bits(transform.update(grads, state, params)[0], updates)
    # A run shares no memory with its start: scan copies what passes through, and so does a step.
    step = gd.make_step(lambda p, batch: total(p) ** 2, transform)
    assert_pure(lambda p: gd.train(step, step.init(p), None, gd.full_batch(1, 2), row.lr)[0], params)


@pytest.mark.parametrize(("name", "key"), NUMBERED)
def test_it_maps_over_every_hyperparameter(name, key):
    row = TABLE[name]
    start, value = start_of(row), row.hyperparameters[key]
    values = torch.tensor([0.9, 1.0, 1.05], dtype=torch.float64) * value

    def run(hyperparameter):
        return descend(make(row, **{key: hyperparameter}), start, row.lr, 6)[0]

    rows = vmap(run)(values)
    for i, single in enumerate(values.tolist()):
        row_i = {leaf_name: leaf[i] for leaf_name, leaf in rows.items()}
        torch.testing.assert_close(row_i, run(single), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("name", "key"), NUMBERED)
def test_its_derivatives_are_the_finite_differences(name, key):
    row = TABLE[name]
    start, value = start_of(row), torch.tensor(row.hyperparameters[key], dtype=torch.float64)

    def run(hyperparameter):
        return total(descend(make(row, **{key: hyperparameter}), start, row.lr, 6)[0])

    eps = 1e-6 * value.abs()
    difference = (run(value + eps) - run(value - eps)) / (2 * eps)
    torch.testing.assert_close(grad(run)(value), difference, rtol=1e-5, atol=1e-7)


@everywhere
def test_its_derivatives_are_finite_where_gradients_and_parameters_are_zero(name):
    row = TABLE[name]
    zero = {key: torch.zeros_like(leaf) for key, leaf in start_of(row).items()}

    def run(lr, grads, **hyperparameters):
        transform, params = make(row, **hyperparameters), zero
        state = transform.init(params)
        for _ in range(3):
            updates, state = transform.update(grads, state, params)
            params = gd.apply_updates(params, updates, lr)
        return total(params)

    lr = torch.tensor(row.lr, dtype=torch.float64)
    slopes = grad(run, (0, 1))(lr, zero)
    assert all(slope.isfinite().all() for slope in [slopes[0], *slopes[1].values()])
    for key, value in row.hyperparameters.items():
        slope = grad(lambda h, key=key: run(lr, zero, **{key: h}))(torch.tensor(value, dtype=torch.float64))
        assert slope.isfinite()


@everywhere
def test_its_state_goes_through_a_flat_dict_of_tensors(name):
    transform = make(TABLE[name])
    middle, state = descend(transform, start_of(TABLE[name]), TABLE[name].lr, 3)
    named = dict(_tree.named_leaves(state, "state"))
    assert all(isinstance(leaf, torch.Tensor) for leaf in named.values())
    assert len(named) == len(_tree.leaves(state))
    restored = _tree.unflatten(_tree.flatten(state)[1], [leaf.clone() for leaf in named.values()])
    got, expected = (transform.update(gradients(middle), kept, middle)[0] for kept in (restored, state))
    assert_same_bits(got, expected)


@everywhere
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_in_a_gradient_is_seen_in_the_update(name, bad):
    start, transform = start_of(TABLE[name]), make(TABLE[name])
    grads = gradients(start) | {"w": torch.full_like(start["w"], bad)}
    updates, state = transform.update(grads, transform.init(start), start)
    if name == "accumulate":  # which passes nothing on in its first step
        updates, _ = transform.update(grads, state, start)
    replaced = "zero_nans" if bad != bad else "clip_by_value"
    assert updates["w"].isfinite().any() == (name in (replaced, "apply_if_finite"))


@everywhere
def test_it_takes_a_tree_without_leaves(name):
    masks = {"masked": gd.masked(gd.scale(1.0), {}), "partition": gd.partition({}, {})}
    transform = masks.get(name) or make(TABLE[name])
    assert transform.update({}, transform.init({}), {})[0] == {}


@everywhere
def test_it_runs_in_a_scan(name):
    row = TABLE[name]
    step = gd.make_step(
        lambda p, _: sum((0.25 + i / 2) * (leaf - 0.3).square().sum() for i, leaf in enumerate(p.values())),
        make(row),
    )
    final, _ = gd.train(step, step.init(start_of(row)), None, gd.full_batch(1, 6), row.lr)
    expected, _ = descend(make(row), start_of(row), row.lr, 6)
    torch.testing.assert_close(final.params, expected, rtol=1e-10, atol=1e-12)


WITH_STATE = [name for name, row in TABLE.items() if _tree.leaves(make(row).init(start_of(row)))]


@pytest.mark.parametrize("name", WITH_STATE)
def test_the_state_of_another_tree_raises(name):
    transform, start = make(TABLE[name]), start_of(TABLE[name])
    other = {key: leaf for key, leaf in start.items() if key != "m"} | {"other": start["m"]}
    if name != "lbfgs":  # whose state is one vector
        with pytest.raises(ValueError, match=r"'other'|labels|mask"):
            transform.update(gradients(other), transform.init(start), other)
    wider = {key: torch.cat([leaf, leaf], -1) if leaf.ndim else leaf for key, leaf in start.items()}
    if name not in ("masked", "partition"):
        with pytest.raises(ValueError, match=r"has shape|different parameter tree"):
            transform.update(gradients(wider), transform.init(start), wider)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gd.momentum(1.0), r"momentum must be a finite number in \[0, 1\)"),
        (lambda: gd.momentum(1.5), "momentum must be a finite number"),
        (lambda: gd.momentum(float("nan")), "momentum must be a finite number"),
        (lambda: gd.momentum(0.9, dampening=2), r"dampening must be a finite number in \[0, 1\]"),
        (lambda: gd.adam((1.0, 0.9)), r"betas\[0\] must be a finite number in \[0, 1\)"),
        (lambda: gd.adam((0.9, -0.1)), r"betas\[1\] must be a finite number in \[0, 1\)"),
        (lambda: gd.adam(eps=-1), r"eps must be a finite number in \[0, inf\)"),
        (lambda: gd.adam(eps=torch.ones(1)), r"eps must be .* got a tensor of shape \(1,\)"),
        (lambda: gd.adamw(weight_decay=-1), "rate must be a finite number"),
        (lambda: gd.adagrad(lr_decay=-1), "lr_decay must be a finite number"),
        (lambda: gd.adadelta(rho=1.0), "rho must be a finite number"),
        (lambda: gd.adadelta(eps=0.0), r"eps must be a finite number in \(0, inf\)"),
        (lambda: gd.rmsprop(alpha=1.0), "alpha must be a finite number"),
        (lambda: gd.rprop((0.5, 1.0)), r"etas\[1\] must be a finite number in \(1, inf\)"),
        (lambda: gd.rprop(step_sizes=(0.0, 1.0)), r"step_sizes\[0\] must be a finite number in \(0, inf"),
        (lambda: gd.rprop(step_sizes=(50, 1e-6)), r"must be \(smallest, largest\); got \(50, 1e-06\)"),
        (lambda: gd.clip_by_global_norm(0.0), r"max_norm must be a finite number in \(0, inf\)"),
        (lambda: gd.clip_by_global_norm(float("nan")), "max_norm must be a finite number"),
        (lambda: gd.clip_by_value(-1.0), "limit must be a finite number"),
        (lambda: gd.muon(ns_steps=0), "ns_steps must be an int >= 1; got 0"),
        (lambda: gd.muon().init({"b": torch.ones(3)}), r"params\['b'\] has shape \(3,\), but muon is for"),
        (lambda: gd.accumulate(gd.chain(), 0), "steps must be an int >= 1; got 0"),
        (lambda: gd.weight_decay(0.1).update(torch.ones(1), ()), "this transformation needs params"),
    ],
)
def test_hyperparameters_out_of_range_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_table_has_every_transformation():
    made = {
        name for name, value in vars(gd).items() if "gdfunc._transforms" in getattr(value, "__module__", "")
    }
    assert made - {"GradientTransformation", "freeze"} <= set(TABLE)


# Steps.

each_step = pytest.mark.parametrize("name", STEPS)
PARAMS = {"w": normal(0, 3), "b": normal(1, 1)[0]}
DATA = linear_data(3, 6, 3)
ROWS = torch.tensor([[4, 1, 1, 0], [5, 5, 2, 3], [0, 0, 0, 0], [3, 1, 4, 5]])  # some samples twice
LR = torch.tensor(0.05, dtype=torch.float64)


def make_step(name, loss_fn=linear_loss, data=DATA, **changed):
    row = STEPS[name]
    return row.make(loss_fn, data, **(row.hyperparameters | changed))


def plan_of(name, data=DATA):
    """What `train` gets as its data and index."""
    return (torch.arange(6), ROWS) if STEPS[name].has_data else (data, gd.full_batch(6, 4))


def run(name, step, carry, lr=LR, data=DATA, **options):
    data, index = plan_of(name, data)
    return gd.train(step, carry, data, index, lr, **options)


def params_of(carry):
    return getattr(carry, "params", carry)


@each_step
def test_a_run_is_the_loop_of_its_calls(name):
    step = make_step(name)
    final, trajectory = run(name, step, step.init(PARAMS), record=("loss", "params", "grad_norm"))
    data, index = plan_of(name)
    carry = step.init(PARAMS)
    for t, row in enumerate(index):
        params, batch = params_of(carry), gd.take(data, row)
        new, loss, grads = step.advance(carry, batch, LR)
        assert_same_bits(step(carry, batch, LR), (new, loss))
        assert_same_bits(trajectory.loss[t], loss)
        assert_same_bits(_tree.map(lambda leaf, t=t: leaf[t], trajectory.params), params)
        # A pass over many mini-batches measures its loss on all of the data.
        measured_on = DATA if step.state is None or not STEPS[name].has_data else gd.take(DATA, row)
        torch.testing.assert_close(loss, linear_loss(params, measured_on), rtol=1e-12, atol=0)
        torch.testing.assert_close(trajectory.grad_norm[t], _tree.norm(grads), rtol=1e-12, atol=0)
        if name != "private":  # whose gradient is clipped, and noisy
            torch.testing.assert_close(grads, linear_gradient(params, measured_on), rtol=1e-11, atol=1e-12)
        carry = new
    assert_same_bits(final, carry)


@each_step
def test_a_run_in_two_parts_is_the_run(name):
    step, (data, index) = make_step(name), plan_of(name)
    whole, _ = gd.train(step, step.init(PARAMS), data, index, LR)
    half, _ = gd.train(step, step.init(PARAMS), data, index[:1], LR)
    as_arrays = _tree.map(lambda leaf: leaf.numpy(), data)
    assert_same_bits(gd.train(step, half, as_arrays, index[1:], LR)[0], whole)


@each_step
def test_a_step_is_pure_and_shares_nothing(name):
    params, (data, index) = _tree.clone(PARAMS), plan_of(name)
    step, batches = make_step(name), [gd.take(data, row) for row in index]
    begin = step.init(params)
    carry = step(step(begin, batches[0], LR)[0], batches[1], LR)[0]
    around = params, begin, carry, batches, DATA, LR
    new, loss = assert_pure(lambda *around: step(carry, batches[2], LR), *around)
    results = fingerprint(_tree.leaves((new, loss)))
    step(new, batches[3], LR)
    assert fingerprint(_tree.leaves((new, loss))) == results


def descend_by(name, step, carry, lr, data=DATA):
    """Four steps, without `train`, which warns of half precision."""
    data, index = plan_of(name, data)
    for row in index:
        carry, loss = step(carry, gd.take(data, row), lr)
    return carry, loss


TOLERANCES = {torch.float16: 0.1, torch.bfloat16: 0.2, torch.float32: 1e-4, torch.float64: 1e-6, None: 0.2}


@each_step
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lr", [0.05, LR])
def test_a_step_keeps_structure_shape_dtype_and_device(name, dtype, lr):
    """With float64 hyperparameters; for dtype None the leaves are of two dtypes."""
    first, second = (dtype, dtype) if dtype else (torch.bfloat16, torch.float64)
    data = tuple(leaf.to(second) for leaf in DATA)

    def loss_fn(params, batch):
        return linear_loss(_tree.map(lambda leaf: leaf.to(second), params), batch)

    step = make_step(name, loss_fn, data, **as_tensors(STEPS[name].hyperparameters))
    begin = step.init({"w": PARAMS["w"].to(first), "b": PARAMS["b"].to(second)})
    final, loss = descend_by(name, step, begin, lr, data)
    allowed = {first, second, torch.promote_types(second, torch.float32), torch.int64}
    allowed |= {torch.float64} if name == "private" else set()  # its clipping norm
    assert loss.dtype == second
    assert _tree.flatten(final)[1] == _tree.flatten(begin)[1]
    for got, old in zip(_tree.leaves(final), _tree.leaves(begin), strict=True):
        assert (got.shape, got.dtype, got.device) == (old.shape, old.dtype, old.device)
        assert got.isfinite().all()
        assert got.dtype in allowed
    params = params_of(final)
    assert [params["w"].dtype, params["b"].dtype] == [first, second]
    exact = make_step(name)
    expected, _ = descend_by(name, exact, exact.init(PARAMS), LR)
    if name not in ("private", "lbfgs"):  # where rounding turns the direction
        assert (flat(params) - flat(params_of(expected))).norm() < TOLERANCES[dtype]


def outcome(name, lr, params=PARAMS, data=DATA, **hyperparameters):
    """A number in which everything in the last carry and all losses have a part."""
    step = make_step(name, data=data, **hyperparameters)
    final, trajectory = run(name, step, step.init(params), lr, data)
    row = torch.cat([flat(final), trajectory.loss])
    return row @ torch.linspace(1, 2, len(row), dtype=row.dtype)


def arguments_of(name):
    """A run as a function of lr, the start, the data and every hyperparameter, and where to take it."""
    hyperparameters = as_tensors(STEPS[name].hyperparameters)

    def f(lr, w, x, *values):
        named = dict(zip(hyperparameters, values, strict=True))
        return outcome(name, lr, {"w": w, "b": PARAMS["b"]}, (x, DATA[1]), **named)

    return f, [LR, PARAMS["w"], DATA[0], *hyperparameters.values()]


@each_step
def test_a_vmapped_run_is_separate_runs(name):
    f, arguments = arguments_of(name)
    for i, argument in enumerate(arguments):
        many = torch.stack([0.9 * argument, argument, 1.1 * argument])
        dims = tuple(0 if j == i else None for j in range(len(arguments)))
        together = vmap(f, dims)(*arguments[:i], many, *arguments[i + 1 :])
        alone = torch.stack([f(*arguments[:i], one, *arguments[i + 1 :]) for one in many])
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
        assert len(set(alone.tolist())) == 3 or i > 2  # a bound need not bind


@pytest.mark.parametrize("name", WITH_HYPERPARAMETERS)
def test_a_float64_hyperparameter_of_a_step_is_swept_over_float32_parameters(name):
    data = tuple(leaf.float() for leaf in DATA)
    params = _tree.map(torch.Tensor.float, PARAMS)
    hyperparameters = as_tensors(STEPS[name].hyperparameters)
    for key, value in hyperparameters.items():

        def end(value, key=key):
            step = make_step(name, data=data, **{**hyperparameters, key: value})
            return _tree.leaves(run(name, step, step.init(params), LR.float(), data)[0])

        together = vmap(end)(torch.stack([value, value]))
        alone = [torch.stack([leaf, leaf]) for leaf in end(value)]
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.long
@each_step
def test_the_derivatives_of_a_run_are_finite_differences(name):
    f, arguments = arguments_of(name)
    assert_derivatives(f, *arguments, atol=1e-5)


@each_step
def test_without_a_learning_rate_nothing_moves(name):
    step = make_step(name)
    start = params_of(step.init(PARAMS))  # which projected descent has projected
    final, _ = run(name, step, step.init(PARAMS), 0.0)
    for tree in (params_of(final), getattr(final, "average", getattr(final, "slow", start))):
        torch.testing.assert_close(tree, start, rtol=1e-15, atol=0)


@each_step
def test_autograd_and_numpy_stay_outside(name):
    step = make_step(name, data=tuple(leaf.numpy() for leaf in DATA))
    begin = step.init(_tree.map(lambda leaf: leaf.clone().requires_grad_(), PARAMS))
    assert not any(leaf.requires_grad for leaf in _tree.leaves(begin))
    batch = ROWS[0] if STEPS[name].has_data else tuple(leaf.numpy() for leaf in DATA)
    as_tensors = ROWS[0] if STEPS[name].has_data else DATA
    assert_same_bits(step(begin, batch, LR), step(begin, as_tensors, LR))


@each_step
def test_a_step_refuses_what_is_not_its_own(name):
    step, batch = make_step(name), gd.take(plan_of(name)[0], plan_of(name)[1][0])
    others = {type(make_step(other).init(PARAMS)): make_step(other).init(PARAMS) for other in STEPS}
    for kind, carry in others.items():
        if kind is not (step.state or dict):
            with pytest.raises(TypeError, match=f"carry is {kind.__name__}, but this step needs"):
                step(carry, batch, LR)
            with pytest.raises(TypeError, match=f"carry is {kind.__name__}, but this step needs"):
                run(name, step, carry)
    with pytest.raises(TypeError, match=r"params\['w'\] is int64"):
        step.init({"w": torch.arange(3), "b": torch.tensor(0.0)})
    with pytest.raises(ValueError, match="params has no tensor leaves"):
        step.init({})
    for lr in (-1.0, float("nan"), torch.ones(1)):
        with pytest.raises(ValueError, match="lr must be a finite number >= 0"):
            step(step.init(PARAMS), batch, lr)


@pytest.mark.parametrize("name", WITH_HYPERPARAMETERS)
def test_a_hyperparameter_out_of_range_is_named(name):
    for key in STEPS[name].hyperparameters:
        bad = [float("nan"), "1", True, torch.tensor([0.5]), torch.tensor(1)]
        bad += [] if key == "minimum" else [-0.1]
        for value in bad:
            with pytest.raises(ValueError, match=key):
                make_step(name, **{key: value})
