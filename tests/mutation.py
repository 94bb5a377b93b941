"""Mutants of the transformations, methods and schedules, and whether the suite finds them.

python -m tests.mutation                 # all of them: hours
python -m tests.mutation --sample 300    # a sample: about half an hour on two cores

A mutant is the package with one small fault: an operator exchanged, an operand dropped, a comparison
turned, a constant changed, two arguments exchanged, a call dropped. Checks of arguments and messages are
left out: other tests hold those. A mutant is found if a test of its file fails, or runs for longer than
four minutes. Every test of the file runs until one fails. Those that reached the line of the fault when
nothing was wrong run first, the shortest of them before all.
"""

import argparse
import ast
import copy
import hashlib
import importlib.machinery
import os
import pickle
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import Phase, settings

PACKAGE = Path(__file__).parents[1] / "gdfunc"
# Which tests hold the files of a room. The kit alone holds the mathematics of transformations.
ADAPTIVE, NORMS, DESCENT, CURVED = (
    f"tests/test_kit_{name}.py" for name in ("adaptive", "norms", "descent", "curved")
)
MOMENTUM = "tests/test_kit.py"
METHODS = "tests/test_methods.py"
_CONFORMANCE = "tests/test_conformance.py::test_{}"
OF_TRANSFORMATIONS = [
    _CONFORMANCE.format("it_keeps_structure_shape_dtype_device_and_stride"),
    _CONFORMANCE.format("a_float64_hyperparameter_is_swept_over_parameters_of_few_bits"),
    "tests/test_parity_optim.py::test_many_leaves_at_once_have_the_bits_of_each_alone",
]
OF_STEPS = [
    _CONFORMANCE.format("a_float64_hyperparameter_of_a_step_is_swept_over_float32_parameters"),
    _CONFORMANCE.format("a_step_keeps_structure_shape_dtype_and_device"),
    _CONFORMANCE.format("autograd_and_numpy_stay_outside"),
]
TESTS = {
    "_transforms/_adam.py": [ADAPTIVE, "tests/test_lr_free.py"],
    "_transforms/_averages.py": [ADAPTIVE, MOMENTUM, NORMS],
    "_transforms/_base.py": [ADAPTIVE, MOMENTUM, NORMS],
    "_transforms/_dog.py": ["tests/test_lr_free.py"],
    "_transforms/_factored.py": ["tests/test_lr_free.py"],
    "_transforms/_lbfgs.py": [CURVED],
    "_transforms/_norms.py": [NORMS],
    "_transforms/_wrappers.py": [NORMS, "tests/test_family.py"],
    "interop/_as_optimizer.py": ["tests/test_interop.py"],
    "interop/_from_optim.py": ["tests/test_interop.py"],
    "methods/_averaging.py": ["tests/test_kit_averages.py", METHODS],
    "methods/_constrained.py": ["tests/test_projections.py"],
    "methods/_direction.py": [CURVED, METHODS],
    "methods/_least_squares.py": ["tests/test_least_squares.py"],
    "methods/_lr_free.py": ["tests/test_lr_free.py"],
    "methods/_momentum.py": [DESCENT, METHODS],
    "methods/_plateau.py": ["tests/test_plateau.py"],
    "methods/_sophia.py": ["tests/test_lr_free.py"],
    "methods/_variance_reduction.py": ["tests/test_kit_sums.py", "tests/test_variance_reduction.py"],
    "methods/_wolfe.py": ["tests/test_wolfe.py"],
    "projections.py": ["tests/test_projections.py"],
    "schedules/_formulas.py": ["tests/test_schedules.py"],
    "schedules/_schedule.py": ["tests/test_schedules.py"],
}
for _room, _laws in {"_transforms/": OF_TRANSFORMATIONS, "methods/": OF_STEPS}.items():
    TESTS |= {name: [*tests, *_laws] for name, tests in TESTS.items() if name.startswith(_room)}
SECONDS = 240  # of the processor

# Mutants that compute the same as the original, or that no test of the file can be asked to see, each with
# its reason: (file, its line, original, mutant).
_PATH = "which of two ways to the same numbers is taken"
_DTYPE = "the dtype, which test_conformance holds"
_EQUAL = "rounding decides which side a number is on that equals its bound"
_SIGN = "the product is compared with zero alone"
ARGUED = {
    (
        "_transforms/_base.py",
        "if leaf is not None and (type(leaf) is not Tensor or leaf.requires_grad):",
        "type(leaf)",
        "leaf",
    ): _PATH,
    (
        "_transforms/_base.py",
        "if len(leaves) < 2 or is_watched():",
        "2",
        "3",
    ): _PATH,
    (
        "_transforms/_base.py",
        'if wide(dtype) != dtype or leaves[0].device.type != "cpu":',
        "leaves[0].device.type != 'cpu'",
        "leaves[0].device.type == 'cpu'",
    ): _PATH,
    (
        "_transforms/_base.py",
        "return torch.addcmul(in_dtype(beta, x.dtype) * average, in_dtype(1.0 - beta, x.dtype) * x, x)",
        "in_dtype(beta, x.dtype)",
        "beta",
    ): _DTYPE,
    (
        "_transforms/_base.py",
        "if len(leaves) < 2 or is_watched():",
        "len(leaves) < 2",
        "len(leaves) <= 2",
    ): _PATH,
    (
        "_transforms/_base.py",
        'if wide(dtype) != dtype or leaves[0].device.type != "cpu":',
        "0",
        "1",
    ): "all leaves are on one device",
    (
        "interop/_from_optim.py",
        "take_step(made, leaves, float(lr), lambda: (None, _tree.leaves(grads)))",
        "float(lr)",
        "lr",
    ): _PATH,
    (
        "methods/_wolfe.py",
        "u = torch.where(descends(u), u, 0.0)",
        "0.0",
        "1.0",
    ): "a direction that does not descend is gone along for a size of zero",
    (
        "methods/_wolfe.py",
        "is_level = is_level & (seen.slope <= (2 * decrease - 1) * start.slope)",
        "seen.slope <= (2 * decrease - 1) * start.slope",
        "seen.slope < (2 * decrease - 1) * start.slope",
    ): _EQUAL,
    (
        "methods/_wolfe.py",
        "return torch.where(has_minimum & (share * otherwise > 0), share, otherwise).clamp(*limits)",
        "share * otherwise > 0",
        "share * otherwise >= 0",
    ): _EQUAL,
    (
        "methods/_wolfe.py",
        "share = 1 - safe_ratio(second + length - bend, second - first + 2 * length, 1 - otherwise)",
        "1 - otherwise",
        "otherwise",
    ): "in a bracket the loss is no straight line, and outside the share of either sign is not used",
    (
        "methods/_wolfe.py",
        "length = root(torch.where(has_minimum, square, 0.0))",
        "0.0",
        "1.0",
    ): "without a minimum the length is not used",
    (
        "_transforms/_adam.py",
        "update_many if are_numbers and not amsgrad else None,",
        "update_many if are_numbers and (not amsgrad) else None",
        "None",
    ): _PATH,
    (
        "_transforms/_averages.py",
        "minus, plus, least, most = (like(scalar, g) for scalar in (*factors, low, high))",
        "like(scalar, g)",
        "scalar",
    ): _DTYPE,
    (
        "_transforms/_averages.py",
        "turn = sign_of(g) * sign_of(prev)",
        "sign_of(g)",
        "g",
    ): _SIGN,
    (
        "_transforms/_averages.py",
        "turn = sign_of(g) * sign_of(prev)",
        "sign_of(prev)",
        "prev",
    ): _SIGN,
    (
        "_transforms/_norms.py",
        "tall = x.shape[0] > x.shape[1]",
        "0",
        "1",
    ): _PATH,
    (
        "_transforms/_norms.py",
        "tall = x.shape[0] > x.shape[1]",
        "1",
        "0",
    ): _PATH,
    (
        "_transforms/_norms.py",
        "tall = x.shape[0] > x.shape[1]",
        "x.shape[0] > x.shape[1]",
        "x.shape[0] >= x.shape[1]",
    ): _PATH,
    (
        "methods/_constrained.py",
        "return NoiseState(carry, steps, random.fold_in(key.to(steps.device), 0))",
        "random.fold_in(key.to(steps.device), 0)",
        "key.to(steps.device)",
    ): "the first noise is drawn from another key, which no other draw uses",
    (
        "methods/_least_squares.py",
        "torch.where(is_good, 2.0, (2 * state.growth).clamp(max=1 / limits.eps)),",
        "1",
        "2",
    ): "the damping reaches its own bound long before",
    (
        "methods/_lr_free.py",
        "lambda m, v, p: m / (safe_sqrt(v) + like(eps, v)) + like(weight_decay, p) * p, m, v, params",
        "like(eps, v)",
        "eps",
    ): "the update has more bits than needed, to which the parameters round it",
    (
        "methods/_lr_free.py",
        "added = (1.0 - kept) * rate",
        "1.0 - kept",
        "1.0",
    ): "r and s have the factor in common, and their ratio alone is used",
    (
        "methods/_direction.py",
        "away = safe_ratio(scalar(rho, params), length)",
        "scalar(rho, params)",
        "rho",
    ): _DTYPE,
    (
        "projections.py",
        "size = (falling * counts > excess).sum(-1, keepdim=True).clamp(min=1)",
        "falling * counts > excess",
        "falling * counts >= excess",
    ): "an entry that equals the threshold does not change it",
    (
        "methods/_averaging.py",
        "squared_lr = learning_rate(lr, state.params) ** 2",
        "learning_rate(lr, state.params)",
        "lr",
    ): _DTYPE,
    (
        "methods/_wolfe.py",
        "numbers = [scalar(0.0, params) for _ in range(9)]",
        "9",
        "10",
    ): "one more is not used",
    (
        "schedules/_schedule.py",
        "positive = torch.where(exponent > 0, exponent, 1).to(base)",
        "torch.where(exponent > 0, exponent, 1).to(base)",
        "torch.where(exponent > 0, exponent, 1)",
    ): _PATH,
    (
        "schedules/_schedule.py",
        "positive = torch.where(exponent > 0, exponent, 1).to(base)",
        "0",
        "1",
    ): "where the exponent is 1, both branches are 1",
}

SYMMETRIC = {"dot", "max", "maximum", "min", "minimum"}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}


class Mutant(NamedTuple):
    """A file with one fault."""

    path: Path
    line: int
    text: str
    before: str
    after: str
    source: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return str(self.path.relative_to(PACKAGE)), self.text, self.before, self.after

    def __str__(self) -> str:
        return f"{self.key[0]}:{self.line}: {self.before}  ->  {self.after}   in: {self.text}"


def mutations(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes with one fault that could stand in a node's place."""
    if isinstance(node, ast.BinOp):
        if type(node.op) in OPERATORS:
            yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        yield node.left
        yield node.right
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1)
        if node.value:
            yield ast.Constant(0)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif (
        isinstance(node, ast.Call) and node.args and not any(isinstance(a, ast.Starred) for a in node.args)
    ):
        yield node.args[0]
        name = ast.unparse(node.func).rpartition(".")[2]
        if len(node.args) >= 2 and name not in SYMMETRIC:
            yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
        if isinstance(node.func, ast.Attribute):
            yield node.func.value
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse


def is_formula(node: ast.AST) -> bool:
    """Whether a node belongs to the mathematics: no message, check, annotation or default value."""
    if isinstance(
        node, ast.Raise | ast.arguments | ast.ClassDef | ast.Import | ast.ImportFrom | ast.Assert
    ):
        return False
    if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise):
        return False
    name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    return not name.split(".")[-1].startswith(("check", "_check", "isinstance", "zip", "len", "clone"))


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """All places of expressions under a node: a parent, its field, and the position in a list."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for position, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and is_formula(child):
                if isinstance(child, ast.expr):
                    yield node, name, position
                yield from places(child)


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All mutants of a file: faults inside functions."""
    text = path.read_text()
    tree, lines = ast.parse(text), text.splitlines()
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for function in [node for node in functions if not node.name.startswith(("check", "_check"))]:
        for parent, name, position in list(places(function)):
            value = getattr(parent, name)
            original = value if position is None else value[position]
            for changed in mutations(original):
                changed = ast.copy_location(copy.deepcopy(changed), original)
                if position is None:
                    setattr(parent, name, changed)
                else:
                    value[position] = changed
                source = ast.unparse(ast.fix_missing_locations(tree))
                line = original.lineno
                words = ast.unparse(original), ast.unparse(changed)
                if words[0] != words[1]:
                    yield Mutant(path, line, lines[line - 1].strip(), *words, source)
            if position is None:
                setattr(parent, name, original)
            else:
                value[position] = original


def all_mutants() -> list[Mutant]:
    """Every mutant of every room, but those that are argued."""
    files = [PACKAGE / name for name in TESTS]
    return [mutant for path in files for mutant in mutants_of(path) if mutant.key not in ARGUED]


def sample_of(mutants: list[Mutant], size: int) -> list[Mutant]:
    """A sample that stays nearly the same when code changes: the mutants of the smallest digests."""
    return sorted(mutants, key=lambda mutant: hashlib.sha256(repr(mutant.key).encode()).digest())[:size]


class Reached:
    """A plugin of pytest: the lines of the rooms that each test reaches, and the seconds that it takes."""

    def __init__(self) -> None:
        self.files = {str(PACKAGE / name) for name in TESTS}
        self.lines: dict[tuple[str, int], set[str]] = {}
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        seen: set[tuple[str, int]] = set()

        def in_line(frame: Any, event: str, arg: Any) -> Any:
            seen.add((frame.f_code.co_filename, frame.f_lineno))
            return in_line

        start = time.process_time()
        sys.settrace(lambda frame, *_: in_line if frame.f_code.co_filename in self.files else None)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.seconds[item.nodeid] = time.process_time() - start
            for line in seen:
                self.lines.setdefault(line, set()).add(item.nodeid)


class FirstFailure:
    """Tests in the order that finds a mutant first, up to the first failure, as a plugin of pytest."""

    def __init__(self, mutant: Mutant, reached: Reached) -> None:
        self.tests = reached.lines.get((str(mutant.path), mutant.line), set())
        self.seconds = reached.seconds

    def pytest_configure(self) -> None:
        # Because the first failure is enough: a smaller one is not looked for.
        phases = [Phase.explicit, Phase.generate]
        settings.register_profile("mutant", settings.get_profile("dev"), phases=phases, database=None)
        settings.load_profile("mutant")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: (item.nodeid not in self.tests, self.seconds.get(item.nodeid, 0.0)))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        try:
            return (yield)
        except pytest.skip.Exception:
            raise
        except Exception:
            os._exit(1)  # before anything is written about it


def _test(tests: list[str], plugin: Any) -> int:
    """Run tests in this process without a word."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    # Tests of controls, and of torch and problems alone, run nothing of what is mutated.
    options = [
        "-m",
        "not slow and not benchmark",
        "-k",
        "not control and not diagnos and not docstring and not wrong and not test_torchs and not public",
        "-x",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "-W",
        "ignore",
    ]
    return int(pytest.main([*options, "--hypothesis-seed=0", *tests], [plugin]))


def _learn(tests: list[str], path: Path) -> None:
    """Run the tests of a room as it is, and write down what each of them reaches."""
    reached = Reached()
    status = _test(tests, reached)
    path.write_bytes(pickle.dumps((reached.lines, reached.seconds)))
    os._exit(status)


def _run(mutant: Mutant, reached: Reached) -> None:
    """Run the tests on a mutant in a process of its own, which exits with 0 if nothing failed."""
    original = importlib.machinery.SourceFileLoader.get_code

    def get_code(self, fullname):
        if self.path == str(mutant.path):
            return compile(mutant.source, self.path, "exec")
        return original(self, fullname)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    os._exit(_test(TESTS[mutant.key[0]], FirstFailure(mutant, reached)) != 0)


def _in_processes(calls: list[Callable[[], Any]], workers: int) -> Iterator[tuple[int, int]]:
    """Make calls in processes of their own, a few at once; give the position and exit status of each."""
    waiting, running = list(enumerate(calls)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            position, call = waiting.pop()
            process = os.fork()
            if not process:
                call()
            running[process] = position
        process, status = os.wait()
        yield running.pop(process), status


def reached_by(rooms: set[str], workers: int) -> Reached:
    """Learn what the tests of some rooms reach.

    Raises:
        AssertionError: a test fails although nothing is wrong.
    """
    tests = sorted({test for room in rooms for test in TESTS[room]})
    all_reached = Reached()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, str(position)) for position in range(len(tests))]
        calls = [partial(_learn, [test], path) for test, path in zip(tests, paths, strict=True)]
        for position, status in _in_processes(calls, workers):
            assert status == 0, f"{tests[position]} fails on the package as it is"
        for path in paths:
            lines, seconds = pickle.loads(path.read_bytes())
            all_reached.seconds |= seconds
            for line, names in lines.items():
                all_reached.lines.setdefault(line, set()).update(names)
    return all_reached


def survivors_of(chosen: list[Mutant], workers: int = 2, report: bool = False) -> list[Mutant]:
    """The mutants that no test finds."""
    import torch  # once, before the processes fork, as all that is not mutated

    torch.set_num_threads(1)
    torch.func.grad(torch.sin)(torch.tensor(0.0))  # imports what it needs when it is first called
    reached = reached_by({mutant.key[0] for mutant in chosen}, workers)
    calls = [partial(_run, mutant, reached) for mutant in chosen]
    found = []
    for position, status in _in_processes(calls, workers):
        if status == 0:
            found.append(chosen[position])
            if report:
                print(chosen[position], flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, help="how many, drawn by their digests")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--room", help="the beginning of the files' names, such as methods/")
    options = parser.parse_args(arguments)
    chosen = all_mutants()
    if options.room:
        chosen = [mutant for mutant in chosen if mutant.key[0].startswith(options.room)]
    if options.sample:
        chosen = sample_of(chosen, options.sample)
    survivors = survivors_of(chosen, options.workers, report=True)
    share = 1 - len(survivors) / len(chosen)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants are found: {share:.1%}")
    return int(share < 0.97)


if __name__ == "__main__":
    sys.exit(main())
