"""Laws that an optimizer keeps if it is what it claims to be."""

from ._contract import check_dtype as check_dtype
from ._contract import check_purity as check_purity
from ._kernel import check_kernel as check_kernel
