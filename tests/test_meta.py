"""No operation reads a value on the host or mixes devices: all run on `meta`, whose tensors have no values.

Flags that were asked for (`stop=`, `check_finite=`) and plots read values, and are left out.
"""

import pytest
import torch

import gdfunc as gd
from gdfunc import _tree

from .references import linear_loss, normal
from .tables import STEPS, TABLE, make, start_of

META = torch.device("meta")
KEY = gd.random.key(0, device=META)
DATA = normal(0, 6, 3).to(META), normal(1, 6).to(META)
PARAMS = {"w": torch.zeros(3, dtype=torch.float64, device=META), "b": DATA[1].new_zeros(())}
LR = torch.tensor(0.1, dtype=torch.float64, device=META)


def on_meta(tree):
    return _tree.map(lambda leaf: leaf.to(META), tree)


def assert_on_meta(result):
    leaves = _tree.tensors(result)
    assert leaves
    assert {leaf.device for leaf in leaves} == {META}


def run_of(step, lr, **options):
    index = gd.epoch_batches(KEY, 6, 2, 2)
    return gd.train(step, step.init(PARAMS), DATA, index, lr, **options)


@pytest.mark.parametrize("name", TABLE)
def test_transformations_run(name):
    row = TABLE[name]
    transform = make(
        row, **{key: torch.tensor(value, device=META) for key, value in row.hyperparameters.items()}
    )
    params = on_meta(start_of(row))
    state = transform.init(params)
    for _ in range(2):
        updates, state = transform.update(params, state, params)
    assert_on_meta((updates, state))
    assert_on_meta(gd.apply_updates(params, updates, LR))


@pytest.mark.parametrize("name", STEPS)
def test_steps_and_their_runs_run(name):
    row = STEPS[name]
    hyperparameters = {key: torch.tensor(value, device=META) for key, value in row.hyperparameters.items()}
    if name == "private":
        step = gd.privacy.make_private_step(linear_loss, key=KEY, divisor=6.0, **hyperparameters)
    else:
        step = row.make(linear_loss, DATA, **hyperparameters)
    data = torch.arange(6, device=META) if row.has_data else DATA
    index = gd.epoch_batches(KEY, 6, 4, 6)
    record = ("loss", "params", "state", "lr", "grad_norm")
    final, trajectory = gd.train(step, step.init(PARAMS), data, index, LR.expand(6), record=record, every=2)
    assert_on_meta(final)
    assert_on_meta([trajectory.loss, trajectory.params, trajectory.grad_norm])

    def loss_after(lr):
        final, trajectory = gd.train(step, step.init(PARAMS), data, index, lr)
        moved = [leaf for leaf in _tree.leaves(final) if leaf.is_floating_point()]
        return trajectory.loss.sum() + _tree.norm(moved)

    assert_on_meta(gd.hypergrad(loss_after)(LR))


ADJOINTS = [
    gd.adjoints.Reverse(),
    gd.adjoints.Checkpoint(2),
    gd.adjoints.Checkpoint("sqrt"),
    gd.adjoints.Checkpoint(carries=2),
    gd.adjoints.Truncated(2),
    gd.adjoints.Implicit("cg", 3),
    gd.adjoints.Implicit("neumann", 3),
    gd.adjoints.Forward(),
]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_adjoints_run(adjoint):
    def run(lr, adjoint=gd.adjoints.Reverse()):
        return linear_loss(run_of(gd.make_step(linear_loss), lr, adjoint=adjoint)[0], DATA)

    assert_on_meta(gd.hypergrad(run, "lr", adjoint=adjoint)(LR))


REDUCERS = {
    "mean": gd.reducers.mean(),
    "second_moment": gd.reducers.second_moment(),
    "variance": gd.reducers.variance(),
    "norms": gd.reducers.norms(),
    "leaf_norms": gd.reducers.leaf_norms(),
    "gram": gd.reducers.gram(),
    "clipped_sum": gd.reducers.clipped_sum(1.0),
    "dots": gd.reducers.dots(PARAMS),
    "weighted_sum": gd.reducers.weighted_sum(DATA[1]),
    "spread": gd.stats.spread(),
}


@pytest.mark.parametrize("name", REDUCERS)
def test_reducers_run(name):
    assert_on_meta(gd.reduce_per_sample(linear_loss, REDUCERS[name])(PARAMS, DATA))


def spread():
    return gd.reduce_per_sample(linear_loss, gd.stats.spread())(PARAMS, DATA)[0]


def path():
    return run_of(gd.make_step(linear_loss), LR, record=("params",))[1].params


OTHERS = {
    "batch_grad": lambda: gd.batch_grad(linear_loss)(PARAMS, DATA),
    "per_sample_grad": lambda: gd.per_sample_grad(linear_loss, chunk_size=4)(PARAMS, DATA),
    "noise_scale": lambda: gd.stats.noise_scale(spread(), unbiased=True),
    "norm_test": lambda: gd.stats.norm_test(spread()),
    "inner_product_test": lambda: gd.stats.inner_product_test(spread()),
    "hvp": lambda: gd.curvature.hvp(linear_loss)(PARAMS, DATA, PARAMS),
    "top_eigenvalues": lambda: gd.curvature.top_eigenvalues(gd.curvature.hvp(linear_loss), 2)(
        PARAMS, DATA, KEY
    ),
    "hutchinson_trace": lambda: gd.curvature.hutchinson_trace(gd.curvature.hvp(linear_loss))(
        PARAMS, DATA, KEY
    ),
    "influence": lambda: gd.stats.influence(
        linear_loss, path(), LR, DATA, DATA, index=gd.epoch_batches(KEY, 6, 2, 2)
    ),
    "split": lambda: gd.random.split(KEY, 3),
    "normal": lambda: gd.random.normal(KEY, (3,)),
    "uniform": lambda: gd.random.uniform(KEY, (3,), torch.bfloat16, -1.0, LR),
    "randint": lambda: gd.random.randint(KEY, (3,), 0, 2**32, unbiased=True),
    "permutation": lambda: gd.random.permutation(KEY, 9),
    "epoch_batches": lambda: gd.epoch_batches(KEY, 9, 4, 3, remainder="carry"),
    "sample_batches": lambda: gd.sample_batches(KEY, 9, 4, 3, replacement=False),
    "poisson_batches": lambda: gd.privacy.poisson_batches(KEY, 9, 0.5, 3).index,
    "schedule": lambda: gd.schedules.cosine_annealing(0.1, 9)(torch.arange(9, device=META)),
    "sweep": lambda: torch.func.vmap(lambda lr: run_of(gd.make_step(linear_loss), lr)[0])(LR.expand(4)),
    "mse": lambda: gd.losses.mse(DATA[0], DATA[0]),
    "modules": lambda: gd.modules.functional(torch.nn.Linear(3, 2, device=META, dtype=torch.float64)).apply(
        {"weight": DATA[0][:2], "bias": DATA[1][:2]}, DATA[0]
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_run(name):
    assert_on_meta(OTHERS[name]())
