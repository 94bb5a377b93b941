"""Operators of single elements: tables of expressions, and those that need more than an expression."""

from math import prod
from typing import Any

import torch
from torch import fx

from .._index import Point
from .._kernel import Kernel
from .._reduction import PRODUCT
from .._statement import HALVES, VALUE_TYPES
from .._tensor import Formula, Lazy, Map, stored
from ._call import Call, lowers

# C's library has these under the same names.
FUNCTIONS = (
    "exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh "
    "lgamma digamma erf erfc sqrt floor ceil trunc"
)
FUNCTIONS_OF_TWO = "atan2 hypot copysign nextafter fmod pow"

# {0}, {1}, … are values of the result's dtype, {f} the suffix of C's functions for it, {t} its type.
POINTWISE = {
    **{name: name + "{f}({0})" for name in FUNCTIONS.split()},
    **{name: name + "{f}({0}, {1})" for name in FUNCTIONS_OF_TWO.split()},
    "neg": "-{0}",
    "abs": "{0} < 0 ? -{0} : {0} + 0",
    "sign": "({0} > 0) - ({0} < 0)",
    "reciprocal": "1 / {0}",
    "rsqrt": "1 / sqrt{f}({0})",
    "round": "rint{f}({0})",
    "sigmoid": "1 / (1 + exp{f}(-{0}))",
    "relu": "{0} < 0 ? 0 : {0}",
    "mul": PRODUCT,
    "div": "{0} / {1}",
    "maximum": "({0} > {1}) | ({0} != {0}) ? {0} : {1}",
    "minimum": "({0} < {1}) | ({0} != {0}) ? {0} : {1}",
    "fmax": "({0} >= {1}) | ({1} != {1}) ? {0} : {1}",
    "fmin": "({0} <= {1}) | ({1} != {1}) ? {0} : {1}",
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "bitwise_xor": "{0} ^ {1}",
}
ROUNDING = {"floor", "ceil", "trunc", "round"}  # which leave integers as they are
ARITHMETIC = {"neg", "abs", "sign", "add", "sub", "relu"}  # which C does otherwise on bool

# The values are of the dtype that torch compares in; the result is bool.
PREDICATES = {
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "signbit": "__builtin_signbit((double){0}) != 0",
}
QUICK = ("sqrt", "floor", "ceil", "trunc", "rint", "copysign")  # functions that are one instruction


def pointwise(call: Call, template: str, *values: Any) -> Lazy:
    """Write an expression whose values and result have the result's dtype."""
    name = call.name.removeprefix("prims::")
    if name in ROUNDING and not call.dtype.is_floating_point:
        return call.tensor(values[0])
    if "{f}(" in template and not call.dtype.is_floating_point:
        raise call.refuse("of integers")
    if name in ARITHMETIC and call.dtype is torch.bool:
        raise call.refuse("of bool")
    if name == "nextafter" and call.dtype in HALVES:
        raise call.refuse("of 16 bits")
    if template == PRODUCT:
        factors = [value for value in values if isinstance(value, Lazy) or value != 1]
        if len(factors) == 1:
            return call.tensor(factors[0])
    operands = [call.tensor(value) for value in values]
    if call.dtype in HALVES and template in (PRODUCT, POINTWISE["div"]):
        operands[1] = call.tensor(values[1], _exactly(call, values[1]))
    quick = "{f}(" not in template or any(f"{name}{{f}}" in template for name in QUICK)
    if quick or prod(call.shape) == 1:
        return Map(template, operands, call.dtype)
    # From memory to memory, so that nothing breaks the row of calls, and none is made twice.
    operands = [stored(call.block, operand) if operand.cost else operand for operand in operands]
    return stored(call.block, Map(template, operands, call.dtype))


def _exactly(call: Call, value: Any) -> torch.dtype:
    """Choose a dtype for a factor. As in torch, a number that scales 16 bits is not rounded to them."""
    is_number = not isinstance(value, Lazy) or not value.shape
    return torch.float32 if is_number else call.dtype


def predicate(call: Call, template: str) -> Lazy:
    """Write an expression whose result is bool, of values in the dtype that torch compares in."""
    values: list[Any] = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in call.node.args]
    dtype = torch.result_type(*values) if len(values) == 2 else values[0].dtype
    return Map(template, [call.tensor(value, dtype) for value in call.arguments.values()], torch.bool)


@lowers("add", "sub", "prims::add", "prims::sub")
def _add(call: Call) -> Lazy:
    alpha = call.arguments.get("alpha", 1)
    template = "{0} + {1}" if "add" in call.name else "{0} - {1}"
    return pointwise(
        call, template if alpha == 1 else template + " * {2}", call["self"], call["other"], alpha
    )


@lowers("round")
def _round(call: Call) -> Lazy:
    if call.arguments.get("decimals"):
        raise call.refuse("with decimals")
    return pointwise(call, POINTWISE["round"], call["self"])


@lowers("where")
def _where(call: Call) -> Lazy:
    values = [call.tensor(call[name]) for name in ("self", "other")]
    return Map("{0} ? {1} : {2}", [call.tensor(call["condition"], torch.bool), *values], call.dtype)


@lowers("clamp", "clamp_min", "clamp_max")
def _clamp(call: Call) -> Lazy:
    result = call["self"]
    for bound, name in (("min", "maximum"), ("max", "minimum")):
        if call.arguments.get(bound) is not None:
            # Of equals, as 0 and -0, it takes the last.
            result = pointwise(call, POINTWISE[name], call[bound], result)
    return call.tensor(result)


@lowers("pow")
def _pow(call: Call) -> Lazy:
    base, exponent = call["self"], call["exponent"]
    squares = {0: "1", 1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}"}
    roots = {0.5: "sqrt{f}({0})", -0.5: "1 / sqrt{f}({0})", -1: "1 / {0}", -2: "1 / ({0} * {0})"}
    if call.dtype is torch.bfloat16 and not isinstance(exponent, Lazy) and exponent in (3, -2):
        square = pointwise(call, squares[2], base)  # which torch rounds
        return pointwise(call, *((PRODUCT, square, base) if exponent == 3 else (roots[-1], square)))
    if not isinstance(exponent, Lazy) and exponent in squares:
        return pointwise(call, squares[exponent], base)
    if not call.dtype.is_floating_point:
        raise call.refuse("of integers")
    if call.dtype is torch.float16:  # for which torch has no square root here: that of -0 is 0, of -inf inf
        roots = roots | {0.5: "{0} < -65504 ? -{0} : sqrt{f}({0} + 0)"}
        del roots[-0.5]
    if not isinstance(exponent, Lazy) and exponent in roots:
        return pointwise(call, roots[exponent], base)
    return pointwise(call, POINTWISE["pow"], base, exponent)


@lowers("polygamma")
def _polygamma(call: Call) -> Lazy:
    if call["n"] > 1:
        raise call.refuse(f"of order {call['n']}")
    return pointwise(call, ("digamma{f}({0})", "trigamma{f}({0})")[call["n"]], call["self"])


@lowers("remainder", "fmod", "floor_divide", "div")
def _divide(call: Call) -> Lazy:
    left, right = call["self"], call["other"]
    name = call.arguments.get("rounding_mode") or call.name
    if call.dtype.is_floating_point and name == "remainder":
        rest = pointwise(call, POINTWISE["fmod"], left, right)
        return pointwise(call, "{0} != 0 && (({1} < 0) != ({0} < 0)) ? {0} + {1} : {0}", rest, right)
    if call.dtype.is_floating_point:
        return pointwise(call, POINTWISE[name], left, right)
    if call.dtype is torch.bool:
        raise call.refuse("of bool")
    by = call.tensor(right)

    def nonzero(kernel: Kernel, point: Point) -> str:
        return kernel.divisor(by.at(kernel, point), VALUE_TYPES[call.dtype])

    over = Formula(call.shape, call.dtype, nonzero)
    # The processor traps where the least number is divided by -1.
    quotient = pointwise(call, "{1} == -1 ? -{0} : {0} / {1}", left, over)
    rest = pointwise(call, "{1} == -1 ? 0 : {0} % {1}", left, over)
    if name in ("trunc", "fmod"):
        return quotient if name == "trunc" else rest
    has_other_sign = pointwise(call, "{0} != 0 && ({0} < 0) != ({1} < 0)", rest, over)
    if name == "remainder":
        return pointwise(call, "{0} + {1} * {2}", rest, over, has_other_sign)
    return pointwise(call, "{0} - {1}", quotient, has_other_sign)


@lowers("gdfunc::threefry")
def _threefry(call: Call) -> Lazy:
    words = Map(
        "threefry({0}, {1}, {2})", [call.tensor(value) for value in call.arguments.values()], call.dtype
    )
    return stored(call.block, words)  # because it is dear, and both words are read


@lowers("bitwise_not")
def _bitwise_not(call: Call) -> Lazy:
    return pointwise(call, "{0} == 0" if call.dtype is torch.bool else "~{0}", call["self"])


@lowers("__lshift__", "__rshift__", "bitwise_left_shift", "bitwise_right_shift")
def _shift(call: Call) -> Lazy:
    by = call["other"]
    if isinstance(by, Lazy) or not 0 <= by < 8 * call.dtype.itemsize or call.dtype is torch.bool:
        raise call.refuse("unless it is by a number of bits that the dtype has")
    is_left = call.name in ("__lshift__", "bitwise_left_shift")
    return pointwise(call, "{0} << {1}" if is_left else "{0} >> {1}", call["self"], by)


@lowers("_to_copy", "to", "clone", "contiguous", "lift_fresh", "lift_fresh_copy")
@lowers("alias", "detach", "copy", "prims::convert_element_type")
def _copy(call: Call) -> Lazy:
    return call.tensor(call.arguments.get("src", next(iter(call.arguments.values()))))
