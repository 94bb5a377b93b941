"""Dropout from a key: a mode that replaces every draw of dropout in the forward pass of a module."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .. import _tree, random
from .._torch._draws import is_checkpointed, opened
from .._torch._transforms import members

_SATURATION = 1.7580993408473766  # −λα of SELU: Klambauer et al., "Self-normalizing neural networks", 2017


class KeyedDropout(TorchFunctionMode):
    """Draw the masks of dropout from keys: row i of call c from `fold_in(rows[i], c)`.

    Args:
        rows: int64 [B, 2], a key for each sample.
        expected: how many calls there will be, if known, whose keys are then derived at once.
    """

    def __init__(self, rows: Tensor, expected: int = 0) -> None:
        super().__init__()
        self.rows, self.calls, self.members = rows, 0, members()
        counts = torch.arange(expected, device=rows.device)
        self.keys = random.fold_in(rows[:, None], counts).unbind(1) if expected > 1 else ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in opened:
            with self:
                return opened[func](*args, **kwargs)
        replacement = _REPLACEMENTS.get(func)
        return func(*args, **kwargs) if replacement is None else replacement(self, func, *args, **kwargs)

    def draw(self, draw: Callable[[Tensor, Sequence[int]], Tensor], shape: Sequence[int]) -> Tensor:
        """Draw a tensor by one call: contiguous blocks of its rows from the keys of the samples."""
        if is_checkpointed():
            raise ValueError(
                "dropout inside torch.utils.checkpoint is run again for the gradient, without the key, and "
                "would draw another mask; leave dropout out of what is checkpointed"
            )
        if members() != self.members:
            raise ValueError(
                "dropout inside a vmap of the forward pass would draw one mask for all that is mapped; "
                "write the forward pass for a batch, or apply dropout outside of the vmap"
            )
        call, self.calls = self.calls, self.calls + 1
        keys = self.keys[call] if call < len(self.keys) else random.fold_in(self.rows, call)
        if not len(keys):  # a batch without samples
            return draw(keys.new_zeros(2), shape)
        if not shape or shape[0] % len(keys):
            return draw(keys[0], shape)  # rows that belong to no sample
        return draw(keys, (shape[0] // len(keys), *shape[1:])).reshape(shape)


def rows_of(key: Any, inputs: Any, are_drawn_from: bool) -> Tensor | None:
    """Return the keys of the rows of a batch, int64 [B, 2]; None if nothing will be drawn from them."""
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.shape[-1:] != (2,) or key.ndim > 2:
        raise TypeError(
            f"key must be int64 [2] from gdfunc.random, or [B, 2] with one for each row; got "
            f"{random._form(key)}. If the module has an argument named key itself, pass it by position"
        )
    first = next(iter(_tree.tensors(inputs)), None)
    size = len(first) if first is not None and first.ndim else 1
    if key.ndim == 2 and len(key) != size:
        shape = "none" if first is None else list(first.shape)
        raise ValueError(
            f"key has {len(key)} rows, but the batch {size} (the first tensor argument is {shape}); "
            f"pass a key for each row, or one key [2]"
        )
    if not are_drawn_from:
        return None
    rows = random.fold_in(key, torch.arange(size, device=key.device)) if key.ndim == 1 else key
    return rows if first is None else rows.to(first.device)


def _dropout(is_feature: bool, is_alpha: bool) -> Callable[..., Tensor]:
    def replacement(mode: KeyedDropout, func: Any, input: Tensor, p: float, train: bool) -> Tensor:
        if not train or not 0 < p < 1 or not input.numel():
            return func(input, p, train)  # which draws nothing, or refuses p
        shape = [*input.shape[:2], *[1] * (input.ndim - 2)] if is_feature else input.shape
        result = _masked(mode, input, p, shape, is_alpha)
        return input.copy_(result) if _is_in_place(func) else result

    return replacement


def _masked(
    mode: KeyedDropout, x: Tensor, p: float, shape: Sequence[int], is_alpha: bool = False
) -> Tensor:
    keep = mode.draw(lambda keys, rows: random._keep(keys, rows, p), shape)
    if not is_alpha:
        return random._dropped(x, keep, p)
    scale = 1 / math.sqrt((_SATURATION**2 * p + 1) * (1 - p))
    shift = _SATURATION * scale * p
    return (x * scale + shift).masked_fill(~keep, shift - _SATURATION * scale)


def _rrelu(
    mode: KeyedDropout,
    func: Any,
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: Any = None,
) -> Tensor:
    if not training:
        return func(input, lower, upper, training)
    slope = mode.draw(lambda keys, rows: random.uniform(keys, rows, input.dtype, lower, upper), input.shape)
    result = torch.where(input > 0, input, input * slope)
    return input.copy_(result) if _is_in_place(func) else result


def _is_in_place(func: Any) -> bool:
    return func.__name__.endswith("_")


def _attention(
    mode: KeyedDropout,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend as torch does, with dropout on the weights: softmax(Q Kᵀ / √E + mask) V."""
    if not 0 < dropout_p <= 1:
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return func(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention takes attn_mask or is_causal=True, not both")
    if enable_gqa:
        key, value = (_repeated(x, query.shape[-3] // x.shape[-3]) for x in (key, value))
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    # A row without any place to attend to has weights 0, and no slope.
    is_empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(is_empty, 0).softmax(-1).masked_fill(is_empty, 0)
    weights = weights * 0 if dropout_p == 1 else _masked(mode, weights, dropout_p, weights.shape)
    return weights @ value


def _repeated(x: Tensor, times: int) -> Tensor:
    """Repeat each head of [..., H, S, E] for a group of queries."""
    return x.unsqueeze(-3).expand(*x.shape[:-2], times, *x.shape[-2:]).flatten(-4, -3)


_REPLACEMENTS: dict[Any, Callable[..., Tensor]] = {
    torch.dropout: _dropout(False, False),
    torch.dropout_: _dropout(False, False),
    torch.feature_dropout: _dropout(True, False),
    torch.feature_dropout_: _dropout(True, False),
    torch.alpha_dropout: _dropout(False, True),
    torch.alpha_dropout_: _dropout(False, True),
    torch.feature_alpha_dropout: _dropout(True, True),
    torch.feature_alpha_dropout_: _dropout(True, True),
    torch.rrelu: _rrelu,
    torch.rrelu_: _rrelu,
    functional.scaled_dot_product_attention: _attention,
}
