"""Plans: which samples, when."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

import gdfunc as gd
from gdfunc import _sampling
from gdfunc import testing as gt

from .assertions import assert_refused

KEY, X = gd.random.key(0), torch.arange(4.0)
sizes = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))
epoch_counts = st.integers(0, 5)
seeds = st.integers(0, 2**64 - 1)


@given(seeds, sizes, epoch_counts, st.booleans())
def test_an_epoch_visits_every_sample_at_most_once(seed, size, epochs, shuffle):
    n, batch_size = size
    key = gd.random.key(seed)
    plan = gd.epoch_batches(key, n, batch_size, epochs, shuffle=shuffle)
    per_epoch = n // batch_size
    assert plan.shape == (epochs * per_epoch, batch_size)
    assert plan.dtype == torch.int64
    for epoch in range(epochs):
        visited = plan[epoch * per_epoch : (epoch + 1) * per_epoch].flatten()
        whole = gd.random.permutation(gd.random.fold_in(key, epoch), n) if shuffle else torch.arange(n)
        assert torch.equal(visited, whole[: per_epoch * batch_size])


@given(seeds, sizes, epoch_counts, st.booleans())
def test_carry_draws_every_sample_once_an_epoch(seed, size, epochs, shuffle):
    n, batch_size = size
    plan = gd.epoch_batches(gd.random.key(seed), n, batch_size, epochs, shuffle=shuffle, remainder="carry")
    assert plan.shape == (epochs * n // batch_size, batch_size)
    gt.check_epochs(plan, n, remainder="carry")


@given(seeds, sizes, epoch_counts, epoch_counts, st.sampled_from(["drop", "carry"]))
def test_plans_of_consecutive_epochs_make_the_whole_plan(seed, size, first, more, remainder):
    key = gd.random.key(seed)
    parts = [
        gd.epoch_batches(key, *size, epochs, remainder=remainder)
        for epochs in (range(first), range(first, first + more))
    ]
    whole = gd.epoch_batches(key, *size, first + more, remainder=remainder)
    assert torch.equal(torch.cat(parts), whole)


@given(seeds, sizes, epoch_counts, epoch_counts, st.booleans())
def test_plans_of_consecutive_steps_make_the_whole_plan(seed, size, first, more, replacement):
    key = gd.random.key(seed)
    parts = [
        gd.sample_batches(key, *size, steps, replacement=replacement)
        for steps in (range(first), range(first, first + more))
    ]
    whole = gd.sample_batches(key, *size, first + more, replacement=replacement)
    assert torch.equal(torch.cat(parts), whole)
    assert whole.shape == (first + more, size[1])
    if not replacement:
        assert all(len(row.unique()) == size[1] for row in whole)


def test_replacement_allows_a_sample_twice():
    plan = gd.sample_batches(KEY, 10, 4, 200)
    assert any(len(row.unique()) < 4 for row in plan)


class Count(TorchDispatchMode):
    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("remainder", ["drop", "carry"])
def test_a_plan_of_many_epochs_costs_operations_by_the_part_not_by_the_epoch(remainder):
    counted = []
    for epochs in (2, 20_000):
        with Count() as count:
            plan = gd.epoch_batches(KEY, 50, 20, epochs, remainder=remainder)
        counted.append(count.operations)
        assert torch.equal(plan[:4], gd.epoch_batches(KEY, 50, 20, 2, remainder=remainder)[:4])
    assert counted[1] < 20 * counted[0]  # 16 parts of 1,310 epochs


@pytest.mark.parametrize("n", [2**13 - 1, 2**15, 2**15 + 1, 2**16 + 1])
def test_a_plan_in_parts_is_the_plan(n):
    plan = gd.sample_batches(KEY, n, 2, 10, replacement=False)
    epochs = gd.epoch_batches(KEY, n, n, 10)
    drawn = gd.sample_batches(KEY, n, n, 10)
    for t in range(10):
        key = gd.random.fold_in(KEY, t)
        order = gd.random.permutation(key, n)
        assert torch.equal(plan[t], order[:2])
        assert torch.equal(epochs[t], order)
        assert torch.equal(drawn[t], gd.random.randint(key, (n,), 0, n))


def test_error_allows_no_remainder():
    assert gd.epoch_batches(KEY, 6, 2, 1, remainder="error").shape == (3, 2)


def test_plans_map_over_keys():
    keys = gd.random.split(KEY, 3)
    for plan in (
        lambda key: gd.epoch_batches(key, 7, 3, 2, remainder="carry"),
        lambda key: gd.sample_batches(key, 7, 3, 2),
        lambda key: gd.sample_batches(key, 7, 3, 2, replacement=False),
    ):
        assert torch.equal(vmap(plan)(keys), torch.stack([plan(key) for key in keys]))


def test_full_batch_takes_one_row_of_memory():
    plan = gd.full_batch(5, 1000)
    assert torch.equal(plan, torch.arange(5).repeat(1000, 1))
    assert plan.untyped_storage().nbytes() == 5 * 8


SIZE = r"batch_size must be an int in \[1, 10\]; got"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gd.epoch_batches(KEY, 0, 1, 1), "n must be an int >= 1; got 0"),
        (lambda: gd.sample_batches(KEY, 0, 1, 1), "n must be an int in .1, 4294967296.; got 0"),
        (lambda: gd.full_batch(0, 1), "n must be an int >= 1; got 0"),
        (lambda: gd.full_batch(3, -1), "steps must be an int >= 0; got -1"),
        (lambda: gd.full_batch(3, True), "steps must be an int >= 0; got True"),
        (lambda: gd.epoch_batches(KEY, 3, 1, -1), "epochs must be an int >= 0; got -1"),
        (lambda: gd.epoch_batches(KEY, 3, 1, range(0, 4, 2)), "epochs must be an int >= 0 or range"),
        (lambda: gd.epoch_batches(KEY, 3, 1, range(-1, 2)), "epochs must be an int >= 0 or range"),
        (lambda: gd.sample_batches(KEY, 3, 1, 2.5), "steps must be an int >= 0; got 2.5"),
        (
            lambda: gd.epoch_batches(KEY, 3, 1, 1, remainder="keep"),
            "'drop' or 'carry' or 'error'; got 'keep'",
        ),
        (
            lambda: gd.epoch_batches(KEY, 6, 4, 1, remainder="error"),
            "does not divide n = 6: 2 samples are left",
        ),
        *(
            (lambda plan=plan, size=size: plan(KEY, 10, size, 1), SIZE)
            for plan in (gd.epoch_batches, gd.sample_batches)
            for size in (0, -1, 11, 2.0, True, "8", None, np.float64(2))
        ),
        *(
            (lambda index=index: gd.take(X, index), "TypeError: index must be an int64 tensor; got")
            for index in (X > 0, X, [0, 1], torch.tensor([1], dtype=torch.uint8))
        ),
        (lambda: gd.take(X, torch.tensor([4])), "IndexError: 4"),
    ],
)
def test_plans_and_indices_out_of_range_are_refused(call, message):
    assert_refused(call, message)


def test_take_indexes_every_leaf():
    data = {"x": np.arange(12.0).reshape(4, 3), "label": (torch.tensor([3, 2, 1, 0]), None)}
    batch = gd.take(data, torch.tensor([2, 0]))
    assert batch["x"].tolist() == [[6.0, 7.0, 8.0], [0.0, 1.0, 2.0]]
    assert torch.equal(batch["label"][0], torch.tensor([1, 3]))
    assert [leaf.dtype for leaf in gd._tree.leaves(batch)] == [torch.float64, torch.int64]
    assert batch["label"][1] is None
    whole = torch.arange(4.0)
    assert gd.take(whole, torch.arange(4)).data_ptr() != whole.data_ptr()
    assert gd.take(whole, torch.tensor(2)).untyped_storage().nbytes() == 4
    assert gd.take(None, torch.arange(4)) is None


def test_take_leaves_a_read_only_array_alone():
    array = np.arange(4.0)
    array.flags.writeable = False
    assert gd.take(array, torch.tensor([3])).tolist() == [3.0]


PLANS = {
    "epochs": lambda key: gd.epoch_batches(key, n=7, batch_size=3, epochs=range(2, 5), remainder="carry"),
    "samples": lambda key: gd.sample_batches(key, n=7, batch_size=3, steps=4),
    "samples without replacement": lambda key: gd.sample_batches(key, 7, 3, 4, replacement=False),
    "numbers of a large epoch": lambda key: gd.epoch_batches(key, 40_000, 20_000, 2),
}


@pytest.mark.long
@pytest.mark.parametrize("name", PLANS)
def test_members_with_equal_and_different_keys_have_the_plans_of_their_keys(name, monkeypatch):
    plan, vmap = PLANS[name], torch.func.vmap
    keys = gd.random.split(gd.random.key(3), 3)[torch.tensor([1, 0, 1, 2, 0, 1])]
    alone = torch.stack([plan(key) for key in keys])
    assert torch.equal(vmap(plan)(keys), alone)
    assert torch.equal(vmap(plan, in_dims=1)(keys.mT), alone)
    nested, each = keys.reshape(2, 3, 2), alone.reshape(2, 3, *alone.shape[1:])
    assert torch.equal(vmap(vmap(plan))(nested), each)
    assert torch.equal(vmap(vmap(plan), in_dims=1, out_dims=1)(nested), each)
    assert torch.equal(vmap(lambda _: vmap(plan)(keys))(torch.ones(2))[1], alone)
    assert torch.equal(vmap(lambda key: vmap(lambda _: plan(key))(torch.ones(2)))(keys)[:, 1], alone)
    assert torch.equal(vmap(torch.func.functionalize(plan))(keys), alone)
    assert torch.equal(torch.func.functionalize(vmap(plan))(keys), alone)
    moved = vmap(lambda key, w: torch.func.grad(lambda w: w * plan(key).sum())(w))(keys, torch.ones(6))
    assert torch.equal(moved, alone.flatten(1).sum(1).float())
    pushed = lambda key: torch.func.jvp(lambda w: w * plan(key), (torch.ones(()),), (torch.ones(()),))[1]  # noqa: E731
    assert torch.equal(vmap(pushed)(keys), alone.float())


def test_the_members_of_a_vmap_draw_once_for_each_different_key(monkeypatch):
    drawn, orders = [], _sampling._orders
    monkeypatch.setattr(_sampling, "_orders", lambda key, n: drawn.append(key.shape) or orders(key, n))
    keys = gd.random.split(gd.random.key(3), 2).repeat(20, 1)
    torch.func.vmap(lambda key: gd.epoch_batches(key, n=40_000, batch_size=3, epochs=1))(keys)
    assert sum(shape[:-1].numel() for shape in drawn) == 2
