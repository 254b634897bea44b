"""The clamped activations become one kernel that pads its rows for the product that follows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from magihuman.graphs.rewrite import call, replace
from magihuman.graphs.transformer.passes.context import Context
from magihuman.kernels import ops  # noqa: F401 - registers torch.ops.magihuman
from magihuman.kernels import reference as ref


def run(module: fx.GraphModule, context: Context) -> int:
    """Replace one activation a layer."""
    config = context.config
    gelu = [layer for layer in range(config.num_layers) if layer in config.gelu7_layers]
    swiglu = [layer for layer in range(config.num_layers) if layer not in config.gelu7_layers]
    count = 0
    for layers, fn in ((gelu, ref.gelu7), (swiglu, ref.swiglu7)):
        if layers:
            width, out = config.mlp_widths(layers[0])
            count += _run(module, context, width, out, fn)
    return count


def _run(
    module: fx.GraphModule, context: Context, width: int, out: int, fn: Callable[[Tensor], Tensor]
) -> int:
    def build(graph: fx.Graph, inputs: list[fx.Node]) -> list[fx.Node]:
        (x,) = inputs
        operator = torch.ops.magihuman.activation.default
        return [call(graph, operator, x=x, kind=fn.__name__, padded=ref.padded_width(out))]

    return replace(
        module, fn, (context.example(context.tokens, width, dtype=context.dtype),), build
    )
