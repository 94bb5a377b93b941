"""Plans that are computed and never held: entries of keyed orders by their position."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ._errors import check_choice, check_int
from ._sampling import _draw, _no_batches, _shared
from ._torch._autograd import has_values
from .random import _check_key, _orders, _threefry, _unsigned, fold_in, split

_SORTED = 2**16  # up to so many entries an order is sorted, because networks on few are not uniform
_ROUNDS = 8
_AT_ONCE = 30_000  # entries: of 2¹⁵, torch would share every operation among threads, which costs more
_WALK_BITS = 80  # a walk of fixed length misses an entry with a chance below 2⁻⁸⁰
_BLOCK, _LARGEST_BLOCK = 2**14, 2**16  # rows; all of a block's order is computed for any of its rows


def lazy_batches(
    key: Tensor,
    n: int,
    batch_size: int,
    epochs: int,
    *,
    shuffle: bool | str = True,
    remainder: str = "drop",
    block_size: int | None = None,
) -> "LazyBatches":
    """Plan mini-batch gradient descent on data of any size: `epoch_batches` that takes no memory.

    Each epoch visits the samples once, in an order of its own, by the key `fold_in(key, epoch)`. A row of
    the plan is computed where it is read, from its position alone, so a plan of 10⁸ samples and a thousand
    epochs takes no memory, and a run can start at any step.

    Up to 2¹⁶ samples the rows are those of `epoch_batches`, whose orders are as good as equally likely even
    for 4 samples (to 1e-10). Above, an order is a Feistel network of 8
    rounds, whose round functions are `gd.random`'s generator: position and entry are pairs of digits in
    ℤₐ × ℤ_b with ab ≥ n, and what is not below n is sent through the network again. So the order is a
    permutation for every key, has the same bits on every device, and costs about 0.2 µs an entry. To tell
    networks of 8 rounds from uniform orders takes about n whole epochs (Patarin 2001). A network inside
    `jit` takes minutes to trace, because the trace has no values: call `train` outside of it.

    `shuffle="blocks"` is for data on disks that are slow to seek. An epoch cuts the data, from a random row
    on and round its end, into blocks of consecutive rows. It visits block by block, in random order, and
    the rows of a block in random order. This is not uniform. Every row is equally likely at every place,
    but two rows of a block are always fewer than `block_size` places apart, and a batch has rows of at most
    1 + ⌈(B − 1) / block_size⌉ blocks. If neighbours in the file are alike, as in a file that is sorted, so
    are the samples of a batch. Then store the data in a random order, or use uniform orders.

    Args:
        key: int64 [2], from `gdfunc.random.key`.
        n: number of samples, at most 2⁴⁸.
        batch_size: B, in [1, n].
        epochs: how many. More of them leave the rows before as they are.
        shuffle: True for uniform orders, `"blocks"`, or False for the samples in their own order.
        remainder: `"drop"`, `"carry"` or `"error"`, as in `epoch_batches`.
        block_size: rows in a block, in [1, min(n, 2¹⁶)], for `shuffle="blocks"`; 2¹⁴ by default.

    Returns:
        The plan, of shape [T, B], for `train` and, row by row, for `take`.

    Raises:
        ValueError: a size is out of range, or `remainder="error"` and B does not divide n.

    Example:
        >>> plan = gd.lazy_batches(gd.random.key(0), n=10**8, batch_size=4, epochs=1000)
        >>> plan.shape
        torch.Size([25000000000, 4])
        >>> plan[10**9 : 10**9 + 2]
        tensor([[46794126, 87708255, 11675600, 49755232],
                [14966113, 94926823, 97111642, 72932950]])

    References:
        J. Patarin, "Generic attacks on Feistel schemes", 2001.
        J. Black, P. Rogaway, "Ciphers with arbitrary finite domains", 2002 (the walk).
    """
    _check_key(key)
    n = check_int("n", n, 1, 2**48)
    batch_size = check_int("batch_size", batch_size, 1, n)
    epochs = check_int("epochs", epochs, 0, 2**32)
    check_choice("remainder", remainder, ("drop", "carry", "error"))
    if remainder == "error" and n % batch_size:
        raise ValueError(
            f"batch_size {batch_size} does not divide n = {n}: {n % batch_size} samples are left over; "
            f'choose remainder="drop" or "carry"'
        )
    if epochs * n >= 2**62:
        raise ValueError(f"epochs · n must be below 2^62; got {epochs} · {n}")
    if not isinstance(shuffle, bool):
        check_choice("shuffle", shuffle, ("blocks",))
    if shuffle == "blocks":
        largest = min(n, _LARGEST_BLOCK)
        block_size = check_int(
            "block_size", min(n, _BLOCK) if block_size is None else block_size, 1, largest
        )
        if n // block_size > 2**32:
            raise ValueError(f"block_size {block_size} makes {n // block_size} blocks, more than 2^32")
    elif block_size is not None:
        raise ValueError(f'block_size is for shuffle="blocks"; got shuffle={shuffle}')
    return LazyBatches(key, n, batch_size, epochs, shuffle, remainder, block_size)


@dataclass(frozen=True, eq=False, repr=False)
class LazyBatches:
    """A plan [T, B] whose rows are computed when they are read; made by `lazy_batches`.

    `plan[t]` is int64 [B], and `plan[first:last]` int64 [last − first, B], on the key's device.

    Attributes:
        key: the key of all epochs.
        n: the number of samples.
        batch_size: B.
        epochs: how many.
        shuffle: True, `"blocks"` or False.
        remainder: `"drop"`, `"carry"` or `"error"`.
        block_size: rows in a block; None without blocks.
        shape: [T, B].

    Example:
        >>> plan = gd.lazy_batches(gd.random.key(0), n=6, batch_size=2, epochs=1)
        >>> plan
        lazy_batches(key=[0, 0], n=6, batch_size=2, epochs=1, shuffle=True, remainder='drop')
        >>> plan[1]
        tensor([4, 1])
        >>> gd.take(torch.arange(6) * 10, plan[1])
        tensor([40, 10])
    """

    key: Tensor
    n: int
    batch_size: int
    epochs: int
    shuffle: bool | str
    remainder: str
    block_size: int | None

    @property
    def shape(self) -> torch.Size:
        samples = self._used * self.epochs
        return torch.Size([samples // self.batch_size, self.batch_size])

    @property
    def _used(self) -> int:
        """Count the samples of an epoch that are visited before the next epoch begins."""
        return self.n if self.remainder == "carry" else self.n - self.n % self.batch_size

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: int | slice) -> Tensor:
        """Compute a row [B] or, of a slice without a step, rows [last − first, B]."""
        if isinstance(at, slice):
            first, last, step = at.indices(len(self))
            if step != 1:
                raise ValueError(f"a plan is read in steps of 1; got a step of {step}")
            return self._rows(first, max(first, last))
        row = range(len(self))[at]  # counts from the end, and raises the IndexError that ends a loop
        return self._rows(row, row + 1)[0]

    def __repr__(self) -> str:
        key = self.key.tolist() if has_values(self.key) else "..."
        blocks = "" if self.block_size is None else f", block_size={self.block_size}"
        return (
            f"lazy_batches(key={key}, n={self.n}, batch_size={self.batch_size}, epochs={self.epochs}, "
            f"shuffle={self.shuffle!r}, remainder={self.remainder!r}{blocks})"
        )

    def to(self, device: torch.device | str) -> "LazyBatches":
        """Give the same plan on another device."""
        return replace(self, key=self.key.to(device))

    def digest(self) -> str:
        """Compute the SHA-256 of all that a row depends on: the arguments without the number of epochs."""
        made = f"{_ROUNDS} rounds, {replace(self, epochs=0)!r}"
        return hashlib.sha256(made.encode()).hexdigest()

    def _rows(self, first: int, last: int) -> Tensor:
        if first == last:
            return _no_batches(self.key, self.batch_size)
        used, start, stop = self._used, first * self.batch_size, last * self.batch_size
        if not self.shuffle:
            return (torch.arange(start, stop, device=self.key.device) % used).view(-1, self.batch_size)
        if self.block_size is None:
            order = partial(_entries, self.n)
        else:
            order = partial(_entries_by_block, self.n, self.block_size)

        epochs = range(start // used, (stop - 1) // used + 1)
        if self.n <= _SORTED:
            orders = _draw(partial(order, 0, self.n), self.key, epochs, self.n)
            samples = orders[:, :used].flatten()[start - epochs.start * used : stop - epochs.start * used]
            return samples.reshape(-1, self.batch_size)
        parts = [
            _shared(
                partial(
                    _of_epoch, epoch, order, max(start - epoch * used, 0), min(stop - epoch * used, used)
                ),
                self.key,
            )
            for epoch in epochs
        ]
        return torch.cat(parts).view(-1, self.batch_size)


def _of_epoch(
    epoch: int, order: Callable[[int, int, Tensor], Tensor], first: int, last: int, key: Tensor
) -> Tensor:
    """Compute the entries first … last−1 of an epoch's order by each of the keys [..., 2]."""
    return order(first, last, fold_in(key, epoch))


def _entries(n: int, first: int, last: int, key: Tensor) -> Tensor:
    """Compute the entries first … last−1 of an order of 0 … n−1 by each of the keys [..., 2]."""
    if n <= _SORTED:
        return _orders(key, n)[..., first:last]
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    at_once = max(1, _AT_ONCE // max(1, math.prod(key.shape[:-1])))
    positions = torch.arange(first, last, device=key.device).split(at_once)
    return _walk(key, n, a, b, torch.cat([_network(key, a, b, part) for part in positions], dim=-1))


def _entries_by_block(n: int, size: int, first: int, last: int, key: Tensor) -> Tensor:
    """Compute the entries first … last−1 of an order by blocks by each of the keys [..., 2]."""
    of_blocks, within, of_start = split(key, 3).unbind(-2)
    whole = n // size  # blocks; the last n % size rows of an epoch are a shorter one
    slots = range(min(first // size, whole), min(-(-last // size), whole))
    blocks = _entries(whole, slots.start, slots.stop, of_blocks)
    entries = _entries(size, 0, size, fold_in(within.unsqueeze(-2), blocks))
    rows = (blocks.unsqueeze(-1) * size + entries).flatten(-2)
    if last > whole * size:
        rest = whole * size + _entries(n % size, 0, n % size, fold_in(within, whole))
        rows = torch.cat([rows, rest], dim=-1)
    rows = rows[..., first - slots.start * size : last - slots.start * size]
    return (rows + _entries(n, 0, 1, of_start)) % n


def _walk(key: Tensor, n: int, a: int, b: int, x: Tensor) -> Tensor:
    """Send what is not below n through the network of its key again, until it is."""
    if a * b == n:
        return x
    if not has_values(x):  # a walk of fixed length, long enough
        for _ in range(math.ceil(_WALK_BITS / math.log2(a * b / (a * b - n)))):
            x = torch.where(x < n, x, _network(key, a, b, x))
        return x
    keys = key.unsqueeze(-2).expand(*x.shape, 2)
    outside = torch.nonzero(x >= n, as_tuple=True)
    while len(outside[0]):
        moved = _network(keys[outside], a, b, x[outside].unsqueeze(-1)).squeeze(-1)
        x[outside] = moved
        outside = tuple(at[moved >= n] for at in outside)
    return x


def _network(key: Tensor, a: int, b: int, x: Tensor) -> Tensor:
    """Send numbers below ab through a Feistel network on ℤₐ × ℤ_b by each of the keys [..., 2].

    Even rounds add a random function of the second digit to the first, odd rounds one of the first digit
    to the second.
    """
    digits, sizes = [x // b, x % b], (a, b)
    for at in range(_ROUNDS):
        changed, read = at % 2, digits[1 - at % 2]
        size = sizes[changed]
        counter = torch.full((), at, device=x.device).expand(read.shape)
        high, low = map(_unsigned, _threefry(key.unsqueeze(-2), counter, read))
        # ⌊size · word / 2⁶⁴⌋ of a random word of 64 bits: equally likely to within 2⁻⁶⁴ · size.
        moved = digits[changed] + ((high * size + (low * size >> 32)) >> 32)
        digits[changed] = moved - size * (moved >= size)
    return digits[0] * b + digits[1]
