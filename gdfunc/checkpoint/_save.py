"""Trees on disk."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

import torch

from .._tree import Tree
from ._describe import Part, describe, owned, restored
from ._file import CheckpointCorruptError, CheckpointError, CheckpointVersionError, file_path, read, write

FORMAT = 1


def save(path: str | PathLike[str], tree: Tree) -> None:
    """Write a tree to a safetensors file.

    Containers are dicts, lists, tuples, NamedTuples, and what gdfunc returns: a `Trajectory`, a
    `SweepResult`, an interruption. Leaves are tensors, numbers, texts, bools and None. Axes of a sweep that
    are neither data nor plain values, such as functions, are written by name.

    The file is private to its owner (mode 0600). An old one stays whole until the new one is on disk.

    Args:
        path: a file in a folder that exists. Its name may end in anything; `.safetensors` tells others.
        tree: its tensors may be on any device, share memory, be complex, and be no leaves of autograd.

    Raises:
        CheckpointError: a leaf is something else; the message names it. (Also a ValueError.)
        ModuleNotFoundError: safetensors is not installed.
        OSError: the disk is full, path is a folder, or the file cannot be written. The old one is as it
            was.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/run.safetensors"
        >>> gd.save(path, {"params": {"w": torch.ones(3)}, "epoch": 4})
        >>> gd.load(path)
        {'params': {'w': tensor([1., 1., 1.])}, 'epoch': 4}
    """
    file = file_path(path)
    node, tensors = describe(tree)
    copies, ties = owned(tensors)
    about = {"format": FORMAT, "torch": torch.__version__, "tree": node, "ties": ties}
    write(file, copies, {"gdfunc": json.dumps(about)})


def load(path: str | PathLike[str], like: Tree = None) -> Tree:
    """Read the tree of a file that `save` wrote.

    Args:
        path: the file.
        like: a tree with the structure, shapes and dtypes that the file must have, such as
            `step.init(params)`. Tensors go to the devices of its leaves; its values are not read. Needed
            for NamedTuples and other classes that are the user's own. None takes what is there, on the CPU.

    Returns:
        The tree. Leaves that were one tensor are one again.

    Raises:
        CheckpointCorruptError: the file is not as it was written.
        CheckpointVersionError: a later version wrote it.
        CheckpointError: it differs from `like`, or holds a class of the user's own and `like` is None.
        OSError: there is no file, or path is a folder.
        ModuleNotFoundError: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/params.safetensors"
        >>> gd.save(path, gd.make_step(lambda w, batch: w**2, gd.adam()).init(torch.tensor(1.0)))
        >>> gd.load(path).params
        tensor(1.)
        >>> gd.save(path, {"w": torch.ones(3)})
        >>> try:
        ...     gd.load(path, like={"w": torch.ones(2)})
        ... except gd.CheckpointError as error:
        ...     print(str(error).partition(": ")[2])
        it differs from like: w is float32[3] in it, float32[2] in like
    """
    with opened(path) as whole:
        return whole.build(like)


@contextmanager
def opened(path: str | PathLike[str]) -> Iterator[Part]:
    """Open a file, and name it in what is wrong with it."""
    path = file_path(path)
    tensors, metadata = read(path)
    try:
        about = json.loads(metadata["gdfunc"])
        if about["format"] > FORMAT:
            raise CheckpointVersionError(
                f"it has format {about['format']}, but this gdfunc reads formats up to {FORMAT}; upgrade it"
            )
        yield Part(about["tree"], "", restored(about["tree"], tensors, about["ties"]))
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, RuntimeError) as error:
        raise CheckpointCorruptError(
            f"{path} has a digest, but gd.save did not write it: {error!r}"
        ) from error
