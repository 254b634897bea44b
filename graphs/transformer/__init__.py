"""The DiT: captured once at any numbers of tokens, rewritten by `passes`, replayed by size.

`compile` has the order of the passes and the matches that they must reach. `replay` keeps a CUDA
graph for each size, and `options` has what either may be asked. `layer_hooks` lets weights come
layer by layer.
"""

from magihuman.graphs.transformer.compile import (
    TRACE_ROWS,
    compile_forward,
    example_inputs,
    pad_weights,
    rewrite,
    route_linears,
    specialize,
)
from magihuman.graphs.transformer.options import CompileOptions, ReplayOptions
from magihuman.graphs.transformer.passes.context import Context
from magihuman.graphs.transformer.replay import CompiledForward

__all__ = [
    "TRACE_ROWS",
    "CompileOptions",
    "CompiledForward",
    "Context",
    "ReplayOptions",
    "compile_forward",
    "example_inputs",
    "pad_weights",
    "rewrite",
    "route_linears",
    "specialize",
]
