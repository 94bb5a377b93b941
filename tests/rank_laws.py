"""Laws of data-parallel descent, each a function that every rank of a run calls."""

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import grad, jvp, vmap

import gdfunc as gd
from gdfunc import _tree
from gdfunc._scan.backends.native import _build
from gdfunc.distributed import RankError, average, data_parallel, rank, replicated, world_size
from gdfunc.distributed._gather import agree, all_gather_tree

from .references import normal


def prepare(laws: Sequence[str]) -> None:
    """Compile quickly, except for what is timed."""
    if not laws[0].startswith("times_"):
        _build._FLAGS[0] = "-O0"


N, BATCH, STEPS = 41, 11, 20


def loss_fn(params, batch):
    x, y = batch
    return (torch.tanh(x @ params["w"]) + params["b"] - y).square().mean()


def problem():
    """Parameters, data and a plan, none of whose sizes is a multiple of the number of ranks."""
    params, data = {"w": normal(2, 3), "b": normal(3)}, (normal(0, N, 3), normal(1, N))
    return params, data, gd.epoch_batches(gd.random.key(1), N, BATCH, 7)[:STEPS]


def run(step, *state, **how):
    params, data, index = problem()
    how = {"lr": 0.1} | how
    return gd.train(step, step.init(*(state or (params,))), data, index, **how)


def assert_close(got, wanted, tolerance=1e-10):
    for a, b in zip(_tree.leaves(got), _tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        scale = max(1.0, float(b.abs().max())) if b.is_floating_point() else 0.0
        assert float((a - b).abs().max()) <= tolerance * scale


def assert_same_everywhere(tree):
    for other in all_gather_tree(tree):
        assert all(a.equal(b) for a, b in zip(_tree.leaves(tree), _tree.leaves(other), strict=True))


def parameters_are_those_of_one_process(_: Path) -> None:
    makers = [
        gd.make_step,
        lambda loss: gd.make_step(loss, gd.adam()),
        lambda loss: gd.make_step(loss, gd.chain(gd.clip_by_global_norm(0.1), gd.momentum(0.9))),
        lambda loss: gd.methods.sam(loss, rho=0.1),
        lambda loss: gd.methods.line_search(loss),
        lambda loss: gd.methods.ema(gd.make_step(loss), 0.9),
    ]
    for make in makers:
        alone, trajectory = run(make(loss_fn), backend="eager", record=("loss", "grad_norm"))
        shared, of_shared = run(make(data_parallel(loss_fn)), record=("loss", "grad_norm"))
        assert float((trajectory.loss[0] - trajectory.loss[-1]).abs()) > 1e-3
        assert_close((shared, of_shared), (alone, trajectory))
        assert_same_everywhere((shared, of_shared))


def a_rank_without_samples_adds_nothing(_: Path) -> None:
    params, data, index = problem()
    for size in (1, 2):
        shared, _ = gd.train(gd.make_step(data_parallel(loss_fn)), params, data, index[:, :size], 0.1)
        alone, _ = gd.train(gd.make_step(loss_fn), params, data, index[:, :size], 0.1)
        assert_close(shared, alone)
        assert_same_everywhere(shared)


def a_loss_without_data_is_shared(_: Path) -> None:
    params = {"w": normal(0, 3)}
    grads, loss = gd.batch_grad(data_parallel(lambda params, batch: params["w"].square().sum()))(
        params, None
    )
    assert_close((grads, loss), ({"w": 2 * params["w"]}, params["w"].square().sum()))


def leaves_of_narrow_dtypes_are_shared(_: Path) -> None:
    params = {"w": normal(2, 3).float(), "b": normal(3).bfloat16()}
    data = normal(0, N, 3).float(), normal(1, N).float()
    grads, loss = gd.batch_grad(data_parallel(loss_fn))(params, data)
    wanted, of_loss = gd.batch_grad(loss_fn)(params, data)
    assert_close((grads, loss), (wanted, of_loss), 1e-2)
    assert _tree.map(lambda leaf: leaf.dtype, grads) == _tree.map(lambda leaf: leaf.dtype, params)
    assert_same_everywhere((grads, loss))


def final_loss(loss):
    """The loss after a short run, as a function of lr, the first parameters and the data."""
    step, index = gd.make_step(loss, gd.momentum(0.5)), problem()[2][:3]

    def f(lr, init, data):
        (final, _), _ = gd.train(step, step.init(init), data, index, lr, backend="eager")
        return final["w"].square().sum() + final["b"] ** 3 + loss_fn(final, data)

    return f


def moved(f):
    return lambda *given: jvp(f, given, _tree.map(torch.ones_like, given))


LRS = torch.tensor([0.05, 0.1, 0.2], dtype=torch.float64)
DERIVATIVES = {
    "grad": lambda f: grad(f, (0, 1, 2)),
    "jvp": moved,
    "grad of grad": lambda f: grad(lambda *given: grad(f)(*given), (0, 1, 2)),
    "jvp of grad": lambda f: moved(grad(f, (0, 1))),
    "grad of jvp": lambda f: grad(lambda *given: moved(f)(*given)[1]),
    "grad of the direction": lambda f: (
        lambda *given: grad(lambda *moves: jvp(f, given, moves)[1], (0, 1))(*given)
    ),
    "members": lambda f: lambda lr, *given: vmap(lambda lr: f(lr, *given))(lr * LRS),
    "members of grad": lambda f: lambda lr, *given: vmap(grad(lambda lr: f(lr, *given)))(lr * LRS),
    "grad of members": lambda f: grad(
        lambda lr, *given: vmap(lambda r: f(r, *given))(lr * LRS).sum(), (0, 1)
    ),
}


def derivatives_of_runs_are_those_of_one_process(_: Path) -> None:
    params, data, _ = problem()
    for derivative in DERIVATIVES.values():
        given = torch.tensor(0.1, dtype=torch.float64), params, data
        shared = derivative(final_loss(data_parallel(loss_fn)))(*given)
        assert_close(shared, derivative(final_loss(loss_fn))(*given))
        assert_same_everywhere(shared)


def a_derivative_of_one_rank_alone_is_refused(_: Path) -> None:
    params, data, _ = problem()

    def after(penalty, through, sharing):
        def penalised(params, batch):
            return loss_fn(params, batch) + through(penalty) * params["w"].square().sum()

        return final_loss(sharing(penalised))(0.1, params, data)

    penalty = torch.tensor(0.3, dtype=torch.float64)
    with pytest.raises(gd.GdfuncError, match="is not replicated"):
        grad(after)(penalty, lambda tensor: tensor, data_parallel)
    shared = grad(after)(penalty, replicated, data_parallel)
    assert_close(shared, grad(after)(penalty, lambda tensor: tensor, lambda loss: loss))
    # Forward mode pushes whole tangents, so that it needs nothing.
    one = torch.ones_like(penalty)
    shared = jvp(lambda p: after(p, lambda tensor: tensor, data_parallel), (penalty,), (one,))
    assert_close(
        shared, jvp(lambda p: after(p, lambda tensor: tensor, lambda loss: loss), (penalty,), (one,))
    )


def dropout_masks_belong_to_rows_of_the_whole_batch(_: Path) -> None:
    torch.manual_seed(0)
    model = gd.modules.functional(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double())
    x, y = problem()[1]
    results = []
    for sharing in (lambda loss: loss, data_parallel):
        step = gd.make_step(sharing(model.loss(gd.losses.mse)), gd.adam())
        state = step.init(model.params, model.buffers, gd.random.key(7))
        results.append(gd.train(step, state, (x, y[:, None]), problem()[2], 0.01, backend="eager"))
    assert_close(results[1], results[0])
    assert_same_everywhere(results[1])


def buffers_are_averaged_and_counters_counted(_: Path) -> None:
    @gd.stateful
    def with_means(params, batch, buffers, key):
        mean = torch.lerp(buffers["mean"], batch[0].mean(0), 0.1)
        buffers = {"mean": mean, "steps": buffers["steps"] + 1, "same": buffers["same"]}
        return loss_fn(params, batch) + (params["w"] * mean).sum(), buffers

    @gd.stateful
    def of_constants(params, batch, buffers, key):
        return loss_fn(params, batch) + (params["w"] * buffers["same"]).sum(), buffers

    buffers = {"mean": normal(9, 3), "steps": torch.tensor(2**40), "same": normal(8, 3)}
    params = problem()[0]
    for loss in (of_constants, with_means):
        alone, _ = run(gd.make_step(loss), params, buffers, backend="eager")
        shared, _ = run(gd.make_step(data_parallel(loss)), params, buffers)
        assert_close(shared.buffers, alone.buffers)
        assert int(shared.buffers["steps"]) == 2**40 + (STEPS if loss is with_means else 0)
        assert shared.buffers["same"].equal(buffers["same"])
        assert_same_everywhere(shared)


def batch_normalisation_has_the_statistics_of_the_whole_batch(_: Path) -> None:
    torch.manual_seed(0)
    x, y = problem()[1]
    signals = normal(4, N, 2, 6)
    for norm in (nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(4).eval()):
        for layers, data in (
            ((nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 1)), (x, y[:, None])),
            ((nn.Conv1d(2, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 1)), (signals, y[:, None])),
        ):
            model = gd.modules.functional(nn.Sequential(*layers).double())
            results = []
            for sharing in (lambda loss: loss, data_parallel):
                step = gd.make_step(
                    sharing(model.loss(gd.losses.mse)), gd.momentum(0.9)
                )  # Adam would magnify rounding errors
                state = step.init(model.params, model.buffers)
                results.append(gd.train(step, state, data, problem()[2], 0.01, backend="eager"))
            assert_close(results[1], results[0])
            assert_same_everywhere(results[1])
            assert (
                results[0][0].buffers["1.running_var"] - model.buffers["1.running_var"]
            ).any() == norm.training


def batch_normalisation_is_refused_in_transformations(_: Path) -> None:
    x, y = problem()[1]
    for norm, is_refused in ((nn.BatchNorm1d(4), True), (nn.GroupNorm(2, 4), False)):
        model = gd.modules.functional(nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 1)).double())
        step = gd.make_step(data_parallel(model.loss(gd.losses.mse)))

        def loss(lr, step=step, model=model):
            state, _ = step(step.init(model.params, model.buffers), (x, y[:, None]), lr)
            return state.params["0.weight"].square().sum()

        if is_refused:
            with pytest.raises(ValueError, match=r"batch normalisation in training mode.*nn\.GroupNorm"):
                grad(loss)(torch.tensor(0.1).double())
        else:
            assert_same_everywhere(grad(loss)(torch.tensor(0.1).double()))


def private_noise_is_drawn_once(_: Path) -> None:
    params, data, _ = problem()
    plan = gd.privacy.poisson_batches(gd.random.key(3), N, 0.1, STEPS)
    padded = gd.privacy.pad(data, plan)
    settings = {"key": gd.random.key(5), "noise_multiplier": 1.1, "divisor": 0.1 * N}
    for max_norm in (0.5, gd.privacy.Quantile(0.1, noise=1.0)):
        for columns in (plan.index.shape[1], 2):
            results = []
            for sharing in (lambda loss: loss, data_parallel):
                step = gd.privacy.make_private_step(
                    sharing(loss_fn), gd.adam(), max_norm=max_norm, **settings
                )
                index = plan.index[:, :columns]
                results.append(gd.train(step, step.init(params), padded, index, 0.1, backend="eager"))
            assert_close(results[1], results[0])
            assert_same_everywhere(results[1])


def clipped_gradients_are_those_of_one_process(_: Path) -> None:
    params, data, _ = problem()
    clipped, shared = (
        gd.privacy.clipped_grad(loss, 0.5, divisor=3.0) for loss in (loss_fn, data_parallel(loss_fn))
    )
    assert_close(shared(params, data), clipped(params, data))


def averages_between_steps_are_data_parallel(_: Path) -> None:
    params, data, index = problem()
    index = index[:, : world_size() * 3]
    step, mine = gd.make_step(loss_fn), index[:, rank() :: world_size()]
    local = params
    for row in mine:
        local, _ = gd.train(step, local, data, row[None], 0.1)
        local = average(local)
        assert_same_everywhere(local)
    shared, _ = gd.train(gd.make_step(data_parallel(loss_fn)), params, data, index, 0.1)
    assert_close(local, shared)
    state = gd.make_step(loss_fn, gd.adam()).init(_tree.map(lambda leaf: leaf * rank(), params))
    state = average(state._replace(opt_state=state.opt_state._replace(step=torch.tensor(rank()))))
    assert int(state.opt_state.step) == rank()
    assert_close(state.params, _tree.map(lambda leaf: leaf * (world_size() - 1) / 2, params))


def collectives_do_not_run_compiled(_: Path) -> None:
    params, data, index = problem()
    step, index = gd.make_step(data_parallel(loss_fn)), index.repeat(8, 1)  # enough to be traced
    shared, _ = gd.train(step, params, data, index, 0.1)
    alone, _ = gd.train(gd.make_step(loss_fn), params, data, index, 0.1, backend="eager")
    assert_close(shared, alone)
    with pytest.raises(gd.BackendError, match="sums over the ranks, which a compiled loop cannot"):
        gd.train(step, params, data, index, 0.1, backend="native")


def ranks_that_differ_end_with_one_message(_: Path) -> None:
    params, data, index = problem()
    step = gd.make_step(data_parallel(loss_fn))
    late = rank() == world_size() - 1
    other = {"w": params["w"] + late, "b": params["b"]}
    longer = {"w": normal(0, 3 + late), "b": params["b"]}
    cases = [
        (
            r"the ranks differ in the number of steps: 20 on rank 0, but 19",
            (params, index[: STEPS - late], 0.1),
        ),
        (r"the ranks differ in what they start from: .*state\['w'\]", (other, index, 0.1)),
        (
            r"the ranks differ in the first batch: .*batch\[0\].*whole data",
            (params, index.roll(int(late), 0), 0.1),
        ),
        (r"the ranks differ in lr: \(0\.1, .*on rank 0, but \(1\.1,", (params, index, 0.1 + late)),
        (
            r"the ranks differ in what they start from: .*state\['w'\]",
            (longer, index, 0.1),
        ),
    ]
    for message, (init, plan, lr) in cases:
        with pytest.raises(RankError, match=message) as caught:
            gd.train(step, init, data, plan, lr)
        agree(str(caught.value), "the message")
    with pytest.raises(RankError, match=r"differ in every: 1 on rank 0, but 2"):
        gd.train(step, params, data, index, 0.1, every=1 + late)
    other_step = gd.make_step(data_parallel(loss_fn), gd.adam() if late else gd.momentum(0.9))
    with pytest.raises(RankError, match=r"differ in step: .*momentum.*adam"):
        gd.train(other_step, other_step.init(params), data, index, 0.1)
    with pytest.raises(RankError, match=r"the shapes of params and batch: .*float64\[3\].*float64\[4\]"):
        gd.batch_grad(data_parallel(loss_fn))(longer, (normal(0, N, 3 + late), data[1]))
    with pytest.raises(RankError, match="the shapes of what is averaged"):
        average(longer)


def one_rank_writes_the_file_that_all_read(folder: Path) -> None:
    params, data, index = problem()
    step, path = gd.make_step(data_parallel(loss_fn), gd.adam()), folder / "run.safetensors"
    whole = gd.train(step, step.init(params), data, index, 0.1)
    how = {"checkpoint_to": path, "checkpoint_every": 1}
    gd.train(step, step.init(params), data, index[:7], 0.1, **how)
    assert gd.load(path)["step"] == 7
    resumed = gd.train(step, step.init(params), data, index, 0.1, **how)
    assert_close(resumed, whole, 0.0)
    assert_same_everywhere(resumed)


def files_of_other_world_sizes_are_read(folder: Path) -> None:
    params, data, index = problem()
    step, path = gd.make_step(data_parallel(loss_fn), gd.adam()), folder.parent / "shared.safetensors"
    taken = gd.load(path)["step"] if path.exists() else 0
    agree(taken, "steps in the file")
    shared = gd.train(step, step.init(params), data, index[: taken + 6], 0.1, checkpoint_to=path)
    alone = gd.make_step(loss_fn, gd.adam())
    assert_close(shared, gd.train(alone, alone.init(params), data, index[: taken + 6], 0.1))


def trained(end, folder: Path, **how) -> None:
    """Train for long; the last rank does something at step 5."""

    def at(step, numbers):
        if step >= 5 and rank() == world_size() - 1:
            end()

    params, data, index = problem()
    step = gd.make_step(data_parallel(loss_fn))
    try:
        gd.train(step, params, data, index.repeat(10_000, 1), 0.1, log=at, **how)
    except BaseException as error:
        print(type(error).__name__, error, *getattr(error, "__notes__", []), flush=True)
        os._exit(3)


def a_rank_that_raises(folder: Path) -> None:
    def end():
        raise ZeroDivisionError("the disk of this rank is full")

    trained(end, folder)


def a_rank_that_is_killed(folder: Path) -> None:
    trained(lambda: os.kill(os.getpid(), signal.SIGKILL), folder, checkpoint_to=folder / "run.safetensors")


def a_rank_that_is_taken_back(folder: Path) -> None:
    trained(lambda: os.kill(os.getpid(), signal.SIGTERM), folder, checkpoint_to=folder / "run.safetensors")


def a_rank_that_hangs(folder: Path) -> None:
    trained(lambda: time.sleep(20), folder)


def a_rank_that_goes_on_after_its_error(folder: Path) -> None:
    """Its next run would send its words in the place of the sums that the other still waits for."""

    def at(step, numbers):
        if step >= 5 and rank() == world_size() - 1:
            raise ZeroDivisionError("the disk of this rank is full")

    params, data, index = problem()
    step = gd.make_step(data_parallel(loss_fn))
    for log in (at, None):
        try:
            gd.train(step, params, data, index, 0.1, log=log)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    os._exit(3)


def an_error_that_all_ranks_have_ends_their_run_alone(_: Path) -> None:
    params, data, index = problem()
    step = gd.make_step(data_parallel(loss_fn))
    wanted = gd.train(step, params, data, index, 0.1)

    def at(taken, numbers):
        time.sleep(0.1 * rank())
        raise ZeroDivisionError

    for log in (at, None, at):
        with pytest.raises(ZeroDivisionError):
            gd.train(step, params, data, index, 0.1, log=log or at)
        assert_close(gd.train(step, params, data, index, 0.1), wanted, 0.0)


def ranks_of_unequal_speed_end_at_the_same_step(_: Path) -> None:
    """A segment ends by the time that it takes; a run that ends early ends with its segment."""
    params, (x, y), index = problem()
    index = index.repeat(4, 1)
    bad = x.clone()
    bad[index[23, 0]] = torch.nan
    sleeps = [0.3]  # in the first segment of all ranks but the first

    def update(grads, state, params=None):
        time.sleep(sleeps.pop() * (rank() > 0) if sleeps else 0.0)
        return grads, state

    def ends(loss, data, **how):
        step = gd.make_step(loss, gd.GradientTransformation(lambda params: (), update))
        sleeps[:] = [0.3]
        return gd.train(step, step.init(params), data, index, 0.05, backend="eager", **how)

    def below(carry, loss):
        return loss < 0.7

    shared, alone = (ends(loss, (x, y), stop=below) for loss in (data_parallel(loss_fn), loss_fn))
    assert 2 < int(alone[1].steps) < 70
    assert_close(shared[0], alone[0])
    assert int(shared[1].steps) == int(alone[1].steps)
    stopped = []
    for loss in (data_parallel(loss_fn), loss_fn):
        with pytest.raises(gd.NonFiniteError) as caught:
            ends(loss, (bad, y), check_finite="loss")
        stopped.append(caught.value)
    assert stopped[0].step == stopped[1].step > 2
    assert_close(stopped[0].state, stopped[1].state)
    assert_same_everywhere(stopped[0].state)


def ranks_that_drift_apart_are_refused(_: Path) -> None:
    params, data, index = problem()
    drift = gd.GradientTransformation(
        lambda params: (),
        lambda grads, state, params=None: (_tree.map(lambda g: g + 1e-13 * rank(), grads), state),
    )
    step = gd.make_step(data_parallel(loss_fn), drift)
    with pytest.raises(RankError, match=r"the ranks differ in what they end with: .*state.*\['w'\]"):
        gd.train(step, step.init(params), data, index, 0.1, backend="eager")


def ranks_that_do_different_things_are_refused(_: Path) -> None:
    params, data, index = problem()
    step = gd.make_step(data_parallel(loss_fn))
    grid = gd.grid(lr=[1.0, 2.0, 3.0])
    calls = [lambda: gd.sweep(lambda lr: lr, grid), lambda: gd.train(step, params, data, index, 0.1)]
    with pytest.raises(
        RankError, match="differ in what they run: 'sweep' on rank 0, but 'train' on rank 1"
    ):
        calls[min(rank(), 1)]()


def times_of_sums(to: Path) -> None:
    """Write the least seconds of a sum of each size in bytes."""
    times = {}
    for size in (4, 4_000, 400_000, 4_000_000, 40_000_000):
        bucket, taken = torch.ones(size // 4), []
        for _ in range(5 if size > 10**6 else 50):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(bucket)
            taken.append(time.perf_counter() - began)
        times[size] = min(taken)
    if rank() == 0:
        (to / "times.json").write_text(json.dumps(times))


def times_of_steps(to: Path) -> None:
    """Write the least seconds of a step: alone, with a sum, and with an average in a hundred steps."""
    x, y = normal(0, 1000, 16).float(), normal(1, 1000).float()
    params = {"w": torch.zeros(16), "b": torch.zeros(())}
    index = gd.epoch_batches(gd.random.key(1), 1000, 100, 50)

    def linear(params, batch):
        x, y = batch
        return (x @ params["w"] + params["b"] - y).square().mean()

    def locally(step, mine):
        carry = params
        for rows in mine.split(100):
            carry, _ = gd.train(step, carry, (x, y), rows, 0.01, backend="native")
            carry = average(carry)

    alone, shared = gd.make_step(linear), gd.make_step(data_parallel(linear))
    mine = index[:, rank() :: world_size()]
    runs = {
        "one rank alone, eager": lambda: gd.train(alone, params, (x, y), index, 0.01, backend="eager"),
        "two ranks, a sum in every step": lambda: gd.train(shared, params, (x, y), index, 0.01),
        "two ranks, native, an average every 100 steps": lambda: locally(alone, mine),
    }
    times = {}
    for name, call in runs.items():
        taken = []
        for _ in range(5):
            dist.barrier()
            began = time.perf_counter()
            call()
            taken.append((time.perf_counter() - began) / len(index))
        times[name] = min(taken)
    if rank() == 0:
        (to / "times.json").write_text(json.dumps(times))
