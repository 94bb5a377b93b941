"""Trees: None is an empty node, dicts may order their keys otherwise, paths read like Python."""

from collections import OrderedDict, defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap

import gdfunc as gd
from gdfunc import _tree
from gdfunc._torch._transforms import members

from .references import normal


class Pair(NamedTuple):
    left: object
    right: object


leaf_strategy = st.integers(-5, 5).map(lambda value: torch.tensor(float(value)))
trees = st.recursive(
    st.one_of(st.none(), leaf_strategy),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.builds(Pair, inner, inner),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    ),
    max_leaves=6,
)


@given(trees)
def test_flatten_and_unflatten_are_inverse(tree):
    leaves, structure = _tree.flatten(tree)
    assert all(leaf is not None for leaf in leaves)
    again, same = _tree.flatten(_tree.unflatten(structure, leaves))
    assert same == structure
    assert all(a is b for a, b in zip(again, leaves, strict=True))
    assert len(_tree.named_leaves(tree, "t")) == len(leaves)


@pytest.mark.parametrize(
    "tree",
    [
        OrderedDict(b=torch.zeros(1), a=[torch.ones(1), None]),
        defaultdict(list, b=torch.zeros(1), a=(torch.ones(1),)),
        gd.Trajectory(step=torch.zeros(1), loss={"a": torch.ones(1)}),
        torch.max(torch.ones(2, 2), 0),
    ],
)
def test_other_containers_are_nodes_too(tree):
    leaves, structure = _tree.flatten([tree])
    (again,) = _tree.unflatten(structure, leaves)
    assert type(again) is type(tree)
    assert hash(structure) == hash(_tree.flatten([again])[1])
    assert _tree.flatten([again])[1] == structure != _tree.flatten([tree, tree])[1]
    assert all(a is b for a, b in zip(_tree.leaves(again), leaves, strict=True))
    assert getattr(again, "default_factory", None) is getattr(tree, "default_factory", None)


def test_dicts_of_all_kinds_match_whatever_the_order_of_their_keys():
    plain, ordered = {"a": 1, "b": (2, None)}, OrderedDict(b=(2, None), a=1)
    for first, second in [(plain, ordered), (ordered, plain), (plain, defaultdict(int, ordered))]:
        assert _tree.match(_tree.flatten(first)[1], second) == _tree.leaves(first)
    for other in ({"a": 1}, {"a": 1, "b": (2, 3)}, {"a": 1, "b": [2, None]}, {"a": (1,), "b": (2, None)}):
        assert _tree.match(_tree.flatten(ordered)[1], other) is None
    first, second = gd.Trajectory(step=1, loss=2), gd.Trajectory(step=1, lr=2)
    assert _tree.match(_tree.flatten(first)[1], second) is None


def test_slots_are_leaves_and_nones():
    assert _tree.slots({"a": None, "b": [1, (None, Pair(2, None))]}) == [None, 1, None, 2, None]


def test_members_are_counted_over_all_vmaps():
    counted = []

    def f(x):
        counted.append(members())
        return x.sum()

    vmap(vmap(f))(torch.ones(3, 4))
    vmap(grad(f))(torch.ones(3, 4))
    f(torch.ones(3))
    assert counted == [12, 3, 1]


@given(trees)
def test_map_maps_leaves_and_keeps_the_rest(tree):
    doubled = _tree.map(lambda a, b: a + b, tree, tree)
    assert _tree.flatten(doubled)[1] == _tree.flatten(tree)[1]
    assert [float(x) for x in _tree.leaves(doubled)] == [2 * float(x) for x in _tree.leaves(tree)]


def test_paths_read_like_python():
    tree = {"layer1": {"w": 1}, "rest": [Pair(2, (3, None))]}
    assert [path for path, _ in _tree.named_leaves(tree, "params")] == [
        "params['layer1']['w']",
        "params['rest'][0].left",
        "params['rest'][0].right[0]",
    ]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": 1}, r"trees\[1\] does not have the structure of trees\[0\]: missing trees\[0\]\['b'\]"),
        ({"a": 1, "b": [2]}, r"missing trees\[0\]\['b'\]; unexpected trees\[1\]\['b'\]\[0\]"),
        ({"a": 1, "b": None}, r"missing trees\[0\]\['b'\]"),
        ({"a": 1, "b": 2, "c": 3}, r"unexpected trees\[1\]\['c'\]"),
    ],
)
def test_other_structures_raise(other, message):
    with pytest.raises(ValueError, match=message):
        _tree.map(lambda a, b: a, {"a": 1, "b": 2}, other)
    with pytest.raises(ValueError, match="containers of other types"):
        _tree.map(lambda a, b: a, (1, 2), [1, 2])


def test_dot_and_norm_are_those_of_the_flat_vector():
    a, b = ({"x": normal(seed, 3), "y": [normal(seed + 1, 2, 2)]} for seed in (0, 5))
    flat_a, flat_b = (torch.cat([t["x"], t["y"][0].flatten()]) for t in (a, b))
    torch.testing.assert_close(_tree.dot(a, b), flat_a @ flat_b)
    torch.testing.assert_close(_tree.norm(a), flat_a.norm())


@given(st.floats(1e-300, 1e300))
def test_the_norm_neither_overflows_nor_vanishes(size):
    leaf = torch.tensor([3 * size, 4 * size], dtype=torch.float64)
    assert float(_tree.norm([leaf])) == pytest.approx(5 * size, rel=1e-12)


def test_the_norm_of_half_precision_of_zero_and_of_what_is_not_finite():
    assert float(_tree.norm([torch.full((10**4,), 300.0, dtype=torch.float16)])) == pytest.approx(3e4)
    assert grad(lambda x: _tree.norm([x]))(torch.zeros(3)).tolist() == [0, 0, 0]
    assert float(_tree.norm([torch.tensor([1.0, float("inf")])])) == float("inf")
    assert _tree.norm([torch.tensor([1.0, float("nan")])]).isnan()


def test_overlap_looks_at_places_not_at_storages():
    buffer = torch.zeros(4, 3)
    assert _tree.overlap([buffer[:, 0], buffer[:, 1], buffer[:, 2]]) is None
    assert _tree.overlap([buffer[0], buffer[1:]]) is None
    assert _tree.overlap([buffer[0], buffer[:, 1]]) == (0, 1)
    assert _tree.overlap([torch.zeros(1), buffer, torch.ones(1), buffer[2:]]) == (1, 3)
    assert _tree.overlap([buffer[0].expand(2, 3), buffer[1]]) is None


def test_unshare_copies_what_is_held_twice_only():
    a, b = torch.zeros(2), torch.zeros(2)
    first, second, third = _tree.unshare((a, a, b), [b])
    assert first is a
    assert second.data_ptr() != a.data_ptr()
    assert third.data_ptr() != b.data_ptr()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(3.0)[::-1],
        np.arange(3, dtype=">f4"),
        np.broadcast_to(np.arange(3.0), (2, 3)),
        np.array(2.0),
        np.zeros(2, dtype=[("a", "f4"), ("b", "i8")])["b"],
    ],
    ids=["negative strides", "foreign byte order", "read-only", "0-d", "a field"],
)
def test_every_numeric_array_becomes_a_tensor(array):
    tensor = _tree.as_tensors({"x": array})["x"]
    assert tensor.tolist() == array.tolist()
    assert tensor.dtype == getattr(torch, array.dtype.name)


def test_random_trees_have_independent_standard_normal_leaves():
    like = {"a": torch.zeros(4000), "b": (torch.zeros(40, 100, dtype=torch.float64), None)}
    drawn = gd.tree.random_like(gd.random.key(3), like)
    a, b = gd.tree.leaves(drawn)
    assert (a.dtype, b.dtype, b.shape) == (torch.float32, torch.float64, (40, 100))
    for leaf in (a.double(), b.flatten()):
        assert abs(leaf.mean()) < 5 / 4000**0.5
        assert abs(leaf.var() - 1) < 5 * (2 / 4000) ** 0.5
    assert abs(torch.dot(a.double(), b.flatten())) < 5 * 4000**0.5
    again = gd.tree.random_like(gd.random.key(3), like)
    assert all(map(torch.equal, gd.tree.leaves(drawn), gd.tree.leaves(again)))


@pytest.mark.parametrize("leaf", [torch.ones(2, dtype=torch.int64), torch.ones(2) * 1j, 1.0])
def test_random_trees_refuse_leaves_that_are_not_real_floats(leaf):
    with pytest.raises(TypeError, match=r"tree\['n'\] is .*, not a float tensor; leave it out"):
        gd.tree.random_like(gd.random.key(0), {"n": leaf})


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_masked_decay_of_matrices_is_adamw_with_two_groups(backend):
    with torch.random.fork_rng():
        net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)).double()
    net.load_state_dict({name: normal(i, *p.shape) for i, (name, p) in enumerate(net.named_parameters())})
    x, y = normal(8, 6, 3), normal(9, 6, 1)
    apply, params, _ = gd.modules.functional(net)
    step = gd.make_step(
        lambda params, batch: (apply(params, batch[0]) - batch[1]).square().mean(),
        gd.chain(gd.adam(), gd.masked(gd.weight_decay(0.3), gd.tree.matrices)),
    )
    final = gd.train(step, step.init(params), (x, y), gd.full_batch(6, 10), 0.05, backend=backend)[0].params
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(final[name], p.detach(), rtol=1e-10, atol=1e-12)
