"""A body as C: where its tensors lie, what a step writes, and the loop around the steps."""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from operator import getitem
from typing import Any

import torch
from torch import fx

from ..._body import Aval, Body
from . import _operators
from ._contraction import transposition, vector
from ._index import strides_of
from ._kernel import C_TYPES, over
from ._operators import RESHAPES, Call, functions, name_of
from ._tensor import Block, Kept, Lazy, Memory, Stored, Unsupported, View, address, fill
from ._trace import operations

_MOST_WORK = 6e6  # rounds of loops in a step: with more, libraries that divide it into blocks are faster
LONG = 1e7  # rounds of loops, some ten milliseconds: what takes more looks whether it should stop
_MOST_OPERATIONS = 3000  # which take a compiler some ten seconds
_BY_VALUE = 256  # bytes of a carry that is copied rather than exchanged by its address
_ON_STACK = 8192  # bytes of intermediate results
_VIEWS = {*RESHAPES, "expand", "permute", "transpose", "t", "slice", "select", "flip", "alias", "detach"}


def write(body: Body) -> str:
    """Write the loop over a body in C, or refuse it.

    Raises:
        Unsupported: an operation, a dtype or a device is not covered, or a step is too large.
    """
    consts = [_Pointer(f"const_{i}", aval, True) for i, aval in enumerate(body.consts)]
    carry = [_Pointer(f"carry_{i}", aval, False) for i, aval in enumerate(body.carry)]
    x = [_Pointer(f"x_{i}", aval, True) for i, aval in enumerate(body.x)]
    y = [_Pointer(f"y_{i}", aval, False) for i, aval in enumerate(body.y)]
    block, graph = Block(), operations(body)
    moving = {i: aval for i, aval in enumerate(body.carry) if i not in _still(body, graph)}
    now = [pointer.memory for pointer in carry]
    after: list[Memory | None] = [None] * len(carry)
    for i, aval in moving.items():
        now[i], after[i] = (Memory(f"{copy}->c{i}", aval.shape, aval.dtype) for copy in ("now", "next"))
    inputs = [*[each.memory for each in consts], *now, *[each.memory for each in x]]
    _step(block, graph, inputs, after, [each.memory for each in y])
    if block.work > _MOST_WORK:
        raise Unsupported(f"a step of {block.work:.1g} operations, where torch's own kernels are faster")

    sizes = {i: prod(aval.shape) * aval.dtype.itemsize for i, aval in moving.items()}
    near = _nearest(block)
    small = sum(sizes.values()) <= _BY_VALUE and not block.fields
    if small:  # all is the compiler's to keep in registers
        home = "struct scratch here, *restrict w = &here;"
        turn = ["struct carry *restrict now = w->carries, *restrict next = w->carries + 1;"]
        end, last = ["*now = *next;"], "w->carries"
    else:
        stays = {i for i in moving if _overwrites(block.lines, f"now->c{i}", f"next->c{i}", f"carry_{i}")}
        moving = {i: aval for i, aval in moving.items() if i not in stays}
        _share(block)
        home = "struct scratch *restrict w = (struct scratch *)memory;"
        turn = [
            "struct carry *restrict now = w->carries + ((t - t0) & 1);",
            "struct carry *restrict next = w->carries + (~(t - t0) & 1);",
        ]
        end, last = [], "(w->carries + ((t1 - t0) & 1))"
    align = "" if small else "_Alignas(64) "
    carries = [
        f"{align}{C_TYPES[each.dtype]} c{i}[{max(prod(each.shape), 1)}];" for i, each in moving.items()
    ]
    places = list(enumerate([*consts, *carry, *x, *y]))
    of_member, of_step = places[: len(consts) + len(carry)], places[len(consts) + len(carry) :]
    lines = [
        *block.functions,
        f"struct carry {{ {' '.join(carries) or 'char none;'} }};",
        f"struct near {{ {_declared(near) or 'char none;'} }};",
        f"struct scratch {{ {_declared(block.fields)} struct carry carries[2]; }};",
        f"const int64_t scratch_size = {0 if small else 'sizeof(struct scratch)'};",
        f"const int64_t step_rounds = {int(block.work + block.nested)};",
        "int64_t run(int64_t n0, int64_t n1, int64_t t0, int64_t t1, char *const *place,",
        "            const int64_t *member, const int64_t *time, char *memory, const volatile int *stop) {",
        "struct near local, *restrict v = &local;",
        home,
        "int bad = 0;",
        "for (int64_t n = n0; n < n1; n++) {",
        "if (*stop) return -1;",
        *[pointer.declared(at, moves=False) for at, pointer in of_member],
        *[f"__builtin_memcpy(w->carries->c{i}, carry_{i}, {sizes[i]});" for i in moving],
        "for (int64_t t = t0; t < t1; t++) {",
        *turn,
        *[pointer.declared(at, moves=True) for at, pointer in of_step],
        *block.lines,
        "if (bad) return t;",
        *end,
        "}",
        *[f"__builtin_memcpy(carry_{i}, {last}->c{i}, {sizes[i]});" for i in moving],
        "}",
        "return -1;",
        "}",
    ]
    text = "\n".join([*lines, ""])
    kinds = [
        (c_type, bits) for c_type, bits in (("float", 32), ("double", 64)) if f"transpose_{c_type}(" in text
    ]
    return "\n".join([*_prelude(), *[line for kind in kinds for line in transposition(*kind)], text])


def _declared(fields: Mapping[str, tuple[str, int]]) -> str:
    return " ".join(f"_Alignas(64) {c_type} {name}[{count}];" for name, (c_type, count) in fields.items())


def _nearest(block: Block) -> dict[str, tuple[str, int]]:
    """Put the smallest tensors on the stack, for the compiler to keep in registers; give their fields."""
    near: dict[str, tuple[str, int]] = {}
    left = _ON_STACK
    for name, (_, count) in sorted(block.fields.items(), key=lambda item: item[1][1]):
        left -= count * 8
        if left >= 0:
            near[name] = block.fields.pop(name)
    block.lines[:] = [
        _SCRATCH.sub(lambda found: f"v->{found[1]}" if found[1] in near else found[0], line)
        for line in block.lines
    ]
    return near


def _numbered(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Lines with the number of their statement: a kernel is one, and so is a loop within the step."""
    statement = depth = 0
    for line in lines:
        yield statement, line
        depth += line.count("{") - line.count("}")
        statement += not depth


def _overwrites(lines: list[str], old: str, new: str, place: str) -> bool:
    """Let new values take the place of the old ones, if none of these is read once it is gone.

    That is so if the statement that first writes new ones reads at most the old element that it replaces,
    and no later one reads any.
    """
    uses = re.compile(rf"(?P<name>{re.escape(old)}|{re.escape(new)})\b(?:\[(?P<index>[^]]*)])?")
    found = [(number, use) for number, line in _numbered(lines) for use in uses.finditer(line)]
    writes = [(number, use) for number, use in found if use["name"] == new]
    if not writes:
        return False
    (first, write), *_ = writes
    for number, use in found:
        replaced = number == first and use["index"] == write["index"]
        if use["name"] == old and number >= first and not replaced:
            return False
    lines[:] = [uses.sub(lambda use: use[0].replace(use["name"], place, 1), line) for line in lines]
    return True


def _share(block: Block) -> None:
    """Let tensors that are not needed at the same time lie in the same place: less memory, and nearer."""
    spans: dict[str, list[int]] = {}
    for statement, line in _numbered(block.lines):
        for name in _SCRATCH.findall(line):
            spans.setdefault(name, [statement, statement])[1] = statement
    slots: dict[str, tuple[str, int, int]] = {}
    renamed = {}
    for name, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        c_type, count = block.fields[name]
        free = [slot for slot, (kind, _, busy) in slots.items() if kind == c_type and busy < first]
        near = min(free, key=lambda slot: abs(slots[slot][1] - count), default=f"r{len(slots)}")
        renamed[name] = near
        slots[near] = c_type, max(count, slots.get(near, ("", 0, 0))[1]), last
    block.lines[:] = [_SCRATCH.sub(lambda found: f"w->{renamed[found[1]]}", line) for line in block.lines]
    block.fields.clear()
    block.fields.update({slot: (c_type, count) for slot, (c_type, count, _) in slots.items()})


_SCRATCH = re.compile(r"w->(s\d+)\b")


class _Pointer:
    """A tensor of the caller's, at its place for this member and step."""

    def __init__(self, name: str, aval: Aval, is_input: bool) -> None:
        _check(aval)
        self.name, self.is_input, self.c_type = name, is_input, C_TYPES[aval.dtype]
        self.memory = Memory(name, aval.shape, aval.dtype)

    def declared(self, at: int, moves: bool) -> str:
        kind = f"{'const ' if self.is_input else ''}{self.c_type} *"
        step = f" + t * time[{at}]" if moves else ""
        return f"{kind}restrict {self.name} = ({kind})(place[{at}] + n * member[{at}]{step});"


def _check(aval: Any, where: str = "") -> None:
    if aval.dtype not in C_TYPES:
        raise Unsupported(f"{str(aval.dtype).removeprefix('torch.')} tensors{where}")
    if aval.device.type != "cpu":
        raise Unsupported(f"tensors on {aval.device}")


def _still(body: Body, graph: fx.GraphModule) -> set[int]:
    """Which leaves of the carry every step returns as they are."""
    nodes = list(graph.graph.nodes)
    given = nodes[len(body.consts) : len(body.consts) + len(body.carry)]
    return {i for i, node in enumerate(given) if nodes[-1].args[0][i] is node}


def _step(
    block: Block,
    graph: fx.GraphModule,
    inputs: Sequence[Lazy],
    carry: Sequence[Memory | None],
    y: Sequence[Memory],
) -> None:
    """Write what a step does: each result goes to its target, if it has one."""
    targets = [*carry, *y]
    nodes = list(graph.graph.nodes)
    operations = [node for node in nodes if node.op == "call_function"]
    if len(operations) > _MOST_OPERATIONS:
        raise Unsupported(f"a step of {len(operations)} operations")
    results = list(nodes[-1].args[0])
    waiting: dict[fx.Node, Memory] = {}
    for node, target in zip(results, targets, strict=True):
        if target is not None:
            waiting.setdefault(node, target)
    known: dict[fx.Node, Any] = dict(zip(nodes, inputs, strict=False))
    same: dict[Any, Any] = {}
    for node in operations:
        key = _key(node, known)
        if key is not None and key in same:
            known[node] = same[key]
            continue
        tensor = _lowered(block, node, known)
        if isinstance(tensor, Lazy):
            tensor = _kept(block, node, tensor, waiting.get(node))
        known[node] = tensor
        if key is not None:
            same[key] = tensor
    pairs = list(zip(results, targets, strict=True))
    # What reads the carry goes before what replaces it.
    for node, target in pairs[len(carry) :] + pairs[: len(carry)]:
        if target is not None:
            tensor = known[node]
            source = tensor.memory() if isinstance(tensor, Stored) else tensor
            if source is not target:
                fill(block, target, source)


def _key(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """What two nodes share that compute the same."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    args = fx.node.map_arg((node.args, node.kwargs), lambda arg: ("node", id(known[arg])))
    return node.target, repr(args)


def _lowered(block: Block, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if node.target is getitem:
        return known[node.args[0]][node.args[1]]  # type: ignore[index]
    if hasattr(node.target, "loop"):
        return _loop(block, node.target.loop, [known[arg] for arg in node.args])  # type: ignore[index]
    if not isinstance(node.target, torch._ops.OpOverload):
        raise Unsupported(str(node.target))
    for value in node.meta["val"] if isinstance(node.meta["val"], (list, tuple)) else [node.meta["val"]]:
        _check(value, f" ({node.target})")
    schema = node.target._schema
    order = [argument.name for argument in schema.arguments]
    defaults = {each.name: each.default_value for each in schema.arguments if each.has_default_value()}
    given = defaults | dict(zip(order, node.args, strict=False)) | node.kwargs
    arguments = fx.node.map_arg({name: given[name] for name in order if name in given}, known.__getitem__)
    return _operators.lower(Call(block, node, arguments))


def _kept(block: Block, node: fx.Node, tensor: Lazy, target: Memory | None) -> Lazy:
    """Store what is a result, and what is used twice and is not cheap."""
    users = _users(node)
    base = tensor
    while isinstance(base, View):
        base = base.source
    base.shared = base.shared or len(users) > 1
    if target is not None:
        if isinstance(tensor, Stored) and tensor.target is None and tensor._memory is None:
            tensor.target = target
            return tensor
        kept = Kept(block, tensor)
        kept.target = target
        return kept
    cheap = isinstance(tensor, (Memory, Stored, View)) or tensor.cost < 2
    return tensor if cheap or len(users) == 1 else Kept(block, tensor)


def _users(node: fx.Node) -> list[fx.Node]:
    """Who computes with it, views of it included."""
    users = []
    for user in node.users:
        users += _users(user) if name_of(user.target) in _VIEWS else [user]
    return users


def _loop(block: Block, loop: Any, tensors: Sequence[Lazy]) -> list[Lazy]:
    """Write a loop within the step."""
    body: Body = loop.body
    graph = operations(body)
    inner = Block([], block.fields, block.functions, block.names)
    t = f"t{next(block.names)}"
    consts, init, xs = body.split(tensors)
    still = _still(body, graph)
    now = [
        _memory(block, leaf) if i in still else block.scratch(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(init)
    ]
    for i, leaf in enumerate(init):
        if i not in still:
            fill(block, now[i], leaf)
    ys = [block.scratch((loop.length, *aval.shape), aval.dtype) for aval in body.y]
    row = f"({loop.length - 1} - {t})" if loop.reverse else t
    x = [_row(inner, _memory(block, leaf, free=1), row, "const ") for leaf in xs]
    y = [_row(inner, leaf, row, "") for leaf in ys]
    after = [None if i in still else block.scratch(leaf.shape, leaf.dtype) for i, leaf in enumerate(init)]
    _step(inner, graph, [*[_memory(block, leaf) for leaf in consts], *now, *x], after, y)
    for old, new in zip(now, after, strict=True):
        if new is not None and not _overwrites(inner.lines, old.pointer, new.pointer, old.pointer):
            size = prod(new.shape) * new.dtype.itemsize
            inner.lines.append(f"__builtin_memcpy({old.pointer}, {new.pointer}, {size});")
    rounds = loop.length * (inner.work + inner.nested)
    block.nested += rounds
    if rounds > LONG:
        inner.lines.append("if (*stop) return -1;")
    block.lines += [f"for (int64_t {t} = 0; {t} < {loop.length}; {t}++) {{", *inner.lines, "}"]
    block.work = max(block.work, inner.work)  # libraries win on large steps, however many there are
    return [*now, *ys]


def _memory(block: Block, tensor: Lazy, free: int = 0) -> Memory:
    """The tensor where it lies, if that is contiguous but for the first axes; else in memory of its own."""
    base = tensor
    while isinstance(base, View):
        base = base.source
    if isinstance(base, (Memory, Stored)):
        loops, point = over(tensor.shape, flat=False)
        memory, place = address(block, tensor, point)
        strides = [sum(place.factor(var) for var, _ in index.terms) for index in point]
        shape = tensor.shape[free:]
        dense = zip(shape, strides[free:], strides_of(shape), strict=True)
        if {var for var, _ in place.terms} <= {*loops} and all(n == 1 or a == b for n, a, b in dense):
            return Memory(memory.pointer, tensor.shape, tensor.dtype, strides, place.constant)
    return Kept(block, tensor).memory()


def _row(block: Block, memory: Memory, row: str, const: str) -> Memory:
    """One step's part of a tensor of x's or y's."""
    shape, name = memory.shape[1:], f"r{next(block.names)}"
    kind = f"{const}{C_TYPES[memory.dtype]} *"
    block.lines.append(f"{kind}{name} = {memory.pointer} + {memory.start} + {row} * {memory.strides[0]};")
    return Memory(name, shape, memory.dtype)


# Those of the C library that it has for whole vectors too.
_VECTORISED = {"exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sin", "cos", "tan", "asin", "acos"}
_VECTORISED |= {"atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "pow", "atan2"}
_VECTORISED |= {"hypot"}


def _prelude() -> list[str]:
    """What all programs begin with; functions of the C library take whole vectors where it has such."""
    lines = [
        "#include <stdint.h>",
        "#ifdef VECTOR_MATH",
        '#define MATH __attribute__((simd("notinbranch"), const))',
        "#else",
        "#define MATH __attribute__((const))",
        "#endif",
        "#ifdef __clang__",
        "#define TILES __attribute__((noinline))",
        "#define SHUFFLE(integer, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)",
        "#else",
        '#define TILES __attribute__((noinline, optimize("fp-contract=fast")))',
        "#define SHUFFLE(integer, a, b, ...) "
        f"__builtin_shuffle(a, b, (integer __attribute__((vector_size({vector()[0]})))){{__VA_ARGS__}})",
        "#endif",
    ]
    for c_type, suffix in (("float", "f"), ("double", "")):
        lines.append(
            f"typedef {c_type} vector_{c_type} "
            f"__attribute__((vector_size({vector()[0]}), aligned({4 if suffix else 8}), may_alias));"
        )
        for name, takes in functions().items():
            kind = "MATH" if name in _VECTORISED else "__attribute__((const))"
            lines.append(f"{kind} {c_type} {name}{suffix}({', '.join([c_type] * takes)});")
    return lines
