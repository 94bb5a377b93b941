"""The result of a sweep: outputs with their places on the grid."""

import csv
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._torch._transforms import is_transformed
from .._tree import Tree
from ._grid import Grid, numbers


@dataclass(frozen=True, eq=False, repr=False)
class SweepResult:
    """The outputs of a sweep's members, with their places on the grid.

    Attributes:
        outputs: what `run` returns, each leaf with a leading [N]: row i is of the point `grid[i]`.
        grid: the grid, with its `shape` and `axes`.
        diverged: bool [N]: whether a leaf of the member is not finite, or a bool leaf named `diverged` says
            so, such as that of a `Trajectory`. Padding does not count.
        lengths: int64 [N] for each leaf that has an axis of its own, by its dotted path: how many entries
            along the first of them are a member's own; padding follows.

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
        shapes = [f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" for _, leaf in leaves]
        pairs = zip(leaves, shapes, strict=True)
        named = [f"{dotted(path)} {shape}".lstrip() for (path, _), shape in pairs]
        axes = repr(self.grid).removeprefix("Grid(").removesuffix(")") or "one point"
        count = "?" if is_transformed(self.diverged) else int(self.diverged.sum())
        return f"SweepResult({axes}, {count} of {len(self.grid)} diverged, outputs: {', '.join(named)})"

    @property
    def axes(self) -> dict[str, Any]:
        """The values of each axis: tensors, trees of tensors, or lists of the objects."""
        each = self.grid.axes.items()
        return {name: axis.values if axis.vmapped else list(axis.values) for name, axis in each}

    def select(self, **values: Any) -> "SweepResult":
        """Keep the members with these values of axes, as in `result.select(lr=0.1, method="adam")`.

        A value is named as in the table: a number (of which a millionth may be wrong) or string by itself,
        a function by its name or itself, a key or other tensor by its position on the axis. The axes leave
        the grid, unless zipped, and padding that is no longer needed leaves the outputs.

        Raises:
            ValueError: there is no such axis or value, or (unless zipped) the value stands there twice.
        """
        part, members = self.grid.select(**values)
        rows = torch.tensor(members)
        lengths = {name: length[rows.to(length.device)] for name, length in self.lengths.items()}
        named = _tree.named_leaves(self.outputs, "")
        leaves = [_trimmed(leaf[rows.to(leaf.device)], lengths.get(dotted(path))) for path, leaf in named]
        outputs = _tree.unflatten(_tree.flatten(self.outputs)[1], leaves)
        return SweepResult(part, outputs, self.diverged[rows.to(self.diverged.device)], lengths)

    def reshape(self) -> Tree:
        """View the outputs in the shape of the grid: [N, ...] as [*grid.shape, ...].

        Padding stays in (see `lengths`), and a picture takes its NaN for divergence: `select` first.
        """
        return _tree.map(lambda leaf: leaf.reshape((*self.grid.shape, *leaf.shape[1:])), self.outputs)

    def to_records(self) -> list[dict[str, Any]]:
        """List a dict for each member: its point, the scalars among its outputs, whether it diverged.

        A scalar goes by its dotted path (`output` if `run` returns it alone), with `output.` before it
        where an axis has that name. Numbers have as many digits as their dtype.
        """
        columns: dict[str, list[Any]] = {}
        for path, leaf in [*_tree.named_leaves(self.outputs, ""), (".diverged", self.diverged)]:
            if leaf.ndim == 1:
                name = dotted(path) or "output"
                columns[f"output.{name}" if name in self.grid.axes else name] = numbers(leaf)
        rows = zip(*columns.values(), strict=True)
        return [
            {**self.grid.labels(i), **dict(zip(columns, row, strict=True))} for i, row in enumerate(rows)
        ]

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

    def save(self, path: str | PathLike[str]) -> None:
        """Write the records to a CSV file."""
        records = self.to_records()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)


def _trimmed(leaf: Tensor, lengths: Tensor | None) -> Tensor:
    """Leave out the padding that no member needs."""
    if lengths is None or not len(lengths) or is_transformed(lengths):
        return leaf
    return leaf[:, : int(lengths.max())]


def dotted(path: str) -> str:
    """A path as the name of a column: `[1].loss` is `1.loss`, `['w']` is `w`."""
    return path.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "").lstrip(".")
