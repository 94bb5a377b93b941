"""Every step that changes the parameters of another, around every method: right, or refused at the door."""

import pytest
import torch

import gdfunc as gd
from gdfunc import _tree
from gdfunc._step import as_step, params_of
from gdfunc.methods._averaging import replace_params

from .references import normal

CURVATURE = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
CENTER = torch.tensor([2.0, -0.25, 0.5], dtype=torch.float64)
NEAREST = CENTER.clamp(-1, 1)  # the minimum in the box
DATA = CENTER.repeat(4, 1)


def loss_fn(w, batch):
    return 0.5 * (CURVATURE * (w - batch) ** 2).sum(-1).mean()


def residuals(w, batch):
    return (0.5 * CURVATURE / len(batch)).sqrt() * (w - batch)


def plain():
    return gd.make_step(loss_fn)


LOWEST = float(loss_fn(NEAREST, DATA))
KEY = gd.random.key(0)
# Every method, and the lr with which it descends. Those of a finite sum take row numbers.
METHODS = {
    "add_noise": (lambda: gd.methods.add_noise(plain(), 0.0, key=KEY), 0.2),
    "asgd": (lambda: gd.methods.asgd(loss_fn, lambd=0.0), 0.2),
    "ema": (lambda: gd.methods.ema(plain(), 0.9), 0.2),
    "gauss_newton": (lambda: gd.methods.gauss_newton(residuals), 0.5),
    "heavy_ball": (lambda: gd.methods.heavy_ball(loss_fn, 0.5), 0.2),
    "lbfgs": (lambda: gd.methods.lbfgs(loss_fn), 1.0),
    "levenberg_marquardt": (lambda: gd.methods.levenberg_marquardt(residuals), 0.5),
    "line_search": (lambda: gd.methods.line_search(loss_fn), 0.2),
    "lookahead": (lambda: gd.methods.lookahead(plain(), 3), 0.2),
    "mechanic": (lambda: gd.methods.mechanic(loss_fn), 0.2),
    "nesterov": (lambda: gd.methods.nesterov(loss_fn, 0.5), 0.2),
    "ogm": (lambda: gd.methods.ogm(loss_fn, 300), 0.2),
    "polyak": (lambda: gd.methods.polyak(loss_fn, LOWEST), 0.5),
    "prodigy": (lambda: gd.methods.prodigy(loss_fn, d0=0.1), 0.2),
    "projected": (lambda: gd.methods.projected(plain(), gd.projections.ball(10.0)), 0.2),
    "reduce_on_plateau": (lambda: gd.methods.reduce_on_plateau(plain(), patience=500), 0.2),
    "sag": (lambda: gd.methods.sag(loss_fn, DATA), 0.05),
    "saga": (lambda: gd.methods.saga(loss_fn, DATA), 0.05),
    "sam": (lambda: gd.methods.sam(loss_fn, rho=1e-7), 0.2),
    "sarah": (lambda: gd.methods.sarah(loss_fn, DATA, batch_size=1), 0.1),
    "schedule_free": (lambda: gd.methods.schedule_free(loss_fn), 0.2),
    "sophia": (lambda: gd.methods.sophia(loss_fn, key=KEY, every=1, gamma=1.0), 0.02),
    "svrg": (lambda: gd.methods.svrg(loss_fn, DATA, batch_size=1), 0.1),
    "triple_momentum": (lambda: gd.methods.triple_momentum(loss_fn, condition_number=4.0), 0.2),
}
OF_ROWS = ("sag", "saga", "sarah", "svrg")
REFUSED = ("lbfgs", "mechanic", "schedule_free")
JUDGED = ("levenberg_marquardt", "line_search")  # which a projection would deceive
BOX = gd.projections.box(-1.0, 1.0)
WRAPPERS = {
    "projected": lambda step: gd.methods.projected(step, BOX),
    "add_noise": lambda step: gd.methods.add_noise(step, 0.1, key=KEY),
    "lookahead": lambda step: gd.methods.lookahead(step, 2),
}
STARTS = torch.zeros(3, dtype=torch.float64)


def batch_of(name):
    return torch.arange(4) if name in OF_ROWS else DATA


def test_the_table_has_every_method():
    assert set(METHODS) == {name for name in vars(gd.methods) if name[0] != "_"}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_step_that_would_forget_the_change_is_refused(name, wrapper):
    step = METHODS[name][0]()
    for inner in (step, gd.methods.reduce_on_plateau(gd.methods.ema(step, 0.5))):
        with pytest.raises(TypeError, match=rf"{wrapper} changes the parameters, but .*{name}\(.* forget"):
            WRAPPERS[wrapper](inner)


def changed_and_not(name, change):
    """Take two steps, change the parameters, and take one more with the change and without it."""
    make, lr = METHODS[name]
    step, batch = as_step(make()), batch_of(name)
    carry = step.init(STARTS)
    for _ in range(2):
        carry, _ = step(carry, batch, lr)
    params = params_of(carry)
    moved = replace_params(carry, _tree.map(lambda p: p + change, params))
    return [params_of(step(_tree.clone(start), batch, lr)[0]) for start in (moved, carry)]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in REFUSED])
def test_a_step_goes_on_from_where_its_parameters_are(name):
    """Descent with curvature below 1/lr keeps a part of a change, and no method but Newton's forgets it."""
    with_change, without = changed_and_not(name, 0.01 * normal(0, 3).sign())
    assert ((with_change - without).abs() > 1e-4).all()


@pytest.mark.parametrize("name", ["mechanic", "schedule_free"])
def test_the_steps_that_are_refused_forget_a_change(name):
    with_change, without = changed_and_not(name, 0.01)
    # Only the gradient sees where the parameters were, so that the change itself is gone.
    assert ((with_change - without).abs() < 0.01 * CURVATURE * METHODS[name][1]).all()


@pytest.mark.parametrize("name", JUDGED)
def test_a_projection_of_points_that_were_judged_is_refused(name):
    with pytest.raises(TypeError, match=rf"projected moves the parameters after .*{name}\(.* has judged"):
        gd.methods.projected(gd.methods.ema(METHODS[name][0](), 0.5), BOX)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in METHODS if name not in (*REFUSED, *JUDGED)])
def test_projected_methods_end_at_the_minimum_in_the_box(name):
    make, lr = METHODS[name]
    step, batch = gd.methods.projected(make(), BOX), batch_of(name)
    steps, within = (2000, 0.02) if name == "polyak" else (400, 3e-3)  # its steps shrink with the gap
    index = batch[None].expand(steps, 4) if name in OF_ROWS else gd.full_batch(4, steps)
    data = torch.arange(4) if name in OF_ROWS else DATA
    carry, _ = gd.train(step, step.init(STARTS), data, index, lr, backend="eager")
    torch.testing.assert_close(params_of(carry), NEAREST, rtol=0, atol=within)
