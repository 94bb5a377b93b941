"""A body as C: what a step does, and where its tensors lie."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from math import prod
from operator import getitem
from string import Template
from typing import Any

from torch import fx

from ...._torch._graphs import OpOverload, schema_arguments
from ..._body import Body, Loop
from ._memory import Uses, nearest, overwrites, share, spans, uses
from ._sharing import LARGE, Tables
from ._statement import C_TYPES, Access, Buffer, Code, Repeat, Tiles, size_of
from ._tensor import Block, Lazy, Memory, Stored, TorchIsFaster, Unsupported, View, contiguous, fill, stored
from ._trace import operations
from .operators import RESHAPES, Call, lower, name_of

# Sizes from which torch's own kernels are faster, measured by tests/benchmarks/test_native_limit.py. On one
# thread, products lose their lead at 4e8 FLOP, and a second thread helps torch alone. The rest was ahead
# ten times at 6e8 bytes, because native makes one pass where torch makes many.
_MOST_FLOP, _MOST_BYTES = 2e8, 1e9
_DEEP = 32  # computations in a row that wait for memory: more would nest too deep for Python
LONG = 1e7  # rounds of loops, some ten milliseconds: a longer loop looks whether it should stop
_MOST_LINES = 10_000  # of a step, which take a compiler some ten seconds
_BY_VALUE = 256  # bytes of a carry that is copied rather than exchanged by its address
_VIEWS = {*RESHAPES, "expand", "permute", "transpose", "t", "slice", "select", "flip", "alias", "detach"}
Parts = dict[str, list[str]]  # lines, by their names in program.c
Named = tuple[str, Buffer]  # a tensor of the caller's, and its kind
Carry = dict[int, tuple[Memory, Memory]]  # old and new, by the number of the leaf
FUNCTIONS, _PROGRAM = (
    files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("functions.c", "program.c")
)


def write(body: Body, tiles: Tiles) -> str:
    """Write the loop over a body in C, or refuse it.

    Args:
        tiles: the vectors of the processor on which the loop will run.

    Raises:
        Unsupported: an operation, a dtype or a device is not covered, or a step is too large.
    """
    for aval in (*body.consts, *body.carry, *body.x, *body.y):
        _check(aval)
    groups = {"CONST": body.consts, "CARRY": body.carry, "X": body.x, "Y": body.y}
    arguments = {
        kind: [_memory(f"{kind.lower()}_{i}", aval) for i, aval in enumerate(avals)]
        for kind, avals in groups.items()
    }
    block = Block(tiles)
    consts, init, xs, ys = arguments.values()

    def memory(name: str, leaf: Lazy) -> Memory:
        return block.scratch(leaf.shape, leaf.dtype) if _bytes(leaf) <= _BY_VALUE else _memory(name, leaf)

    _, carry = _step(block, block, body, consts, init, xs, ys, memory)
    flop, moved = size_of(block.statements)
    if flop / _MOST_FLOP + moved / _MOST_BYTES > _limit():
        raise TorchIsFaster(
            f"a step of {flop:.1g} FLOP in products and {moved:.1g} bytes beyond them, where torch's own "
            f"kernels are faster (GDFUNC_NATIVE_LIMIT=inf in the environment covers it all the same)"
        )
    buffers = [(kind, memory.buffer) for kind, memories in arguments.items() for memory in memories]
    of_member = len(body.consts) + len(body.carry)
    text, load, save = _placed(block, carry, init)
    parts = {"load": load, "step": block.statements, "save": save}
    is_large = sum(len(statement.text) for statement in block.statements) > LARGE
    text |= _in_tables(text, buffers, parts) if is_large else _as_it_is(buffers, parts, of_member)
    code = "\n".join([*block.functions, *text["shared"], *text["step"]])
    if (size := 1 + code.count("\n")) > _MOST_LINES:
        raise Unsupported(f"a step of {size} lines of C")
    text |= {
        "functions": block.functions,
        "rounds": [str(int(sum(statement.rounds for statement in block.statements)))],
        "functions_of_c": [FUNCTIONS],
        "vector": [str(block.tiles.width)],
    }
    return Template(_PROGRAM).substitute({name: "\n".join(lines) for name, lines in text.items()})


@cache
def _limit() -> float:
    """Return the factor by which the user moves the limit of a step's size. It is read once."""
    text = os.environ.get("GDFUNC_NATIVE_LIMIT", "1")
    try:
        if (factor := float(text)) >= 0:
            return factor
    except ValueError:
        pass
    raise ValueError(f"GDFUNC_NATIVE_LIMIT must be a number >= 0, such as 2 or inf; got {text!r}")


def _as_it_is(buffers: Sequence[Named], parts: Mapping[str, Sequence[Code]], of_member: int) -> Parts:
    """Write a step in one function, with a variable for each tensor of the caller's."""
    declared = [f"{kind}({each.c_type}, {each.name}, {at})" for at, (kind, each) in enumerate(buffers)]
    step = {name: [line for code in codes for line in code.text] for name, codes in parts.items()}
    return step | {
        "shared": [],
        "tables": [],
        "of_member": declared[:of_member],
        "of_step": declared[of_member:],
    }


def _in_tables(text: Parts, buffers: Sequence[Named], parts: Mapping[str, Sequence[Code]]) -> Parts:
    """Write a large step as tables of calls, in which the name of each tensor is a macro for its place."""
    arguments = {each.name: f"ARGUMENT({each.c_type}, {at})" for at, (_, each) in enumerate(buffers)}
    places = [f"#define {name} {place}" for name, place in arguments.items()] + text["places"]
    tables = Tables({line.split(" ")[1] for line in places})
    step = {name: tables.lines(codes) for name, codes in parts.items()}
    locate = f"LOCATE({len(buffers)})"
    return step | {
        "save": [locate, *step["save"]],
        "places": places,
        "scratch": [*text["scratch"], f"char *base[FIXED + {len(buffers)}];"],
        "shared": tables.functions,
        "tables": tables.tables,
        "of_member": [locate],
        "of_step": [locate],
    }


def _placed(block: Block, carry: Carry, init: Sequence[Memory]) -> tuple[Parts, list[Code], list[Code]]:
    """Write where the tensors of a step lie, and how the carry gets there and back."""
    places: dict[Buffer, str] = {}
    found = uses(block.statements)
    load, save, moving = [], [], []
    for i, (old, new) in carry.items():
        if _bytes(old) <= _BY_VALUE:
            _replace(block, found, old, new)
        elif overwrites(found, old.buffer, new.buffer):
            places |= dict.fromkeys((old.buffer, new.buffer), f"carry_{i}")
            continue
        else:
            places |= {old.buffer: f"NOW(c{i})", new.buffer: f"NEXT(c{i})"}
            moving.append(f"_Alignas(64) {old.buffer.c_type} c{i}[{old.buffer.count}];")
        load.append(_copy(old, init[i]))
        save.append(_copy(init[i], old))
    lives = spans(uses(block.statements))
    lives |= {old.buffer: (0, len(block.statements)) for old, _ in carry.values()}
    scratch = [buffer for buffer in block.buffers if buffer in lives]
    near = dict.fromkeys(nearest(scratch))
    far = share({buffer: lives[buffer] for buffer in scratch if buffer not in near})
    places |= {buffer: f"NEAR({buffer.name})" for buffer in near}
    places |= {buffer: f"SCRATCH({slot.name})" for buffer, slot in far.items()}
    places |= {buffer: buffer.parent.name for buffer in block.buffers if buffer.parent}
    slots = {slot.name: slot for slot in far.values()}.values()
    text = {
        "places": [f"#define {buffer.name} {place}" for buffer, place in places.items()],
        "carry": moving,
        "near": [f"_Alignas(64) {buffer.c_type} {buffer.name}[{buffer.count}];" for buffer in near],
        "scratch": [f"_Alignas(64) {slot.c_type} {slot.name}[{slot.count}];" for slot in slots],
    }
    return text, load, save


def _bytes(leaf: Lazy) -> int:
    return prod(leaf.shape) * leaf.dtype.itemsize


def _copy(target: Memory, source: Memory) -> Code:
    text = f"__builtin_memcpy({target.buffer.name}, {source.buffer.name}, {_bytes(target)});"
    return Code([text], [Access(target.buffer, writes=True), Access(source.buffer)])


def _memory(name: str, leaf: Any) -> Memory:
    return Memory(Buffer(name, leaf.dtype, max(prod(leaf.shape), 1)), leaf.shape)


def _check(aval: Any, where: str = "") -> None:
    if aval.dtype not in C_TYPES:
        raise Unsupported(f"{str(aval.dtype).removeprefix('torch.')} tensors{where}")
    if aval.device.type != "cpu":
        raise Unsupported(f"tensors on {aval.device}")


def _step(
    block: Block,
    around: Block,
    body: Body,
    consts: Sequence[Lazy],
    init: Sequence[Lazy],
    xs: Sequence[Lazy],
    ys: Sequence[Memory],
    memory: Callable[[str, Any], Memory],
) -> tuple[list[Memory], Carry]:
    """Write a step of a loop. Return the carry, and where its leaves lie before and after the step.

    Args:
        around: the block around the loop; tensors from outside are made contiguous there.
        memory: makes a place for the old or the new value of a leaf. A leaf that never changes needs none.
    """
    nodes = list(operations(body).nodes)
    pairs = zip(nodes[len(consts) :], nodes[-1].args[0], init, strict=False)
    changed = [i for i, (old, new, _) in enumerate(pairs) if old is not new]
    carry = {i: (memory(f"old_{i}", init[i]), memory(f"new_{i}", init[i])) for i in changed}
    before = [carry[i][0] if i in carry else contiguous(around, leaf) for i, leaf in enumerate(init)]
    after = [carry[i][1] if i in carry else None for i in range(len(init))]
    inputs = [*[contiguous(around, leaf) for leaf in consts], *before, *xs]
    calls = [node for node in nodes if node.op == "call_function"]
    results = list(zip(nodes[-1].args[0], [*after, *ys], strict=True))
    targets = {node: target for node, target in reversed(results) if target is not None}
    values: dict[fx.Node, Any] = dict(zip(nodes, inputs, strict=False))
    computed: dict[Any, Any] = {}
    depth: dict[fx.Node, int] = {}  # computations in a row that a value not yet in memory waits for
    for node in calls:
        key = _key(node, values)
        depth[node] = 1 + max((depth.get(source, 0) for source in node.all_input_nodes), default=0)
        if key not in computed:
            value = _lowered(block, node, values)
            if isinstance(value, Lazy):
                value = _stored(block, node, value, targets.get(node))
                if depth[node] > _DEEP:
                    value = (
                        value.memory()
                        if isinstance(value, Stored)
                        else contiguous(block, value, free=len(value.shape))
                    )
            computed[key] = value
        values[node] = computed[key]
        if isinstance(values[node], Memory):
            depth[node] = 0
    # Because a result that reads the carry must be written before one that replaces it.
    for node, target in results[len(after) :] + results[: len(after)]:
        if target is not None:
            value = values[node]
            source = value.memory() if isinstance(value, Stored) else value
            if source is not target:
                fill(block, target, source)
    return before, carry


def _key(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Make a key that two nodes share if they compute the same."""
    if not isinstance(node.target, OpOverload):
        return node
    args = fx.node.map_arg((node.args, node.kwargs), lambda arg: ("node", id(values[arg])))
    return node.target, repr(args)


def _lowered(block: Block, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.target is getitem:
        return values[node.args[0]][node.args[1]]  # type: ignore[index]
    if isinstance(node.target, Loop):
        return _loop(block, node.target, [values[arg] for arg in node.args])
    if not isinstance(node.target, OpOverload):
        raise Unsupported(str(node.target))
    for value in node.meta["val"] if isinstance(node.meta["val"], (list, tuple)) else [node.meta["val"]]:
        _check(value, f" ({node.target})")
    schema = schema_arguments(node.target)
    order = [argument.name for argument in schema]
    defaults = {each.name: each.default_value for each in schema if each.has_default_value()}
    given = defaults | dict(zip(order, node.args, strict=False)) | node.kwargs
    arguments = fx.node.map_arg({name: given[name] for name in order if name in given}, values.__getitem__)
    return lower(Call(block, node, arguments))


def _stored(block: Block, node: fx.Node, tensor: Lazy, target: Memory | None) -> Lazy:
    """Store a tensor that is a result, or that is used twice and is not cheap."""
    users = _users(node)
    base = tensor
    while isinstance(base, View):
        base = base.source
    base.shared = base.shared or len(users) > 1
    if target is not None:
        if isinstance(tensor, Stored) and not tensor.target and not tensor.written:
            tensor.target = target
            return tensor
        return stored(block, tensor, target)
    is_cheap = isinstance(tensor, (Memory, Stored, View)) or tensor.cost < 2
    return tensor if is_cheap or len(users) == 1 else stored(block, tensor)


def _users(node: fx.Node) -> list[fx.Node]:
    """List the nodes that compute with a tensor, or with a view of it."""
    users = []
    for user in node.users:
        users += _users(user) if name_of(user.target) in _VIEWS else [user]
    return users


def _loop(block: Block, loop: Loop, tensors: Sequence[Lazy]) -> list[Lazy]:
    """Write a loop within the step."""
    body, inner = loop.body, replace(block, statements=[], packed={})
    consts, init, xs = body.split(tensors)
    ys = [block.scratch((loop.length, *aval.shape), aval.dtype) for aval in body.y]
    counter = f"t{next(block.names)}"
    row = f"({loop.length - 1} - {counter})" if loop.reverse else counter
    x = [_row(inner, contiguous(block, leaf, free=1), row, "const ") for leaf in xs]
    y = [_row(inner, leaf, row) for leaf in ys]
    scratch = lambda _, leaf: block.scratch(leaf.shape, leaf.dtype)  # noqa: E731
    last, carry = _step(inner, block, body, consts, init, x, y, scratch)
    found = uses(inner.statements)
    for i, (old, new) in carry.items():
        fill(block, old, init[i])
        _replace(inner, found, old, new)
    if loop.length * sum(statement.rounds for statement in inner.statements) > LONG:
        inner.statements.append(Code(["if (*stop) return -1;"]))
    block.statements.append(Repeat(counter, loop.length, inner.statements))
    return [*last, *ys]


def _replace(block: Block, found: Uses, old: Memory, new: Memory) -> None:
    """End a round: the new carry becomes the old one, in place where that is possible."""
    if overwrites(found, old.buffer, new.buffer):
        new.buffer.parent = old.buffer
    else:
        block.statements.append(_copy(old, new))


def _row(block: Block, memory: Memory, row: str, const: str = "") -> Memory:
    """Point to one step's part of a tensor of x's or y's."""
    part = Buffer(f"r{next(block.names)}", memory.dtype, prod(memory.shape[1:]), memory.buffer)
    place = f"{memory.buffer.name} + {memory.start} + {row} * {memory.strides[0]}"
    text = f"{const}{part.c_type} *{part.name} = {place};"
    block.statements.append(Code([text], [Access(memory.buffer)]))
    return Memory(part, memory.shape[1:])
