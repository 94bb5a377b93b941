"""Traces: the parts of f that they see, refuse and put back, when they are made, and their memory."""

import copy
import functools
import gc
import pickle
import signal
import types
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.func import grad, grad_and_value, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import gdfunc as gd
from gdfunc import BackendError
from gdfunc._scan import _recent
from gdfunc._scan.trace import _trace
from gdfunc._sweep._memory import Memory
from gdfunc.adjoints import Checkpoint, Reverse

from .assertions import assert_agrees
from .references import loop, normal
from .tables import TRACED

START = torch.tensor([1.0, 2.0], dtype=torch.float64)
XS = torch.tensor([[0.3, -0.2], [0.5, 0.1], [-0.4, 0.7]], dtype=torch.float64)
W = torch.tensor([0.3, -0.7], dtype=torch.float64)
traced = pytest.mark.parametrize("options", TRACED)


def assert_traced(run, options):
    """A run, a function of options, has equal results when traced and in eager."""
    assert_agrees(run(**options), run())


def final(f, w, init=START, **options):
    return gd.scan(lambda c, x: (f(c, x, w), c), init, XS, **options)[0].sum()


@pytest.mark.long
@traced
@pytest.mark.parametrize("norm", [functional.batch_norm, functional.instance_norm])
@pytest.mark.parametrize("used", [False, True])
def test_running_statistics_are_updated_whether_the_output_is_used_or_not(norm, used, options):
    """The operation does not say that it writes into them."""

    def f(c, x):
        mean, variance = c[0].clone(), c[1].clone()
        train = {"training": True} if norm is functional.batch_norm else {"use_input_stats": True}
        y = norm(x, mean, variance, momentum=0.3, **train)
        return (mean, variance), (mean * 2, (y if used else x).sin().sum())

    init = START, START.square()
    xs = torch.linspace(-1, 2, 3 * 5 * 2 * 4, dtype=torch.float64).sin().reshape(3, 5, 2, 4)
    run = functools.partial(gd.scan, f, init)
    assert_traced(functools.partial(run, xs), options)
    assert_traced(lambda **how: grad(lambda xs: run(xs, **how)[1][1].sum())(xs), options)


# A tensor that f keeps for later has no value in a trace.


def made():
    return torch.arange(2, dtype=torch.float64)


def lazily(holder):
    if holder.table is None:
        holder.table = made()
    return holder.table


class Rotary:
    @functools.cached_property
    def angles(self):
        return made()


class Slotted:
    __slots__ = ("table",)

    def __init__(self):
        self.table = None


def in_a_closure():
    last = None

    def f():
        nonlocal last
        last = made()
        return last

    return f, lambda: last


def in_a_global():
    def f():
        global LAST
        LAST = made()
        return LAST

    return f, lambda: globals().get("LAST")


def held(holder, read=lazily, peek=lambda holder: holder.table):
    return functools.partial(read, holder), functools.partial(peek, holder)


KEPT = {  # a function that keeps a tensor, and what it has kept
    "in a dict": lambda: held({}, lambda table: table.setdefault("two", (made(),))[0], lambda table: table),
    "in a closure": in_a_closure,
    "in a global": in_a_global,
    "by a property": lambda: held(Rotary(), lambda holder: holder.angles, vars),
    "in an attribute": lambda: held(types.SimpleNamespace(table=None)),
    "in a slot": lambda: held(Slotted()),
    "in a class": lambda: held(type("Holder", (), {"table": None})),
    "by a cache": lambda: [functools.lru_cache(made)] * 2,
    "by an endless cache": lambda: [functools.cache(made)] * 2,
}


@traced
@pytest.mark.parametrize("name", KEPT)
def test_values_that_f_keeps_are_put_back(name, options):
    table, kept = KEPT[name]()

    def f(c, x):
        return torch.sin(c + table() * x), c

    compiled = gd.scan(f, START, XS, **options)
    assert not any(isinstance(leaf, FakeTensor) for leaf in gd._tree.leaves(kept()))
    expected = gd.scan(f, START, XS)
    assert_agrees(compiled, expected)
    assert_agrees(gd.scan(f, START, XS, **options), expected)


class Own(dict):
    """Its methods are not those that a trace is to call."""

    def keys(self):
        raise RuntimeError("keys")

    __iter__ = items = values = keys

    def __setitem__(self, key, value):
        super().__setitem__(f"own {key}", value)


@traced
@pytest.mark.filterwarnings("ignore:.*traced on every call")
def test_what_f_reads_stays_the_same_object(options):
    layers = functools.lru_cache(lambda name: [name])
    layer, own, cyclic, deep = layers("old"), Own(rate=2.0), {}, []
    cyclic["me"] = cyclic
    for _ in range(60):
        deep = [deep, deep]

    def f(c, x):
        assert layers("new") == ["new"]
        own["kept"] = torch.sin(c)
        return c * dict.get(own, "rate") + len(deep) + len(cyclic), c

    compiled = gd.scan(f, START, XS, **options)
    assert dict.__len__(own) == 1
    assert layers("old") is layer
    assert_agrees(compiled, gd.scan(f, START, XS))


@traced
def test_a_tensor_that_a_trace_left_elsewhere_is_no_input(options):
    out = []

    def smuggle(x, options=tuple(options)):  # past everything that f can be seen to reach
        torch.utils.gdfunc_left = x * 2
        return x

    gd.scan(lambda c, x: (smuggle(c), None), START, length=2, **options)
    out.append(vars(torch.utils).pop("gdfunc_left"))
    for f, init in ((lambda c, x: (c * out[0], None), START), (lambda c, x: (c * 2, None), out[0])):
        with pytest.raises(BackendError, match="a tensor has no value"):
            gd.scan(f, init, length=2, **options)


@traced
@pytest.mark.filterwarnings("ignore:.*traced on every call")
@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_waits_for_the_end_of_a_trace(options, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.utils, "gdfunc_seen", seen, raising=False)

    def f(c, x):  # which notes what it does past everything that it can be seen to reach
        torch.utils.gdfunc_seen.append(1)
        signal.raise_signal(signal.SIGINT)
        torch.utils.gdfunc_seen.append(2)
        if 3 in torch.utils.gdfunc_seen:
            signal.raise_signal(signal.SIGINT)
        return torch.sin(c), c

    with pytest.raises(KeyboardInterrupt):
        gd.scan(f, START, length=2, **options)
    assert seen == [1, 2]
    seen.append(3)
    with pytest.raises(KeyboardInterrupt):  # the second in a trace
        gd.scan(f, START * 1, XS, **options)
    assert seen == [1, 2, 3, 1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def own(signum, frame):
        pass

    def installs(c, x):
        signal.signal(signal.SIGINT, own)
        return torch.sin(c), c

    try:
        got = gd.scan(installs, START, length=2, **options)
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert_agrees(got, gd.scan(lambda c, x: (torch.sin(c), c), START, length=2))


@pytest.mark.long
def test_traces_take_a_bounded_memory(monkeypatch):
    """Of functions that each close over other numbers or arrays."""
    monkeypatch.setattr(_recent, "BYTES", 2**20)
    monkeypatch.setattr(_trace, "_recipes", recipes := _recent.Recent())
    for i in range(12):
        many = [float(i)] * 3000, np.full(30_000, float(i))
        gd.scan(
            lambda c, x, many=many: (c * many[0][0] + many[1][0], None),
            START,
            length=1,
            adjoint=Checkpoint(1),
        )
    assert 1 <= len(recipes._entries) <= 4
    assert recipes._bytes <= 2**20


# Derivatives.


def complex_part(c, x, w):
    t = c * w
    with torch.no_grad():
        z = torch.complex(t, t)
    return t * z.real + x


def quiet(function):
    """f uses what the function makes of a tensor under no_grad."""

    def f(c, x, w):
        t = c * w
        with torch.no_grad():
            u = function(t)
        return t * x + u

    return f


def counted(t):
    """What comes up under no_grad may be written into."""
    total = torch.zeros_like(t)
    total += t
    total[0] = 3.0
    return total.mul_(2)


def masked_quietly(c, x, w):
    mask = torch.full((2, 2), -9.0, dtype=torch.float64)
    with torch.no_grad():
        mask.triu_(1)
    return torch.softmax(mask + torch.outer(c, w), -1).sum(0)


def averaged(c, x, w):
    average, copy_ = torch.zeros_like(c), (c * w).detach().clone()
    with torch.no_grad():
        average.add_(c * w)
        copy_.clamp_(-0.1, 0.1)
    return c * w + average + copy_


def with_new_parameters(c, x, w):
    scale = nn.init.constant_(torch.empty(2, dtype=torch.float64), 0.5)
    return nn.LayerNorm(2, dtype=torch.float64)(c * w) * scale + x


def first_order(c, x, w):
    q = c.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(((q * w) ** 2).sum(), q)
    (h,) = torch.autograd.grad(((q * w) ** 2).sum(), q, create_graph=True)
    return c - 0.1 * g - 0.01 * h


FOLLOWED = {
    "a mask made in place": masked_quietly,
    "averages": averaged,
    "a sum with itself": lambda c, x, w: with_itself(c * w) + x,
    "new parameters": with_new_parameters,
    "gradients of autograd": first_order,
    "a copy": lambda c, x, w: copy.deepcopy(w) * c + w * x,
    "the value of vjp": quiet(lambda t: torch.func.vjp(lambda q: (q**3).sum(), t)[0]),
    "the same again": quiet(lambda t: t.to(torch.float64)),
    "contiguous": quiet(torch.Tensor.contiguous),
    "dropout in eval": quiet(nn.Dropout().eval()),
    "a view": quiet(lambda t: t.view(2)),
    "a sum in place": quiet(counted),
    "complex": complex_part,
    "grad": quiet(grad(lambda q: (q**3).sum())),
    "grad of what is outside": lambda c, x, w: c - 0.1 * quiet(grad(lambda q: (q**3 * w).sum()))(c, x, w),
    "grad and value": quiet(lambda t: grad_and_value(lambda q: (q**3).sum())(t)[1]),
    "an assignment by a mask": lambda c, x, w: masked(c * w, x),
    "a write with a derivative": lambda c, x, w: (c * w).mul_(x).clamp_(-0.5, 0.5),
}


def with_itself(t):
    return t.add_(t.detach())


def masked(t, x):
    rows = torch.stack([t, t * x])
    rows[x > 0.2] = 0.5  # a row of two
    rows[rows < 0] = x.sum()
    return rows.sum(0)


@traced
@pytest.mark.parametrize("name", FOLLOWED)
def test_no_grad_within_f_cuts_what_it_cuts_in_eager(name, options):
    if (name, options) == ("complex", {"backend": "native"}):
        with pytest.raises(BackendError, match="does not cover complex128"):
            final(FOLLOWED[name], W, **options)
        return
    w = W.clone().requires_grad_()
    run = functools.partial(final, FOLLOWED[name], w)
    assert_traced(run, options)
    assert_traced(lambda **how: torch.autograd.grad(run(**how), w)[0], options)


def written(change):
    def f(c, x, w):
        t = c * w + x
        change(t)
        return t

    return f


def quietly(change):
    return written(lambda t: torch.no_grad()(change)(t))


def constant_for_a_while(c, x, w):
    with torch.no_grad():
        b = torch.zeros_like(c)
    b.add_(c * w)
    with torch.no_grad():
        b.mul_(3.0)
    return b + x


SILENT = {
    "what was a constant": constant_for_a_while,
    "rows of a detached alias": written(lambda t: vmap(lambda row: row.mul_(2))(t.detach())),
    "under no_grad": quietly(lambda t: t.clamp_(-0.5, 0.5)),
    "an assignment": quietly(lambda t: t.__setitem__(0, 7.0)),
    "a detached alias": written(lambda t: t.detach().mul_(2)),
    "a view of one": written(lambda t: t.detach()[1:].mul_(2)),
    "data": written(lambda t: t.data.mul_(2)),
    "an initial value": written(lambda t: nn.init.constant_(t, 2.0)),
}


@traced
@pytest.mark.parametrize("name", SILENT)
def test_a_write_past_autograd_has_its_value_and_no_derivative(name, options):
    run = functools.partial(final, SILENT[name])
    assert_traced(functools.partial(run, W), options)
    with pytest.raises(BackendError, match="an in-place operation under no_grad or on a detached tensor"):
        grad(lambda w: run(w, **options))(W)


@pytest.mark.long
@traced
@pytest.mark.parametrize("derivative", [torch.func.hessian, torch.func.jacfwd])
def test_no_grad_does_not_stop_forward_mode_within_f(derivative, options):
    def f(c, x, w):
        with torch.no_grad():
            slope = derivative(lambda q: (q**4 * w).sum())(c)
        return c * w + 0.1 * slope.sum() + x

    assert_agrees(final(f, W, **options), final(f, W))
    with pytest.raises(BackendError, match="a forward-mode derivative under no_grad"):
        grad(lambda w: final(f, w, **options))(W)


@traced
def test_an_operator_of_the_users_is_not_differentiated_as_a_graph(options):
    with torch.library._scoped_library("gdfunc_tests", "FRAGMENT") as library:
        library.define("square(Tensor x) -> Tensor")
        library.impl("square", lambda x: x * x, "CompositeExplicitAutograd")
        run = functools.partial(final, lambda c, x, w: torch.ops.gdfunc_tests.square(c * w) + x)
        if options != {"backend": "native"}:  # which has no such operation
            assert_agrees(run(W, **options), run(W))
        with pytest.raises(BackendError, match=r"gdfunc_tests\.square"):
            grad(lambda w: run(w, **options))(W)


@traced
def test_a_derivative_may_be_checkpointed_and_watched(options):
    def slope(around):
        w = W.clone().requires_grad_()
        around(lambda w: final(lambda c, x, w: torch.tanh(c * w + x), w, **options), w).backward()
        return w.grad

    expected = grad(lambda w: final(lambda c, x, w: torch.tanh(c * w + x), w))(W)
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    assert_agrees(slope(checkpointed), expected)
    with torch.autograd.set_detect_anomaly(True):
        assert_agrees(slope(lambda f, w: f(w)), expected)


@pytest.mark.long
def test_a_run_that_stops_itself_is_not_traced_as_a_whole():
    def run(lr, backend="eager"):
        step = gd.make_step(lambda w, batch: (w**2).sum())
        index = gd.full_batch(1, 5)
        stop = lambda w, loss: loss < 0.1  # noqa: E731
        return gd.train(step, START, None, index, lr, stop=stop, backend=backend)[0].sum()

    lr = torch.tensor(0.1, dtype=torch.float64)
    assert_traced(
        lambda **how: gd.hypergrad(functools.partial(run, **how))(lr).grads, {"backend": "native"}
    )
    with pytest.raises(BackendError, match="cannot be traced as a whole"):
        gd.jit(gd.hypergrad(run), backend="native")(lr)


@pytest.mark.long
def test_forward_over_reverse_goes_where_some_of_the_carry_has_no_tangent():
    def run(a, **options):
        f = lambda c, x: ((c[0].sin(), c[1].cos() * x[0]), c[1])  # noqa: E731
        (a, b), ys = gd.scan(f, (a, normal(1, 2)), normal(2, 3, 2), **options)
        return a.sin().sum() + b.sum() + ys.sum()

    a = normal(0, 4)
    assert_traced(
        lambda **how: jvp(grad(lambda a: run(a, **how)), (a,), (a.cos(),))[1], {"backend": "native"}
    )


@traced
def test_a_tensor_that_is_a_view_alone_need_not_be_one_under_vmap(options):
    kernel, xs = normal(0, 3, 2, 2, 2), normal(1, 2, 2, 2, 4, 3)

    def f(c, x):
        return functional.conv2d(x, c).flatten().cumsum(0).tanh().sum() * c, c

    kernels = torch.stack([kernel, kernel + 0.1])
    assert_traced(lambda **how: vmap(lambda k: gd.scan(f, k, xs, **how)[1])(kernels), options)


# Changes between two calls.

RATES = [0.1]


class State(NamedTuple):
    w: torch.Tensor

    @property
    def rate(self):
        return RATES[0]


class Node:
    def __init__(self, w, conf):
        self.w, self.conf = w, conf

    @property
    def rate(self):
        return self.conf[0]

    def _replace(self, w):
        return Node(w, self.conf)


pytree.register_pytree_node(Node, lambda n: ([n.w], n.conf), lambda leaves, conf: Node(*leaves, conf))


@traced
@pytest.mark.parametrize("make", [State, lambda w: Node(w, RATES)], ids=["class", "node"])
def test_a_number_in_the_class_or_the_node_of_the_carry_is_read(make, options):
    def f(c, x):
        return c._replace(w=c.w - c.rate * x), c.w

    for rate in (0.5, 0.1):
        RATES[0] = rate
        assert_traced(lambda **how: gd.scan(f, make(START), XS, **how)[0].w, options)


@pytest.mark.long
@traced
def test_equal_keys_of_other_types_are_others(options):
    def f(c, x):
        return c, torch.tensor(next(iter(c)))

    for key in (1, 1.0, True):
        assert_traced(lambda **how: gd.scan(f, {key: START}, length=2, **how)[1], options)  # noqa: B023


@pytest.fixture
def double_by_default():
    """A function that makes float64 the default dtype, for the rest of the test."""
    yield lambda: torch.set_default_dtype(torch.float64)
    torch.set_default_dtype(torch.float32)


@pytest.mark.long
@traced
def test_the_default_dtype_of_the_trace_stays(options, double_by_default):
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def run(**options):
        f = lambda c, x: (c + w * torch.sin(x * 0.1 + 0.01), x / 3)  # noqa: E731
        return gd.scan(f, w * 0, torch.arange(1, 4), **options)

    losses = [run(**how)[0] for how in (options, {})]
    double_by_default()
    got, expected = (torch.autograd.grad(loss, w)[0] for loss in losses)
    assert abs(got - expected) < 1e-14
    (end, ys), (expected_end, expected) = run(**options), run()
    assert ys.dtype == expected.dtype == torch.float64
    assert abs(end - expected_end) < 1e-14


@pytest.mark.long
@pytest.mark.parametrize("options", [{"adjoint": Checkpoint(2)}, {"backend": "native"}])
def test_a_backward_pass_under_autocast_has_the_casts_of_the_trace(options):
    matrix = torch.linspace(-1, 1, 16).reshape(4, 4)

    def slope(autocast, **options):
        c = torch.ones(4, 4, requires_grad=True)
        end = gd.scan(lambda c, x: (torch.tanh(c @ matrix), None), c, length=4, **options)[0].sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            end.backward()
        return c.grad

    for autocast in (True, False):
        torch.testing.assert_close(slope(autocast, **options), slope(False))


@pytest.mark.long
def test_scans_inside_that_differ_in_length_are_not_taken_for_each_other():
    start = torch.tensor(1.0, dtype=torch.float64)
    for steps in (2, 3):

        def f(c, x):
            return gd.scan(lambda d, _: (d * 0.5, None), c, length=steps, adjoint=Checkpoint(1))[0], None  # noqa: B023

        assert gd.scan(f, start, length=2, adjoint=Checkpoint(1))[0] == 0.5 ** (2 * steps)


@pytest.mark.long
def test_equal_functions_of_other_tensors_are_traced_once(traces):
    def run(w, p, xs, rate=0.5):
        return gd.scan(lambda c, x: (c - rate * torch.sin(c * w) * x, c), p, xs, adjoint=Checkpoint(2))[0]

    for seed in range(3):
        w, p = normal(seed, 3), normal(seed + 1, 3)
        for length in (4, 7):
            xs = normal(seed + 2, length)
            expected, _ = loop(lambda c, x: (c - 0.5 * torch.sin(c * w) * x, c), p, xs)  # noqa: B023
            torch.testing.assert_close(run(w, p, xs), expected)
    assert len(traces) == 2  # a new trace is made twice
    run(w, p, xs, rate=0.25)
    run(w.float(), p.float(), xs.float())
    run(w[:1], p, xs)
    assert len(traces) == 8


@pytest.mark.long
def test_a_trace_is_for_one_kind_of_carry_and_of_x():
    def f(c, x):
        return c * 2, (torch.ones(c.shape, dtype=c.dtype), torch.zeros(x.shape, dtype=x.dtype))

    for dtype in (torch.float32, torch.float64):
        for size in (2, 3):
            small, large = torch.ones(1), torch.ones(4, size, dtype=dtype)
            for init, xs in ((large[0], small), (small[0], large)):
                _, ys = gd.scan(f, init, xs, adjoint=Checkpoint(1))
                assert [y.shape[1:] for y in ys] == [init.shape, xs.shape[1:]]
                assert [y.dtype for y in ys] == [init.dtype, xs.dtype]


# Refusals.


def replaced(c):
    t = c * 2
    t.data = c
    return t


def drawn():
    return torch.rand(2, generator=torch.Generator().manual_seed(0))


COUNT, TWO = torch.tensor(1), torch.tensor(2.0, dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64).to_sparse()
REFUSED = {
    "detaches a tensor in place": lambda c: (c * 2).detach_(),
    "detaches a tensor in place, or replaces its data": replaced,
    "takes a tensor's values out of torch": lambda c: c * pickle.loads(pickle.dumps(W)),
    "values out of torch": lambda c: c + W.clone().apply_(lambda value: value + 1),
    "takes a tensor.s values out of torch": lambda c: c * float(np.from_dlpack(TWO)),
    "applies multilabel_margin_loss": lambda c: functional.multilabel_margin_loss(c, torch.tensor([0, -1])),
    "applies _assert_async": lambda c: (torch._assert_async(c[0] > 0), c)[1],
    "a tensor of layout torch.sparse_coo": lambda c: c + EYE @ c,
    "f needs the value of a tensor": lambda c: c[:COUNT].sum(),
    "f reads .grad of a tensor": lambda c: c if WEIGHT.grad is None else WEIGHT.grad,
    r"f cannot be traced \(RuntimeError: The tensor has": lambda c: c + torch.tensor([TWO, TWO]),
    r"f cannot be traced \(RuntimeError: .tolist": lambda c: c * TWO.tolist(),
    "f formats or prints a tensor": lambda c: c * float(f"{TWO:.2f}"),
    "f makes a tensor in a way that a trace cannot follow": lambda c: c + drawn(),
}
WEIGHT = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))


@traced
@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize("reason", REFUSED)
def test_a_body_that_a_trace_cannot_follow_is_refused_and_auto_runs_it_in_eager(
    reason, options, monkeypatch
):
    def run(**options):
        return gd.scan(lambda c, x: (c, REFUSED[reason](c)), START, length=2, **options)

    with pytest.raises(BackendError, match=reason):
        run(**options)
    monkeypatch.setattr("gdfunc._scan._cost.TRACE", 0.0)
    monkeypatch.setattr("gdfunc._scan._cost._WORTH_A_WARNING", 0.0)
    with pytest.warns(gd.PerformanceWarning, match=f"runs 2 steps.* from Python.*: .*{reason}"):
        got = run(backend="auto")
    assert_agrees(got, run())


@traced
@pytest.mark.parametrize(
    "asks", [lambda t: t.requires_grad, lambda t: not t.is_leaf, lambda t: t.grad_fn is not None]
)
def test_what_autograd_knows_is_told_where_it_knows_nothing(asks, options):
    def f(c, x):
        return c * (2 if asks(c * 1) else 3), None

    assert_agrees(gd.scan(f, START, XS, **options), gd.scan(f, START, XS))

    def run(c):
        return gd.scan(f, c, XS, **options)[0].sum()

    for asked in (lambda: run(START.clone().requires_grad_()), lambda: grad(run)(START)):
        with pytest.raises(BackendError, match="asks what autograd knows"):
            asked()
    assert_agrees(gd.scan(f, START, XS, **options), gd.scan(f, START, XS))


@traced
def test_modules_of_torch_may_ask(options):
    """For the sake of speed."""
    with torch.random.fork_rng():
        attention = nn.MultiheadAttention(2, 1, bias=False, dtype=torch.float64).eval()
    for weight in attention.parameters():
        nn.init.constant_(weight, 0.3)

    def attend(c, x):
        return attention(c, c, c, need_weights=False)[0], None

    assert_agrees(gd.scan(attend, XS, length=2, **options), gd.scan(attend, XS, length=2))


class Doubling(torch.Tensor):
    pass


class Cosine(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (torch.cos if func is torch.sin else func)(*args, **(kwargs or {}))


@traced
def test_tensors_and_modes_of_the_users_own_are_refused(options):
    def f(c, x):
        return torch.sin(c), None

    with pytest.raises(BackendError, match="a Doubling may have operations of its own"):
        gd.scan(f, START.as_subclass(Doubling), length=2, **options)
    with Cosine(), pytest.raises(BackendError, match="a Cosine is active"):
        gd.scan(f, START, length=2, **options)


@pytest.mark.long
@traced
def test_the_default_device_is_that_of_new_tensors_alone(options):
    with torch.device("meta"):
        end, ys = gd.scan(lambda c, x: (torch.sin(c), c), START, length=2, **options)
    assert_agrees((end, ys), gd.scan(lambda c, x: (torch.sin(c), c), START, length=2))
    with torch.device("meta"), pytest.raises((BackendError, RuntimeError), match="meta"):
        gd.scan(lambda c, x: (c + torch.ones(2), None), START, length=2, **options)


def test_a_loop_in_c_needs_values_and_members():
    with FakeTensorMode(), pytest.raises(BackendError, match="needs data but was given a FakeTensor"):
        gd.scan(lambda c, x: (c * 2, None), torch.ones(2), length=2, backend="native")
    run = vmap(lambda c: gd.scan(lambda c, x: (c * 2, None), c, length=2, backend="native")[0])
    with pytest.raises(BackendError, match="no members"):
        run(torch.ones(0, 2))


@traced
@pytest.mark.parametrize("transform", [lambda run: run, grad])
def test_make_fx_writes_a_loop_down(transform, options):
    def run(c):
        return final(lambda c, x, w: torch.tanh(c * w + x), W, c, **options)

    graph = make_fx(transform(run))(START)
    assert_agrees(graph(START + 1), transform(run)(START + 1))


# Memory.


def peak_of_backward(length, adjoint, transform):
    w, p = normal(0, 1)[0], normal(1, 1000)

    def loss(w):
        f = lambda c, x: (torch.sin(c * w) + torch.cos(c), None)  # noqa: E731
        return gd.scan(f, p, length=length, adjoint=adjoint, backend="eager")[0].sum()

    transform(loss, w)  # the traces, which are made once
    with Memory() as live:
        transform(loss, w)
    return live.peak


def by_autograd(loss, w):
    loss(w.clone().requires_grad_()).backward()


@pytest.mark.long
@pytest.mark.parametrize("transform", [by_autograd, lambda loss, w: grad(loss)(w)])
@pytest.mark.parametrize(
    ("adjoint", "least", "most"),
    [
        (Reverse(), 3.5, 4.2),
        (Checkpoint("sqrt"), 1.7, 2.3),
        (Checkpoint(1), 3.5, 4.2),
        (Checkpoint(10**9), 3.5, 4.2),
        (Checkpoint(carries=4), 0.99, 1.05),
    ],
    ids=str,
)
def test_a_checkpointed_backward_pass_grows_as_the_root_of_the_steps(adjoint, least, most, transform):
    short, long = (peak_of_backward(length, adjoint, transform) for length in (32, 128))
    assert least < long / short < most


@pytest.mark.long
def test_checkpointing_bounds_the_peak():
    all_carries = peak_of_backward(256, Reverse(), by_autograd)
    assert all_carries > 256 * 8 * 1000
    assert peak_of_backward(256, Checkpoint("sqrt"), by_autograd) < all_carries / 4


@pytest.mark.filterwarnings("ignore:f's global `gc` is the module gc")
def test_no_garbage_is_collected_within_a_trace_and_the_collector_is_then_as_before():
    def f(carry, x):
        if gc.isenabled() or x is None:
            raise LookupError
        return carry + x, None

    try:
        for collects in (gc.enable, gc.disable):
            collects()
            gd.scan(f, torch.zeros(2), torch.ones(3), backend="native")
            assert gc.isenabled() == (collects is gc.enable)
            with pytest.raises(LookupError):
                gd.scan(f, torch.zeros(2), length=3, backend="native")
            assert gc.isenabled() == (collects is gc.enable)
    finally:
        gc.enable()
