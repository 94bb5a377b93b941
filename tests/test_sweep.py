"""Sweeps: a row is the single run of its point, whatever runs beside it, and knows its place."""

import csv
import math
import sys
from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.func import grad, jvp, vmap

import gdfunc as gd
from gdfunc import _tree
from gdfunc._sweep._memory import Memory

from .assertions import assert_derivatives, assert_refused
from .references import COMPILED, few, fingerprint, linear_data, linear_loss, normal, storages

DATA = linear_data(0, 12, 3)
START = {"w": torch.zeros(3, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
KEYS = gd.random.split(gd.random.key(7), 8)
STEP = gd.make_step(linear_loss)


def run(lr=0.1, key=KEYS[0], params=START, batch_size=4, epochs=2, **kwargs):
    index = gd.epoch_batches(key, n=12, batch_size=batch_size, epochs=epochs)
    return gd.train(STEP, params, DATA, index, lr, **kwargs)


def last_loss(**point):
    return linear_loss(run(**point)[0], DATA)


def rows(tree, i):
    return _tree.map(lambda leaf: leaf[i], tree)


def close(a, b, tolerance=1e-12):
    pairs = zip(_tree.leaves(a), _tree.leaves(b), strict=True)
    return all(
        x.shape == y.shape and torch.allclose(x, y, tolerance, tolerance, equal_nan=True) for x, y in pairs
    )


def same(a, b):
    pairs = zip(_tree.leaves(a), _tree.leaves(b), strict=True)
    return all(x.shape == y.shape and x.numpy().tobytes() == y.numpy().tobytes() for x, y in pairs)


# What a grid is.


def test_a_product_goes_through_the_last_axis_fastest():
    grid = gd.grid(batch_size=[2, 4], lr=torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
    assert (len(grid), grid.shape) == (6, (2, 3))
    points = [(point["batch_size"], round(float(point["lr"]), 3)) for point in grid]
    assert points == [(2, 0.1), (2, 0.2), (2, 0.3), (4, 0.1), (4, 0.2), (4, 0.3)]
    assert grid[-1]["lr"].dtype == torch.float64
    assert list(gd.grid(lr=[0.1], batch_size=[2])[0]) == ["lr", "batch_size"]


def test_zipped_axes_go_together():
    grid = gd.grid(zipped=True, lr=[0.1, 0.2, 0.3], batch_size=[2, 4, 2])
    assert (len(grid), grid.shape) == (3, (3,))
    assert [point["batch_size"] for point in grid] == [2, 4, 2]
    assert repr(grid) == "Grid(lr [3] = batch_size [3])"


def stack_of_params():
    return [{"w": normal(i, 3), "b": normal(i + 9, 1)[0]} for i in range(2)]


VMAPPED = {
    "floats": ([0.1, 0.2], torch.tensor(0.1)),
    "floats and ints": ([1, 0.5], torch.tensor(1.0)),
    "NumPy floats": ([np.float64(0.1), np.float32(0.2)], torch.tensor(0.1)),
    "keys": (KEYS, KEYS[0]),
    "list of keys": (list(KEYS), KEYS[0]),
    "ints in a tensor": (torch.tensor([3, 4]), torch.tensor(3)),
    "array": (np.array([0.1, 0.2]), torch.tensor(0.1, dtype=torch.float64)),
    "tree": (_tree.map(lambda *x: torch.stack(x), *stack_of_params()), stack_of_params()[0]),
    "list of trees": (stack_of_params(), stack_of_params()[0]),
    "betas": ([(0.9, 0.99), (0.5, 0.7)], (torch.tensor(0.9), torch.tensor(0.99))),
    "0-d tensors": ([torch.tensor(1.5), torch.tensor(2.5)], torch.tensor(1.5)),
}
LOOPED = {
    "ints": [8, 16],
    "range": range(2, 5),
    "strings": ["adam", "momentum"],
    "bools": [True, False],
    "functions": [gd.adam, gd.momentum],
    "transformations": [gd.adam(), gd.momentum(0.9)],
    "some none": [None, 0.5],
    "widths": [(8, 8), (16,)],
    "ints in tuples": ((8, 8), (16, 16)),
    "shapes that differ": [torch.zeros(2), torch.zeros(3)],
    "structures that differ": [{"w": torch.zeros(2)}, {"v": torch.zeros(2)}],
    "words in an array": np.array(["a", "b"]),
}


@pytest.mark.parametrize("name", VMAPPED)
def test_data_are_vmapped(name):
    values, first = VMAPPED[name]
    grid = gd.grid(axis=values)
    assert grid.axes["axis"].vmapped
    assert same(grid[0]["axis"], first)
    assert {leaf.dtype for leaf in _tree.leaves(grid[0])} == {leaf.dtype for leaf in _tree.leaves(first)}
    calls = []
    gd.sweep(lambda axis: calls.append(1) or _tree.leaves(axis)[0].sum(), grid)
    assert len(calls) == 1


@pytest.mark.parametrize("name", LOOPED)
def test_what_shapes_the_program_is_looped_over(name):
    grid = gd.grid(lr=[0.1, 0.2], axis=LOOPED[name])
    assert not grid.axes["axis"].vmapped
    seen = []
    gd.sweep(lambda lr, axis: seen.append(axis) or lr, grid)
    assert len(seen) == len(LOOPED[name])
    if not isinstance(LOOPED[name], np.ndarray):
        assert all(got is value for got, value in zip(seen, LOOPED[name], strict=True))


def test_equal_values_form_one_group_but_true_is_not_one():
    calls = []
    grid = gd.grid(zipped=True, flag=[1, True, 1, True], lr=[0.1, 0.2, 0.3, 0.4])
    result = gd.sweep(lambda flag, lr: calls.append(flag) or lr * (1 + (flag is True)), grid)
    assert [type(flag) for flag in calls] == [int, bool]
    assert torch.allclose(result.outputs, torch.tensor([0.1, 0.4, 0.3, 0.8]))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"lr": 0.1}, r"TypeError: axis lr is 0\.1.*lr=\[…\].*partial"),
        ({"method": "adam"}, "TypeError: axis method is 'adam'"),
        ({"lr": torch.tensor(0.1)}, "TypeError: lr is a single value"),
        ({"t": gd.adam()}, r"TypeError: axis t\.init is function.*list"),
        ({"t": {"a": gd.adam}}, r"TypeError: axis t\['a'\] is function"),
        ({}, "at least one axis"),
        ({"lr": []}, "axis lr is empty"),
        ({"lr": torch.zeros(0)}, "axis lr is empty"),
        ({"params": {}}, "axis params is empty"),
        ({"p": {"w": torch.zeros(2, 3), "b": torch.zeros(4)}}, r"p\['w'\] has 2 values, p\['b'\] has 4"),
        ({"zipped": True, "a": [1, 2], "b": [1, 2, 3]}, "a has 2, b has 3"),
        ({"momentum": [0.1, math.nan]}, r"momentum\[1\] must not be NaN; got nan"),
        ({"lr": [0.1, math.nan]}, r"lr\[1\] must be finite and >= 0; got nan"),
        ({"lr": torch.tensor([0.1, -0.5])}, r"lr\[1\].*got -0\.5"),
        ({"lr": np.array([np.inf, 1])}, r"lr\[0\].*got inf"),
        ({"params": {"w": torch.tensor([[0.0], [math.nan]])}}, r"params\['w'\]\[1, 0\] must not be NaN"),
    ],
)
def test_bad_axes_are_refused_at_the_door(axes, message):
    assert_refused(lambda: gd.grid(**axes), message)


def test_an_infinite_clip_is_a_value():
    assert gd.grid(max_norm=[1.0, math.inf])[1]["max_norm"] == math.inf


# Row i is the single run i.


@pytest.mark.long
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, "auto"])
@settings(max_examples=few.max_examples // 2)
@given(
    lrs=st.lists(st.floats(0.001, 0.3), min_size=1, max_size=4),
    seeds=st.integers(1, 4),
    starts=st.integers(1, 3),
    sizes=st.lists(st.sampled_from([1, 3, 4]), min_size=1, max_size=2, unique=True),
)
def test_row_i_is_the_single_run_i(chunk_size, lrs, seeds, starts, sizes):
    """Also with as many members as parameters have entries (3), where torch once mixed up the axes."""
    params = {"w": normal(1, starts, 3), "b": normal(2, starts)}
    grid = gd.grid(lr=lrs, params=params, batch_size=sizes, key=KEYS[:seeds])
    small = partial(run, epochs=1, record=("loss", "grad_norm"))
    result = gd.sweep(small, grid, chunk_size=chunk_size)
    lengths = result.lengths["1.loss"].tolist()
    for i, point in enumerate(grid):
        single, row = small(**point), rows(result.outputs, i)
        assert lengths[i] == len(single[1].loss) == 12 // point["batch_size"]
        kept = (row[0], _tree.map(lambda leaf: leaf[: lengths[i]], row[1]))  # noqa: B023
        assert same(kept, single) if chunk_size == 1 else close(kept, single)
        assert row[1].loss[lengths[i] :].isnan().all()
        assert (row[1].step[lengths[i] :] == -1).all()


def test_a_diverged_member_is_counted_and_disturbs_none():
    lrs = torch.tensor([0.1, 1e200, 0.05, 0.02], dtype=torch.float64)
    result = gd.sweep(run, gd.grid(lr=lrs))
    assert result.diverged.tolist() == [False, True, False, False]
    assert not rows(result.outputs, 1)[0]["w"].isfinite().all()
    tame = gd.sweep(run, gd.grid(lr=lrs.clamp(max=0.2)))
    assert not tame.diverged.any()
    kept = [0, 2, 3]
    assert same(rows(result.outputs, kept), rows(tame.outputs, kept))


@pytest.mark.long
@pytest.mark.parametrize("every", [1, 3])
def test_a_member_that_has_ended_is_what_it_was_alone(every):
    stopping = partial(run, epochs=10, every=every, stop=lambda carry, loss: loss < 0.05)
    lrs = torch.tensor([0.3, 0.1, 0.02, 1e160], dtype=torch.float64)
    grid = gd.grid(lr=lrs, key=KEYS[:2])
    result = gd.sweep(stopping, grid)
    _, kept = result.outputs
    assert len(set(kept.steps.tolist())) > 3
    assert result.diverged.tolist() == [False] * 6 + [True] * 2
    for i, point in enumerate(grid):
        final, single = stopping(**point)
        length = len(single.step)
        assert int(result.lengths["1.loss"][i]) == length == -(-int(single.steps) // every)
        assert close(rows(result.outputs[0], i), final)
        assert close(kept.loss[i, :length], single.loss)
        assert kept.loss[i, length:].isnan().all()
        assert kept.step[i].tolist() == single.step.tolist() + [-1] * (kept.step.shape[1] - length)
    for chunk_size in (1, 3):
        parts = gd.sweep(stopping, grid, chunk_size=chunk_size)
        assert close(parts.outputs, result.outputs, 1e-9)
        assert same(parts.diverged, result.diverged)


# What comes out.


def test_types_of_the_tree_are_kept():
    def everything(lr):
        final, trajectory = run(lr)
        state = gd.TrainState(final, {"none": None, "count": 3, "share": 0.5, "yes": True})
        return state, [trajectory], np.float64(2.5)

    state, (trajectory,), number = gd.sweep(everything, gd.grid(lr=[0.1, 0.2])).outputs
    assert isinstance(state, gd.TrainState)
    assert isinstance(trajectory, gd.Trajectory)
    assert state.opt_state["none"] is None
    kept = [state.opt_state[name].tolist() for name in ("count", "share", "yes")]
    assert kept == [[3, 3], [0.5, 0.5], [True, True]]
    assert number.tolist() == [2.5, 2.5]
    assert trajectory.step.shape == trajectory.loss.shape == (2, 6)


def test_nothing_is_written_to_and_nothing_shared():
    closed_over, lrs = normal(0, 3), torch.tensor([0.1])
    before = fingerprint([closed_over, lrs, KEYS])
    grid = gd.grid(lr=lrs, key=KEYS[:1])
    for chunk_size in (None, 1):
        result = gd.sweep(lambda lr, key: (lr, lr, key, closed_over), grid, chunk_size=chunk_size)
        held = [lrs, KEYS, closed_over, grid.axes["lr"].values, grid.axes["key"].values]
        places = storages([*_tree.leaves(result.outputs), *held])
        assert len(set(places)) == len(places)
    assert fingerprint([closed_over, lrs, KEYS]) == before
    lrs += 1
    assert grid[0]["lr"] == torch.tensor(0.1)


def test_padding_says_how_long_a_row_is():
    def curves(size, lr):
        x = torch.arange(size)
        return {"curve": lr * x, "ints": x, "bytes": x.to(torch.uint8), "bools": x >= 0, "one": lr}

    result = gd.sweep(curves, gd.grid(size=[3, 1], lr=[0.5, 1.0]))
    out = result.outputs
    assert out["curve"][1:3].nan_to_num(nan=-9).tolist() == [[0, 1, 2], [0, -9, -9]]
    assert out["ints"][2].tolist() == [0, -1, -1]
    assert out["bytes"][2].tolist() == [0, 255, 255]
    assert out["bools"][2].tolist() == [True, False, False]
    assert {name: length.tolist() for name, length in result.lengths.items()} == {
        name: [3, 3, 1, 1] for name in ("curve", "ints", "bytes", "bools")
    }
    assert not result.diverged.any()
    assert result.select(size=1).outputs["curve"].tolist() == [[0.0], [0.0]]
    assert result.select(size=3).outputs["curve"].shape == (2, 3)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda width, lr: {"w": lr * torch.ones(4, width)},
            r"result\['w'\] has shape \(4, 2\) at width=2.*\(4, 3\) at width=3",
        ),
        (lambda width, lr: lr if width == 2 else lr[None], r"shape \(\) at width=2.*\(1,\) at width=3"),
        (lambda width, lr: {"ab"[width - 2]: lr}, r"width=3.*missing.*\['a'\].*unexpected.*\['b'\]"),
        (lambda width, lr: {"loss": "low"}, r"TypeError: result\['loss'\] is str"),
        (lambda width, lr: None, "TypeError: run returned no tensor"),
    ],
)
def test_results_that_do_not_stack_are_refused(run, message):
    for chunk_size in (None, 1):
        assert_refused(
            lambda c=chunk_size: gd.sweep(run, gd.grid(width=[2, 3], lr=[0.1, 0.2]), chunk_size=c), message
        )


# Errors name the point.


def notes(error):
    return " ".join(error.value.__notes__)


def test_an_error_names_the_group_or_the_point():
    grid = gd.grid(batch_size=[4, 5], lr=[0.1, 0.2], key=KEYS[:3])

    def fragile(batch_size, lr, key):
        if batch_size == 5:
            raise ArithmeticError("five")
        return lr

    def fragile_at_one(batch_size, lr, key):
        if batch_size == 5 and lr == 0.2 and torch.equal(key, KEYS[1]):
            raise ArithmeticError("there")
        return lr

    with pytest.raises(ArithmeticError) as error:
        gd.sweep(fragile, grid)
    assert "batch_size=5, 6 members over lr, key" in notes(error)
    assert "chunk_size=1" in notes(error)
    with pytest.raises(ArithmeticError) as error:
        gd.sweep(fragile_at_one, grid, chunk_size=1)
    assert "batch_size=5, lr=0.2, key=1" in notes(error)


def test_a_batch_size_in_a_tensor_is_explained():
    with pytest.raises(ValueError, match="batch_size must be an int") as error:
        gd.sweep(last_loss, gd.grid(batch_size=torch.tensor([2, 4])))
    assert "batch_size: vmapped, all members at once" in notes(error)


def test_torchs_own_random_numbers_are_refused_or_chosen():
    def noisy(lr):
        return lr * torch.rand(3)

    grid = gd.grid(lr=[1.0, 1.0])
    with pytest.raises(RuntimeError, match="random") as error:
        gd.sweep(noisy, grid)
    assert "randomness='different'" in notes(error)
    with torch.random.fork_rng():
        different = gd.sweep(noisy, grid, randomness="different").outputs
        alike = gd.sweep(noisy, grid, randomness="same").outputs
    assert not torch.equal(different[0], different[1])
    assert torch.equal(alike[0], alike[1])


def test_bad_arguments_are_refused():
    grid = gd.grid(lr=[0.1])
    assert_refused(lambda: gd.sweep(last_loss, {"lr": [0.1]}), r"TypeError: grid is dict.*gd\.grid")
    assert_refused(lambda: gd.sweep(last_loss, grid, randomness="any"), "randomness must be")
    for size in (0, -1, 1.5, True, "Auto"):
        assert_refused(
            lambda c=size: gd.sweep(last_loss, grid, chunk_size=c), "chunk_size must be an int >= 1"
        )


def test_an_interrupt_names_the_place_too():
    def interrupted(carry, loss):
        raise KeyboardInterrupt

    with pytest.raises(gd.SweepInterrupted, match="after 0 of 2 runs") as error:
        gd.sweep(partial(run, stop=interrupted), gd.grid(batch_size=[4], lr=[0.1, 0.2]))
    assert "batch_size=4, 2 members over lr" in notes(error)
    assert error.value.result is None
    assert error.value.members == []


@pytest.mark.long
@pytest.mark.parametrize("chunk_size", [1, 2, 5, None, "auto"])
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_an_interrupted_sweep_goes_on_to_the_same_bits(chunk_size, calls, monkeypatch):
    monkeypatch.setattr("gdfunc._sweep._sweep.AUTO_LIMIT", 30_000)
    grid = gd.grid(lr=[0.1, 0.2, 0.3], batch_size=[4, 3], key=KEYS[:3])
    whole = gd.sweep(run, grid, chunk_size=chunk_size)
    left = [calls]

    def impatient(**point):
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        return run(**point)

    if chunk_size is None and calls == 3:  # more than there are
        gd.sweep(impatient, grid)
        return
    with pytest.raises(gd.SweepInterrupted) as error:
        gd.sweep(impatient, grid, chunk_size=chunk_size)
    stopped = error.value
    if stopped.result is not None:
        assert len(stopped.result.grid) == len(stopped.members) == len(stopped.result.diverged)
        for row, member in enumerate(stopped.members):
            assert stopped.result.grid.labels(row) == grid.labels(member)
    again = []

    def counted(**point):
        again.append(0)
        return run(**point)

    result = gd.sweep(counted, grid, chunk_size=chunk_size, resume=stopped)
    assert same(result.outputs, whole.outputs)
    assert same(result.lengths, whole.lengths)
    assert result.grid is grid
    if chunk_size == 1:
        assert len(again) == len(grid) - calls


def test_a_foreign_interrupt_is_refused():
    grid = gd.grid(batch_size=[3, 4], lr=[0.1])

    def impatient(batch_size, lr):
        if batch_size == 4:
            raise KeyboardInterrupt
        return run(lr, batch_size=batch_size)

    with pytest.raises(gd.SweepInterrupted) as error:
        gd.sweep(impatient, grid)
    with pytest.raises(ValueError, match="another grid, of 2 points"):
        gd.sweep(run, gd.grid(batch_size=[2, 4], lr=[0.1]), resume=error.value)
    with pytest.raises(ValueError, match="another grid, of 2 points"):
        gd.sweep(run, gd.grid(batch_size=[3, 4], lr=[0.1, 0.2]), resume=error.value)
    with pytest.raises(TypeError, match="resume is bool"):
        gd.sweep(run, grid, resume=True)


# Memory and progress.


def width(lr, n=4):
    """Peaks at two tensors [n, 100] of float32, 800 n bytes, and returns 4."""
    a = lr * torch.ones(n, 100)
    return (a + 1).sum()


def test_auto_counts_through_forward_mode():
    """Whose symbolic zeros crash torch when a TorchDispatchMode hands them on."""

    def run(lr):
        f = partial(torch.addcmul, torch.ones(3), torch.ones(3), value=-1)
        return jvp(f, (lr,), (torch.ones_like(lr),))[1].sum()

    assert gd.sweep(run, gd.grid(lr=[0.1, 0.2]), chunk_size="auto").outputs.tolist() == [-3, -3]


def test_auto_keeps_to_the_limit(monkeypatch):
    sizes = []

    def run(lr, n):
        sizes.append((n, torch._C._functorch.get_unwrapped(lr).shape[0]))
        return width(lr, n)

    grid = gd.grid(n=[4, 16], lr=torch.linspace(0, 1, 30))
    whole = gd.sweep(run, grid).outputs
    assert sizes == [(4, 30), (16, 30)]
    for limit in (100_000, 30_000):
        monkeypatch.setattr("gdfunc._sweep._sweep.AUTO_LIMIT", limit)
        sizes.clear()
        result = gd.sweep(run, grid, chunk_size="auto")
        assert torch.allclose(result.outputs, whole)
        assert (sizes[0], sum(size for _, size in sizes)) == ((4, 1), 60)
        for n in (4, 16):
            chunk = max(size for m, size in sizes if m == n)
            with Memory() as memory:
                vmap(partial(width, n=n))(torch.linspace(0, 1, chunk))
            # A chunk keeps to the limit, and one of half as many again would not.
            assert memory.peak <= limit < memory.peak * 1.5 or chunk == 29
    # A member holds 3200 bytes and a few scalars; the first was run to find out.
    assert [size for m, size in sizes if m == 4] == [1, 9, 9, 9, 2]


def test_memory_counts_what_is_alive():
    with Memory() as memory:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1
        assert memory.now == 8000
        del a
        c = b.sum()
    assert (memory.peak, memory.now) == (8000, 4004)
    del b, c
    assert memory.now == 0
    outside = torch.ones(1000)
    with Memory() as memory:
        outside.view(10, 100).t()
    assert memory.peak == 0


def test_progress_counts_members():
    calls = []
    grid = gd.grid(size=[1, 2], lr=[0.1, 0.2, 0.3])
    gd.sweep(
        lambda size, lr: lr, grid, chunk_size=2, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(2, 6), (3, 6), (5, 6), (6, 6)]


def test_progress_goes_to_stderr(capsys):
    gd.sweep(last_loss, gd.grid(lr=[0.1, 0.2, 0.3]), progress=True)
    out, err = capsys.readouterr()
    assert not out
    assert "3/3" in err


# Derivatives.


@pytest.mark.long
def test_derivatives_go_through_members_padding_and_autograd():
    def losses(scale, run=last_loss, **options):
        grid = gd.grid(batch_size=[4, 6], lr=scale * torch.tensor([0.05, 0.1], dtype=torch.float64))
        return gd.sweep(run, grid, **options).outputs

    def padded(scale, **options):
        return losses(scale, run, **options)[1].loss.nansum()

    one = torch.tensor(1.0, dtype=torch.float64)
    for function in (
        lambda x: losses(x) @ torch.arange(4.0).double(),
        padded,
        partial(padded, chunk_size=1),
    ):
        assert abs(grad(function)(one)) > 1e-3
        assert_derivatives(function, one, rtol=1e-7)
    assert torch.allclose(vmap(losses)(torch.stack([one, one / 2]))[1], losses(one / 2), rtol=1e-12)
    leaf = one.clone().requires_grad_()
    (slope,) = torch.autograd.grad(padded(leaf), leaf)
    assert torch.allclose(slope, grad(padded)(one), rtol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("backend", COMPILED)
def test_a_compiled_loop_is_swept(backend):
    def descend(lr, backend=backend):
        step = gd.make_step(lambda w, batch: (w * w).sum())
        return gd.train(step, START["w"] + 1, None, gd.full_batch(1, 4), lr, backend=backend)

    grid = gd.grid(lr=torch.tensor([0.05, 0.1, 1e200], dtype=torch.float64))
    compiled = gd.sweep(descend, grid)
    assert close(compiled.outputs, gd.sweep(partial(descend, backend="eager"), grid).outputs)
    assert compiled.diverged.tolist() == [False, False, True]


# The result knows its axes.


def methods_swept():
    def score(method, lr, key, betas):
        return {"score": lr * betas[0] + key[0], "name": len(method()), "curve": lr * torch.ones(2)}

    grid = gd.grid(
        method=[gd.adam, gd.scale],
        lr=torch.logspace(-3, 0, 4),
        key=torch.arange(4).reshape(2, 2),
        betas=[(0.9, 0.99), (0.5, 0.7)],
    )
    return gd.sweep(lambda **p: score(**{**p, "method": lambda: p["method"].__name__}), grid)


def test_axes_reshape_and_select():
    result = methods_swept()
    assert result.axes["method"] == [gd.adam, gd.scale]
    assert torch.equal(result.axes["lr"], torch.logspace(-3, 0, 4))
    shaped = result.reshape()
    assert shaped["curve"].shape == (2, 4, 2, 2, 2)
    some = result.select(lr=0.01, method="scale")
    assert some.grid.shape == (2, 2)
    assert list(some.axes) == ["key", "betas"]
    assert torch.equal(some.reshape()["score"], shaped["score"][1, 1])
    assert torch.equal(result.select(key=1, lr=1).reshape()["score"], shaped["score"][:, 3, 1])
    by_itself = result.select(method=gd.adam, betas=(0.5, 0.7))
    assert torch.equal(by_itself.reshape()["score"], shaped["score"][0, :, :, 1])
    one = some.select(key=0, betas=(0.9, 0.99))
    assert (len(one.grid), one.grid.shape) == (1, ())
    assert one.reshape()["score"] == shaped["score"][1, 1, 0, 0]
    assert repr(some.select(key=0)).startswith(
        "SweepResult(betas [2], 0 of 2 diverged, outputs: score float32[2]"
    )
    assert repr(one).startswith("SweepResult(one point, 0 of 1 diverged, ")


def test_select_zipped_keeps_the_axes_in_step():
    grid = gd.grid(zipped=True, size=[1, 2, 1], lr=[0.1, 0.2, 0.3])
    result = gd.sweep(lambda size, lr: lr * size, grid)
    part = result.select(size=1)
    assert part.axes["size"] == [1, 1]
    assert torch.allclose(part.axes["lr"], torch.tensor([0.1, 0.3]))
    assert torch.allclose(part.outputs, torch.tensor([0.1, 0.3]))
    assert part.grid.shape == (2,)
    with pytest.raises(ValueError, match=r"no point of the zipped grid has all of size = 2, lr = 0\.1"):
        result.select(size=2, lr=0.1)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"lr": 0.3}, r"no point has lr = 0\.3; its values are \[0\.1, 0\.1, 0\.2\]"),
        ({"rate": 0.1}, "rate is no axis of the grid; its axes are lr, size"),
        ({"lr": 0.1}, "several positions"),
        ({"lr": KEYS}, "no point has lr = tensor"),
        ({"size": 10_000_002}, "no point has size = 10000002"),
        ({"size": 10_000_000.5}, "no point has size"),
    ],
)
def test_select_names_what_is_not_there(where, message):
    grid = gd.grid(lr=[0.1, 0.1, 0.2], size=[10_000_000, "all", 10_000_001])
    result = gd.sweep(lambda lr, size: lr, grid)
    assert_refused(lambda: result.select(**where), message)
    assert result.select(size=10_000_001).axes["lr"].shape == (3,)


def test_a_float_need_not_be_given_to_the_last_digit():
    lrs = torch.logspace(-3, 0, 7, dtype=torch.float64)
    result = gd.sweep(lambda lr: lr, gd.grid(lr=lrs))
    assert result.select(lr=0.0316227766).outputs == lrs[3]
    with pytest.raises(ValueError, match="no point has lr"):
        result.select(lr=0.0316)


def test_what_has_no_name_is_selected_by_position_or_itself():
    transforms = [gd.adam(), gd.momentum(0.9)]
    grid = gd.grid(transform=transforms, lr=[0.1, 0.2])
    result = gd.sweep(lambda transform, lr: lr * transforms.index(transform), grid)
    for wanted in (transforms[1], 1):
        assert torch.equal(result.select(transform=wanted).outputs, torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match=r"no point has transform = 0\.5"):
        result.select(transform=0.5)
    with pytest.raises(ValueError, match=r"no point has transform = scale\(factor=2.0\)"):
        result.select(transform=gd.scale(2.0))


def test_records_hold_the_points_and_the_scalars():
    records = methods_swept().select(key=1).to_records()
    assert len(records) == 16
    assert records[5] == {
        "method": "adam",
        "lr": pytest.approx(0.1),
        "betas": (0.5, 0.7),
        "score": pytest.approx(0.1 * 0.5 + 2),
        "name": 4,
        "diverged": False,
    }
    assert len(str(records[5]["score"])) < 10  # float32 has no more digits


def test_a_name_that_an_axis_has_goes_under_output():
    grid = gd.grid(zipped=True, lr=[0.1, 0.2], diverged=[1.0, 2.0])
    (first, _) = gd.sweep(lambda lr, diverged: {"lr": 2 * lr}, grid).to_records()
    assert first == {"lr": 0.1, "diverged": 1.0, "output.lr": 0.2, "output.diverged": False}
    assert gd.sweep(lambda lr: lr, gd.grid(lr=[0.1])).to_records() == [
        {"lr": 0.1, "output": 0.1, "diverged": False}
    ]


def test_save_writes_what_can_be_read_back(tmp_path):
    result = gd.sweep(lambda method, lr: run(lr), gd.grid(method=["a, b", "c"], lr=[0.1, 0.3]))
    with pytest.warns(
        UserWarning, match=r"leaves out 0\.w .*, 1\.loss .*: return numbers from run, or keep"
    ):
        result.save(tmp_path / "sweep.csv")
    with open(tmp_path / "sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [list(row) for row in table] == [["method", "lr", "0.b", "diverged"]] * 4
    assert [float(row["0.b"]) for row in table] == result.outputs[0]["b"].tolist()
    assert [(row["method"], row["lr"]) for row in table[1:3]] == [("a, b", "0.3"), ("c", "0.1")]


@pytest.mark.parametrize("name", ["runs.json", "runs", "runs.csv.gz"])
def test_save_refuses_a_suffix_that_it_does_not_write(tmp_path, name):
    result = gd.sweep(lambda lr: lr, gd.grid(lr=[0.1]))
    with pytest.raises(
        ValueError, match=r"save writes CSV, but .* ends in '[.a-z]*': end it in \.csv, or use"
    ):
        result.save(tmp_path / name)
    assert not [*tmp_path.iterdir()]
    result.save(tmp_path / "RUNS.CSV")
    result.save(str(tmp_path / "runs.csv"))
    assert len([*tmp_path.iterdir()]) == 2


def test_a_frame_is_made_of_the_records(monkeypatch):
    result = gd.sweep(lambda lr: lr, gd.grid(lr=[0.1]))

    class Pandas:
        DataFrame = staticmethod(lambda records: ("frame", records))

    monkeypatch.setitem(sys.modules, "pandas", Pandas)
    assert result.to_frame() == ("frame", result.to_records())
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        result.to_frame()


@pytest.mark.long
def test_a_dataset_has_the_axes_as_dimensions_and_the_outputs_as_variables():
    pytest.importorskip("xarray")

    def run(betas, lr, key, size, method):
        draws = gd.random.uniform(key, (3,)) * lr
        return {"loss": draws, "end": (draws[0] * size, betas[0].bfloat16()), "lr": lr / 0.0}

    keys = gd.random.split(gd.random.key(0), 2)
    axes = {"betas": [(0.9, 0.99), (0.8, 0.9)], "lr": [0.1, 0.2, 0.4], "key": keys}
    result = gd.sweep(run, gd.grid(**axes, size=[2, 3], method=["adam", torch.sin]))
    data = result.to_xarray()
    assert dict(data.sizes) == {"betas": 2, "lr": 3, "key": 2, "size": 2, "method": 2, "loss.0": 3}
    assert list(data.data_vars) == ["loss", "end.0", "end.1", "output.lr", "diverged"]
    assert {name: data[name].values.tolist() for name in data.coords} == {
        "betas": ["(0.9, 0.99)", "(0.8, 0.9)"],
        "lr": [0.1, 0.2, 0.4],
        "key": [0, 1],
        "size": [2, 3],
        "method": ["adam", "sin"],
    }
    assert data.attrs == {"grid": repr(result.grid)}
    for i, positions in enumerate(result.grid.positions):
        row = data.isel(dict(zip(axes | {"size": 0, "method": 0}, positions, strict=True)))
        assert row["loss"].values.tolist() == result.outputs["loss"][i].tolist()
        assert float(row["end.0"]) == float(result.outputs["end"][0][i])
        assert float(row["end.1"]) == float(result.outputs["end"][1][i])
        assert np.isinf(row["output.lr"])
        assert row["diverged"]
    assert data["end.0"].dtype == np.float32
    assert float(data["loss"].sel({"lr": 0.2, "method": "sin", "size": 3})[0, 0, 0]) == float(
        result.select(lr=0.2, method="sin", size=3).outputs["loss"][0, 0]
    )


@pytest.mark.parametrize(
    ("grid", "shape"),
    [(gd.grid(zipped=True, lr=[0.1, 0.2], size=[3, 4]), {"point": 2}), (gd.grid(lr=[0.5]), {"lr": 1})],
)
def test_a_dataset_of_a_zipped_grid_or_of_one_point(grid, shape):
    pytest.importorskip("xarray")
    result = gd.sweep(lambda lr, size=2: lr * size, grid)
    data = result.to_xarray()
    assert dict(data.sizes) == shape
    assert data["output"].values.tolist() == result.outputs.tolist()
    assert {name: data[name].values.tolist() for name in data.coords} == {
        name: axis.labels for name, axis in grid.axes.items()
    }
    if not grid.zipped:
        assert float(result.select(lr=0.5).to_xarray()["output"]) == 1.0


def test_a_dataset_needs_xarray(monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ModuleNotFoundError, match=r"^to_xarray needs xarray: pip install xarray$"):
        gd.sweep(lambda lr: lr, gd.grid(lr=[0.1])).to_xarray()


@pytest.mark.long
def test_what_is_evaluated_after_a_member_has_ended_is_padding():
    x = torch.linspace(-1, 1, 40)
    step, plan = gd.make_step(lambda w, b: ((b[0] * w - b[1]) ** 2).mean()), gd.full_batch(40, 60)

    def run(lr):
        stop = gd.stops.any_of(gd.stops.patience("error"), lambda w, loss: loss < 1e-2)
        watched = {"evaluate": {"error": lambda w: (w - 3).abs().mean()}, "evaluate_every": 5, "every": 5}
        start = torch.zeros(12)  # as many as there are records: the best carry is none of them
        return gd.train(step, start, (x[:, None], 3 * x[:, None]), plan, lr, stop=stop, **watched)[1]

    result = gd.sweep(run, gd.grid(lr=[0.1, 0.3, 1.0]))
    for i, lr in enumerate([0.1, 0.3, 1.0]):
        alone = run(torch.tensor(lr))
        for name in ("step", "loss", "evaluated", "error"):
            length = len(getattr(alone, name))
            assert result.lengths[name][i] == length
            row = getattr(result.outputs, name)[i]
            torch.testing.assert_close(row[:length], getattr(alone, name))
            assert (row[length:].isnan() if row.is_floating_point() else row[length:] == -1).all()
        assert torch.equal(result.outputs.steps[i], alone.steps)
        torch.testing.assert_close(result.outputs.best.carry[i], alone.best.carry)
