"""Laws that an optimizer keeps if it is what it claims to be."""

from ._averages import check_average as check_average
from ._contract import check_dtype as check_dtype
from ._contract import check_purity as check_purity
from ._curved import check_armijo as check_armijo
from ._curved import check_lbfgs as check_lbfgs
from ._curved import check_polyak as check_polyak
from ._curved import check_sam as check_sam
from ._curved import check_step as check_step
from ._derivatives import check_hypergradient as check_hypergradient
from ._draws import check_epochs as check_epochs
from ._draws import check_noise as check_noise
from ._draws import check_permutation as check_permutation
from ._draws import check_reshuffling as check_reshuffling
from ._edges import check_clip as check_clip
from ._edges import check_flip as check_flip
from ._edges import check_rest as check_rest
from ._kernel import check_kernel as check_kernel
from ._schedules import check_schedule as check_schedule
from ._symmetry import check_drift as check_drift
from ._symmetry import check_resume as check_resume
from ._symmetry import check_rotation as check_rotation
from ._symmetry import check_scale as check_scale
from ._symmetry import check_vmap as check_vmap
