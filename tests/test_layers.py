"""The rooms: a module imports only lower ranks, and each foreign package has one door."""

import ast
from pathlib import Path

import pytest

import gdfunc

PACKAGE = Path(gdfunc.__file__).parent
RANKS = {
    0: {"_tree", "_numerics", "_errors", "_progress", "_through", "random"},
    1: {"_sampling", "_gradients", "_transforms", "schedules", "_scan", "losses", "problems", "datasets"}
    | {"_per_sample", "reducers", "_reductions"},
    2: {"_step", "curvature"},
    3: {"_train", "methods", "_sweep", "_hypergradient", "modules", "stats", "privacy"},
    4: {"checkpoint", "distributed", "plot", "testing"},
}
RANK = {room: rank for rank, rooms in RANKS.items() for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
# random checks its arguments with _errors: a rank 0 room that imports nothing of ours.
SAME_RANK = {
    ("random", "_errors"),
    ("_gradients", "random"),
    ("_sampling", "random"),
    ("_tree", "_numerics"),
    ("problems", "random"),
    ("problems", "losses"),
    ("problems", "datasets"),
    ("reducers", "_per_sample"),
    ("reducers", "_reductions"),
    *[("_reductions", room) for room in ("_gradients", "_per_sample", "_scan")],
    ("privacy", "methods"),  # whose steps know how their states begin
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[tuple[str, str]]:
    """All (package, name) pairs that a file imports; our own rooms come as ("gdfunc", room)."""
    depth = len(path.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name.split(".")[0], alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module.split(".")[0], node.module))
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            found |= {("gdfunc", name) for name in names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_lower_ranks_only(path):
    room = room_of(path)
    assert room in RANK, f"{room} has no rank: add it to the design"
    for package, name in imports(path):
        if package == "gdfunc":
            assert RANK[name] < RANK[room] or (room, name) in SAME_RANK, f"{room} imports {name}"


DOORS = {
    "torch.utils._pytree": {"_tree"},
    "matplotlib": {"plot"},
    "hypothesis": {"testing"},
    "sklearn": {"datasets"},
    "tqdm": {"_progress"},
    "pandas": {"_sweep"},
}


@pytest.mark.parametrize("package", DOORS)
def test_foreign_packages_have_one_door(package):
    users = {room_of(path) for path in FILES if any(name.startswith(package) for _, name in imports(path))}
    assert users <= DOORS[package]


def test_only_known_packages_are_imported():
    known = {"gdfunc", "torch", "numpy", "matplotlib", "sklearn", "tqdm", "pandas"}
    standard = __import__("sys").stdlib_module_names
    for path in FILES:
        assert {package for package, _ in imports(path)} <= known | standard


FORBIDDEN_CALLS = {"eval", "exec", "manual_seed", "item", "load"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_forbidden_is_used(path):
    tree = ast.parse(path.read_text())
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            from_numpy = isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "np.load"
            own = name == "exec" and path.name == "_reread.py"  # code that it wrote itself, from no file
            assert name not in FORBIDDEN_CALLS or from_numpy or own, f"{name} in line {node.lineno}"
            # In a step it would silently zero the derivative with respect to lr; a picture has none.
            assert name != "no_grad" or room_of(path) == "plot"
            for keyword in node.keywords:
                assert keyword.arg != "allow_pickle" or keyword.value.value is False
        if isinstance(node, ast.Attribute):
            assert node.attr != "data" or not isinstance(node.ctx, ast.Store)
    assert "pickle" not in {package for package, _ in imports(path)}


def test_no_room_is_a_drawer():
    assert not {room_of(path) for path in FILES} & {"utils", "helpers", "misc", "common"}


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parent.rglob("test_*.py")), ids=lambda path: path.name
)
def test_tests_import_no_tests(path):
    """Tables, references and assertions that several files share have modules of their own."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
            assert not [name for name in names if name.split(".")[-1].startswith("test_")], node.lineno
