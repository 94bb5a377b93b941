"""The outputs of a sweep at its points, and their tables."""

import csv
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _html, _tree, checkpoint
from .._errors import warn
from .._shown import dotted, shown
from .._torch._transforms import is_transformed
from .._tree import Tree
from ._grid import Axis, Grid, numbers

_ROWS = 20  # of a table in a notebook


@dataclass(frozen=True, eq=False, repr=False)
class SweepResult:
    """The outputs of a sweep's members, with their places on the grid.

    Attributes:
        outputs: the results of `run`, each leaf with a leading [N]. Row i belongs to the point `grid[i]`.
        grid: the grid, with its `shape` and `axes`.
        diverged: bool [N], whether a leaf of the member is not finite or a bool leaf named `diverged` is
            true, such as that of a `Trajectory`. Padding does not count.
        lengths: int64 [N] for each leaf with an axis of its own, by its dotted path: the number of a
            member's entries along the first such axis, before the padding.

    Example:
        >>> grid = gd.grid(power=[1, 50], lr=[0.5, 1.5, 9.0])
        >>> result = gd.sweep(lambda power, lr: (1 - lr) ** power, grid)
        >>> result
        SweepResult(power [2] × lr [3], 1 of 6 diverged, outputs: float32[6])
        >>> result.select(power=1).outputs
        tensor([ 0.5000, -0.5000, -8.0000])
        >>> result.reshape().shape
        torch.Size([2, 3])
        >>> result.to_records()[-1]
        {'power': 50, 'lr': 9.0, 'output': inf, 'diverged': True}
    """

    grid: Grid
    outputs: Tree
    diverged: Tensor
    lengths: dict[str, Tensor]

    def __repr__(self) -> str:
        leaves = _tree.named_leaves(self.outputs, "")
        named = [f"{dotted(path)} {shown(leaf)}".lstrip() for path, leaf in leaves]
        return f"{type(self).__name__}({', '.join(self._facts())}, outputs: {', '.join(named)})"

    def _facts(self) -> list[str]:
        """Say on what axes the members are, and how they fared."""
        axes = repr(self.grid).removeprefix("Grid(").removesuffix(")") or "one point"
        count = "?" if is_transformed(self.diverged) else int(self.diverged.sum())
        return [axes, f"{count} of {len(self.grid)} diverged"]

    def _repr_html_(self) -> str:
        """Show the first records in a notebook."""
        if is_transformed(self.diverged):
            return _html.table(repr(self), (), ())
        records = self.to_records()
        rows = [tuple(record.values()) for record in records[:_ROWS]]
        rest = f", the first {_ROWS} of {len(records)} rows" if len(records) > _ROWS else ""
        return _html.table(repr(self) + rest, tuple(records[0]), rows)

    @property
    def axes(self) -> dict[str, Any]:
        """Return the values of each axis: tensors, trees of tensors, or lists of the objects."""
        each = self.grid.axes.items()
        return {name: axis.values if axis.vmapped else list(axis.values) for name, axis in each}

    def select(self, **values: Any) -> "SweepResult":
        """Keep the members with these values of axes, as in `result.select(lr=0.1, method="adam")`.

        Give a number (right to a millionth) or string itself, a function or its name, and for a key or
        other tensor its position on the axis. The axes leave the grid, unless it is zipped, and padding
        that is no longer needed leaves the outputs.

        Raises:
            ValueError: there is no such axis or value, or (unless zipped) the value stands there twice.
        """
        part, members = self.grid.select(**values)
        lengths = {name: length[members] for name, length in self.lengths.items()}
        named = _tree.named_leaves(self.outputs, "")
        leaves = [_trimmed(leaf[members], lengths.get(dotted(path))) for path, leaf in named]
        outputs = _tree.unflatten(_tree.flatten(self.outputs)[1], leaves)
        return SweepResult(part, outputs, self.diverged[members], lengths)

    def reshape(self) -> Tree:
        """View the outputs in the shape of the grid: [N, ...] as [*grid.shape, ...].

        Padding stays in (see `lengths`). Its NaN looks like divergence in a picture, so `select` first.
        """
        return _tree.map(lambda leaf: leaf.reshape((*self.grid.shape, *leaf.shape[1:])), self.outputs)

    def _leaves(self) -> list[tuple[str, Tensor]]:
        """List what a table has of the members, each with its path."""
        return [*_tree.named_leaves(self.outputs, ""), (".diverged", self.diverged)]

    def _column(self, path: str) -> str:
        """Name the column of an output; no axis has that name."""
        name = dotted(path) or "output"
        return f"output.{name}" if name in self.grid.axes else name

    def to_records(self) -> list[dict[str, Any]]:
        """List a dict for each member: its point, its scalar outputs, and whether it diverged.

        The key of a scalar is its dotted path (`output` if `run` returns it alone), prefixed with `output.`
        where an axis has that name. Numbers have the digits of their dtype.
        """
        columns: dict[str, list[Any]] = {}
        for path, leaf in self._leaves():
            if leaf.ndim == 1:
                columns[self._column(path)] = numbers(leaf)
        rows = zip(*columns.values(), strict=True)
        return [self.grid.labels(i) | dict(zip(columns, row, strict=True)) for i, row in enumerate(rows)]

    def to_frame(self) -> Any:
        """Make a pandas DataFrame of the records.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        try:
            import pandas  # type: ignore[import-untyped]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_frame needs pandas: pip install pandas; to_records and save do without"
            ) from error
        return pandas.DataFrame(self.to_records())

    def to_xarray(self) -> Any:
        """Make an xarray Dataset: the axes are its dimensions, and the outputs its variables.

        An output [N, ...] becomes a variable of the grid's shape. Its name is its dotted path (`output` if
        `run` returns it alone), prefixed with `output.` where an axis has that name. Axes of its own are
        named after it: `loss.0`, `loss.1`. Padding stays in. The points of a zipped grid are one dimension,
        `point`. A value of an axis that is no number becomes text, and a tree or a key its position.

        Raises:
            ModuleNotFoundError: xarray is not installed.
        """
        try:
            import xarray
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("to_xarray needs xarray: pip install xarray") from error
        axes = self.grid.axes
        shape, dims = self.grid.shape, ("point",) if self.grid.zipped else tuple(axes)
        variables = {}
        for path, leaf in self._leaves():
            name = self._column(path)
            own = [f"{name}.{i}" for i in range(leaf.ndim - 1)]
            values = leaf.detach().cpu()
            values = values.float() if values.dtype == torch.bfloat16 else values
            variables[name] = (*dims, *own), values.numpy().reshape((*shape, *leaf.shape[1:]))
        coordinates = {
            name: (dims if self.grid.zipped else name, _coordinate(axis)) for name, axis in axes.items()
        }
        return xarray.Dataset(variables, coordinates, {"grid": repr(self.grid)})

    def save(self, path: str | PathLike[str]) -> None:
        """Write the records to a CSV file, a row for each member.

        A warning names the outputs that are not scalars, which have no column.

        Raises:
            ValueError: the path does not end in `.csv`.
        """
        if Path(path).suffix.lower() != ".csv":
            raise ValueError(
                f"save writes CSV, but {str(path)!r} ends in {Path(path).suffix!r}: end it in .csv, or use "
                f"to_frame(), whose frame writes other formats"
            )
        left_out = [
            f"{dotted(path)} {shown(leaf)}".lstrip()
            for path, leaf in _tree.named_leaves(self.outputs, "")
            if leaf.ndim != 1
        ]
        if left_out:
            warn(
                f"a CSV has the scalars of each run and leaves out {', '.join(left_out)}: return numbers "
                f"from run, or keep result.outputs too"
            )
        records = self.to_records()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)


checkpoint.register(SweepResult)


def _trimmed(leaf: Tensor, lengths: Tensor | None) -> Tensor:
    """Cut off the padding that no member needs."""
    if lengths is None or not len(lengths) or is_transformed(lengths):
        return leaf
    return leaf[:, : int(lengths.max())]


def _coordinate(axis: Axis) -> np.ndarray:
    """Return the labels of an axis as numbers, or else as texts, [n]."""
    labels = axis.labels
    return np.array(labels if all(isinstance(label, Real) for label in labels) else [*map(str, labels)])
