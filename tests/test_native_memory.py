"""Reuse of memory in a native loop: programs of random statements, run with and without it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdfunc._scan.backends.native import _memory
from gdfunc._scan.backends.native._index import Index, Var
from gdfunc._scan.backends.native._statement import Access, Buffer, Code, Repeat

EXTENT = 3
HERE = Index(0, ((Var("i0", EXTENT), 1),))
REVERSED = Index(EXTENT - 1, ((Var("i0", EXTENT), -1),))


def buffer(name):
    return Buffer(name, torch.float64, EXTENT)


def code(*reads, writes, place=HERE):
    """A statement that reads (buffer, place) pairs and writes a buffer."""
    return Code([], [*[Access(*read) for read in reads], Access(writes, place, writes=True)])


def elements(place, i):
    return range(EXTENT) if place is None else [place.constant + place.terms[0][1] * i]


def run(statements, place_of, memory, seen, clock):
    """Run a program on labels: note what each statement reads, and write new labels."""
    for statement in statements:
        if isinstance(statement, Repeat):
            for _ in range(statement.length):
                run(statement.statements, place_of, memory, seen, clock)
            continue
        reads = [access for access in statement.accesses if not access.writes]
        writes = [access for access in statement.accesses if access.writes]

        def read(reads, i):
            cells = [(place_of(r.buffer), e) for r in reads for e in elements(r.place, i)]
            seen.append([memory.get(cell) for cell in cells])

        order = range(EXTENT) if len(seen) % 2 else range(EXTENT)[::-1]  # the rounds are in no order
        for i in order:
            read(reads, i)
            for access in writes:
                for e in elements(access.place, i):
                    clock.append(e)
                    memory[place_of(access.buffer), e] = len(clock)
            # Any elements may also be read after, or written before.
            is_anywhere = any(access.place is None for access in writes)
            read([each for each in reads if is_anywhere or each.place is None], i)


def observed(statements, place_of, old, new, steps=3):
    memory, seen, clock = {(place_of(old), e): -e - 1 for e in range(EXTENT)}, [], []
    for _ in range(steps):
        run(statements, place_of, memory, seen, clock)
        for e in range(EXTENT):
            memory[place_of(old), e] = memory.get((place_of(new), e))
    return seen


@st.composite
def programs(draw):
    """Statements that read the old carry and what was written before, and that write the new carry."""
    old, new = buffer("old"), buffer("new")
    written, numbers = [old], iter(range(99))
    places = st.sampled_from([HERE, HERE, HERE, REVERSED, None])

    def statement():
        reads = draw(st.lists(st.tuples(st.sampled_from(written), places), max_size=2))
        target = new if draw(st.integers(0, 3)) == 0 else buffer(f"s{next(numbers)}")
        written.append(target)
        return code(*reads, writes=target, place=draw(places))

    def block(depth):
        made = [statement() for _ in range(draw(st.integers(1, 4)))]
        if depth and draw(st.booleans()):
            made.append(Repeat("t", 2, block(depth - 1)))
            made += [statement() for _ in range(draw(st.integers(0, 2)))]
        return made

    statements = block(2)
    if new not in written:
        statements.append(code((draw(st.sampled_from(written)), draw(places)), writes=new))
    return statements, old, new


@given(programs())
def test_carry_is_reused_only_when_no_later_reader_needs_it(program):
    statements, old, new = program
    if _memory.overwrites(_memory.uses(statements), old, new):
        reused = observed(statements, lambda each: old if each is new else each, old, new)
        assert reused == observed(statements, lambda each: each, old, new)


@given(programs())
def test_scratch_memory_is_shared_only_by_tensors_that_are_not_needed_at_once(program):
    statements, old, new = program
    lives = {
        each: life
        for each, life in _memory.spans(_memory.uses(statements)).items()
        if each not in (old, new)
    }
    slots = _memory.share(lives)
    assert all(slot.count >= each.count for each, slot in slots.items())
    names = {each: slots[each].name if each in slots else each for each in [*lives, old, new]}
    assert observed(statements, names.get, old, new) == observed(statements, lambda each: each, old, new)


OLD, NEW, OTHER = buffer("old"), buffer("new"), buffer("other")
REUSES = {  # the other statements are refused by the law above
    "each element from its own": [code((OLD, HERE), writes=NEW)],
    "from its own, read twice": [code((OLD, HERE), (OLD, HERE), writes=NEW)],
    "read before": [code((OLD, None), writes=OTHER), code((OTHER, None), writes=NEW)],
    "the new one read after": [code((OLD, HERE), writes=NEW), code((NEW, None), writes=OTHER)],
}


@pytest.mark.parametrize("name", REUSES)
def test_carry_is_reused_where_each_new_element_needs_only_the_one_it_replaces(name):
    assert _memory.overwrites(_memory.uses(REUSES[name]), OLD, NEW)


def test_carry_is_not_reused_where_a_view_of_it_is_read_or_nothing_is_written():
    row = Buffer("row", torch.float64, 1, OLD)
    for statement in (code((row, HERE), writes=NEW), code((OLD, HERE), writes=OTHER)):
        assert not _memory.overwrites(_memory.uses([statement]), OLD, NEW)


def test_scratch_memory_grows_with_what_is_needed_at_once_and_not_with_the_number_of_tensors():
    chain = [buffer(f"s{i}") for i in range(20)]
    statements = [code((a, HERE), writes=b) for a, b in pairwise(chain)]
    slots = _memory.share(_memory.spans(_memory.uses(statements)))
    assert len({slot.name for slot in slots.values()}) == 2
