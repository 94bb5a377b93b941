"""Drawn bodies in the loop that gdfunc compiles and in `jax.lax.scan`, where JAX is installed.

python -m pytest -m slow -n 0 tests/test_jax_bodies.py
"""

import functools

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import gdfunc as gd

from .references import normal

# Names that both libraries have. Of a, of a and b, and of a along its first axis.
OF_ONE = "sin cos tanh sinh exp expm1 log1p sqrt square abs sign floor ceil trunc arctan arcsinh erf erfinv"
OF_ONE += " sigmoid relu softplus silu reciprocal digamma rsqrt negative exp2 sinc erfc"
OF_TWO = (
    "add subtract multiply maximum minimum hypot arctan2 copysign logaddexp fmod remainder floor_divide"
)
OF_TWO += " true_divide xlogy power"
OF_AXIS = "sum mean amax amin prod cumsum softmax log_softmax logsumexp argmax argmin cumprod sort diff"
POSITIVE = {"log1p", "sqrt", "reciprocal", "digamma", "rsqrt", "xlogy", "power"}  # of the first operand
NONZERO = {"fmod", "remainder", "floor_divide", "true_divide", "power", "xlogy"}  # of the second
OTHERS = {
    "product": lambda of, a, b: of("matmul")(a, b.T)[:, :1] * a,
    "row": lambda of, a, b: a[1] + b,
    "reverse": lambda of, a, b: of("flip")(a, (0,)) * b,
    "choice": lambda of, a, b: of("where")(a > b, a, 0.5 * b),
    "stack": lambda of, a, b: of("stack")([a, b])[:, 1:],
    "corner": lambda of, a, b: of("tril")(a) + of("triu")(b),
    "shape": lambda of, a, b: of("reshape")(a, (4, 3)).T,
    "clip": lambda of, a, b: of("clip")(a, -0.4, 0.6),
    "strided": lambda of, a, b: a[:, ::2] - b[:, 1::2],
}
NAMES = [*OF_ONE.split(), *OF_TWO.split(), *OF_AXIS.split(), *OTHERS]
programs = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=8
)


def of_torch(name):
    if name == "sort":
        return lambda a, dim: torch.sort(a, dim).values
    return next(
        getattr(room, name) for room in (torch, torch.nn.functional, torch.special) if hasattr(room, name)
    )


def of_jax(name):
    jax = pytest.importorskip("jax")
    if name in ("rsqrt", "digamma"):
        return getattr(jax.lax, name)
    rooms = jax.nn, jax.numpy, jax.scipy.special
    return next(getattr(room, name) for room in rooms if hasattr(room, name))


def body(of, program, carry, x):
    """A step of the program: [3, 4] of the carry, of x and of what each line makes."""
    made = [carry, x]
    for name, i, j in program:
        a, b = made[-1 - i % len(made)], made[-1 - j % len(made)]
        a = a * a + 0.5 if name in POSITIVE else 0.9 * of("tanh")(a) if name == "erfinv" else a
        b = b * b + 0.5 if name in NONZERO else b
        if name in OTHERS:
            new = OTHERS[name](of, a, b)
        else:
            new = of(name)(
                *((a,) if name in OF_ONE.split() else (a, b) if name in OF_TWO.split() else (a, 0))
            )
        # The factor is a tensor of the carry's dtype, because the libraries promote integers differently.
        made.append(new if new.shape == carry.shape else carry * of("mean")(new * (0 * carry[0, 0] + 0.3)))
        made[-1] = of("tanh")(made[-1])  # so that all steps stay comparable
    return made[-1] + 0.1 * carry, made[-2]


def of_both(program, length):
    """The function of carry and xs in both libraries."""
    jax = pytest.importorskip("jax")
    ours = functools.partial(gd.scan, functools.partial(body, of_torch, program), backend="native")
    theirs = functools.partial(jax.lax.scan, functools.partial(body, of_jax, program))
    return ours, theirs


@pytest.mark.slow
@settings(max_examples=300, phases=[Phase.explicit, Phase.generate])
@given(programs, st.integers(1, 4), st.integers(0, 2**31))
def test_drawn_bodies_are_those_of_jax(program, length, seed):
    jax = pytest.importorskip("jax")
    ours, theirs = of_both(program, length)
    init, xs = normal(seed, 3, 4), normal(seed + 1, length, 3, 4)
    args, moves = (init, xs), (init.cos(), xs.cos())
    with jax.enable_x64(True):
        given, along = ([jax.numpy.asarray(leaf.numpy()) for leaf in each] for each in (args, moves))

        def total(run):
            return lambda init, xs: sum((leaf**2).sum() for leaf in run(init, xs))

        pairs = {
            "value": (ours(*args), theirs(*given)),
            "grad": (torch.func.grad(total(ours), (0, 1))(*args), jax.grad(total(theirs), (0, 1))(*given)),
            "jvp": (torch.func.jvp(ours, args, moves)[1], jax.jvp(theirs, given, along)[1]),
        }
        for name, (got, expected) in pairs.items():
            for left, right in zip(got, expected, strict=True):
                right = np.asarray(right)
                scale = 1 + np.abs(right).max(initial=0)
                assert np.abs(left.numpy() - right).max(initial=0) <= 1e-9 * scale, (name, program)
