"""The rooms: a module imports only lower ranks, and each foreign package has one door."""

import ast
import functools
import graphlib
import subprocess
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path

import pytest

import gdfunc

PACKAGE = Path(gdfunc.__file__).parent
RANKS = {
    0: {"_torch", "_lock", "_tree", "_numerics", "_errors", "_progress", "_shown", "_html", "random"}
    | {"_data", "_inputs"},
    1: {
        "_sampling",
        "_lazy",
        "_gradients",
        "_transforms",
        "schedules",
        "_scan",
        "losses",
        "problems",
        "datasets",
    }
    | {"projections", "_per_sample", "reducers", "_reductions", "tree", "_stateful", "stops", "checkpoint"},
    2: {"_step", "curvature", "adjoints", "distributed"},
    3: {"_train", "methods", "_sweep", "_hypergradient", "_jit", "modules", "stats", "privacy", "search"},
    4: {"plot", "testing", "interop", "__main__"},
}
RANK = {room: rank for rank, rooms in RANKS.items() for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
# random checks its arguments with _errors, and asks _torch whether it is traced: both import no random.
SAME_RANK = {
    ("_tree", "_torch"),
    ("_data", "_tree"),
    ("_data", "_numerics"),
    ("_inputs", "_tree"),
    ("_inputs", "_data"),
    ("_torch", "_lock"),
    ("random", "_errors"),
    ("random", "_torch"),
    ("_gradients", "random"),
    ("_gradients", "_stateful"),
    ("_stateful", "random"),
    ("_sampling", "random"),
    ("_lazy", "random"),
    ("_lazy", "_sampling"),
    ("_tree", "_errors"),
    ("_tree", "_numerics"),
    ("problems", "random"),
    ("problems", "losses"),
    ("problems", "datasets"),
    ("testing", "interop"),
    ("reducers", "_per_sample"),
    ("reducers", "_reductions"),
    ("search", "_sweep"),
    ("search", "_train"),
    *[("_reductions", room) for room in ("_gradients", "_per_sample", "_scan")],
}


def each(files: list[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """Make one test of a law for several files, whose failure names the file."""

    def test_of(law: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            for path in files:
                try:
                    law(path)
                except AssertionError as error:
                    raise AssertionError(f"{path}: {error}") from error

        test.__name__, test.__doc__ = law.__name__, law.__doc__
        return test

    return test_of


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    """All nodes of a file's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text())))


def rooms_imported(path: Path, root: Path) -> set[str]:
    """The rooms under a root that a file of it imports, wherever the import stands in the file."""
    depth, found = len(path.relative_to(root).parts), set()
    for node in nodes_of(path):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


@functools.cache
def imports(path: Path) -> set[tuple[str, str]]:
    """All (package, name) pairs that a file imports; our own rooms come as ("gdfunc", room)."""
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found |= {(alias.name.split(".")[0], alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module.split(".")[0], node.module))
    return found | {("gdfunc", name) for name in rooms_imported(path, PACKAGE)}


@each(FILES)
def test_a_room_imports_lower_ranks_only(path):
    room = room_of(path)
    assert room in RANK, f"{room} has no rank: add it to the design"
    for package, name in imports(path):
        if package == "gdfunc" and name != "__version__":
            assert RANK[name] < RANK[room] or (room, name) in SAME_RANK, f"{room} imports {name}"


DOORS = {  # modules, and the rooms that may import them; the last two are hidden channels
    "torch.utils._pytree": {"_tree"},
    "matplotlib": {"plot"},
    "PIL": {"plot"},
    "hypothesis": {"testing"},
    "sklearn": {"datasets"},
    "tqdm": {"_progress"},
    "pandas": {"_sweep"},
    "xarray": {"_sweep"},
    "safetensors": {"checkpoint"},
    "optuna": {"search"},
    "contextvars": set(),
    "dis": {"_scan"},
}


@pytest.mark.parametrize("package", DOORS)
def test_foreign_packages_have_one_door(package):
    users = {
        room_of(path) for path in FILES for _, name in imports(path) if f"{name}.".startswith(f"{package}.")
    }
    assert users <= DOORS[package]


def chain(node: ast.AST) -> list[str]:
    """The names of a dotted expression, such as torch.ops.aten; the first is empty for any other object."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [getattr(node, "id", ""), *names[::-1]]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names_of_torch(path: Path) -> list[str]:
    """The names of torch in a file that torch does not promise to keep: private or experimental."""
    found = []
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [[*node.module.split("."), alias.name] for alias in node.names]
        elif isinstance(node, ast.Attribute):
            found.append(chain(node))
    allowed = ["torch", "utils", "_pytree"] if room_of(path) == "_tree" else None
    private = [names for names in found if "experimental" in names or any(map(is_private, names))]
    return [".".join(names) for names in private if names[0] == "torch" and names != allowed]


OUTSIDE = [path for path in FILES if room_of(path) != "_torch"]
NAMES = {  # of attributes that gdfunc defines
    node.attr if isinstance(node, ast.Attribute) else getattr(node, "name", None) or getattr(node, "id", "")
    for path in FILES
    for node in nodes_of(path)
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Name))
    or (isinstance(node, ast.Attribute) and chain(node)[0] in ("self", "cls"))
} | {name for path in FILES for name in path.relative_to(PACKAGE).with_suffix("").parts}


def is_documented(names: list[str]) -> bool:
    """Tell whether a name is one of NamedTuples or CPython, or of an operator, which has a schema."""
    is_of_python = names[-1] in ("_replace", "_fields", "_asdict") or names == ["sys", "_getframe"]
    return is_of_python or "aten" in names


@each(OUTSIDE)
def test_private_names_of_torch_have_one_door(path):
    assert not private_names_of_torch(path)


@each(OUTSIDE)
def test_private_attributes_of_foreign_objects_have_one_door(path):
    """Such as a tensor's `_version`: an attribute with a private name that gdfunc does not define."""
    nodes = [node for node in nodes_of(path) if isinstance(node, ast.Attribute)]
    foreign = [chain(node) for node in nodes if is_private(node.attr) and node.attr not in NAMES]
    assert not [".".join(names) for names in foreign if not is_documented(names)]


@each(OUTSIDE)
def test_foreign_modules_are_patched_in_one_room_only(path):
    """No setattr, and no assignment to an attribute of a module that the file imports."""
    modules = {
        alias.asname or alias.name.split(".")[0]
        for node in nodes_of(path)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    for node in nodes_of(path):
        if isinstance(node, ast.Call):
            assert chain(node.func)[-1] not in ("setattr", "delattr"), f"line {node.lineno}"
        if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            owner = chain(node.value)[0]
            assert owner not in modules, f"{owner} is changed in line {node.lineno}"


def test_an_eager_run_imports_no_module_of_a_compiler():
    code = """
import sys
import torch
import gdfunc as gd
gd.scan(lambda c, x: (c + x, c), torch.tensor(0), torch.arange(3), backend="eager")
heavy = "sympy", "torch._inductor", "torch._dynamo", "torch.fx.experimental.symbolic_shapes"
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_only_listed_packages_are_imported():
    allowed = {
        "gdfunc",
        "torch",
        "numpy",
        "matplotlib",
        "PIL",  # of matplotlib
        "sklearn",
        "tqdm",
        "pandas",
        "xarray",
        "safetensors",
        "optuna",
    } | sys.stdlib_module_names
    for path in FILES:
        assert {package for package, _ in imports(path)} <= allowed


FORBIDDEN_CALLS = {"eval", "exec", "manual_seed", "item", "load"}
OF_TORCHS_GENERATORS = {"rand", "randn", "randperm", "rand_like", "randn_like", "multinomial", "bernoulli"}


@each(FILES)
def test_nothing_forbidden_is_used(path):
    assert not any(isinstance(node, ast.Assert) for node in nodes_of(path))
    for node in nodes_of(path):
        if isinstance(node, ast.Call):
            name = chain(node.func)[-1]
            is_safe = chain(node.func) in (["np", "load"], ["load"])  # the second is the package's own
            own = name == "exec" and path.name == "_reread.py"  # code that it wrote itself, from no file
            assert name not in OF_TORCHS_GENERATORS, f"{name} in line {node.lineno}"
            assert name not in FORBIDDEN_CALLS or is_safe or own, f"{name} in line {node.lineno}"
            # In a step it would silently zero the derivative with respect to lr; a picture has none.
            assert name != "no_grad" or room_of(path) == "plot"
            for keyword in node.keywords:
                assert keyword.arg != "allow_pickle" or keyword.value.value is False
        if isinstance(node, ast.Attribute):
            assert node.attr != "data" or not isinstance(node.ctx, ast.Store)
    assert "pickle" not in {package for package, _ in imports(path)}


# The imports of each part of _scan: trace and backends make and run bodies, so _body lies below them.
SCAN = {
    "_scan": {"_adjoint", "_loop", "_cost"},
    "_adjoint": {"_body", "_loop"},
    "_loop": {"_derived", "trace", "backends", "_body"},
    "_derived": {"_body"},
    "trace": {"_body", "_recent"},
    "backends": {"_body", "_recent", "_cost"},
    "_body": set(),
    "_cost": set(),
    "_recent": set(),
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE / "_scan").parts[0].removesuffix(".py")


FILES_OF_SCAN = [path for path in FILES if room_of(path) == "_scan" and part_of(path) != "__init__"]


def test_scan_has_the_listed_parts():
    assert {part_of(path) for path in FILES_OF_SCAN} == {*SCAN}


@each(FILES_OF_SCAN)
def test_imports_inside_scan_go_down(path):
    assert rooms_imported(path, PACKAGE / "_scan") - {part_of(path)} <= SCAN[part_of(path)]


@pytest.mark.long
@each(FILES)
def test_no_import_hides_in_a_function(path):
    """A circle of imports could hide there: inside functions only heavy modules of others are imported."""
    for function in nodes_of(path):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                is_ours = isinstance(node, ast.ImportFrom) and node.level
                assert not is_ours, f"line {node.lineno}"


def lines_of_code(path: Path) -> set[int]:
    """The lines of a file without its comments, docstrings and empty lines."""
    no_code = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    with tokenize.open(path) as file:
        tokens = [token for token in tokenize.generate_tokens(file.readline) if token.type not in no_code]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in nodes_of(path):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


@each(FILES)
def test_no_file_and_no_function_is_long(path):
    assert len(path.read_text().splitlines()) <= 450
    lines = lines_of_code(path)
    for node in nodes_of(path):
        if isinstance(node, ast.FunctionDef):
            assert len(lines & set(range(node.lineno, node.end_lineno + 1))) <= 60, node.name


def imported_files(path: Path) -> set[Path]:
    """Our own files that a file imports by name."""
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for target in [base / alias.name for alias in node.names] + ([base] if node.module else []):
                files = target.with_suffix(".py"), target / "__init__.py"
                found |= {file for file in files if file.exists()}
    return found


def test_no_imports_form_a_circle():
    graphlib.TopologicalSorter({path: imported_files(path) for path in FILES}).prepare()


def test_no_room_is_a_drawer():
    assert not {room_of(path) for path in FILES} & {"utils", "helpers", "misc", "common"}


@each(sorted(Path(__file__).parent.rglob("test_*.py")))
def test_tests_import_no_tests(path):
    """Tables, references and assertions that several files share have modules of their own."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
            assert not [name for name in names if name.split(".")[-1].startswith("test_")], node.lineno
