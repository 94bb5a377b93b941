"""Laws of symmetry, of hypergradients and of schedules: gdfunc and torch keep them, faults break them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gdfunc as gd
from gdfunc import testing as gt

from .references import few
from .tables import LEAST_SQUARES, STEPS, TABLE, make

ours = gt.from_transform
BETAS = st.tuples(st.sampled_from([0.0, 0.5, 0.875]), st.sampled_from([0.25, 0.75, 0.984375]))


def by_hand(update, init=torch.zeros_like):
    return gt.subject(init, update, "mine")


def torchs(make, **options):
    return gt.from_torch(lambda params: make(params, lr=1.0, **options))


FORGETS_SCALE = [
    (ours(gd.sign()), gt.Sign()),
    (ours(gd.lion()), gt.Lion()),
    (ours(gd.rprop()), gt.Rprop()),
    (ours(gd.adagrad(eps=0.0)), gt.Adagrad(eps=0.0)),
    (ours(gd.rmsprop(eps=0.0)), gt.RMSprop(eps=0.0)),
    (torchs(torch.optim.Adam, eps=0.0), gt.Adam(eps=0.0)),
    (torchs(torch.optim.Adam, eps=0.0, amsgrad=True), gt.Adam(eps=0.0, amsgrad="raw")),
    (torchs(torch.optim.RMSprop, eps=0.0), gt.RMSprop(eps=0.0)),
]
KEEPS_SCALE = [
    (ours(gd.chain()), gt.GradientDescent()),
    (ours(gd.momentum(0.9, nesterov=True)), gt.Momentum(0.9, nesterov=True)),
    (torchs(torch.optim.SGD, momentum=0.9, dampening=0.5), gt.Momentum(0.9, 0.5)),
]


@pytest.mark.parametrize(("subject", "claim"), FORGETS_SCALE + KEEPS_SCALE, ids=repr)
def test_scale_is_forgotten_or_kept_to_the_bit(subject, claim):
    gt.check_scale(subject, claim)


@pytest.mark.long
@given(BETAS)
@few
def test_adam_forgets_the_scale_with_any_betas(betas):
    gt.check_scale(ours(gd.adam(betas, eps=0.0)), gt.Adam(betas, eps=0.0))
    gt.check_resume(ours(gd.adam(betas)), gt.Adam(betas))
    gt.check_vmap(ours(gd.adam(betas)), gt.Adam(betas))


@pytest.mark.long
@pytest.mark.parametrize(
    ("subject", "claim"),
    [
        (ours(gd.adam(eps=1e-30)), gt.Adam(eps=0.0)),
        (ours(gd.adagrad(eps=0.0, initial_accumulator_value=1e-30)), gt.Adagrad(eps=0.0)),
        (ours(gd.clip_by_global_norm(1e6)), gt.GradientDescent()),
        (by_hand(lambda g, b, x, lr: (x - lr * g / g.norm(), b)), gt.GradientDescent()),
        (
            by_hand(lambda g, b, x, lr: (x - lr * torch.where(g.abs() < 1e-9, 0 * g, g), b)),
            gt.Momentum(0.0),
        ),
    ],
    ids=repr,
)
def test_a_hidden_scale_is_caught(subject, claim):
    with pytest.raises(gt.LawBroken, match="bit for bit"):
        gt.LAWS["check_scale"](subject, claim)  # without the diagnosis, which takes seconds


ISOTROPIC = [
    (ours(gd.chain()), gt.GradientDescent()),
    (torchs(torch.optim.SGD, momentum=0.9), gt.Momentum(0.9)),
    (ours(gd.clip_by_global_norm(1.0)), gt.ClipByGlobalNorm(1.0)),
    (ours(gd.lars()), gt.LARS()),
    (ours(gd.muon()), gt.Muon()),
    (ours(gd.chain(gd.weight_decay(0.125))), gt.WeightDecay(0.125)),
]


@pytest.mark.parametrize(("subject", "claim"), ISOTROPIC, ids=repr)
def test_coordinates_do_not_matter(subject, claim):
    gt.check_rotation(subject, claim)


@pytest.mark.long
@pytest.mark.parametrize(
    ("subject", "claim", "mixing"),
    [
        (ours(gd.clip_by_value(0.5)), gt.ClipByGlobalNorm(0.5), "entries"),
        (ours(gd.adaptive_clip()), gt.LARS(), "entries"),
        (ours(gd.sign()), gt.Muon(), "rows"),
        (by_hand(lambda g, b, x, lr: (x - lr * (g - g.mean()), b)), gt.GradientDescent(), "entries"),
    ],
    ids=repr,
)
def test_a_step_by_coordinates_is_caught(subject, claim, mixing):
    with pytest.raises(gt.LawBroken, match=f"mixing of {mixing}"):
        gt.LAWS["check_rotation"](subject, claim)


@pytest.mark.long
@given(st.sampled_from([1 / 5, 1 / 10, 1 / 17, 1 / 2]))
@few
def test_reddis_example_drifts_as_it_must(beta2):
    betas = (0.0, beta2)
    gt.check_drift(ours(gd.adam(betas, eps=0.0)), gt.Adam(betas, 0.0))
    for amsgrad in (False, True):
        subject = torchs(torch.optim.Adam, betas=betas, eps=0.0, amsgrad=amsgrad)
        gt.check_drift(subject, gt.Adam(betas, 0.0, amsgrad="raw" if amsgrad else None))


@pytest.mark.long
def test_the_drift_tells_conventions_apart():
    betas = (0.0, 0.1)
    raw = torchs(torch.optim.Adam, betas=betas, eps=0.0, amsgrad=True)
    gt.check_drift(raw, gt.Adam(betas, 0.0, amsgrad="raw"))
    for other in ("corrected", None):
        with pytest.raises(gt.LawBroken, match="drift of a period"):
            gt.LAWS["check_drift"](raw, gt.Adam(betas, 0.0, amsgrad=other))


def forgetful():
    """Make gradient descent whose momentum is kept outside its carry."""

    def make(loss_fn):
        memory = {}

        def step(x, batch, lr):
            grads, loss = gd.batch_grad(loss_fn)(x, batch)
            for name, g in grads.items():
                memory[name] = 0.5 * memory.get(name, 0) + g
            return {name: x[name] - lr * memory[name] for name in x}, loss

        return step

    return gt.from_step(make, "forgetful")


@pytest.mark.long
def test_a_run_is_resumed_from_its_carry():
    gt.check_resume(torchs(torch.optim.Adam), gt.Adam())
    with pytest.raises(gt.LawBroken, match="6 steps = 3 steps, a copy of the carry, and 3 steps"):
        gt.LAWS["check_resume"](forgetful(), gt.Momentum(0.5))
    diverging = by_hand(lambda g, b, x, lr: (1e200 * x, b))
    gt.check_resume(diverging, gt.GradientDescent())


OURS = {name: ours(make(row)) for name, row in TABLE.items() if name not in ("masked", "partition")} | {
    name: gt.from_step(lambda loss_fn, row=row: row.make(loss_fn, None, **row.hyperparameters), name)
    for name, row in STEPS.items()
    if not row.has_data and name not in LEAST_SQUARES
}


@pytest.mark.parametrize("name", OURS)
def test_every_step_of_ours_is_resumed_and_vmapped(name):
    claim = gt.Muon() if name == "muon" else gt.GradientDescent()  # the shapes alone matter
    gt.check_resume(OURS[name], claim)
    gt.check_vmap(OURS[name], claim)


class Double(torch.autograd.Function):
    """2·x, with a rule for vmap that mixes the members."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x):
        return 2 * x.mean(0, keepdim=True).expand_as(x), 0


@pytest.mark.long
def test_a_vmap_is_runs_alone():
    mixing = by_hand(lambda g, b, x, lr: (x - lr * Double.apply(g) / 2, b))
    with pytest.raises(gt.LawBroken, match="row 0 of a vmap"):
        gt.LAWS["check_vmap"](mixing, gt.GradientDescent())
    looking = by_hand(lambda g, b, x, lr: (x - lr * g if float(g.sum()) > -9 else x, b))
    with pytest.raises(gt.NotApplicable, match="mine cannot be vmapped: "):
        gt.check_vmap(looking, gt.GradientDescent())


@pytest.mark.parametrize(
    ("check", "claim", "reason"),
    [
        (gt.check_scale, gt.Adam(), "neither keep nor forget"),
        (gt.check_rotation, gt.Sign(), "depend on the coordinates"),
        (gt.check_drift, gt.Adam(), "beta1 = 0"),
        (gt.check_drift, gt.Adam((0.0, 0.999), 0.0), "1/2"),
        (gt.check_vmap, gt.GradientDescent(), "in place"),
    ],
)
def test_laws_say_what_they_are_not_about(check, claim, reason):
    with pytest.raises(gt.NotApplicable, match=reason):
        check(torchs(torch.optim.SGD), claim)


# ---------------------------------------------------------------- derivatives of runs


def unrolled(loss_fn, start, lrs, keep=99, cut=False):
    """Differentiate a run of which only the last steps are seen, or whose gradients are constants."""

    def last_loss(lrs):
        x = start
        for t, lr in enumerate(lrs):
            g = torch.func.grad(loss_fn)(x)
            x = x - lr * (g.detach() if cut else g)
            x = x.detach() if t == len(lrs) - 1 - keep else x
        return loss_fn(x)

    return torch.func.grad(last_loss)(lrs)


def test_an_unrolled_run_has_its_hypergradient():
    gt.check_hypergradient(unrolled)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda *args: unrolled(*args, keep=3),
        lambda *args: unrolled(*args, cut=True),
        lambda *args: -unrolled(*args),
        lambda *args: unrolled(*args).flip(0),
        lambda *args: unrolled(*args).sum().expand(len(args[2])),
        lambda *args: unrolled(*args) * (1 + 1e-6),
        lambda *args: unrolled(*args).float() + 1e-6,
    ],
)
def test_a_wrong_hypergradient_is_caught(wrong):
    with pytest.raises(gt.LawBroken, match="check_hypergradient broken"):
        gt.check_hypergradient(wrong)


def test_a_slope_that_is_right_on_quadratics_alone_is_caught():
    def by_a_linear_gradient(loss_fn, start, lrs):
        hessian = torch.func.hessian(loss_fn)(start)
        return unrolled(lambda x: 0.5 * x @ hessian @ x, start, lrs)

    with pytest.raises(gt.LawBroken, match="by differences"):
        gt.check_hypergradient(by_a_linear_gradient)


# ---------------------------------------------------------------- schedules

S, PI = gd.schedules, np.pi
SCHEDULES = {
    "constant": (S.constant(0.5), lambda t: 0.5),
    "exponential": (S.exponential(0.5, 0.9), lambda t: 0.5 * 0.9**t),
    "inverse time": (S.inverse_time(0.5, 0.25), lambda t: 0.5 / (1 + 0.25 * t)),
    "step": (S.step(0.5, 7, 0.5), lambda t: 0.5 * 0.5 ** (t // 7)),
    "polynomial": (S.polynomial(0.5, 40, 2.0), lambda t: 0.5 * np.maximum(1 - t / 40, 0) ** 2),
    "cosine": (S.cosine_annealing(0.5, 64, 0.125), lambda t: 0.125 + 0.1875 * (1 + np.cos(PI * t / 64))),
    "warmup": (S.warmup(S.constant(0.5), 8), lambda t: 0.5 * np.minimum(t / 8, 1)),
    "float32": (lambda t: S.exponential(torch.tensor(0.5), 0.9)(t), lambda t: 0.5 * 0.9**t),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_their_formulas(name):
    gt.check_schedule(*SCHEDULES[name])


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (lambda t: 0.5 * 0.9 ** (torch.as_tensor(t).double() + 1), "of the formula"),
        (lambda t: 0.5 * 0.9 ** torch.as_tensor(t).double() - 0.01, "-lr_t <= 0"),
        (lambda t: 0.5 * 0.9 ** torch.as_tensor(t).double() + torch.as_tensor(t).double().log() * 0, "NaN"),
        (lambda t: 0.5 * 0.9 ** torch.as_tensor(t).double() / (torch.as_tensor(t) != 3), "finite"),
        (
            lambda t: 0.5 * 0.9 ** torch.as_tensor(t).double().clamp(max=torch.as_tensor(t).max() - 1),
            "alone",
        ),
        (lambda t: torch.tensor(0.5), "one lr for every count"),
        (lambda t: torch.as_tensor(t), "an lr is a float"),
    ],
)
def test_a_wrong_schedule_is_caught(schedule, words):
    words = r"schedule\(t\) =" if words == "alone" else words
    with pytest.raises(gt.LawBroken, match=words):
        gt.check_schedule(schedule, lambda t: 0.5 * 0.9**t)


def test_no_finite_number_equals_an_infinity():
    with pytest.raises(gt.LawBroken, match=r"0\.5 must equal inf"):
        gt.check_schedule(S.constant(0.5), lambda t: np.where(t == 3, np.inf, 0.5))


@given(st.integers(1, 60), st.sampled_from([0.0, 0.125]))
def test_a_cosine_has_its_sum(steps, low):
    """Σ over 0 … T − 1 is T(lr + low)/2 + (lr − low)/2."""
    lrs = S.cosine_annealing(0.5, steps, low)(torch.arange(steps))
    assert float(lrs.sum()) == pytest.approx(steps * (0.5 + low) / 2 + (0.5 - low) / 2, rel=1e-13)
