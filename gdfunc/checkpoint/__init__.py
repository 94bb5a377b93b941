"""Trees on disk, in files that any library of safetensors reads.

`gd.save(path, tree)` writes parameters, optimizer states, a `Trajectory`, a `SweepResult`, an interruption.
`gd.load(path)` reads them; `gd.load(path, like=step.init(params))` checks the tree too, and puts it on the
devices of another.

A tree is written as flat tensors with names such as `params.layer1.w`, which other readers of safetensors
and `torch.distributed.checkpoint` find too. What else a tree is made of (containers, numbers, texts, None)
is JSON among the file's metadata. No file is ever executed: there is no pickle.

A file is written beside the one it replaces, and takes its place when all of it is on disk. So a crash or a
full disk leaves the old file or the new one. A SHA-256 over the whole file is checked before anything in it
is read: changed bytes and a missing end raise a `CheckpointCorruptError`, the format of a later version a
`CheckpointVersionError`, and a tree that differs from `like` a `CheckpointError`, which both of these are.

`gd.train(..., checkpoint_to=path)` writes a run, and goes on from it when it is called again. It refuses
another run: one with other trees, shapes or dtypes, another transformation, schedule, plan or data, or one
that measures another loss, record or evaluation at the carry in the file. A run over data that are larger
than memory takes them from a file that is mapped, and its order from a plan that is never held:

    x, y = (np.load(name, mmap_mode="r") for name in ("x.npy", "y.npy"))
    plan = gd.lazy_batches(gd.random.key(0), n=len(y), batch_size=1000, epochs=3)  # a LazyBatches
    gd.train(step, init, (x, y), plan, lr=0.1, checkpoint_to="run.safetensors")

Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/run.safetensors"
    >>> gd.save(path, {"params": {"w": torch.ones(2)}, "epoch": 4})
    >>> gd.load(path)
    {'params': {'w': tensor([1., 1.])}, 'epoch': 4}
"""

from ._describe import check_known, register
from ._file import CheckpointCorruptError, CheckpointError, CheckpointVersionError
from ._save import load, opened, save

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointVersionError",
    "check_known",
    "load",
    "opened",
    "register",
    "save",
]
