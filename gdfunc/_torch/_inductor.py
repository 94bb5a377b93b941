"""Inductor's compiler. All imports are inside functions, because they take seconds."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from ._graphs import Rewrites
from ._patches import vectors_of_torch

Compiled = Callable[[list[Tensor]], Any]


def shape_environment() -> Any:
    """Make the book in which torch keeps symbolic sizes."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return ShapeEnv()


def symbolic_length(shapes: Any) -> Any:
    """Make a size that may be any number of steps."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    symbol = shapes.create_symbol(64, ConstantSource("length"), dynamic_dim=DimDynamic.DYNAMIC)
    return shapes.create_symintnode(symbol, hint=64)


def compiled(graph: fx.GraphModule, inputs: list[Tensor], mode: Any) -> Compiled:
    """Compile a graph of tensors without values: to C++ if all of its inputs are on the CPU."""
    import torch._inductor.config as config
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner

    on_cpu = all(leaf.device.type == "cpu" for leaf in inputs)
    # Precompiled headers would come from a directory in /tmp that anybody may have made.
    options = {"cpp_wrapper": on_cpu, "scalar_asserts": False, "cpp_cache_precompile_headers": False}

    def attempt(**more: Any) -> Compiled:
        with config.patch(options | more), tracing(TracingContext(mode)):
            return compile_fx_inner(graph, inputs, cpp_wrapper=on_cpu)

    try:
        with vectors_of_torch():
            return attempt(**{"cpp.vec_isa_ok": True})
    except Exception:
        return attempt()


def inductor_decompositions() -> Rewrites:
    """Collect the decompositions that Inductor wants."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def scan_operator(
    step: Callable[..., list[Tensor]], carry: list[Tensor], xs: list[Tensor], consts: Sequence[Tensor]
) -> list[Tensor]:
    """Call torch's operator for a scan, which Inductor compiles as a loop."""
    from torch._higher_order_ops.scan import scan_op

    return list(scan_op(step, carry, xs, tuple(consts)))
