"""Assertions about trees of tensors, and the examples of docstrings."""

import builtins
import doctest

import pytest
import torch
from torch.func import grad, jvp

import gdfunc as gd

from .references import fingerprint, relative_error, storages


def assert_same_bits(got, expected):
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for name in expected:
            assert_same_bits(got[name], expected[name])
    elif isinstance(expected, gd.Trajectory):
        assert_same_bits(vars(got), vars(expected))
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for pair in zip(got, expected, strict=True):
            assert_same_bits(*pair)
    else:
        assert got is expected is None


def bits(leaf):
    """The bytes of a tensor, and all else that must be kept of it."""
    if not isinstance(leaf, torch.Tensor):
        return type(leaf), repr(leaf)
    raw = leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    strides = [stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True) if size > 1 and raw]
    return leaf.dtype, tuple(leaf.shape), strides, raw


def assert_same(one, two):
    """To the bit, NaN and minus zero too, in the same containers, dtypes, shapes and order in memory."""
    assert gd._tree.flatten(one)[1] == gd._tree.flatten(two)[1]
    assert [bits(leaf) for leaf in gd._tree.leaves(one)] == [bits(leaf) for leaf in gd._tree.leaves(two)]


def assert_agrees(got, expected, tolerance=1e-9):
    """Leaf by leaf, to a share of what is expected; integers and zeros as they are."""
    leaves = gd._tree.check_structure(got, expected, "got", "expected")
    for leaf, right in zip(leaves, gd._tree.leaves(expected), strict=True):
        assert (leaf.shape, leaf.dtype) == (right.shape, right.dtype)
        if right.is_floating_point() and right.any():
            assert right.isfinite().all()
            assert relative_error(leaf.detach().cpu(), right.detach()) < tolerance
        else:
            assert leaf.cpu().equal(right)


def tensors(tree):
    return [leaf for leaf in gd._tree.leaves(tree) if isinstance(leaf, torch.Tensor)]


def assert_pure(f, *args):
    """Call f: it writes into no argument, and no two of its arguments and results share memory."""
    inputs = tensors(args)
    before = fingerprint(inputs)
    result = f(*args)
    assert fingerprint(inputs) == before
    places = storages([*inputs, *tensors(result)])
    assert len(set(places)) == len(places)
    return result


def assert_derivatives(f, *args, rtol=1e-5, atol=1e-6, step=1e-6):
    """Along a direction in each argument: reverse mode, forward mode and finite differences agree."""
    slopes = grad(f, tuple(range(len(args))))(*args)
    for i, (argument, slope) in enumerate(zip(args, slopes, strict=True)):

        def along(x, i=i):
            return f(*args[:i], x, *args[i + 1 :])

        direction = torch.cos(3 * argument)
        up, down = (along(argument + sign * step * direction) for sign in (1, -1))
        reverse = (slope * direction).sum()
        torch.testing.assert_close(reverse, (up - down) / (2 * step), rtol=rtol, atol=atol)
        forward = jvp(along, (argument,), (direction,))[1]
        torch.testing.assert_close(forward, reverse, rtol=1e-8, atol=1e-10)


def assert_refused(call, message):
    """The call raises ValueError with this message; "TypeError: ..." names another error."""
    kind, _, rest = message.partition(": ")
    error = getattr(builtins, kind, None) if kind.endswith("Error") else None
    with pytest.raises(error or ValueError, match=rest if error else message):
        call()


def run_doctest(value, name):
    """The number of examples in a docstring, and a report that is empty if they print what they say."""
    globs = {"gd": gd, "torch": torch}
    finder = doctest.DocTestFinder(recurse=False)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    runner = doctest.DocTestRunner(verbose=False, optionflags=flags)
    report = []
    for test in finder.find(value, name, globs=globs):
        with torch.random.fork_rng():  # for the modules of torch that an example makes
            runner.run(test, out=report.append)
    return runner.tries, "".join(report)
