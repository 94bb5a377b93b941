"""Every public name: one address, a docstring whose example runs, a place in the README or in a guide."""

import ast
import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import gdfunc as gd

from .assertions import run_doctest

ROOT = Path(gd.__file__).parents[1]
PLACES = ("README.md", "demos/README.md", "tests/benchmarks/README.md")
PAGES = [ROOT / place for place in PLACES if (ROOT / place).exists()]
README = PAGES[0].read_text() if PAGES else ""
PACKAGE = ROOT / "gdfunc"


def names_of(module):
    """The public names that a module's file defines, or re-exports as `from ... import name as name`."""
    for node in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names if alias.asname == alias.name]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


def public_names():
    """Each public object under the one address that a user writes after `gd.`."""
    names = {}
    for name in names_of(gd):
        value = getattr(gd, name)
        if inspect.ismodule(value):
            names |= {f"{name}.{inner}": getattr(value, inner) for inner in names_of(value)}
        else:
            names[name] = value
    return names


PUBLIC = public_names()
SPACES = {name: value for name, value in vars(gd).items() if inspect.ismodule(value) and name[0] != "_"}
GUIDES = "".join([README, *(module.__doc__ for module in SPACES.values())])


@pytest.mark.parametrize("name", [*PUBLIC, *SPACES])
def test_docstring_has_an_example_that_runs(name):
    if name.split(".")[-1] in ("digits", "diabetes", "breast_cancer"):
        pytest.importorskip("sklearn")
    if name in ("search.ask", "search.tell"):
        pytest.importorskip("optuna")
    tries, report = run_doctest((PUBLIC | SPACES)[name], name)
    assert not report, report
    assert tries, f"{name} has no example"


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if inspect.isfunction(value)])
def test_docstring_opens_with_one_sentence(name):
    first = inspect.getdoc(PUBLIC[name]).split("\n\n")[0]
    assert first.endswith("."), first
    assert not re.search(r"\.\s+[A-Z]", first), f"{first}: more than one sentence"


@pytest.mark.parametrize("name", PUBLIC)
def test_readme_or_a_guide_names_it(name):
    assert re.search(rf"\b{re.escape(name.split('.')[-1])}\b", GUIDES), f"{name} is in no guide"


def test_face_is_flat_and_explicit():
    source = (ROOT / "gdfunc" / "__init__.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names)
    assert len({id(value) for value in PUBLIC.values()}) == len(PUBLIC)


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_blocks_of_a_page_run_in_order(page):
    """A block may use what the blocks before it made; what it prints is checked if output follows."""
    globs, report, parser = {}, [], doctest.DocTestParser()
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    for index, block in enumerate(blocks(page)):
        if ">>>" in block:
            example = parser.get_doctest(block, globs, f"block {index}", None, 0)
            runner.run(example, out=report.append, clear_globs=False)
        else:
            with torch.random.fork_rng():  # from which a module of torch.nn draws its first parameters
                exec(compile(block, f"{page.name} block {index}", "exec"), globs)
        assert not report, "".join(report)


@each_page
def test_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def test_readme_is_short_and_has_code():
    assert len(README.splitlines()) <= 220
    assert len(blocks(PAGES[0])) >= 2
