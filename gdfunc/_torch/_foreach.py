"""Operations on many tensors in one call of torch: on a CPU the kernels, and so the bits, of one by one."""

from typing import Any

import torch

lerp: Any = torch._foreach_lerp
mul: Any = torch._foreach_mul
addcmul: Any = torch._foreach_addcmul
clamp_min = torch._foreach_clamp_min
addcmul_: Any = torch._foreach_addcmul_
sqrt_ = torch._foreach_sqrt_
div = torch._foreach_div
