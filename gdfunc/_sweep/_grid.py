"""The points of a sweep. Axes are data, or shape the program."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _html, _tree, checkpoint
from .._torch._transforms import is_transformed
from .._tree import Tree


@dataclass(frozen=True, eq=False)
class Axis:
    """The values of one argument: a tree of tensors [n, ...] if vmapped, else a tuple of objects."""

    values: Any
    vmapped: bool
    labels: list[Any]  # for each value: itself if it is plain, else its `__name__` or its position

    def take(self, positions: Sequence[int]) -> "Axis":
        if self.vmapped:
            rows = _tree.map(lambda leaf: leaf[list(positions)], self.values)
        else:
            rows = tuple(self.values[i] for i in positions)
        return Axis(rows, self.vmapped, [self.labels[i] for i in positions])

    def first(self) -> Any:
        return _tree.map(lambda leaf: leaf[0], self.values) if self.vmapped else self.values[0]

    def firsts(self) -> list[int]:
        """Return for each position the first position of an equal value."""
        seen: dict[Any, int] = {}
        return [seen.setdefault(_identity(value), i) for i, value in enumerate(self.values)]

    def find(self, name: str, wanted: Any) -> list[int]:
        """Find the positions of a value. A float need only agree to a millionth."""
        label = _label(wanted, wanted)
        is_array = isinstance(label, Tensor | np.ndarray)
        found = [i for i, own in enumerate(self.labels) if not is_array and own == label]
        if not found and isinstance(label, float):
            floats = ((i, own) for i, own in enumerate(self.labels) if isinstance(own, float))
            found = [i for i, own in floats if math.isclose(own, label, rel_tol=1e-6)]
        if not found and not self.vmapped:
            found = [i for i, value in enumerate(self.values) if value is wanted]
        if not found:
            raise ValueError(f"no point has {name} = {wanted!r}; its values are {self.labels}")
        return found


class Grid:
    """The points of a sweep, in the order of its members: the result of `grid`.

    `len(grid)` is N, `grid[i]` the arguments of member i, `grid.shape` the sizes of the axes, or [N].
    """

    def __init__(self, axes: dict[str, Axis], zipped: bool) -> None:
        self.axes, self.zipped = axes, zipped
        sizes = tuple(len(axis.labels) for axis in axes.values())
        self.shape = sizes[:1] if zipped else sizes
        each = (range(size) for size in sizes)
        self.positions = list(zip(*each, strict=True) if zipped else product(*each))

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, member: int) -> dict[str, Any]:
        point = self.part([range(len(self))[member]])
        return {name: axis.first() for name, axis in point.axes.items()}

    def __repr__(self) -> str:
        sizes = [f"{name} [{len(axis.labels)}]" for name, axis in self.axes.items()]
        return f"Grid({(' = ' if self.zipped else ' × ').join(sizes)})"

    def _repr_html_(self) -> str:
        """Show the axes in a notebook."""
        rows = []
        for name, axis in self.axes.items():
            values = ", ".join(map(str, axis.labels[:8])) + ", …" * (len(axis.labels) > 8)
            rows.append((name, len(axis.labels), "vmapped" if axis.vmapped else "looped", values))
        return _html.table(repr(self), ("axis", "size", "runs", "values"), rows)

    def groups(self) -> list[list[int]]:
        """List the members group by group. The looped values of a group are equal."""
        firsts = [None if axis.vmapped else axis.firsts() for axis in self.axes.values()]
        found: dict[tuple[int, ...], list[int]] = {}
        for member, positions in enumerate(self.positions):
            shared = tuple(first[i] for first, i in zip(firsts, positions, strict=True) if first)
            found.setdefault(shared, []).append(member)
        return list(found.values())

    def split(self, members: Sequence[int]) -> tuple[dict[str, Any], dict[str, Tree]]:
        """Return the looped arguments of a group, and the rows of the vmapped ones for its members."""
        axes = self.part(members).axes.items()
        looped = {name: axis.first() for name, axis in axes if not axis.vmapped}
        return looped, {name: axis.values for name, axis in axes if axis.vmapped}

    def labels(self, member: int) -> dict[str, Any]:
        pairs = zip(self.axes.items(), self.positions[member], strict=True)
        return {name: axis.labels[i] for (name, axis), i in pairs}

    def place(self, members: Sequence[int]) -> str:
        """Describe a point in words, or a chunk by its shared values and its vmapped axes."""
        several = [name for name, axis in self.axes.items() if axis.vmapped and len(members) > 1]
        labels = self.labels(members[0]).items()
        shared = [f"{name}={label}" for name, label in labels if name not in several]
        over = [f"{len(members)} members over {', '.join(several)}"] if several else []
        return ", ".join(shared + over)

    def part(self, members: Sequence[int]) -> "Grid":
        """Make the zipped grid of these members."""
        columns = zip(*(self.positions[i] for i in members), strict=True)
        axes = zip(self.axes.items(), columns, strict=True)
        return Grid({name: axis.take(positions) for (name, axis), positions in axes}, True)

    def select(self, **values: Any) -> tuple["Grid", list[int]]:
        """Return the part of the grid with these values, and the numbers of its members."""
        for name in values:
            if name not in self.axes:
                raise ValueError(f"{name} is no axis of the grid; its axes are {', '.join(self.axes)}")
        found = {name: self.axes[name].find(name, wanted) for name, wanted in values.items()}
        points = (dict(zip(self.axes, positions, strict=True)) for positions in self.positions)
        fits = [all(point[name] in allowed for name, allowed in found.items()) for point in points]
        members = [member for member in range(len(self)) if fits[member]]
        said = ", ".join(f"{name} = {wanted!r}" for name, wanted in values.items())
        if not members:
            raise ValueError(f"no point of the zipped grid has all of {said}")
        if self.zipped:
            return self.part(members), members
        if any(len(positions) > 1 for positions in found.values()):
            raise ValueError(f"the grid has several positions with {said}: {found}")
        return Grid({name: axis for name, axis in self.axes.items() if name not in values}, False), members


def _parts(axis: Axis) -> dict[str, Any]:
    """Return what a file holds of an axis: of objects their labels."""
    return vars(axis) | ({} if axis.vmapped else {"values": tuple(axis.labels)})


checkpoint.register(Axis, _parts)
checkpoint.register(Grid, lambda grid: {"axes": grid.axes, "zipped": grid.zipped})


def grid(*, zipped: bool = False, **axes: Any) -> Grid:
    """Lay out the points at which to run: every combination of the axes' values.

    points = axis₁ × axis₂ × …, the last axis varying fastest;  zipped: the i-th values of all axes together

    The type of an axis decides how `sweep` runs it:

    - A tensor or NumPy array [n, ...] is data, and so is a dict or NamedTuple of them, such as stacked
      initial parameters. Its n slices are vmapped. `gd.random.split(key, 8)` is an axis of 8 keys. Ints in
      a tensor are data too.
    - A list of floats becomes a tensor of torch's default dtype. Ints among floats count as floats. A
      list of tensors, or of trees of floats and tensors such as `betas=[(0.9, 0.99), (0.8, 0.9)]`, is
      stacked if all have the same structure, shapes, dtypes and devices.
    - Any other list, tuple or range (of ints, strings, bools, functions, None, …) is looped over, and its
      values are passed unchanged. Use it for a batch size, a width or a method, which shape the program.

    Args:
        zipped: go through axes of one length together.
        axes: the values of each argument of the function to sweep, by its name.

    Returns:
        A grid with `len`, `shape` and `axes`; `grid[i]` is the i-th point: a dict of arguments.

    Raises:
        TypeError: an axis is a single value, or a dict that is no tree of tensors.
        ValueError: there is no axis, an axis is empty, or its leaves or the zipped axes differ in length.
            A value is NaN, or an lr is not finite or is negative. Values on a GPU or under a
            transformation are not read.

    Example:
        >>> grid = gd.grid(batch_size=[8, 32], lr=[0.1, 0.2, 0.4])
        >>> grid
        Grid(batch_size [2] × lr [3])
        >>> grid[4]
        {'batch_size': 32, 'lr': tensor(0.2000)}
    """
    made = {name: _axis(name, given) for name, given in axes.items()}
    if not made:
        raise ValueError("grid needs at least one axis, such as lr=[0.1, 0.2]")
    sizes = {len(axis.labels): name for name, axis in made.items()}
    if zipped and len(sizes) > 1:
        said = ", ".join(f"{name} has {size}" for size, name in sizes.items())
        raise ValueError(f"zipped axes must have equally many values; {said}")
    return Grid(made, bool(zipped))


def _axis(name: str, given: Any) -> Axis:
    """Decide what an axis is; see `grid`."""
    if isinstance(given, np.ndarray) and given.dtype.kind not in "biufc":
        given = given.tolist()
    if isinstance(given, Tensor | np.ndarray | Mapping) or hasattr(given, "_fields"):
        values = _tree.clone(_slices(name, _tree.as_tensors(given)))
        leaves = _tree.leaves(values)
        is_plain = isinstance(values, Tensor) and values.ndim == 1 and not is_transformed(values)
        labels = numbers(values) if is_plain else list(range(len(leaves[0])))
    elif isinstance(given, Sequence) and not isinstance(given, str | bytes):
        values = _stacked(given)
        labels = [_label(value, i) for i, value in enumerate(given)]
    else:
        raise TypeError(
            f"axis {name} is {given!r}, not a list or tensor of values; write {name}=[…], "
            f"or give run what does not vary: functools.partial(run, {name}=…)"
        )
    if not labels:
        raise ValueError(f"axis {name} is empty")
    if values is None:
        return Axis(tuple(given), False, labels)
    for path, leaf in _tree.named_leaves(values, ""):
        _check_values(name, path, leaf)
    is_pair = isinstance(values, Tensor) and values.shape == (2,) and values.dtype == torch.int64
    if name.endswith("key") and is_pair:
        raise ValueError(
            f"axis {name} is a single key [2]; write {name}=key[None], or split it into [n, 2]"
        )
    return Axis(values, True, labels)


def _slices(name: str, tree: Tree) -> Tree:
    """Check that every leaf is a tensor with the same leading axis."""
    leaves = _tree.named_leaves(tree, name)
    if not leaves:
        raise ValueError(f"axis {name} is empty")
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            got = type(leaf).__name__
            raise TypeError(f"axis {path} is {got}, not a tensor; put the values of an axis in a list")
        if not leaf.ndim:
            raise TypeError(f"axis {path} is a single value; write {name}=[…]")
        first, size = leaves[0][0], len(leaves[0][1])
        if len(leaf) != size:
            raise ValueError(f"axis {name} is ragged: {first} has {size} values, {path} has {len(leaf)}")
    return tree


def _stacked(values: Sequence[Any]) -> Tree | None:
    """Stack values that are trees of floats and tensors of one structure; None if they are not."""
    flat = [_tree.flatten(_tree.as_tensors(value)) for value in values]
    if not flat or not flat[0][0] or any(structure != flat[0][1] for _, structure in flat):
        return None
    columns = [_column(entries) for entries in zip(*(leaves for leaves, _ in flat), strict=True)]
    return None if any(column is None for column in columns) else _tree.unflatten(flat[0][1], columns)


def _column(entries: tuple[Any, ...]) -> Tensor | None:
    if all(isinstance(entry, Tensor) for entry in entries):
        kinds = {(entry.shape, entry.dtype, entry.device) for entry in entries}
        return torch.stack(entries) if len(kinds) == 1 else None
    numbers = all(isinstance(entry, Real) and not isinstance(entry, bool) for entry in entries)
    if not numbers or all(isinstance(entry, Integral) for entry in entries):
        return None
    return torch.tensor([float(entry) for entry in entries], dtype=torch.get_default_dtype())


def _check_values(name: str, path: str, leaf: Tensor) -> None:
    """Refuse NaN, and an lr that is not finite or is negative: under vmap, `train` cannot see it."""
    if not leaf.is_floating_point() or leaf.device.type != "cpu" or is_transformed(leaf):
        return
    is_lr = name == "lr"
    bad = ~(leaf.isfinite() & (leaf >= 0)) if is_lr else leaf.isnan()
    if bad.any():
        place = torch.nonzero(bad)[0].tolist()
        rule = "must be finite and >= 0" if is_lr else "must not be NaN"
        where = f"{name}{path}[{', '.join(map(str, place))}]"
        raise ValueError(f"{where} {rule}; got {numbers(leaf[tuple(place)][None])[0]}")


def _label(value: Any, position: int) -> Any:
    plain = str | Real | None
    if isinstance(value, np.generic):
        return value.tolist()
    if isinstance(value, plain) or (type(value) is tuple and all(isinstance(x, plain) for x in value)):
        return value
    if isinstance(value, Tensor) and not value.ndim and not is_transformed(value):
        return numbers(value[None])[0]
    return getattr(value, "__name__", position)


def numbers(leaf: Tensor) -> list[Any]:
    """List the entries of a tensor [n] as Python numbers with the digits of its dtype."""
    if leaf.dtype in (torch.float16, torch.float32):
        return [float(str(entry)) for entry in leaf.detach().cpu().numpy()]
    return leaf.tolist()


def _identity(value: Any) -> Any:
    """Return a dict key that two values share only if they are the same."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value
