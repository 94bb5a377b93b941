"""Laws that an optimizer keeps if it is what it claims to be."""

from ._kernel import check_kernel as check_kernel
