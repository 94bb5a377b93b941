"""Operators as compositions of simpler ones, where torch has no such decomposition or a less exact one.

Convolutions and pooling all take the same windows of a tensor: as views, of which nothing is stored. With
stride s, padding p and dilation d,

    window[…, o, k] = x[…, o · s + k · d − p]

and a convolution is a sum of products of windows and kernels, which is a contraction like any other.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from itertools import repeat
from math import inf, pi, prod, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._index import strides_of
from ._statement import HALVES

aten = torch.ops.aten
Numbers = Sequence[int]
Axes = tuple[Numbers, Numbers, Numbers, Numbers, Numbers]  # places, size, stride, padding, dilation


def _for_axes(n: int, *numbers: Numbers) -> Iterator[Numbers]:
    """Let one number for all axes stand for each of them."""
    return ([*each] * n if len(each) == 1 else [*each] for each in numbers)


def _windows(x: Tensor, *axes: Numbers, fill: float = 0) -> Tensor:
    """Take windows along the last axes: [..., *places, *size]."""
    places, size, stride, padding, dilation = axes
    first = x.ndim - len(size)
    pads: list[int] = []
    for extent, *axis in zip(x.shape[first:], places, size, stride, padding, dilation, strict=True):
        place, taps, step, before, gap = axis
        pads = [before, (place - 1) * step + (taps - 1) * gap + 1 - before - extent, *pads]
    x = pad(x, pads, value=fill)
    for dim, (taps, step, gap) in enumerate(zip(size, stride, dilation, strict=True), first):
        x = x.unfold(dim, (taps - 1) * gap + 1, step)[..., ::gap]
    return x


def _back(y: Tensor, extents: Numbers, *axes: Numbers) -> Tensor:
    """Transpose windows: y[..., o] at [..., i, k] where i = o · s + k · d − p, else 0."""
    size, stride, padding, dilation = axes
    first, n = y.ndim - len(size), len(size)
    for dim, step in enumerate(stride, first):
        y = pad(y.movedim(dim, -1)[..., None], (0, step - 1)).flatten(-2).movedim(-1, dim)
    before = [gap * (taps - 1) - old for gap, taps, old in zip(dilation, size, padding, strict=True)]
    return _windows(y, extents, size, [1] * n, before, dilation).flip(list(range(-n, 0)))


def _convolve(windows: Tensor, weight: Tensor, is_back: bool, groups: int) -> Tensor:
    """Sum the products of windows [B, groups · C, *places, *size] and kernels, over C and size."""
    n = weight.ndim - 2
    kernels = weight.unflatten(0, (groups, -1))
    kernels = kernels.transpose(1, 2) if is_back else kernels
    kernels = kernels.reshape(*kernels.shape[:3], *repeat(1, n), *kernels.shape[3:])
    products = windows.unflatten(1, (groups, -1))[:, :, None] * kernels
    return products.sum([3, *range(-n, 0)]).flatten(1, 2)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    stride, padding, dilation, transposed, output_padding, groups = how
    size, n = weight.shape[2:], weight.ndim - 2
    stride, padding, dilation, output_padding = _for_axes(n, stride, padding, dilation, output_padding)
    axes = zip(x.shape[2:], size, stride, padding, dilation, output_padding, strict=True)
    if transposed:
        places = [(extent - 1) * s - 2 * p + d * (k - 1) + 1 + more for extent, k, s, p, d, more in axes]
    else:
        places = [(extent + 2 * p - d * (k - 1) - 1) // s + 1 for extent, k, s, p, d, _ in axes]
    windows = (_back if transposed else _windows)(x, places, size, stride, padding, dilation)
    out = _convolve(windows, weight, transposed, groups)
    return out if bias is None else out + bias.reshape(-1, *repeat(1, n))


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *how: Any) -> tuple[Tensor | None, ...]:
    _, stride, padding, dilation, transposed, _, groups, mask = how
    size, n = weight.shape[2:], weight.ndim - 2
    stride, padding, dilation = _for_axes(n, stride, padding, dilation)
    of_x = (_windows if transposed else _back)(grad, x.shape[2:], size, stride, padding, dilation)
    seen, by = (grad, x) if transposed else (x, grad)
    windows = _windows(seen, by.shape[2:], size, stride, padding, dilation).unflatten(1, (groups, -1))
    each = by.shape[1] // groups
    by = by.reshape(len(by), groups, each, 1, *by.shape[2:], *repeat(1, n))
    of_weight = (windows[:, :, None] * by).sum([0, *range(4, 4 + n)]).flatten(0, 1)
    found = _convolve(of_x, weight, not transposed, groups), of_weight, grad.sum([0, *range(2, 2 + n)])
    return tuple(each if wanted else None for each, wanted in zip(found, mask, strict=True))


def _pooling(
    x: Tensor, size: Numbers, stride: Numbers, padding: Numbers, dilation: Numbers, ceil_mode: bool, n: int
) -> Axes:
    """Count the places of the windows, and give their numbers for each of the n axes."""
    size, stride, padding, dilation = _for_axes(n, size, stride or size, padding, dilation)
    places = []
    for extent, k, s, p, d in zip(x.shape[-n:], size, stride, padding, dilation, strict=True):
        place = (extent + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil_mode else 0)) // s + 1
        places.append(place - (ceil_mode and (place - 1) * s >= extent + p))
    return places, size, stride, padding, dilation


def _max_pool(n: int, x: Tensor, size: Numbers, stride: Numbers = (), *how: Any) -> tuple[Tensor, Tensor]:
    padding, dilation, ceil_mode = list[Any]([*how, *((0,), (1,), False)[len(how) :]])
    axes = _pooling(x, size, stride, padding, dilation, ceil_mode, n)
    windows = _windows(x, *axes, fill=-inf).flatten(-n)
    values = windows.amax(-1)
    # As in torch, the place is that of the last NaN, else of the first largest. Padding has no place.
    numbers = torch.arange(prod(x.shape[-n:])).reshape(x.shape[-n:])
    at = _windows(numbers, *axes, fill=-1).flatten(-n)
    first = torch.where((windows == values[..., None]) & (at >= 0), at, numbers.numel()).amin(-1)
    last = torch.where(windows.isnan(), at, -1).amax(-1)
    return values, torch.where(last < 0, first, last)


def _max_pool_backward(n: int, grad: Tensor, x: Tensor, *how: Any) -> Tensor:
    *_, at = how
    flat = torch.zeros_like(x).flatten(-n)
    return flat.scatter_add(-1, at.flatten(-n), grad.flatten(-n)).reshape(x.shape)


def _counts(x: Tensor, axes: Axes, include_pad: bool, divisor: int | None, n: int) -> Any:
    """Count the elements by which the sum over each window is divided."""
    places, size, stride, padding, dilation = axes
    if divisor:
        return divisor
    ones = x.new_ones(x.shape[-n:])
    if include_pad:
        ones, padding = pad(ones, [p for p in reversed(padding) for _ in range(2)], value=1), [0] * n
    return _windows(ones, places, size, stride, padding, dilation).sum(list(range(-n, 0)))


def _avg_pool(n: int, x: Tensor, size: Numbers, stride: Numbers = (), *how: Any) -> Tensor:
    padding, ceil_mode, include_pad, divisor = list[Any]([*how, *((0,), False, True, None)[len(how) :]])
    axes = _pooling(x, size, stride, padding, (1,), ceil_mode, n)
    return _windows(x, *axes).sum(list(range(-n, 0))) / _counts(x, axes, include_pad, divisor, n)


def _avg_pool_backward(n: int, grad: Tensor, x: Tensor, *how: Any) -> Tensor:
    size, stride, padding, ceil_mode, include_pad, divisor = how
    axes = _pooling(x, size, stride, padding, (1,), ceil_mode, n)
    share = grad / _counts(x, axes, include_pad, divisor, n)
    return _back(share, x.shape[-n:], *axes[1:]).sum(list(range(-n, 0)))


def _adaptive_avg_pool2d_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Average alike windows; others are refused."""
    extents, places = x.shape[-2:], grad.shape[-2:]
    if any(extent % place for extent, place in zip(extents, places, strict=True)):
        return NotImplemented
    size = [extent // place for extent, place in zip(extents, places, strict=True)]
    return _avg_pool_backward(2, grad, x, size, size, [0], False, True, prod(size))


def _erfinv(y: Tensor) -> Tensor:
    """Solve erf(x) = y by two steps of Halley's method, of which each triples the digits.

    They start from S. Winitzki's "A handy approximation for the error function and its inverse" (2008),
    which has 3 digits, written so that nothing cancels. Next to 1, erfc knows what erf has lost.
    """
    size, a = y.abs(), 0.147
    tail = torch.log1p(-size * size)
    middle = 2 / (pi * a) + tail / 2
    x = torch.sqrt((-tail / a) / (torch.sqrt(middle * middle - tail / a) + middle))
    for _ in range(2):
        error = torch.where(size < 0.5, torch.erf(x) - size, (1 - size) - torch.erfc(x))
        newton = error / (2 / sqrt(pi) * torch.exp(-x * x))
        x = x - newton / (1 + x * newton)
    x = torch.where(size == 1, inf, x)
    return torch.copysign(x, y)


def _along(rewrite: Callable[..., Any]) -> Callable[..., Any]:
    """Give a tensor without axes one axis while the rewriting runs."""

    @wraps(rewrite)
    def rewritten(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.ndim:
            return rewrite(x, *args, **kwargs)
        return tuple(each.reshape(()) for each in rewrite(x[None], *args, **kwargs))

    return rewritten


@_along
def _sort(x: Tensor, dim: int = -1, descending: bool = False, **_: Any) -> tuple[Tensor, Tensor]:
    """Put each element at the number of those before it. NaN is the largest."""
    rows = x.movedim(dim, -1)
    left, right = rows[..., :, None], rows[..., None, :]
    low, high = (right, left) if descending else (left, right)
    before, after = ((a < b) | (b.isnan() & ~a.isnan()) for a, b in ((low, high), (high, low)))
    number = torch.arange(rows.shape[-1])
    rank = (before | (~after & (number[:, None] < number))).sum(-2)
    at = torch.zeros_like(rank).scatter(-1, rank, number.expand(rank.shape))
    return rows.gather(-1, at).movedim(-1, dim), at.movedim(-1, dim)


@_along
def _topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, *_: Any) -> tuple[Tensor, Tensor]:
    values, at = _sort(x, dim, largest)
    return values.narrow(dim, 0, k), at.narrow(dim, 0, k)


@_along
def _kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    values, at = _sort(x, dim)
    found = values.narrow(dim, k - 1, 1), at.narrow(dim, k - 1, 1)
    return found if keepdim else (found[0].squeeze(dim), found[1].squeeze(dim))


@_along
def _median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Take the lower one of two in the middle; of what has a NaN, its first NaN."""
    value, at = _kthvalue(x, (x.shape[dim] + 1) // 2, dim, keepdim)
    if not x.is_floating_point():
        return value, at
    bad = x.isnan()
    spoilt, first = bad.any(dim, keepdim), bad.long().argmax(dim, keepdim)
    return torch.where(spoilt, torch.nan, value), torch.where(spoilt, first, at)


def _median_of_all(x: Tensor) -> Tensor:
    return _median(x.flatten(), 0)[0] if x.numel() else NotImplemented


def _repeat(x: Tensor, times: Numbers) -> Tensor:
    x = x.expand([1] * (len(times) - x.ndim) + [*x.shape])
    for dim, number in enumerate(times):
        shape = [*x.shape[:dim], number, *x.shape[dim:]]
        x = x.unsqueeze(dim).expand(shape).flatten(dim, dim + 1)
    return x


def _pad(x: Tensor, pads: Numbers, value: Any = 0) -> Tensor:
    for dim, before, after in zip(range(-1, -x.ndim - 1, -1), pads[::2], pads[1::2], strict=False):
        extent = x.shape[dim] + min(before, 0) + min(after, 0)
        x = x.narrow(dim, max(-before, 0), extent)
        before, after = max(before, 0), max(after, 0)
        if before + after:
            shape = list(x.shape)
            shape[dim] += before + after
            x = x.new_full(shape, value).slice_scatter(x, dim, before, before + extent)
    return x


def _diagonal_scatter(x: Tensor, source: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """Write a strided slice: elements of a diagonal are one row and one column apart."""
    rows = x.movedim((dim1, dim2), (-2, -1))
    width, count = rows.shape[-1], source.shape[-1]
    start = offset if offset >= 0 else -offset * width
    flat = rows.flatten(-2).slice_scatter(source, -1, start, start + count * (width + 1), width + 1)
    return flat.reshape(rows.shape).movedim((-2, -1), (dim1, dim2))


def _spread(at: Tensor, dim: int, shape: Numbers) -> Tensor:
    """Give an index of rows to each element of the rows."""
    axes = range(len(shape))
    return at.reshape([at.numel() if axis == dim % len(shape) else 1 for axis in axes]).expand(shape)


def _index_select(x: Tensor, dim: int, at: Tensor) -> Tensor:
    shape = list(x.shape)
    if x.ndim:
        shape[dim] = at.numel()
    return x.gather(dim, _spread(at, dim, shape))


def _embedding(table: Tensor, at: Tensor, *_: Any) -> Tensor:
    return _index_select(table, 0, at).reshape(*at.shape, table.shape[1])


def _index_add(x: Tensor, dim: int, at: Tensor, source: Tensor, *, alpha: Any = 1) -> Tensor:
    return x.scatter_add(dim, _spread(at, dim, source.shape), source * alpha)


def _index_copy(x: Tensor, dim: int, at: Tensor, source: Tensor) -> Tensor:
    """Copy rows to where an index says, which may not be negative here."""
    return x.scatter(dim, _spread(at, dim, source.shape), source)


def _as_strided(x: Tensor, size: Numbers, stride: Numbers, start: int | None = None) -> Tensor:
    """Reshape, as torch's group_norm does. Other strides are refused."""
    is_dense = x.is_contiguous() and x.numel() == prod(size) and tuple(stride) == strides_of(size)
    return x.reshape(size) if is_dense and start is None else NotImplemented


def _smooth_l1_backward(grad: Tensor, x: Tensor, target: Tensor, reduction: int, beta: float) -> Tensor:
    """Give NaN the slope NaN, not 0."""
    off = x - target
    slope = torch.where(off >= beta, 1.0, torch.where(off <= -beta, -1.0, off / beta))
    return slope * grad / (max(x.numel(), 1) if reduction == 1 else 1)


def _divide(a: Any, b: Any, *, rounding_mode: str | None = "floor") -> Tensor:
    """Divide and round as torch's vectors do: all numbers, but integers."""
    dtype = torch.result_type(a, b)
    if rounding_mode is None or not dtype.is_floating_point:
        return NotImplemented
    is_scalar = not isinstance(b, Tensor) or b.numel() == 1
    wide = torch.float32 if dtype in HALVES and is_scalar else dtype  # rounded once
    a, b = (
        each.to(wide) if isinstance(each, Tensor) else torch.full((), each, dtype=wide) for each in (a, b)
    )
    if wide is not dtype:
        return _divide(a, b, rounding_mode=rounding_mode).to(dtype)
    if rounding_mode == "trunc":
        return (a / b).trunc()
    rest = torch.fmod(a, b)
    ratio = (a - rest) / b
    ratio = torch.where((rest != 0) & ((b < 0) ^ (rest < 0)), ratio - 1, ratio)
    floor = ratio.floor()
    floor = torch.where(ratio - floor > 0.5, floor + 1, floor)
    floor = torch.where(ratio != 0, floor, torch.copysign(torch.zeros_like(ratio), a / b))
    return torch.where(b == 0, a / b, floor)


def _logit(x: Tensor, eps: float | None = None) -> Tensor:
    """Round each result in half precision, as torch does here."""
    x = x if eps is None else x.clamp(eps, 1 - eps)
    return (x / (1 - x)).log()


def _sigmoid_backward(grad: Tensor, y: Tensor) -> Tensor:
    """Round each result in float16 and the last one in bfloat16, as torch does."""
    if y.dtype is torch.bfloat16:
        return _sigmoid_backward(grad.float(), y.float()).to(y.dtype)
    return grad * (1 - y) * y


def _xlogy(x: Tensor, y: Tensor) -> Tensor:
    if not (x.dtype == y.dtype and x.is_floating_point()):
        return NotImplemented
    return torch.where(y.isnan(), torch.nan, torch.where(x == 0, 0, x * y.log()))


def _var(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Sum in float64, as torch does here, though not within its norms."""
    return _var_mean(x.double(), *args, **kwargs)[0].to(x.dtype)


def _std(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _var_mean(x.double(), *args, **kwargs)[0].sqrt().to(x.dtype)


def _var_mean(
    x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(range(x.ndim)) if dim is None or dim == [] else dim
    mean = x.mean(dims, keepdim=True)
    count = x.numel() // max(mean.numel(), 1)
    rest = max(count - (1 if correction is None else correction), 0)
    total = (x - mean).square().sum(dims, keepdim=keepdim)
    return total / rest, mean if keepdim else x.mean(dims)


def _zeros_for(tangent: Tensor, primal: Tensor, *, self_num_batch_dims: int = 0) -> Tensor:
    """Give the zeros of forward mode. Their layout does not matter here."""
    return primal.new_zeros((*tangent.shape[:self_num_batch_dims], *primal.shape))


def _in(dtype: torch.dtype, value: Any) -> Any:
    """Convert what is a tensor of floating-point numbers."""
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_floating else value


def of_floats(rewrite: Callable[..., Any]) -> Callable[..., Any]:
    """Round a result in half precision once. Leave the operator of integers to be refused by its name."""

    @wraps(rewrite)
    def rewritten(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not x.is_floating_point():
            return NotImplemented
        if x.dtype not in HALVES:
            return rewrite(x, *args, **kwargs)
        found = rewrite(*(_in(torch.float32, each) for each in (x, *args)), **kwargs)
        if isinstance(found, tuple):
            return tuple(_in(x.dtype, each) for each in found)
        return _in(x.dtype, found)

    return rewritten


_ANY = {
    aten.diagonal_scatter.default: _diagonal_scatter,
    aten.embedding.default: _embedding,
    aten.index_select.default: _index_select,
    aten.index_add.default: _index_add,
    aten.index_copy.default: _index_copy,
    aten.as_strided.default: _as_strided,
    aten.constant_pad_nd.default: _pad,
    aten.repeat.default: _repeat,
    aten.sort.default: _sort,
    aten.sort.stable: _sort,
    aten.topk.default: _topk,
    aten.kthvalue.default: _kthvalue,
    aten.median.dim: _median,
    aten.median.default: _median_of_all,
    aten.logit.default: _logit,
    aten.div.Tensor_mode: _divide,
    aten.div.Scalar_mode: _divide,
    aten.floor_divide.default: _divide,
    aten.floor_divide.Scalar: _divide,
    aten.xlogy.Tensor: _xlogy,
    aten.sigmoid_backward.default: _sigmoid_backward,
    aten._new_zeros_with_same_feature_meta.default: _zeros_for,
}
_FLOATING: dict[Any, Callable[..., Any]] = {
    aten.std.correction: _std,
    aten.var.correction: _var,
    aten.var_mean.correction: _var_mean,
    aten.smooth_l1_loss_backward.default: _smooth_l1_backward,
    aten.erfinv.default: _erfinv,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.max_pool2d_with_indices.default: partial(_max_pool, 2),
    aten.max_pool3d_with_indices.default: partial(_max_pool, 3),
    aten.max_pool2d_with_indices_backward.default: partial(_max_pool_backward, 2),
    aten.max_pool3d_with_indices_backward.default: partial(_max_pool_backward, 3),
    aten.avg_pool2d.default: partial(_avg_pool, 2),
    aten.avg_pool3d.default: partial(_avg_pool, 3),
    aten.avg_pool2d_backward.default: partial(_avg_pool_backward, 2),
    aten.avg_pool3d_backward.default: partial(_avg_pool_backward, 3),
    aten._adaptive_avg_pool2d_backward.default: _adaptive_avg_pool2d_backward,
}
OWN = _ANY | {operator: of_floats(rewrite) for operator, rewrite in _FLOATING.items()}
