"""No operation reads a value on the host or mixes devices: all run on `meta`, whose tensors have no values.

Flags that were asked for (`stop=`, `check_finite=`) and plots read values, and are left out. So are
`grid`, `sweep` and `modules.init`, which read labels, flags of divergence and keys once for all members,
and `interop.from_optim`, because torch's optimizers read values.
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


@pytest.mark.long
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
    "histogram": gd.reducers.histogram(-1.0, 1.0, 4),
    "spread": gd.stats.spread(),
    "gsnr": gd.stats.gsnr(),
    "cosines": gd.stats.cosines(),
}


@pytest.mark.parametrize("name", REDUCERS)
def test_reducers_run(name):
    assert_on_meta(gd.reduce_per_sample(linear_loss, REDUCERS[name])(PARAMS, DATA))


def spread():
    return gd.reduce_per_sample(linear_loss, gd.stats.spread())(PARAMS, DATA)[0]


def path():
    return run_of(gd.make_step(linear_loss), LR, record=("params",))[1].params


def model(members=()):
    """A linear module on `meta`, its parameters, and its inputs."""
    module = torch.nn.Linear(3, 1, device=META, dtype=torch.float64)
    params = {"weight": DATA[0].new_zeros(*members, 1, 3), "bias": DATA[0].new_zeros(*members, 1)}
    return module, gd.modules.functional(module).apply, params, DATA[0]


def predicted(params, x):
    return x @ params["w"] + params["b"]


COUNTS, LABELS = torch.arange(9, device=META), torch.zeros(6, dtype=torch.int64, device=META)
S = gd.schedules
SCHEDULES = {
    "constant": S.constant(LR, 0.5),
    "cosine_annealing": S.cosine_annealing(LR, 9),
    "cosine_with_restarts": S.cosine_with_restarts(LR, 3, 2),
    "exponential": S.exponential(LR, 0.9),
    "inverse_time": S.inverse_time(LR, 0.1),
    "lambda_": S.lambda_(LR, lambda count: 1 / (1 + count)),
    "linear": S.linear(LR),
    "multi_step": S.multi_step(LR, [3, 5]),
    "one_cycle": S.one_cycle(LR, 9),
    "polynomial": S.polynomial(LR, 9),
    "step": S.step(LR, 3),
    "sequential": S.sequential([S.constant(LR), S.linear(LR)], [4]),
    "warmup": S.warmup(S.exponential(LR, 0.9), 3),
}
P = gd.problems
PROBLEMS = [P.quadratic([1.0, 2.0], key=gd.random.key(0)), P.rosenbrock(3), P.beale(), P.himmelblau()]
PROBLEMS += [P.rastrigin(2), P.elevation(), P.linear_regression(normal(0, 6, 3), normal(1, 6))]
PROBLEMS += [P.logistic_regression(normal(0, 6, 3), normal(1, 6) > 0, l2=0.1)]
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
    **{f"schedules.{name}": lambda f=f: f(COUNTS) for name, f in SCHEDULES.items()},
    "vmap": lambda: torch.func.vmap(lambda lr: run_of(gd.make_step(linear_loss), lr)[0])(LR.expand(4)),
    "mse": lambda: gd.losses.mse(DATA[0], DATA[0]),
    "mae": lambda: gd.losses.mae(DATA[0], DATA[0]),
    "huber": lambda: gd.losses.huber(DATA[0], DATA[0], LR),
    "cross_entropy": lambda: gd.losses.cross_entropy(DATA[0], LABELS),
    "bce": lambda: gd.losses.binary_cross_entropy_with_logits(DATA[1], DATA[1]),
    "functional": lambda: model()[1](*model()[2:]),
    "predict": lambda: gd.modules.predict(model()[1], model((4,))[2], DATA[0]).mean,
    "stack": lambda: gd.modules.stack([model()[2]] * 2),
    "member": lambda: gd.modules.member(model((4,))[2], 1),
    "state_dict": lambda: gd.modules.state_dict(model()[0], model()[2]),
    "scan": lambda: gd.scan(lambda c, x: (c + x, c * x), DATA[1], DATA[0].mT),
    "jit": lambda: gd.jit(lambda lr: run_of(gd.make_step(linear_loss), lr)[0])(LR),
    "take": lambda: [gd.take(DATA, LABELS), gd.take(DATA, LABELS[0])],
    "low_precision": lambda: gd.batch_grad(
        gd.low_precision(lambda p, b: p["w"].square().mean() * b[0].mean(), torch.bfloat16)
    )(PARAMS, DATA),
    "ggn_vp": lambda: gd.curvature.ggn_vp(predicted, gd.losses.mse)(PARAMS, DATA, PARAMS),
    "fold_in": lambda: gd.random.fold_in(KEY, LABELS[0]),
    "bits": lambda: gd.random.bits(KEY, (3,)),
    "pad": lambda: gd.privacy.pad(DATA),
    "clipped_grad": lambda: gd.privacy.clipped_grad(linear_loss, 1.0, divisor=2.0)(PARAMS, DATA),
    "problems": lambda: [p.loss_fn(on_meta(p.params), p.data and on_meta(p.data)) for p in PROBLEMS],
    "path": lambda: gd.plot.path(path(), PARAMS),
    "ranks": lambda: gd.stats.ranks(DATA[1]),
    "self_influence": lambda: gd.stats.self_influence(linear_loss, path(), LR, DATA),
    "cabs": lambda: gd.stats.cabs(spread(), LR),
    "diversity": lambda: gd.stats.diversity(spread()),
    "orthogonality_test": lambda: gd.stats.orthogonality_test(spread()),
    "two_batch": lambda: gd.stats.two_batch(LR, LR, sizes=(2, 6)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_run(name):
    assert_on_meta(OTHERS[name]())
