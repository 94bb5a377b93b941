"""A large step in small functions, of which one serves all statements that differ in their tensors alone.

Because a compiler takes more than twice as long for a function of twice the length, and as long for each of
two equal statements, a tree of thousands of leaves would take it minutes.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from ._statement import Code, Repeat

LARGE = 2000  # lines, which compile in about two seconds: a shorter step runs faster in one function
_CALLS = 100  # in one function
# Because calls alone leave nothing to optimise, and gcc takes half the time for them so.
_SHARED, _PART = "__attribute__((noinline, noipa))", '__attribute__((noinline, optimize("O1")))'
_OUTER = {"bad", "stop", "return"}  # words that belong to the function around the step


def shared(statements: Iterable[Code], functions: list[str]) -> list[str]:
    """Write statements as calls of functions, which are added, unless they can stop the loop."""
    names: dict[str, str] = {}
    written = [_call(statement, names) or "\n".join(statement.text) for statement in statements]
    functions += [f"static {_SHARED} void {name}{text}" for text, name in names.items()]
    return list(parts(written, functions))


def parts(lines: Sequence[str], functions: list[str]) -> Iterator[str]:
    """Put rows of calls into functions, which are added."""
    for is_call, found in groupby(lines, lambda line: "\n" not in line and line.endswith(");")):
        row = list(found)
        for start in range(0, len(row), _CALLS) if is_call else ():
            name = f"part_{len(functions)}"
            text = "\n".join(row[start : start + _CALLS])
            functions.append(f"static {_PART} void {name}(PLACES) {{\n{text}\n}}")
            yield f"{name}(HERE);"
        yield from () if is_call else row


def _call(statement: Code, names: dict[str, str]) -> str:
    """Write a statement as a call of a function whose parameters are its tensors, or return nothing."""
    text = "\n".join(statement.text)
    words = dict.fromkeys(re.findall(r"\w+", text))
    if isinstance(statement, Repeat) or not _OUTER.isdisjoint(words):
        return ""
    buffers = {access.buffer.name: access.buffer for access in statement.accesses}
    written = {access.buffer.name for access in statement.accesses if access.writes}
    used = [word for word in words if word in buffers]
    places = {name: f"tensor{at}" for at, name in enumerate(used)}
    parameters = [
        f"{'' if name in written else 'const '}{buffers[name].c_type} *{places[name]}" for name in used
    ]
    general = re.sub(r"\w+", lambda word: places.get(word[0], word[0]), text)
    function = f"({', '.join(parameters)}) {{\n{general}\n}}"
    return f"{names.setdefault(function, f'shared_{len(names)}')}({', '.join(used)});"
