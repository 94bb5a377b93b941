"""The key of a function: equal plain state gives an equal key, and no change leaves a key as it was.

A key may be missing, which costs a trace on every call, but it is never stale.
"""

import argparse
import collections
import collections.abc
import contextlib
import dataclasses
import enum
import functools
import gc
import importlib
import logging
import operator
import os
import random
import re
import sys
import threading
import time
import types
import typing
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

import gdfunc as gd
from gdfunc._scan.trace._key import key_of

from .references import normal

NAN = float("nan")
SCALE = 2.0
ONES = torch.ones(3)
MACHINE = torch.finfo(torch.float32)
SETTINGS = types.ModuleType("settings_of_a_user")
SETTINGS.scale = 2.0
SETTINGS.other = 2.0
SETTINGS.inner = types.ModuleType("settings_of_a_user.inner")
SETTINGS.inner.depth = 3


def key(f):
    return key_of(f).key


def reader(value):
    """A function with a value in its closure."""
    return lambda: value


class Model:
    """An ordinary class of a user's."""

    gain = 3.0
    __gain__ = 3.0

    def __init__(self, rate=0.5, options=None):
        self.rate = rate
        self.options = options

    def step(self, carry):
        return carry * self.rate * self.gain

    @property
    def doubled(self):
        return 2 * self.rate


class Child(Model):
    pass


class Slotted:
    __slots__ = ("__weakref__", "empty", "rate")

    def __init__(self, rate):
        self.rate = rate


@dataclasses.dataclass
class Config:
    rate: float = 0.5
    names: list = dataclasses.field(default_factory=list)


class Point(typing.NamedTuple):
    x: object
    y: object = 0


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Real(float):
    """A number that says that it is another one."""

    def __float__(self):
        return 0.0


class Table(dict):
    """A dict that hides what is in it."""

    def __len__(self):
        return 0

    def keys(self):
        return ()

    def values(self):
        return ()


class Shape(collections.abc.Sized):
    """A class with book-keeping in C, which is of no interest."""

    side = 1.0

    @functools.cached_property
    def area(self):
        return self.side**2

    @staticmethod
    def unit():
        return SCALE


class Square(Shape):
    def __len__(self):
        return 4


def named(carry):
    return carry * SCALE


def importing_name(carry):
    from settings_of_a_user import scale

    return carry * scale


def importing():
    import settings_of_a_user

    return settings_of_a_user.scale


def importing_relative(carry):
    from .settings_of_a_user import scale

    return carry * scale


cached = functools.cache(lambda: SCALE)
posing = functools.wraps(torch.nn.functional.relu)(lambda carry: carry * SCALE)


# Remade closures.


def training(seed):
    """Make new copies of everything that a caller passes to scan."""
    with torch.random.fork_rng():
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    apply, *_ = gd.modules.functional(net)
    x, y = normal(seed, 10, 3), normal(seed + 1, 10, 1)
    step = gd.make_step(
        lambda params, batch: torch.nn.functional.mse_loss(apply(params, batch[0]), batch[1]),
        gd.chain(gd.scale(0.5), gd.chain()),
    )
    return lambda carry, index: step(carry, (x[index], y[index]), 0.1)


def test_a_step_made_anew_has_an_equal_key():
    a, b = key_of(training(0)), key_of(training(1))
    assert a.key == b.key is not None
    assert hash(a.key) == hash(b.key)
    assert len(a.tensors) == len(b.tensors) == 2 + 6 + 3 + 3  # the buffers count twice: they are copied
    assert not {id(x) for x in a.tensors} & {id(x) for x in b.tensors}


def values():
    """Make new values that all differ to a function, however Python compares them."""
    ab, matrix, ordered = {"a": 1, "b": 2}, np.array([1.0, 2.0]), collections.OrderedDict(a=1, b=2)
    return [
        *(
            1,
            1.0,
            True,
            1 + 0j,
            complex(1, -0.0),
            "1",
            b"1",
            0.0,
            -0.0,
            float("nan"),
            None,
            ...,
            NotImplemented,
        ),
        *(
            (1,),
            (1.0,),
            ((1,),),
            [1],
            [],
            [[]],
            {1},
            frozenset({1}),
            frozenset({True}),
            slice(1),
            slice([1]),
        ),
        *(collections.deque([1]), collections.deque([1], maxlen=2), range(1), range(0), range(5, 5)),
        *(ab, {"b": 2, "a": 1}, {1: 2}, {True: 2}, ordered),
        *(collections.defaultdict(int, ab), collections.defaultdict(float, ab)),
        *(types.SimpleNamespace(a=1), types.SimpleNamespace(a=2), Point(1, 2), Point(1, 2.0)),
        *(Mode.FAST, Mode.SLOW, Level.LOW, Level.HIGH),
        *(Model(), Model(0.25), Child(), Slotted(1), Slotted(1.0), Config(), Config(names=["a"]), Square()),
        *(matrix, np.array([1.0, -2.0]), matrix.view(np.int64), matrix[None], np.zeros(1), -np.zeros(1)),
        *(np.zeros(1, [("a", float)]), np.float64(1.0), np.float32(1.0), np.float64(2.0), np.str_("1")),
        *(np.float32, np.add, np.sum, MACHINE, torch.float32, torch.float64),
        *(
            torch.device("cpu"),
            torch.device("meta"),
            torch.Size([1]),
            torch.strided,
            torch.contiguous_format,
        ),
        *(torch.sin, torch.nn.functional.relu, torch.Tensor.sin, torch.ops.aten.sin.default, len, int),
        *(torch.ops.aten.sin, torch.nn.Linear, Model, Child, Mode, Point, Config, torch, SETTINGS),
        *(named, cached, Model().step, Model(0.25).step, dict.fromkeys),
        *({"a": 1}.get, {"a": 2}.get, {"a": 1}.pop, (1, 2).__getitem__, (1, 3).__getitem__),
        *(functools.partial(named, 1), functools.partial(named, 2), functools.partial(named, carry=1)),
        *(torch.ones(3), torch.ones(3, requires_grad=True), torch.nn.Parameter(torch.ones(3))),
        *(torch.nn.Parameter(torch.ones(3), requires_grad=False), torch.ones(2), torch.ones(1, 3)),
        *(torch.ones(3, dtype=torch.float64), torch.ones(3, device="meta"), torch.ones(3, 2)[:, 0]),
        *(torch.ones(3).to_sparse(), torch.ones(1).expand(3)),
    ]


def values_that_are_not_plain():
    """Values of which most have no key."""
    masked = [([1.0, 2.0], [False, True]), ([1.0, 2.0], [True, False]), ([1.0, 3.0], [False, True])]
    return [
        *(collections.Counter(a=1, b=2), types.MappingProxyType({"a": 1, "b": 2}), Table(a=1), Table(a=2)),
        *(Real(1.0), Real(2.0), *(np.ma.masked_array(*each) for each in masked)),
        *(dict[str, int], int | float, np.dtype("float32"), np.dtype("float64")),
    ]


def test_equal_values_have_equal_keys_and_different_values_have_different_keys():
    plain = [[key(reader(value)) for value in values()] for _ in range(2)]
    assert None not in plain[0]
    first, second = (
        [*keys, *filter(None, (key(reader(value)) for value in values_that_are_not_plain()))]
        for keys in plain
    )
    equal = [(i, j) for i, a in enumerate(first) for j, b in enumerate(second) if a == b]
    assert equal == [(i, i) for i in range(len(first))]


@pytest.mark.long
def test_keys_keep_alive_what_they_compare_by_identity():
    mark = type("Mark", (), {})
    held, alive = key(reader(mark)), weakref.ref(mark)
    del mark
    gc.collect()
    assert alive() is not None, "a new class could get its id, and an equal key"
    assert held == key(reader(alive()))


# Whatever changes, the key does.


def setter(**attributes):
    """A change that sets attributes."""

    def change(x):
        for name, value in attributes.items():
            setattr(x, name, value)

    return change


def item(key, value):
    return lambda x: x.__setitem__(key, value)


def itself(f):
    return f


def remade(cls=Model):
    """A class of its own, so that it may be changed."""
    parts = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, cls.__bases__, parts)


def function_of(f, **defaults):
    f = types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    f.__kwdefaults__ = defaults
    return f


def net():
    with torch.random.fork_rng():
        return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))


def full_cell():
    return reader(1)


def rename_attribute(cls):
    del cls.a
    cls.b = 1


CHANGES = {  # how a thing is made, how it is changed, and what reads it
    "cell": (full_cell, lambda f: setattr(f.__closure__[0], "cell_contents", 2), itself),
    "cell: tensor": (full_cell, lambda f: setattr(f.__closure__[0], "cell_contents", ONES), itself),
    "code": (
        lambda: function_of(lambda rate=2.0: rate),
        setter(__code__=(lambda rate=2.0: -rate).__code__),
        itself,
    ),
    "default": (lambda: function_of(lambda rate=2.0: rate), setter(__defaults__=(3.0,)), itself),
    "keyword default": (
        lambda: function_of(lambda *, rate: rate, rate=2.0),
        setter(__kwdefaults__={"rate": 3.0}),
        itself,
    ),
    "attribute of a function": (lambda: function_of(named), setter(scale=3.0), itself),
    "list": (lambda: [1, 2], item(1, 3)),
    "nested list": (list, lambda x: x.append(1), lambda x: reader({"a": (x,)})),
    "dict": (lambda: {"a": 1}, item("a", 2)),
    "ordered dict": (lambda: collections.OrderedDict(a=1, b=1), lambda x: x.move_to_end("a")),
    "attribute of an ordered dict": (collections.OrderedDict, setter(scale=2.0)),
    "set": (lambda: {1, 2}, lambda x: x.add(5)),
    "array": (lambda: np.zeros(3), item(1, 1.0)),
    "attribute": (Model, setter(rate=0.25)),
    "new attribute": (Model, setter(other=0.25)),
    "attribute of an attribute": (Model, setter(rate=1), lambda x: reader(Model(options=x))),
    "slot": (lambda: Slotted(1), setter(rate=2)),
    "empty slot": (lambda: Slotted(1), setter(empty=2)),
    "field of a dataclass": (Config, setter(rate=0.25)),
    "self of a method": (Model, setter(rate=0.25), lambda model: model.step),
    "partial argument": (list, lambda x: x.append(1), lambda x: functools.partial(named, x)),
    "attribute of a partial": (lambda: functools.partial(named), setter(x=1), itself),
    "class of an object": (Model, setter(__class__=Child)),
    "attribute of a base class": (
        remade,
        setter(gain=4.0),
        lambda cls: reader(type("Derived", (cls,), {})()),
    ),
    "attribute of a class in dunders": (remade, setter(__gain__=4.0)),
    "method": (remade, setter(step=lambda self, carry: carry)),
    "property": (remade, setter(doubled=property(lambda self: 0.0)), lambda cls: reader(cls())),
    "cached property": (lambda: remade(Shape), setter(area=functools.cached_property(lambda self: 0.0))),
    "attribute of an abstract class": (lambda: remade(Shape), setter(side=2.0)),
    "name of the last class attribute": (lambda: type("Named", (), {"a": 1}), rename_attribute),
    "attribute of a metaclass": (
        lambda: type("Meta", (type,), {}),
        setter(gain=4.0),
        lambda meta: reader(meta("Made", (), {})),
    ),
    "training": (net, lambda net: net[1].train(False)),
    "setting of a module": (net, lambda net: setattr(net[1], "p", 0.25)),
    "hook": (net, lambda net: net[0].register_forward_hook(lambda *args: None)),
    "module of another name": (
        lambda: types.ModuleType("torch.made_up"),
        *(setter(__name__="a_users", rate=3.0), lambda module: lambda: module.rate),
    ),
    "class of another module": (
        lambda: type("Made", (), {"__module__": "torch.made_up", "rate": 2.0}),
        setter(__module__="a_users", rate=3.0),
    ),
    "class that types made": (lambda: types.new_class("Made"), setter(rate=2)),
    "dataclass that was made": (
        lambda: dataclasses.make_dataclass("Made", [("rate", int, 1)]),
        setter(rate=2),
    ),
    "attribute of a tensor": (lambda: torch.ones(3), setter(scale=2.0)),
    "behind a step": (
        lambda: [2.0],
        item(0, 3.0),
        lambda scale: gd.make_step(lambda params, batch: params * scale[0]),
    ),
    "behind a function of torch": (
        lambda: [2.0],
        item(0, 3.0),
        lambda scale: vmap(grad(lambda x: x * scale[0])),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_changes_the_key(name):
    make, change, read = (*CHANGES[name], reader)[:3]
    x = make()
    f = read(x)
    before = key(f)
    assert before == key(f)
    assert (before is None) == (name == "attribute of a metaclass")
    change(x)
    assert before is None or key(f) != before


NESTED = lambda: (lambda: named(1))()  # noqa: E731
GLOBAL = [named, NESTED, posing, cached, functools.partial(NESTED), reader([NESTED]), reader(Square())]
GLOBAL += [types.SimpleNamespace(f=named), lambda c: [SCALE for _ in c], lambda: (lambda: lambda: SCALE)()]


@pytest.mark.parametrize("f", GLOBAL)
def test_a_global_counts_however_deep(f, monkeypatch):
    before = key(f)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert key(f) not in (before, None)
    monkeypatch.delitem(globals(), "SCALE")
    assert key(f) not in (before, None)
    monkeypatch.undo()
    assert key(f) == before


@pytest.mark.parametrize(
    "f", [lambda: SETTINGS.scale, importing_name, lambda: importing(), importing_relative]
)
def test_an_attribute_of_a_module_counts_if_it_is_named(f, monkeypatch):
    for name in ("settings_of_a_user", f"{__package__}.settings_of_a_user"):
        monkeypatch.setitem(sys.modules, name, SETTINGS)
    held = types.SimpleNamespace(f=[f])
    before = key(held)
    monkeypatch.setattr(SETTINGS, "other", 3.0)
    assert key(held) == before
    monkeypatch.setattr(SETTINGS, "scale", 3.0)
    assert key(held) not in (before, None)
    monkeypatch.delattr(SETTINGS, "scale")
    assert key(held) not in (before, None)


def test_the_name_that_a_global_has_counts():
    f, g = (eval("lambda: left + right", {name: 1}) for name in ("left", "right"))
    assert f.__code__ == g.__code__
    assert key(f) != key(g)


def importing_dotted(carry):
    import settings_of_a_user.inner

    return carry * settings_of_a_user.inner.depth


def test_modules_in_modules_in_cells_and_in_attributes_count(monkeypatch):
    monkeypatch.setitem(sys.modules, "settings_of_a_user", SETTINGS)
    model = types.SimpleNamespace(options=SETTINGS)
    inner = lambda: SETTINGS.inner.depth  # noqa: E731
    for f in (inner, importing_dotted, reader([inner, model]), lambda: model.options.inner.depth):
        before = key(f)
        with monkeypatch.context() as patch:
            patch.setattr(SETTINGS.inner, "depth", 4)
            assert key(f) not in (before, None)


def test_a_script_that_shadows_the_standard_library_is_no_library(monkeypatch, tmp_path):
    (tmp_path / "this.py").write_text("scale = 2\ndef f():\n    return scale\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "this", raising=False)
    import this

    before = key(this.f)
    this.scale = 3
    monkeypatch.delitem(sys.modules, "this")
    assert key(this.f) not in (before, None)


TEMPLATES = ["lambda: {}", "lambda: lambda: {}", "lambda x: x in {{{}}}", "lambda x={}: x"]


@pytest.mark.parametrize("constants", ["1 1.0 True", "0.0 -0.0 0", "(1,) (1.0,) (True,)"])
@pytest.mark.parametrize("source", TEMPLATES)
def test_constants_of_the_code_count(constants, source):
    keys = [key(eval(source.format(constant))) for constant in constants.split()]
    assert len(set(keys)) == 3


@contextlib.contextmanager
def double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SEEN_BY_ALL = [functools.partial(torch.device, "meta"), torch.no_grad, double_by_default]


@pytest.mark.parametrize(
    "setting", [*SEEN_BY_ALL, functools.partial(torch.autocast, "cpu", torch.bfloat16)]
)
def test_settings_that_torch_lets_every_function_see_count(setting):
    before = key(named)
    with setting():
        assert key(named) not in (before, None)
    assert key(named) == before


# Tensors.


@given(st.integers(0, 2**32), st.lists(st.integers(0, 3), max_size=3))
def test_the_values_of_tensors_do_not_count(seed, shape):
    a, b = normal(seed, *shape), normal(seed + 1, *shape)
    assert key(reader([a, b])) == key(reader([b, a])) is not None


def test_aliases_of_tensors_count():
    a, b = torch.ones(3), torch.ones(3)
    patterns = [[a, a, a], [a, a, b], [a, b, a], [a, b, b], [a, b, torch.ones(3)]]
    assert len({key(reader(pattern)) for pattern in patterns}) == 5
    assert key(reader([b, a, b])) == key(reader([a, b, a]))


def test_aliases_of_objects_count():
    a, b = [1], [1]
    assert key(reader((a, a))) == key(reader((b, b))) != key(reader((a, b)))


@given(st.permutations(range(6)))
def test_tensors_come_in_the_order_of_the_key(order):
    """Whatever the order in which they were made; so equal keys mean the same places."""

    def found(made):
        f = reader({"a": [made[0], made[1]], "b": Model(made[2], (made[3], {"c": made[4]}))})
        return key_of(reader([f, made[5], f]))

    first = found({i: torch.full((3,), float(i)) for i in order})
    places = [int(tensor[0]) for tensor in first.tensors]
    assert sorted(places) == list(range(6))
    again = {i: torch.zeros(3) for i in range(6)}
    assert found(again).key == first.key
    assert [id(x) for x in found(again).tensors] == [id(again[i]) for i in places]


def test_symbolic_shapes_give_no_key():
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    x = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.ones(3, 4))
    assert not all(type(n) is int for n in x.shape)
    assert key(reader(x)) is None


def test_a_mode_of_torch_functions_sees_no_tensor():
    seen = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.extend(arg for arg in args if isinstance(arg, torch.Tensor))
            return func(*args, **(kwargs or {}))

    with Spy():
        key_of(reader(ONES))
    assert seen == []


def test_nothing_is_run():
    def raises(*args):
        raise RuntimeError

    names = ("__getattribute__", "__len__", "__eq__", "__hash__")
    Proxy = type("Proxy", (), dict.fromkeys(names, raises) | {"__class__": property(raises)})
    assert key(reader(Proxy())) == key(reader(Proxy())) is not None


# The shape of the graph.


@pytest.mark.parametrize("way", [os.environ, os.getenv, sys.modules, globals, eval, exec, open, __import__])
@pytest.mark.parametrize("hold", [lambda way: way, lambda way: [way], Model])
def test_a_door_to_unreadable_state_gives_no_key_by_whatever_name(way, hold):
    assert key(reader(hold(way))) is None
    assert key(eval("lambda: other_name", {"other_name": way})) is None


def test_an_object_that_hides_its_parts_gives_no_key():
    layouts = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    unhashable = type("Unhashable", (type,), {"__eq__": operator.is_, "__hash__": None})
    for value in (unhashable("Made", (), {})(), layouts):
        assert key(reader([ONES, value])) is None


def test_cycles_end():
    def cycle(length):
        first = rows = []
        for _ in range(length):
            rows.append([])
            rows = rows[0]
        rows.append(first)
        return reader(first)

    assert key(cycle(3)) == key(cycle(3)) is not None
    assert key(cycle(3)) != key(cycle(4))
    model = Model()
    model.options = model
    assert key(model.step) is not None

    def recursive(n):
        return recursive(n - 1)

    assert key(recursive) is not None


def test_depth_and_sharing_are_no_trouble():
    deep = shared = ()
    for _ in range(10_000):
        deep = (deep,)
    for _ in range(200):
        shared = (shared, shared)
    assert key(reader(deep)) not in (key(reader(deep[0])), None)
    assert key(reader(shared)) not in (key(reader(shared[0])), None)


def test_an_empty_cell_differs_from_a_full_one():
    def make(value, fill):
        if fill:
            late = value
        return lambda: late

    assert key(make(None, False)) == key(make(None, False)) != key(make(None, True))


def test_weak_references_are_followed():
    """As the recurrent modules of torch hold their weights by them."""
    x = Model(1)
    f = reader(weakref.ref(x))
    before = key(f)
    x.rate = 2
    assert key(f) not in (before, None)
    with torch.random.fork_rng():
        assert key(reader(torch.nn.LSTM(2, 2))) is not None


def lazy_module():
    module = types.ModuleType("lazy")
    module.__getattr__ = lambda name: 1
    return module


UNREADABLE = {
    "module that makes attributes when asked": lazy_module,
    "module of a class of its own": lambda: type("Making", (types.ModuleType,), {})("making"),
    "generator": lambda: (i for i in [1]),
    "iterator": lambda: iter([1]),
    "zip": lambda: zip([1], [2], strict=True),
    "file": lambda: sys.stderr,
    "torch generator": torch.Generator,
    "numpy generator": lambda: np.random.default_rng(0),
    "numpy random state": lambda: np.random.RandomState(0),
    "random generator": lambda: random.Random(0),
    "method of a random generator": lambda: random.random,
    "method of a numpy random generator": lambda: np.random.default_rng(0).normal,
    "lock": threading.Lock,
    "thread-local": threading.local,
    "object of a class over one in C": lambda: type("Local", (threading.local,), {})(),
    "object array": lambda: np.array([None, [1]], dtype=object),
    "structured array of objects": lambda: np.zeros(1, [("a", object)]),
    "method of an iterator": lambda: iter([1]).__next__,
    "exception": lambda: ValueError([1]),
    "view of a dict": lambda: {"a": 1}.keys(),
    "memory": lambda: memoryview(b"1"),
    "lazy parameter": torch.nn.UninitializedParameter,
    "lazy module": lambda: torch.nn.LazyLinear(3),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("wrap", [reader, lambda x: [Model(x), 1], lambda x: type("Holder", (), {"x": x})])
def test_one_unreadable_object_gives_no_key(name, wrap):
    assert key(wrap(UNREADABLE[name]())) is None


CONFIG = types.ModuleType("config_of_a_user")
CONFIG.rate, CONFIG.held, CONFIG.pick, RATE = 1.0, {"rate": 1.0}, getattr, 1.0
NAME, READ_RATE = "rate", operator.attrgetter("rate")
environment, system, get, of_module_by_name = os.getenv, sys, getattr, operator.attrgetter(NAME)


def through_a_helper(module):
    return module.rate


def by_pattern(module):
    match module:
        case types.ModuleType(rate=rate):
            return rate


def imported_inside():
    import config_of_a_user as config

    return config.rate


def imported_system():
    import sys as system

    return float(system.argv[1])


# Ways to a number of a module, or of the environment, that changes between two runs.
WAYS = {
    "attribute": lambda: CONFIG.rate,
    "global": lambda: RATE,
    "entry of a dict": lambda: CONFIG.held["rate"],
    "attribute in a helper": lambda: through_a_helper(CONFIG),
    "pattern": lambda: by_pattern(CONFIG),
    "import inside": imported_inside,
    "getattr": lambda: getattr(CONFIG, NAME),
    "getattr by another name": lambda: get(CONFIG, NAME),
    "hasattr": lambda: float(hasattr(CONFIG, "five")) * 4 + 1,
    "__dict__": lambda: CONFIG.__dict__[NAME],
    "vars": lambda: vars(CONFIG)[NAME],
    "attrgetter": lambda: operator.attrgetter(NAME)(CONFIG),
    "attrgetter made before": lambda: READ_RATE(CONFIG),
    "reduce": lambda: functools.reduce(getattr, [NAME], CONFIG),
    "getattr held by the module": lambda: CONFIG.pick(CONFIG, NAME),
    "format": lambda: float("{0.rate}".format(CONFIG)),  # noqa: UP030, UP032
    "__getattribute__": lambda: CONFIG.__getattribute__(NAME),
    "arguments of the program": lambda: float(sys.argv[1]),
    "arguments, by getattr": lambda: float(getattr(sys, "argv")[1]),  # noqa: B009
    "arguments, imported inside": imported_system,
    "globals": lambda: globals()["CONFIG"].rate,
    "eval": lambda: eval("CONFIG.rate"),
    "environment": lambda: float(os.environ["GDFUNC_RATE"]),
    "environment by another name": lambda: float(environment("GDFUNC_RATE")),
    "modules": lambda: system.modules["config_of_a_user"].rate,
    "__import__": lambda: __import__("config_of_a_user").rate,
    "import_module": lambda: importlib.import_module("config_of_a_user").rate,
    "globals of a function": lambda: reader.__globals__["CONFIG"].rate,
    "frame": lambda: sys._getframe().f_globals["CONFIG"].rate,
    "file": lambda: float(CONFIG.path.read_text()),
}


@pytest.mark.filterwarnings("ignore:.*traced on every call")
@pytest.mark.parametrize("name", WAYS)
def test_a_run_is_never_stale_by_whatever_way_a_number_is_read(name, monkeypatch, tmp_path):
    read = WAYS[name]
    monkeypatch.setitem(sys.modules, "config_of_a_user", CONFIG)
    monkeypatch.setattr(CONFIG, "path", tmp_path / "rate", raising=False)

    def run():
        return gd.scan(lambda c, x: (c, x * read()), torch.ones(2), torch.ones(3), backend="native")[1]

    for rate in (1.0, 5.0):
        monkeypatch.setattr(CONFIG, "rate", rate)
        monkeypatch.setitem(CONFIG.held, "rate", rate)
        monkeypatch.setitem(globals(), "RATE", rate)
        monkeypatch.setattr(sys, "argv", ["program", str(rate)])
        monkeypatch.setenv("GDFUNC_RATE", str(rate))
        (tmp_path / "rate").write_text(str(rate))
        if rate == 5:
            monkeypatch.setattr(CONFIG, "five", True, raising=False)
        assert run().tolist() == [rate] * 3


@pytest.mark.parametrize(
    ("held", "cause"),
    [
        (iter([1]), "closure variable `value` is a list_iterator"),
        (
            {"frame": [np.random.default_rng(0)]},
            "closure variable `value`['frame'][0] is a numpy.Generator",
        ),
        (types.SimpleNamespace(lock=threading.Lock()), "closure variable `value`.lock is a _thread.lock"),
        (lambda: threading.stack_size(), "global `threading` is the module threading"),
    ],
)
def test_a_loop_without_a_key_warns_once_and_names_the_object_and_the_cost(held, cause):
    value = held

    def run():
        gd.scan(lambda c, x: (c + x, (value, None)[1]), ONES, ONES[:, None], backend="native")

    with pytest.warns(UserWarning, match=re.escape(f"f's {cause}")) as caught:
        run()
    (warning,) = caught
    assert "traced on every call" in str(warning.message)
    assert "0.1 s" in str(warning.message)
    run()


@pytest.mark.long
def test_the_walk_stops_at_the_first_thing_that_is_not_plain():
    held = [iter(()), [[float(i)] for i in range(10**6)]]
    started = time.perf_counter()
    assert key(reader(held)) is None
    assert time.perf_counter() - started < 0.05


OF_LIBRARIES = {
    "a network": lambda: torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(8, 2, batch_first=True), 6, enable_nested_tensor=False
    ),
    "an optimizer": lambda: torch.optim.Adam([torch.ones(1, requires_grad=True)]),
    "a loader": lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ONES)),
    "a graph": lambda: torch.fx.symbolic_trace(torch.nn.Identity()),
    "a logger": lambda: logging.getLogger("gdfunc"),
    "a parser": argparse.ArgumentParser,
    "a figure": lambda: pytest.importorskip("matplotlib.figure").Figure().add_subplot(),
    "a model": lambda: pytest.importorskip("sklearn.linear_model").LinearRegression().fit([[1.0]], [1.0]),
    "a package": lambda: torch,
}


@pytest.mark.parametrize("name", OF_LIBRARIES)
def test_an_object_of_any_library_costs_at_most_50_ms(name):
    with torch.random.fork_rng():
        f, times = reader(OF_LIBRARIES[name]()), []
    for _ in range(3):
        started = time.process_time()
        key(f)
        times.append(time.process_time() - started)
    assert min(times) < 0.05


@pytest.mark.long
def test_a_walk_that_goes_too_far_gives_no_key_in_time():
    rows = [[float(i)] for i in range(10**6)]
    started = time.process_time()
    assert key(lambda: rows) is None
    assert time.process_time() - started < 1


# Key equality is deep equality.

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.sampled_from([0.0, -0.0, 1.0, NAN]),
    st.text("ab", max_size=2),
)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.integers(0, 1), st.sampled_from("ab")), inner, max_size=2),
        st.builds(Point, inner, inner),
        st.builds(Model, inner, inner),
        st.sets(st.integers(0, 3), max_size=2),
        st.lists(inner, max_size=2).map(collections.deque),
    ),
    max_leaves=8,
)


def spell(x):
    """A tree in words, by its definition: types, order and the sign of zeros."""
    if isinstance(x, Model):
        return f"Model({spell(x.rate)}, {spell(x.options)})"
    if isinstance(x, dict):
        return "{" + ", ".join(f"{spell(k)}: {spell(v)}" for k, v in x.items()) + "}"
    if isinstance(x, (list, tuple, set, collections.deque)):
        return f"{type(x).__name__}({', '.join(map(spell, x))})"
    return repr(x)


def rebuild(x):
    """The same tree made of new objects, none of them twice."""
    if isinstance(x, Model):
        return Model(rebuild(x.rate), rebuild(x.options))
    if isinstance(x, dict):
        return {rebuild(k): rebuild(v) for k, v in x.items()}
    if isinstance(x, Point):
        return Point(*map(rebuild, x))
    if isinstance(x, (list, tuple, set, collections.deque)):
        return type(x)([rebuild(entry) for entry in x])
    return float(repr(x)) if isinstance(x, float) else x


@given(trees, trees)
def test_keys_are_equal_iff_the_trees_are(a, b):
    a, b = rebuild(a), rebuild(b)
    assert (key(reader(a)) == key(reader(b))) == (spell(a) == spell(b))
    assert key(reader(a)) == key(reader(rebuild(a))) is not None


READERS = {
    "numpy.load": lambda: np.load("rows.npy"),
    "an alias of a reader": lambda read=np.loadtxt: read("rows.txt"),
    "seed of torch": lambda: torch.initial_seed(),
    "state of NumPy": lambda: np.random.get_state(),  # noqa: NPY002
    "threads": lambda: torch.get_num_threads(),
    "writes so far": lambda: ONES._version,
}


@pytest.mark.parametrize("name", READERS)
def test_a_function_that_reads_what_lies_outside_of_python_has_no_key(name):
    assert key(READERS[name]) is None
