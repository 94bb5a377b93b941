"""Write each of torch's operators element by element. The names are those of aten's schemas.

A new pointwise operator is a line in `_pointwise.POINTWISE` or `PREDICATES`. Any other is a function under
`lowers`.
"""

from typing import Any

from torch import Tensor

from . import _indexing, _reductions  # noqa: F401  which enter what they lower into the table
from ._call import LOWERINGS, Call
from ._call import name_of as name_of
from ._constants import table
from ._pointwise import POINTWISE, PREDICATES, pointwise, predicate
from ._views import RESHAPES as RESHAPES

_TABLES = {"linspace", "logspace", "eye", "tril_indices", "triu_indices"}  # torch makes them more exactly
COVERED = {*POINTWISE, *PREDICATES, *LOWERINGS, *_TABLES}


def lower(call: Call) -> Any:
    """Make the result of a node: a tensor, or several."""
    name = call.name.removeprefix("prims::")  # whose pointwise operators are the same
    if call.name in LOWERINGS:
        return LOWERINGS[call.name](call)
    if name in POINTWISE:
        return pointwise(call, POINTWISE[name], *call.arguments.values())
    if name in PREDICATES:
        return predicate(call, PREDICATES[name])
    if isinstance(call.value, Tensor) and not call.node.all_input_nodes:
        return table(call)
    raise call.refuse()
