"""The door for data: a user's arrays and data sets become a tree of tensors, or are refused with a remedy.

Nothing here imports a package that the user has not imported.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import partial
from numbers import Number
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, Subset, TensorDataset

from . import _tree
from ._numerics import from_numpy
from ._tree import Tree

REGISTER = "a dataclass becomes a tree by torch.export.register_dataclass({})"
_COLLATE = "torch.utils.data.default_collate"


def as_data(tree: Tree, name: str, is_read: bool = False) -> Tree:
    """Turn arrays and data sets among the leaves into tensors.

    A `TensorDataset` becomes the tuple of its tensors, a DataFrame of pandas the dict of its columns. What
    cannot be indexed by a tensor of sample numbers is refused with the line that works. An array that is
    read-only, such as a file that is mapped, is copied, unless the tensors are only read (`is_read`).

    Raises:
        TypeError: a leaf has no form as tensors.
    """
    if type(tree) is list:
        _refuse_list_of_samples(tree, name)
    leaves, structure = _tree.flatten(tree)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            leaves[i] = _converted(leaf, partial(_path, tree, name, i), is_read)
    return _tree.unflatten(structure, leaves)


def _path(tree: Tree, name: str, position: int) -> str:
    return _tree.named_leaves(tree, name)[position][0]


def _converted(leaf: Any, path: Callable[[], str], is_read: bool) -> Tree:
    """Return a leaf as tensors."""
    if isinstance(leaf, np.ma.MaskedArray) and leaf.mask.any():
        remedy = "fill it with x.filled(0), and pass ~x.mask beside it"
        raise _refused(path(), "an array with masked entries", remedy)
    if isinstance(leaf, np.ndarray):
        try:
            return from_numpy(leaf, is_read)
        except TypeError as error:
            raise _refused(path(), f"an array of dtype {leaf.dtype}", _remedy_for_array(leaf)) from error
    if is_plain(leaf):
        return leaf.tensors
    pandas = sys.modules.get("pandas")
    if isinstance(leaf, getattr(pandas, "DataFrame", ())):
        return _columns(leaf, path)
    if isinstance(leaf, getattr(pandas, "Series", ())):
        return _column(leaf, path, _remedy_for_series)
    raise _refused(path(), type(leaf).__name__, remedy_for(leaf))


def _refused(path: str, kind: str, remedy: str) -> TypeError:
    return TypeError(f"{path} is {kind}, not a Tensor or an array of numbers; {remedy}")


def _columns(frame: Any, path: Callable[[], str]) -> dict[Any, Tensor]:
    """Return the columns of a DataFrame as tensors."""
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        remedy = "keep the first of each with df.loc[:, ~df.columns.duplicated()]"
        raise _refused(path(), f"a DataFrame with two columns {twice!r}", remedy)
    return {
        name: _column(frame[name], partial("{}[{!r}]".format, path(), name), _remedy_for_column)
        for name in frame
    }


def _column(column: Any, path: Callable[[], str], remedy: Callable[[Any], str]) -> Tensor:
    """Return a Series of pandas as a tensor."""
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "biufc":
        return from_numpy(column.to_numpy())
    raise _refused(path(), f"a column of dtype {column.dtype}", remedy(column))


def _remedy_for_column(column: Any) -> str:
    """Tell how a column of the DataFrame `df` becomes one of numbers."""
    name, kind, values = repr(column.name), _kind(column), f"df[{column.name!r}]"
    match kind:
        case "missing":
            rows = f"df.dropna(subset=[{name}])"
            return f"leave out the rows that miss it, and convert it: {rows}.astype({{{name}: 'float32'}})"
        case "dates" | "durations":
            return f"measure it in seconds: df.assign(**{{{name}: {_seconds(values, kind)}}})"
        case "texts":
            line = f"pandas.get_dummies(df, columns=[{name}], dtype='float32')"
            return f"replace it by columns of zeros and ones: {line}"
        case "rows":
            return f"stack its rows: {{**df.drop(columns=[{name}]), {name}: np.stack({values})}}"
        case "other":
            return f"leave it out: df.drop(columns=[{name}])"
    return f"convert it: df.astype({{{name}: {kind!r}}})"


def _remedy_for_series(column: Any) -> str:
    """Tell how a `series` becomes one of numbers."""
    kind = _kind(column)
    match kind:
        case "missing":
            return "leave out the rows that miss it, and convert it: series.dropna().astype('float32')"
        case "dates" | "durations":
            return f"measure it in seconds: {_seconds('series', kind)}"
        case "texts":
            return "number its texts: pandas.factorize(series)[0]"
        case "rows":
            return "stack its rows: np.stack(series)"
        case "other":
            return "leave it out"
    return f"convert it: series.astype({kind!r})"


def _seconds(column: str, kind: str) -> str:
    since = f"({column} - {column}.min())" if kind == "dates" else column
    return f"{since}.dt.total_seconds().astype('float32')"


def _kind(column: Any) -> str:
    """Tell what a column of no numeric dtype holds, or the dtype to which it converts."""
    kind = column.dtype.kind
    if kind in "Mm":
        return "dates" if kind == "M" else "durations"
    if kind in "biuf":
        return "missing" if column.isna().any() else {"b": "bool", "f": "float32"}.get(kind, "int64")
    entries = list(column.dropna())
    if entries and all(isinstance(entry, Number) for entry in entries):
        return "missing" if len(entries) < len(column) else "float32"
    if column.dtype.name == "category" or all(isinstance(entry, str) for entry in entries):
        return "texts"
    sized = all(isinstance(entry, list | tuple | np.ndarray) for entry in entries)
    return "rows" if sized and len({np.shape(entry) for entry in entries}) == 1 else "other"


def is_plain(dataset: Any) -> TypeGuard[TensorDataset]:
    """Tell whether a data set is its tensors alone, and computes nothing where it is indexed."""
    return isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__


def _refuse_list_of_samples(samples: list[Any], name: str) -> None:
    """Refuse a list with an entry a sample, where a tree has an entry an array."""
    structures = [_tree.flatten(sample)[1] for sample in samples]
    single = [not isinstance(leaf, Tensor | np.ndarray) or not leaf.ndim for leaf in _tree.leaves(samples)]
    if len(samples) < 2 or not any(single) or any(other != structures[0] for other in structures):
        return
    if not all(isinstance(leaf, Number | Tensor | np.ndarray) for leaf in _tree.leaves(samples)):
        return
    numbers = all(isinstance(leaf, Number) for leaf in _tree.leaves(samples))
    line = "torch.tensor" if numbers else _COLLATE
    raise TypeError(
        f"{name} is a list of {len(samples)} samples, but every leaf must hold all samples on dim 0; "
        f"stack them with {line}({name})"
    )


def _remedy_for_array(array: np.ndarray) -> str:
    """Tell how an array that torch cannot hold becomes one that it can."""
    match array.dtype.kind:
        case "O":
            return _remedy_for_objects(array)
        case "V":
            if array.dtype.names:
                return "pass a dict of its fields: {name: x[name] for name in x.dtype.names}"
        case "U" | "S" | "T":
            return "number its texts with np.unique(x, return_inverse=True)[1]"
        case "M" | "m":
            return "measure it from its minimum: ((x - x.min()) / np.timedelta64(1, 's')).astype('float32')"
    return "convert it with x.astype('float32')"


def _remedy_for_objects(array: np.ndarray) -> str:
    """Tell how an array of objects becomes one of numbers."""
    try:
        array.astype("float64")
        return "convert it with x.astype('float32')"
    except (TypeError, ValueError):
        pass
    if all(isinstance(entry, str) for entry in array.flat):
        return "number its texts with np.unique(x.astype(str), return_inverse=True)[1]"
    try:
        np.stack(list(array.flat)).astype("float64")
        return "stack its rows with np.stack(x).astype('float32')"
    except (TypeError, ValueError):
        return (
            "its entries are not numbers of one shape: pad sequences with torch.nn.utils.rnn.pad_sequence"
            "([torch.as_tensor(row) for row in x], batch_first=True), or leave them out"
        )


def remedy_for(leaf: Any) -> str:
    """Tell how what is no array becomes tensors."""
    if isinstance(leaf, DataLoader):
        return _remedy_for_loader(leaf)
    if isinstance(leaf, Subset) and is_plain(leaf.dataset):
        return "pass gd.take(subset.dataset, torch.as_tensor(subset.indices))"
    if type(leaf).__module__.partition(".")[0] == "datasets":
        return _remedy_for_hugging_face(leaf)
    if isinstance(leaf, Dataset):
        return f"pass all of its samples: {_COLLATE}({_samples_of(leaf, 'dataset')})"
    if isinstance(leaf, Iterator):
        return f"because samples are taken by number, collect them first: {_COLLATE}(list(samples))"
    if is_dataclass(leaf):
        return REGISTER.format(type(leaf).__name__)
    return "make it one with torch.as_tensor"


def _remedy_for_hugging_face(leaf: Any) -> str:
    """Tell how a data set of the package `datasets`, a part or a dict of them becomes tensors."""
    if isinstance(leaf, dict):
        return "pass one of its splits, dataset['train']"
    if not hasattr(leaf, "with_format"):
        return "pass torch.as_tensor(column[:])"
    if isinstance(leaf, IterableDataset):
        return f'pass all of its samples: {_COLLATE}(list(dataset.with_format("torch")))'
    return 'pass its columns as tensors: dataset.with_format("torch")[:]'


def _remedy_for_loader(loader: DataLoader) -> str:
    """Tell how the data set of a loader, and a plan in place of its shuffling, give the same run."""
    dataset, size = loader.dataset, loader.batch_size or "batch_size"
    if is_plain(dataset):
        data, count = "loader.dataset", str(len(dataset))
    else:
        data = f"{_COLLATE}({_samples_of(dataset, 'loader.dataset')})"
        count = "len(loader.dataset)" if hasattr(dataset, "__len__") else "n"
    order = ", shuffle=False" if isinstance(loader.sampler, SequentialSampler) else ""
    return (
        f"pass {data}, and as the index a plan in place of the loader's order: "
        f"gd.epoch_batches(key, {count}, {size}, epochs{order})"
    )


def _samples_of(dataset: Dataset, name: str) -> str:
    """Write the list of all samples of a data set."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return f"list({name})"
    return f"[{name}[i] for i in range(len({name}))]"
