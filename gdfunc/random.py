"""Random numbers as pure functions of a key: the counter-based generator Threefry-2x32.

A key is a pair of 32-bit words held in an int64 tensor [2]. Drawing the same thing from the same key
gives the same bits on every device, under vmap, compiled, and in JAX (its default generator, with
`jax_threefry_partitionable=True`). Use a key once: `split` it or `fold_in` a count for more. torch's,
NumPy's and Python's own generators are neither read nor written.

Every function also takes many keys, int64 [..., 2]. Each key then draws its own [*shape], bit for bit as it
does alone, and the result is [..., *shape]. `dropout` draws a mask from one key, or a row of it from each.

This is a statistical generator, not a cryptographic one.

Example:
    >>> first, second = gd.random.split(gd.random.key(0))
    >>> gd.random.permutation(first, 5)
    tensor([0, 2, 4, 1, 3])

References:
    J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

import math
from collections.abc import Sequence
from functools import reduce
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._errors import check_int
from ._torch._autograd import serves
from ._torch._modes import is_tracing
from ._torch._operators import threefry, threefry_of_arrays

_PART = 2**16  # numbers drawn at once, so that their words stay in the cache, which halves the time
_WORD = 0xFFFFFFFF  # 32 ones
_SIGN = -(2**31)  # the highest bit of a word


def key(seed: int, *, device: torch.device | str | None = None) -> Tensor:
    """Make the key of a seed: its high and its low 32 bits.

    Args:
        seed: an int in [0, 2⁶⁴).
        device: where the key, and so all that is drawn from it, lives.

    Returns:
        The key, int64 [2].

    Raises:
        ValueError: the seed is no int in that range.

    Example:
        >>> gd.random.key(2**32 + 5)
        tensor([1, 5])
    """
    seed = check_int("seed", seed, 0, 2**64 - 1)
    return torch.tensor([seed >> 32, seed & _WORD], dtype=torch.int64, device=device)


def split(key: Tensor, num: int = 2) -> Tensor:
    """Derive `num` keys whose streams are independent of one another and of the key's own.

    Returns:
        Keys, int64 [num, 2]; of keys [..., 2], int64 [..., num, 2].

    Example:
        >>> first, second = gd.random.split(gd.random.key(0))
        >>> first
        tensor([1797259609, 2579123966])
    """
    _check_keys(key)
    return _split(key, check_int("num", num, 0))


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """Derive the key that belongs to a number, such as an epoch, a step or a row.

    Args:
        key: int64 [2], or keys [..., 2].
        data: an int in [0, 2³²), or an integer tensor [...], of which the low 32 bits count. Its shape and
            that of the keys without the last axis are broadcast.

    Returns:
        A key for each number and key, int64 [..., 2]. One key and numbers [n] give keys [n, 2], as do keys
        [n, 2] and an int. Keys [n, 2] and numbers [n] are matched row by row.

    Raises:
        TypeError: data is a tensor, but not of integers.
        ValueError: the shapes of keys and data do not broadcast, or they are on different devices. (A 0-d
            tensor on the CPU goes with any key, as in torch.)

    Example:
        >>> gd.random.fold_in(gd.random.key(0), 7)
        tensor([2716826189,  292468403])
        >>> gd.random.fold_in(gd.random.key(0), torch.arange(7, 9))
        tensor([[2716826189,  292468403],
                [2292653872,  931858003]])
    """
    _check_keys(key)
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.is_complex():
            raise TypeError(f"data must be an int or a tensor of integers; got {data.dtype}")
        if data.device != key.device and (data.ndim or not data.is_cpu):
            raise ValueError(
                f"the key is on {key.device}, but data on {data.device}: move one of them, as in "
                f"data.to(key.device)"
            )
        low = data.to(torch.int64)
        try:
            torch.broadcast_shapes(key.shape[:-1], low.shape)
        except RuntimeError:
            raise ValueError(
                f"keys {list(key.shape)} and data {list(low.shape)} do not broadcast: the keys have shape "
                f"{list(key.shape[:-1])} without the last axis; add axes to them, as in keys[:, None]"
            ) from None
    else:
        low = torch.full((), check_int("data", data, 0, _WORD), dtype=torch.int64, device=key.device)
    return torch.stack([_unsigned(word) for word in _threefry(key, torch.zeros_like(low), low)], dim=-1)


def bits(key: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Draw 32 random bits per entry.

    Args:
        key: int64 [2], or keys [..., 2].
        shape: of each key's draw.

    Returns:
        int64 of the given shape, each entry in [0, 2³²); [..., *shape] of keys [..., 2].

    Example:
        >>> gd.random.bits(gd.random.key(0), (2,))
        tensor([4070199207, 4202968722])
    """
    _check_keys(key)
    return _bits(key, _sizes(shape))


def uniform(
    key: Tensor,
    shape: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    minval: float | Tensor = 0.0,
    maxval: float | Tensor = 1.0,
) -> Tensor:
    """Draw from the uniform distribution on [minval, maxval).

    Every multiple of the dtype's epsilon in [0, 1) is equally likely: 2²³ values in float32, 2⁵² in
    float64, 2⁷ in bfloat16. Scaled to another interval, the largest may round to maxval itself, and a
    float64 draw may differ from JAX's in the last bit. All others have JAX's bits.

    Args:
        key: int64 [2], or keys [..., 2].
        shape: of each key's draw.
        dtype: of the result.
        minval: the lower end, a number or a tensor that broadcasts to the result.
        maxval: the upper end, likewise.

    Returns:
        A tensor of the given shape; [..., *shape] of keys [..., 2].

    Example:
        >>> gd.random.uniform(gd.random.key(0), (2,))
        tensor([0.9477, 0.9786])
    """
    _check_keys(key)
    unit = _unit_uniform(key, _sizes(shape), dtype)
    low = torch.as_tensor(minval, dtype=dtype, device=key.device)
    high = torch.as_tensor(maxval, dtype=dtype, device=key.device)
    width = high - low
    if dtype in (torch.float16, torch.float32):  # JAX's compiler rounds product and sum once
        unit, low, width = (leaf.to(torch.float64) for leaf in (unit, low, width))
    return torch.maximum(unit * width + low, low).to(dtype)


def normal(key: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw from the standard normal distribution by inverting its distribution function.

    x = √2 erf⁻¹(u), u uniform on (−1, 1)

    The function is evaluated in float64 and rounded, so that devices, whose erf⁻¹ differ in the last
    digits, agree on float32 and narrower (but for about one draw in 10⁸).

    Example:
        >>> gd.random.normal(gd.random.key(0), (2,))
        tensor([1.6226, 2.0253])
    """
    above_minus_one = -1.0 + torch.finfo(dtype).eps / 2
    u = uniform(key, shape, dtype, above_minus_one, 1.0).to(torch.float64)
    return (math.sqrt(2) * torch.erfinv(u)).to(dtype)


def randint(
    key: Tensor, shape: Sequence[int], minval: int, maxval: int, *, unbiased: bool = False
) -> Tensor:
    """Draw integers from [minval, maxval).

    The draws have JAX's bits, and with them JAX's bias: up to a span of 2¹⁶, all integers are equally
    likely to within 2⁻³² of the span. Above, some may be twice as likely as others: of three equal parts of
    the span 3·2³⁰, the first has half of the draws.

    Args:
        key: int64 [2], or keys [..., 2].
        shape: of each key's draw.
        minval: the smallest integer drawn.
        maxval: one above the largest; at most 2³² above minval.
        unbiased: draw other bits than JAX, ⌊span · x / 2⁶⁴⌋ for a random x of 64 bits. All integers are
            then equally likely to within 2⁻³², for any span.

    Returns:
        int64 of the given shape; [..., *shape] of keys [..., 2].

    Raises:
        ValueError: the range is empty or wider than 2³².

    Example:
        >>> gd.random.randint(gd.random.key(0), (6,), 0, 10)
        tensor([9, 0, 2, 3, 1, 7])

    References:
        D. Lemire, "Fast random integer generation in an interval", 2019 (`unbiased`).
    """
    _check_keys(key)
    minval = check_int("minval", minval, -(2**63), 2**63 - 2)
    maxval = check_int("maxval", maxval, minval + 1, min(minval + 2**32, 2**63 - 1))
    span, shape = maxval - minval, _sizes(shape)
    if unbiased:
        high, low = map(_unsigned, _words(key, shape))
        return _upper_word(high, span, _upper_word(low, span)) + minval
    return _integers_below(span, key, shape) + minval


def permutation(key: Tensor, n: int) -> Tensor:
    """Shuffle the integers 0 … n−1.

    They are sorted by random 32-bit words, stably, and often enough that ties do not show: all n!
    orders are as good as equally likely.

    Args:
        key: int64 [2], or keys [..., 2].
        n: how many integers.

    Returns:
        int64 [n]; [..., n] of keys [..., 2], an order for each.

    Example:
        >>> gd.random.permutation(gd.random.key(0), 10)
        tensor([0, 1, 8, 5, 6, 4, 3, 2, 7, 9])
    """
    _check_keys(key)
    return _orders(key, check_int("n", n, 0))


def _normals(key: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Draw standard normal vectors in float64, all at once, so that they are the same for every dtype."""
    return normal(key, (sum(sizes),), torch.float64).split(list(sizes))


def dropout(key: Tensor, x: Tensor, p: float) -> Tensor:
    """Set entries to zero, each with probability p, and scale up the others: inverted dropout.

    yⱼ = xⱼ / (1 − p) where uⱼ ≥ p, else 0,  uⱼ uniform on [0, 1)

    Because uⱼ = bits / 2³² is compared as an integer, every device and every dtype has the same mask.

    Args:
        key: int64 [2], or keys [B, 2]: row i of the mask is then drawn from key i alone. In general keys
            [..., 2], whose shape without the last axis is that of the first axes of x.
        x: float or complex tensor.
        p: the probability of zero, in [0, 1].

    Returns:
        y, of the shape and the dtype of x. E[y] = x, and Var[yⱼ] = xⱼ² p / (1 − p).

    Raises:
        TypeError: x is no float or complex tensor.
        ValueError: p is no number in [0, 1], or the keys do not match the first axes of x.

    Example:
        >>> gd.random.dropout(gd.random.key(0), torch.ones(6), 0.5)
        tensor([2., 2., 0., 0., 2., 0.])
        >>> keys = gd.random.split(gd.random.key(0), 3)
        >>> gd.random.dropout(keys, torch.ones(3, 4), 0.5)
        tensor([[2., 0., 0., 0.],
                [0., 0., 2., 0.],
                [2., 2., 0., 0.]])

    References:
        N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever, R. Salakhutdinov, "Dropout: a simple way to
        prevent neural networks from overfitting", 2014.
    """
    _check_keys(key)
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a float or complex tensor; got {got}")
    if isinstance(p, bool) or not isinstance(p, Real) or not 0 <= p <= 1:
        raise ValueError(f"p must be a number in [0, 1]; got {p!r}")
    rows = key.shape[:-1]
    if x.shape[: len(rows)] != rows:
        raise ValueError(
            f"keys {list(key.shape)} need x [{', '.join(map(str, rows))}, ...], a key for each row; "
            f"got {list(x.shape)}"
        )
    if p == 1:
        return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0)  # with a slope of 0
    return _dropped(x, _keep(key, x.shape[len(rows) :], float(p)), p)


def _dropped(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """Scale up the entries that a mask keeps, and set the others to zero."""
    return (x * (1 / (1 - p))).masked_fill(~keep, 0)


def _keep(key: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """Draw a mask, bool, of which a share 1 − p < 1 is true, by each of the keys [..., 2]."""
    first, second = _words(key, shape)
    # Because words are compared with a sign, their highest bit is turned over. p near 1 keeps something.
    return (first ^ second ^ _SIGN) >= min(round(p * 2**32), _WORD) + _SIGN


def _integers_below(span: int, key: Tensor, shape: Sequence[int]) -> Tensor:
    """Draw integers from [0, span), with JAX's bits, by each of the keys [..., 2]."""
    high, low = (_bits(each, shape) for each in _split(key, 2).unbind(-2))
    # 64 random bits modulo the span, with JAX's 2³² mod span, which is 0 for a span above 2¹⁶.
    multiplier = ((2**16 % span) ** 2 & _WORD) % span
    return (high * multiplier + low) % span


def _orders(key: Tensor, n: int) -> Tensor:
    """Shuffle the integers 0 … n−1 by each of the keys [..., 2]."""
    # JAX's number of rounds: it leaves a tie unbroken with a chance below 1/n. One of them for n of 0 or 1
    # too, because torch's vmap fails where a result along another axis than the first depends on no member.
    rounds = max(1, math.ceil(3 * math.log(max(1, n)) / math.log(_WORD)))
    orders = []
    for _ in range(rounds):
        key, subkey = _split(key, 2).unbind(-2)
        first, second = _words(subkey, (n,))
        # Because the words are compared with a sign, their highest bit is turned over.
        orders.append(_stable_order(first ^ second ^ _SIGN))
    return reduce(lambda order, ranks: order.gather(-1, ranks), orders)


def _stable_order(words: Tensor) -> Tensor:
    """Order words along the last axis, equal ones as they stand: the positions of the first, second, …"""
    if not words.is_cpu or not serves((words,)) or words.shape[-1] > _WORD:
        return torch.sort(words, dim=-1, stable=True).indices
    # A fifth of the time: with its position behind it no word equals another, and NumPy sorts in place.
    placed = (words.numpy().astype(np.int64) << 32) | np.arange(words.shape[-1])
    placed.sort(axis=-1)
    placed &= _WORD
    return torch.from_numpy(placed)


def _check_keys(key: Tensor) -> None:
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.shape[-1:] != (2,):
        raise TypeError(
            f"key must be an int64 tensor [2] made by gdfunc.random.key, or keys [..., 2]; got {_form(key)}"
        )


def _check_key(key: Tensor) -> None:
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.shape != (2,):
        raise TypeError(f"key must be an int64 tensor [2] made by gdfunc.random.key; got {_form(key)}")


def _form(key: Any) -> str:
    return f"shape {tuple(key.shape)} and dtype {key.dtype}" if isinstance(key, Tensor) else repr(key)


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(shape, int):
        raise TypeError(f"shape must be a sequence such as ({shape},); got {shape}")
    return tuple(check_int("a dimension of shape", size, 0) for size in shape)


def _split(key: Tensor, num: int) -> Tensor:
    return torch.stack([_unsigned(word) for word in _words(key, (num,))], dim=-1)


def _bits(key: Tensor, shape: Sequence[int]) -> Tensor:
    first, second = _words(key, shape)
    return _unsigned(first ^ second)


def _words(key: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Encrypt the 64-bit counters 0, 1, 2, … by each of the keys [..., 2]."""
    counters = torch.arange(math.prod(shape), device=key.device)
    keys = max(1, math.prod(key.shape[:-1]))
    parts = [counters] if is_tracing() else counters.split(max(1, _PART // keys))
    drawn = [_threefry(key.unsqueeze(-2), part >> 32, part) for part in parts]
    if len(drawn) > 1:
        drawn = [(torch.cat([x for x, _ in drawn], dim=-1), torch.cat([y for _, y in drawn], dim=-1))]
    shape = (*key.shape[:-1], *shape)
    return drawn[0][0].reshape(shape), drawn[0][1].reshape(shape)


def _upper_word(word: Tensor, span: int, more: int | Tensor = 0) -> Tensor:
    """⌊(word · span + more) / 2³²⌋, by halves of the span, so that no product exceeds 49 bits."""
    return (word * (span >> 16) + ((word * (span & 0xFFFF) + more) >> 16)) >> 16


def _unit_uniform(key: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Draw from [0, 1) with as many leading random bits as the dtype's fraction holds."""
    first, second = map(_unsigned, _words(key, shape))
    digits = round(-math.log2(torch.finfo(dtype).eps))
    if dtype == torch.float64:
        fraction = (first << (digits - 32)) | (second >> (64 - digits))
    else:
        width = torch.finfo(dtype).bits if digits >= 8 else 8  # as in JAX, for bfloat16
        fraction = ((first ^ second) & ((1 << width) - 1)) >> (width - digits)
    return fraction.to(dtype) * 2.0**-digits


def _unsigned(word: Tensor) -> Tensor:
    """Read a word as a number in [0, 2³²)."""
    return word.to(torch.int64) & _WORD


def _threefry(key: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Encrypt counters of two words each by the keys [..., 2]: two words each, int32."""
    if key.is_cpu and serves((key, first, second)):
        k0, k1 = key.numpy()[..., 0], key.numpy()[..., 1]
        return threefry_of_arrays(k0, k1, first.numpy(), second.numpy())
    return threefry(key, first, second)
