"""The height of a real landscape as a loss."""

import torch
from torch import Tensor

from .. import datasets
from ._problem import Problem


def elevation(*, dtype: torch.dtype = torch.float64) -> Problem:
    """Make the height of a real landscape a loss: params is a place on the map.

    f(x, y) = (1−u)(1−v) hⱼᵢ + u(1−v) hⱼ,ᵢ₊₁ + (1−u)v hⱼ₊₁,ᵢ + uv hⱼ₊₁,ᵢ₊₁,  x = i + u, y = j + v

    Bilinear between the heights h of `elevation_map`, so that no place is lower than the lowest of
    them: 236 m, in column 347 and row 288 alone. There, as on all lines of the grid, the slope
    jumps; the gradient is that of the cell to the south-east and need not vanish. A place off the
    map has the height of the nearest one on it. The start is the summit.

    Args:
        dtype: of the problem.

    Returns:
        The problem; params is (column, row) [2], in cells from the north-west corner, and the loss
        is in metres.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; it is the extra `plot`.

    Example:
        >>> problem = gd.problems.elevation()
        >>> problem.params, problem.loss_fn(problem.params)
        (tensor([219., 297.], dtype=torch.float64), tensor(1076., dtype=torch.float64))
        >>> problem.minimizers[0], problem.minimum
        (tensor([347., 288.], dtype=torch.float64), 236.0)
    """
    heights = datasets.elevation_map(dtype=dtype)
    rows, columns = heights.shape
    last = torch.tensor([columns - 1, rows - 1], dtype=dtype)
    corners = torch.tensor([0, 1, columns, columns + 1])

    def loss_fn(params: Tensor, batch: None = None) -> Tensor:
        grid, far = heights.to(params).flatten(), last.to(params)
        place = torch.minimum(params.clamp(min=0), far)
        # A place that is NaN needs some cell; its offsets in that cell still make the height NaN.
        cell = torch.minimum(place.nan_to_num().floor(), far - 1)
        (u, v), (column, row) = place - cell, cell.to(torch.int64)
        weights = torch.stack([(1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v])
        return weights @ grid[row * columns + column + corners.to(params.device)]

    def position(index: Tensor) -> Tensor:
        return torch.stack([index % columns, index // columns]).to(dtype)

    summit, lowest = position(heights.argmax()), position(heights.argmin())
    return Problem(loss_fn, summit, None, (lowest,), float(heights.min()))
