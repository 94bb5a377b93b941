"""The convergence kit: what its messages say, what its adapters do, and that its controls are caught."""

import ast
import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import gdfunc as gd
from gdfunc import testing as gt
from gdfunc.testing._diagnosis import diagnose

from .assertions import run_doctest
from .references import few

PACKAGE = Path(gt.__file__).parent
BETA = 0.875
MOMENTUM = {
    "gdfunc": gt.from_transform(gd.momentum(BETA)),
    "torch": gt.from_torch(lambda params: torch.optim.SGD(params, lr=1.0, momentum=BETA)),
    "by hand": gt.subject(
        torch.zeros_like, lambda g, b, x, lr: (x - lr * (BETA * b + g), BETA * b + g), "by hand"
    ),
}


def by_hand(update, init=torch.zeros_like):
    return gt.subject(init, update, "mine")


@pytest.mark.long
@pytest.mark.parametrize("name", MOMENTUM)
def test_a_right_optimizer_passes_whoever_wrote_it(name):
    report = gt.check_optimizer(MOMENTUM[name], gt.Momentum(BETA))
    assert "check_kernel" in report.passed
    assert not report.failed
    assert ("check_purity" in report.not_applicable) == (name == "torch")
    assert "changes its state in place" in str(report) or name != "torch"


@pytest.mark.long
@given(st.floats(0, 0.99), st.floats(0, 1), st.booleans())
@example(0.0, 1.0, False)
@few
def test_ours_and_torchs_momentum_are_what_they_claim(beta, dampening, nesterov):
    claim = gt.Momentum(beta, dampening, nesterov)
    ours = gd.momentum(beta, dampening=dampening, nesterov=nesterov)
    gt.check_optimizer(gt.from_transform(ours), claim)
    if beta and not (nesterov and dampening):  # torch refuses these, or has no buffer to dampen
        options = {"momentum": beta, "dampening": dampening, "nesterov": nesterov}
        gt.check_optimizer(gt.from_torch(lambda params: torch.optim.SGD(params, lr=1.0, **options)), claim)


@given(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=6), st.integers(0, 2**16))
def test_a_feed_is_the_optimizers_answer_to_the_gradients(lrs, seed):
    g = torch.randn(len(lrs), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    transform, expected = gd.momentum(BETA), []
    state = transform.init(g[0])
    for now, lr in zip(g, lrs, strict=True):
        u, state = transform.update(now, state)
        expected.append(-lr * u)
    for subject in MOMENTUM.values():
        torch.testing.assert_close(gt.feed(subject, g, lrs), torch.stack(expected), rtol=1e-12, atol=1e-14)


MISTAKES = {
    "half the lr": (by_hand(lambda g, b, x, lr: (x - 0.5 * lr * (BETA * b + g), BETA * b + g)), "0.5 lr"),
    "uphill": (by_hand(lambda g, b, x, lr: (x + lr * (BETA * b + g), BETA * b + g)), "is -1 lr"),
    "another beta": (
        by_hand(lambda g, b, x, lr: (x - lr * (0.5 * b + g), 0.5 * b + g)),
        "momentum = 0.5",
    ),
    "nesterov": (
        by_hand(lambda g, b, x, lr: (x - lr * (g + BETA * (BETA * b + g)), BETA * b + g)),
        "Nesterov's step",
    ),
    "average": (
        by_hand(lambda g, b, x, lr: (x - lr * torch.lerp(g, b, BETA), torch.lerp(g, b, BETA))),
        "0.125 lr",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", MISTAKES)
def test_the_diagnosis_names_the_mistake(name):
    subject, words = MISTAKES[name]
    with pytest.raises(gt.LawBroken) as caught:
        gt.check_optimizer(subject, gt.Momentum(BETA))
    assert words in caught.value.diagnosis


def test_a_broken_law_says_everything_and_survives_pickle():
    subject, _ = MISTAKES["half the lr"]
    with pytest.raises(gt.LawBroken) as caught:
        gt.check_kernel(subject, gt.Momentum(BETA))
    broken = caught.value
    assert (broken.law, broken.step) == ("check_kernel", 1)
    assert broken.ratio == pytest.approx(0.5)
    text = str(broken)
    for part in ("check_kernel broken at step 1", "ratio 0.5", "slack 1e-09", "b_t = sum_j", "diagnosis: "):
        assert part in text
    assert "to repeat: check_kernel(mine, Momentum(momentum=0.875" in text
    assert str(pickle.loads(pickle.dumps(broken))) == text
    assert isinstance(broken, AssertionError)


@pytest.mark.long
def test_a_failure_of_a_control_or_a_transformation_is_repeated_by_its_line():
    lion = gt.from_transform(gd.lion((0.9, 0.5)))
    for subject, claim in ((gt.WRONG["lion: betas swapped"].subject, gt.Lion()), (lion, gt.Lion())):
        broken = list(gt.examine(subject, claim).failed.values())
        assert len(broken) >= 3
        for law in broken:
            with pytest.raises(gt.LawBroken) as caught:
                eval(law.repeat, {**vars(gd), **vars(gt)})
            assert str(caught.value) == str(law)


def test_a_diagnosis_is_made_when_it_is_first_read(monkeypatch):
    made = []
    monkeypatch.setattr("gdfunc.testing._law.diagnose", lambda *args: made.append(args) or "a slip")
    subject, claim = MISTAKES["half the lr"][0], gt.Momentum(BETA)
    with pytest.raises(gt.LawBroken) as caught:
        gt.check_kernel(subject, claim)
    assert made == []
    assert caught.value.diagnosis == caught.value.diagnosis == "a slip"
    assert made == [(subject, claim)]


@pytest.mark.long
def test_a_diagnosis_places_the_first_wrong_step_beyond_rounding():
    odd = by_hand(lambda g, b, x, lr: (x - lr * (BETA * b + g), BETA * b.sin() + g))
    with pytest.raises(gt.LawBroken) as caught:
        gt.check_kernel(odd, gt.Momentum(BETA))
    assert caught.value.diagnosis == "the first 2 steps are right"


@pytest.mark.long
@pytest.mark.parametrize("beta", [0.7, 0.43])
def test_a_diagnosis_finds_any_value_of_a_hyperparameter(beta):
    with pytest.raises(gt.LawBroken) as caught:
        gt.check_kernel(gt.from_transform(gd.momentum(beta)), gt.Momentum(BETA))
    assert caught.value.diagnosis == f"agrees with momentum = {beta}"


@pytest.mark.long
def test_a_diagnosis_prefers_the_right_lr_and_names_no_fault_that_does_nothing():
    buffer = gt.from_transform(gd.momentum(0.9))
    with pytest.raises(gt.LawBroken) as caught:
        gt.check_kernel(buffer, gt.Momentum(0.9, form="displacement"))
    assert caught.value.diagnosis == "agrees with: displacement scaled by today's lr"


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        "adam: eps outside the root",  # a switch of the claim
        "trust ratio: gradients of norm zero not guarded",  # NaN
        "lookahead: fast weights not reset",  # the answers alone differ from those of another control
        "polyak's step: steps uphill below the minimum",
        "line search: decrease ignored",
    ],
)
def test_a_diagnosis_names_a_fault_that_shows_in_few_places(name):
    control = gt.WRONG[name]
    assert diagnose(control.subject, control.claim) == f"agrees with: {control.fault}"


def test_a_kernel_is_judged_in_float64_whatever_its_gradients():
    gt.check_kernel(gt.from_transform(gd.adam()), gt.Adam(), grads=torch.tensor([1.0, -2.0, 0.3]), lr=0.1)


@pytest.mark.parametrize("lr", [0.125, 0.25, 0.3])
def test_a_sign_step_may_meet_a_gradient_of_zero(lr):
    gt.check_sign_descent(gt.from_transform(gd.sign()), gt.Sign(), lr=lr)


def test_misuse_is_told_in_words():
    adam = gt.from_transform(gd.adam())
    with pytest.raises(TypeError, match=r"not a Subject; make one with .* from_transform"):
        gt.check_optimizer(gd.adam(), gt.Adam())
    with pytest.raises(TypeError, match="not a Subject"):
        gt.feed(gd.adam(), torch.ones(3))
    with pytest.raises(TypeError, match="not a Claim; give an object"):
        gt.check_optimizer(adam, gt.Adam)
    with pytest.raises(TypeError, match=r"tensors or arrays \[T, ...\]"):
        gt.feed(adam, [3.0, 3.0])
    with pytest.raises(ValueError, match=r"lrs has shape \[2\]; give one number, or one per step, \[3\]"):
        gt.feed(adam, torch.ones(3), lr=[1.0, 0.5])
    with pytest.raises(TypeError, match=r"not a Problem of gdfunc\.testing"):
        gt.walk(adam, gd.problems.quadratic([1.0, 4.0]), [1.0, 1.0], 0.1, 3)
    with pytest.raises(ValueError, match="it must be a vector"):
        gt.walk(adam, gt.Quadratic((1.0,)), 1.0, 0.1, 3)
    with pytest.raises(ValueError, match=r"minimizer is .* but spectrum has 2 entries"):
        gt.Quadratic((1.0, 4.0), (1.0,))


@pytest.mark.long
def test_an_impure_step_is_caught():
    memory = {}

    def writes(g, b, x, lr):
        b.mul_(BETA).add_(g)
        return x - lr * b, b

    def remembers(g, b, x, lr):
        memory[g.shape] = BETA * memory.get(g.shape, 0) + g
        return x - lr * memory[g.shape], b

    claim = gt.Momentum(BETA)
    with pytest.raises(gt.LawBroken, match="writes into its carry"):
        gt.check_purity(by_hand(writes), claim)
    with pytest.raises(gt.LawBroken, match="something else when it is repeated"):
        gt.check_purity(by_hand(remembers), claim)


@pytest.mark.long
def test_a_promoted_dtype_is_caught():
    promotes = by_hand(lambda g, b, x, lr: (x.double() - lr * g, b))
    with pytest.raises(gt.LawBroken, match=r"is torch.float32 and becomes torch.float64"):
        gt.check_dtype(promotes, gt.GradientDescent())
    rounds = by_hand(
        lambda g, b, x, lr: (x - (lr * g if g.dtype == torch.float64 else (lr * g).bfloat16()), b)
    )
    with pytest.raises(gt.LawBroken):
        gt.check_dtype(rounds, gt.GradientDescent())


# ---------------------------------------------------------------- negative controls

each_control = pytest.mark.parametrize("name", gt.WRONG)


def is_caught(control):
    """Whether a law is broken: the kernel's, or any other."""
    for name in sorted(gt.LAWS, key=lambda name: name != "check_kernel"):
        try:
            gt.LAWS[name](control.subject, control.claim)
        except gt.LawBroken:
            return True
        except gt.NotApplicable:
            continue
    return False


@each_control
def test_a_control_is_caught(name):
    assert is_caught(gt.WRONG[name])


APPLIES: dict = {}
RIGHT = {(control.build, repr(control.claim)): control for control in gt.WRONG.values()}


@pytest.mark.long
@pytest.mark.parametrize("first", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 5))])
def test_a_control_without_its_fault_keeps_every_law(first):
    for control in list(RIGHT.values())[first::5]:
        assert not gt.examine(control.build(control.claim, ""), control.claim).failed, control.claim


@pytest.mark.long
@pytest.mark.parametrize("first", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 24))])
def test_a_diagnosis_names_the_planted_fault(first):
    controls = list(gt.WRONG.values())[first::24]
    diagnoses = [diagnose(control.subject, control.claim) for control in controls]
    pairs = zip(controls, diagnoses, strict=True)
    unnamed = [
        control.name
        for control, words in pairs
        if control.fault not in words and "effective learning rate" not in words
    ]
    assert set(unnamed) <= {"line search: equality refused"}  # which shows in exact arithmetic alone


@st.composite
def right_subjects(draw, law):
    """A right build of the kit to which a law applies, with other hyperparameters than in `RIGHT`."""
    control = draw(st.sampled_from(APPLIES[law]))
    changed = {}
    for field in dataclasses.fields(control.claim):
        value = getattr(control.claim, field.name)
        if isinstance(value, float) and 0.25 <= value < 1:
            changed[field.name] = draw(st.floats(0.25, 0.95), label=field.name)
        if field.name == "betas":
            changed["betas"] = draw(st.tuples(st.floats(0.25, 0.95), st.floats(0.5, 0.999)), label="betas")
    claim = dataclasses.replace(control.claim, **changed) if changed else control.claim
    return control.build(claim, ""), claim


def applies(law, control):
    try:
        gt.LAWS[law](control.build(control.claim, ""), control.claim)
    except gt.NotApplicable:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("law", gt.LAWS)
def test_right_subjects_keep_a_law_in_many_draws(law):
    """--hypothesis-profile exhaustive makes 10,000 of each law."""
    APPLIES[law] = [control for control in RIGHT.values() if applies(law, control)]

    @settings(suppress_health_check=list(HealthCheck))
    @given(right_subjects(law))
    def check(pair):
        try:
            gt.LAWS[law](*pair)
        except gt.NotApplicable:
            assume(False)

    if APPLIES[law]:
        check()


@pytest.mark.long
def test_power_is_printed_as_a_table_of_laws_and_controls(capsys):
    controls = {name: gt.WRONG[name] for name in ("lion: betas swapped", "sign: lr left out")}
    controls["right"] = gt.Control("", gt.Sign(), gt.WRONG["sign: lr left out"].build)
    power = gt.measure_power(controls)
    assert capsys.readouterr().out == f"{power}\n"
    assert power.found["right"] == ()
    for name, control in controls.items():
        assert power.found[name] == tuple(gt.examine(control.subject, control.claim).failed)
    laws = list(gt.LAWS)[:12]
    found = {"a": (laws[1], laws[11]), "second": (*laws,), "none": ()}
    *counts, tens, ones, first, second, none = str(gt.Power(found)).splitlines()
    twice = (laws[1], laws[11])
    assert counts == [f"{i:2} {law} finds {1 + (law in twice)} of 3" for i, law in enumerate(laws, 1)]
    assert (tens, ones) == (" " * 25 + "1 1 1", " " * 7 + "1 2 3 4 5 6 7 8 9 0 1 2")
    assert (first, second) == ("a      . x . . . . . . . . . x", "second" + " x" * 12)
    assert none == "none  " + " ." * 12


def test_there_are_controls_of_many_families():
    assert len(gt.WRONG) >= 60
    families = {control.claim.family for control in gt.WRONG.values()}
    assert len(families) >= 10
    assert all(family == family.lower() for family in families)


# ---------------------------------------------------------------- the kit itself


@pytest.mark.long
def test_no_law_imports_what_it_judges():
    """Closed forms and NumPy only: the adapters of `_subject` are the one door to gdfunc's optimizers."""
    for path in PACKAGE.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names |= {node.module or "", *(alias.name for alias in node.names)}
        judged = {name for name in names if name.split(".")[0] in ("_transforms", "methods", "schedules")}
        assert not judged or path.name == "_subject.py", (path, judged)


@pytest.mark.long
def test_the_guide_has_an_example_that_runs():
    tries, report = run_doctest(gt, "gdfunc.testing")
    assert tries
    assert not report, report


@pytest.mark.parametrize("name", sorted(name for name in vars(gt) if name[0] != "_"))
def test_public_names_have_examples_that_run(name):
    value = getattr(gt, name)
    if callable(value) and not isinstance(value, type):
        tries, report = run_doctest(value, name)
        assert tries or name in ("LawBroken", "NotApplicable", "from_optax"), f"{name} has no example"
        assert not report, report


@given(st.floats(0.1, 0.99), st.integers(30, 200))
def test_a_linear_rate_is_measured(rho, steps):
    rate = gt.measure_rate(rho ** np.arange(steps))
    assert rate.kind == "linear"
    assert rate.low - 1e-9 <= rho <= rate.high + 1e-9


@given(st.floats(-3, -0.3))
def test_a_sublinear_rate_is_measured(power):
    rate = gt.measure_rate(np.arange(1, 2000.0) ** power)
    assert rate.kind == "sublinear"
    assert rate.rate == pytest.approx(power, rel=0.01)


def test_the_rate_of_a_run_is_the_theorems():
    problem = gd.problems.quadratic([1.0, 4.0])
    _, run = gd.train(gd.make_step(problem.loss_fn), problem.params, None, gd.full_batch(1, 60), 0.125)
    rate = gt.measure_rate(run.loss)
    assert rate.kind == "linear"
    assert rate.rate == pytest.approx((1 - 0.125) ** 2, rel=1e-3)


@pytest.mark.parametrize(
    ("errors", "message"),
    [([1.0, float("inf")], "finite"), ([1.0, 0.5], "four errors"), ([[[1.0]]], "shape"), ([-1.0], ">= 0")],
)
def test_errors_without_a_rate_are_refused(errors, message):
    with pytest.raises(ValueError, match=message):
        gt.measure_rate(errors)


# ---------------------------------------------------------------- subjects and claims that make no sense

PLAIN = by_hand(lambda g, state, x, lr: (x - lr * g, state))
MISFITS = {
    "no pair": (by_hand(lambda g, state, x, lr: x), TypeError, r"return \(params, state\); got Tensor"),
    "another shape": (
        by_hand(lambda g, state, x, lr: ((x - lr * g).sum(), state)),
        ValueError,
        r"new params\['b'\] has shape \(\) but params\['b'\] has \(2, 3\)",
    ),
    "rows": (gt.from_step(gd.methods.saga, of_rows=True), ValueError, "a batch of saga is row numbers"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_subject_that_does_not_fit_is_told_why(name):
    subject, error, message = MISFITS[name]
    with pytest.raises(error, match=message):
        gt.check_optimizer(subject, gt.GradientDescent())


def test_the_error_of_a_subject_names_the_law():
    def fails(g, state, x, lr):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom") as caught:
        gt.check_kernel(by_hand(fails), gt.GradientDescent())
    assert caught.value.__notes__ == ["in check_kernel(mine, GradientDescent())"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gt.Adam(amsgrad=True), r"amsgrad of Adam must be one of .*'raw', 'corrected'.* got True"),
        (lambda: gt.Momentum(0.9, form="bufer"), "form of Momentum must be one of .* got 'bufer'"),
        (lambda: gt.Accumulate(steps=0), "steps of Accumulate must be a whole number >= 1; got 0"),
        (lambda: gt.EMA(gd.adam()), "inner of EMA must be a claim"),
        (lambda: gt.Chain(gd.adam()), "Chain takes claims"),
        (lambda: gt.check_kernel(PLAIN, gt.Masked(gt.Sign(), (True,))), "a law tries 3 leaves"),
        (lambda: gt.check_kernel(PLAIN, gt.Adam((0.9, 1.0))), "no finite answer to random gradients"),
    ],
)
def test_a_claim_that_makes_no_sense_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.long
def test_subjects_that_overflow_write_or_keep_a_history_break_a_law_without_warnings():
    grows = by_hand(lambda g, state, x, lr: (1e300 * x - lr * g, state))
    assert "check_kernel" in gt.examine(grows, gt.GradientDescent()).failed
    keeps = by_hand(lambda g, state, x, lr: ((x - lr * g).requires_grad_(), state))
    with pytest.raises(gt.LawBroken, match="the carry can be copied"):
        gt.check_resume(keeps, gt.GradientDescent())


@pytest.mark.long
def test_a_step_that_writes_into_its_parameters_is_diagnosed_by_its_moves():
    writes = by_hand(lambda g, state, x, lr: (x.sub_(lr * g), state))
    gt.check_kernel(writes, gt.GradientDescent())
    assert diagnose(writes, gt.GradientDescent()).startswith("the moves on linear losses agree")
