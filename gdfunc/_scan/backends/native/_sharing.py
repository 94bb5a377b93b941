"""A large step as tables of calls: a function serves all statements that differ in their tensors alone.

Because a compiler takes as long for each of two equal statements, a tree of thousands of leaves would take
it minutes. A table is data: a thousand rows take a compiler ten milliseconds.
"""

import re
from collections.abc import Collection, Iterable
from itertools import groupby

from ._statement import Code, Repeat

LARGE = 2000  # lines, which compile in about two seconds: a shorter step runs faster in one function
_OUTER = {"bad", "stop", "return"}  # words that belong to the function around the step


class Tables:
    """Tables of calls, and the functions that they call.

    A row of a table is the number of a function and the places of its tensors. A function takes the places
    from its row and returns the next row.
    """

    def __init__(self, placed: Collection[str]) -> None:
        self.tables: list[str] = []
        self._placed = placed  # the names of all tensors but those of constants
        self._numbers: dict[str, int] = {}  # of the functions, by their text

    @property
    def functions(self) -> list[str]:
        """Write the functions, and the list of them."""
        lines = [
            f"static __attribute__((noinline)) const int64_t *shared_{number}(const int64_t *row, "
            f"char *const *base) {text}"
            for text, number in self._numbers.items()
        ]
        names = ", ".join(f"shared_{number}" for number in self._numbers.values())
        return [
            *lines,
            f"static const int64_t *(*const functions[])(const int64_t *, char *const *) = {{{names}}};",
        ]

    def lines(self, statements: Iterable[Code]) -> list[str]:
        """Write statements as calls by tables, but those that can stop the loop as they are."""
        written: list[str] = []
        pairs = [(statement, self._row(statement)) for statement in statements]
        for is_shared, group in groupby(pairs, lambda pair: bool(pair[1])):
            if is_shared:
                name, rows = f"calls_{len(self.tables)}", ",\n".join(row for _, row in group)
                self.tables.append(f"static const int64_t {name}[] = {{\n{rows}}};")
                written.append(f"CALL({name})")
            else:
                written += [line for statement, _ in group for line in statement.text]
        return written

    def _row(self, statement: Code) -> str:
        """Write a statement as a row of a table, or return nothing."""
        text = "\n".join(statement.text)
        words = dict.fromkeys(re.findall(r"\w+", text))
        if isinstance(statement, Repeat) or not _OUTER.isdisjoint(words):
            return ""
        buffers = {access.buffer.name: access.buffer for access in statement.accesses}
        written = {access.buffer.name for access in statement.accesses if access.writes}
        used = [word for word in words if word in buffers and word in self._placed]
        names = {name: f"tensor{at}" for at, name in enumerate(used)}
        tensors = [
            f"{'' if name in written else 'const '}{buffers[name].c_type} *const {names[name]} = "
            f"(void *)(base[row[{2 * at}]] + row[{2 * at + 1}]);"
            for at, name in enumerate(used)
        ]
        general = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), text)
        function = "\n".join(["{", *tensors, general, f"return row + {2 * len(used)};", "}"])
        number = self._numbers.setdefault(function, len(self._numbers))
        return ", ".join([str(number), *used])
