"""Linears of the blocks go to one operator that takes padded rows and modality row ranges."""

from __future__ import annotations

import torch
from torch import fx

from magihuman.graphs.rewrite import call, replace
from magihuman.graphs.transformer.passes.context import Context
from magihuman.kernels import ops  # noqa: F401 - registers torch.ops.magihuman
from magihuman.kernels import reference as ref
from magihuman.kernels.jit import UNSET


def run(module: fx.GraphModule, context: Context) -> int:
    """Replace the linears of the blocks, four a layer."""
    config = context.config
    shapes = {
        (config.hidden_size, config.qkv_rows),
        (config.heads * config.head_dim, config.hidden_size),
    }
    for layer in range(config.num_layers):
        up, down = config.mlp_widths(layer)
        shapes |= {(config.hidden_size, up), (down, config.hidden_size)}
    return sum(
        _run(module, context, modality_rows, *shape)
        for modality_rows in context.groupings
        for shape in sorted(shapes)
    )


def _run(
    module: fx.GraphModule,
    context: Context,
    modality_rows: ref.Counts | None,
    fan_in: int,
    fan_out: int,
) -> int:
    def build(graph: fx.Graph, inputs: list[fx.Node]) -> list[fx.Node]:
        x, weight = inputs
        operator = torch.ops.magihuman.linear.default
        runs = list(modality_rows or ())
        return [call(graph, operator, x=x, weight=weight, modality_rows=runs, route=UNSET)]

    return replace(
        module,
        lambda x, weight: ref.linear(x, weight, modality_rows),
        (
            context.example(context.tokens, fan_in, dtype=context.dtype),
            context.example(fan_out * (3 if modality_rows else 1), fan_in, dtype=context.dtype),
        ),
        build,
    )
