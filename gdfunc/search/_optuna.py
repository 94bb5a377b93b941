"""`ask` and `tell`: a study of Optuna chooses the points of a sweep, and learns what came out.

A study is anything with Optuna's `ask` and `tell`. Optuna is imported to name the states of trials.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .._errors import check_int, missing_extra
from .._shown import shown
from .._sweep._grid import Grid, grid
from .._sweep._result import SweepResult
from ._result import HalvingResult


def ask(
    study: Any, size: int, space: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]
) -> tuple[list[Any], Grid]:
    """Ask a study of Optuna for the points of a sweep.

    trials[i] = study.ask(space),  grid[i] = trials[i].params

    Floats become data, and their members run at once; ints, strings and other choices shape the program,
    so equal ones form a group: see `grid`.

    Args:
        study: from `optuna.create_study`. With a sampler such as TPE, `constant_liar=True` keeps the
            trials of one sweep apart.
        size: how many trials: the members of one sweep.
        space: a dict of Optuna's distributions, or a function `(trial) -> point` that calls the trial's
            `suggest_float` and the like. All points have the same names.

    Returns:
        The trials, and the zipped grid of their points.

    Raises:
        TypeError: space holds what is no distribution.
        ValueError: size is no int >= 1; the points have different names.

    Example:
        >>> import optuna
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> sampler = optuna.samplers.TPESampler(seed=0, constant_liar=True)
        >>> study = optuna.create_study(sampler=sampler)
        >>> space = {"lr": optuna.distributions.FloatDistribution(1e-3, 1.0, log=True)}
        >>> problem = gd.problems.stock_regression()
        >>> def run(lr):
        ...     step, plan = gd.make_step(problem.loss_fn), gd.full_batch(389, 20)
        ...     params, _ = gd.train(step, problem.params, problem.data, plan, lr)
        ...     return problem.loss_fn(params, problem.data) / problem.minimum
        >>> for _ in range(4):
        ...     trials, grid = gd.search.ask(study, 16, space)
        ...     gd.search.tell(study, trials, gd.sweep(run, grid))
        >>> len(study.trials), round(study.best_value, 4), 0.5 < study.best_params["lr"] < 0.8
        (64, 1.0, True)

    References:
        T. Akiba, S. Sano, T. Yanase, T. Ohta, M. Koyama, "Optuna: a next-generation hyperparameter
        optimization framework", 2019.
    """
    if not callable(space):
        space = dict(space)
        for name, distribution in space.items():
            if not hasattr(distribution, "single"):  # as all of Optuna's have
                raise TypeError(
                    f"space[{name!r}] must be a distribution of Optuna, such as "
                    f"optuna.distributions.FloatDistribution(1e-3, 1.0); got {shown(distribution)}"
                )
    trials, points = [], []
    for _ in range(check_int("size", size, 1)):
        trial = study.ask() if callable(space) else study.ask(space)
        trials.append(trial)
        points.append(dict(space(trial) if callable(space) else trial.params))
        if {*points[-1]} != {*points[0]}:
            raise ValueError(
                f"the trials of one sweep must have the same names; got {', '.join(points[0])} and "
                f"{', '.join(points[-1])}"
            )
    return trials, grid(zipped=True, **{name: [point[name] for point in points] for name in points[0]})


def tell(study: Any, trials: list[Any], result: SweepResult, values: Tensor | None = None) -> None:
    """Tell a study of Optuna the result of a sweep.

    Members that diverged are told as failed. Of a `HalvingResult` the scores at the rungs are reported, and
    the members that were dropped are told as pruned.

    Args:
        study: the one that was asked.
        trials: from `ask`.
        result: of the sweep or the halving over the grid from `ask`.
        values: [N], or [N, K] for K objectives, what the trials are worth. None: the outputs, if `run`
            returns one number, or the last scores of a halving.

    Raises:
        ValueError: there are not as many values as trials, or as objectives of the study.
        ModuleNotFoundError: Optuna is not installed.

    Example:
        >>> import optuna
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        >>> space = {"lr": optuna.distributions.FloatDistribution(1e-3, 10.0, log=True)}
        >>> step, plan = gd.make_step(lambda w, batch: w**2), gd.full_batch(1, 90)
        >>> def run(lr, steps, carry):
        ...     return gd.train(step, torch.tensor(1.0) if carry is None else carry, None, plan[steps], lr)
        >>> trials, grid = gd.search.ask(study, 27, space)
        >>> gd.search.tell(study, trials, gd.search.halving(run, grid, [10, 30, 90], "loss"))
        >>> states = [trial.state.name for trial in study.trials]
        >>> {state: states.count(state) for state in sorted({*states})}
        {'COMPLETE': 3, 'PRUNED': 24}
    """
    try:
        from optuna.trial import TrialState
    except ModuleNotFoundError as error:
        raise missing_extra("tell", "optuna", "dev") from error
    halved = result if isinstance(result, HalvingResult) else None
    if values is None:
        values = result.outputs if halved is None else halved.scores[:, -1]
    if not isinstance(values, Tensor) or not len(values) == len(trials) == len(result.grid):
        raise ValueError(
            f"values must be a tensor [N] or [N, K] for the {len(trials)} trials, of a result with "
            f"{len(result.grid)} members; got {shown(values)}: pass one, such as result.outputs['loss']"
        )
    objectives, wanted = values.shape[1:].numel(), len(study.directions)
    if values.ndim > 2 or objectives != wanted:
        raise ValueError(
            f"the study has {wanted} objectives, but values {list(values.shape)} give trials {objectives}: "
            f"pass values [N, K], such as torch.stack([first, second], 1)"
        )
    for i, trial in enumerate(trials):
        dropped = False
        if halved is not None and not halved.diverged[i]:
            taken = int(halved.steps[i])
            dropped = taken < halved.rungs[-1]
            for rung, score in zip(halved.rungs, halved.scores[i].tolist(), strict=True):
                if rung <= taken:
                    trial.report(score, rung)
        if dropped:
            study.tell(trial, state=TrialState.PRUNED)
        elif result.diverged[i] or not values[i].isfinite().all():
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, values[i].tolist())
