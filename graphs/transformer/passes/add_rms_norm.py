"""Residual add and norm become one kernel."""

from __future__ import annotations

import operator

import torch
from torch import fx

from magihuman.graphs.rewrite import call, replace
from magihuman.graphs.transformer.passes.context import Context
from magihuman.kernels import ops  # noqa: F401 - registers torch.ops.magihuman
from magihuman.kernels import reference as ref


def run(module: fx.GraphModule, context: Context) -> int:
    """Replace two norms a layer, of which the very first has no addition. The heads' norms, in
    fp32, are `head_norm`'s.
    """
    return sum(
        _with_addition(module, context, modality_rows) + _first(module, context, modality_rows)
        for modality_rows in context.groupings
    )


def _with_addition(
    module: fx.GraphModule, context: Context, modality_rows: ref.Counts | None
) -> int:
    def build(graph: fx.Graph, inputs: list[fx.Node]) -> list[fx.Node]:
        x, delta, weight = inputs
        target = torch.ops.magihuman.add_norm.default
        pair = call(
            graph, target, x=x, delta=delta, weight=weight, modality_rows=list(modality_rows or ())
        )
        return [graph.call_function(operator.getitem, (pair, i)) for i in range(2)]

    return replace(
        module,
        lambda x, delta, weight: ref.add_norm(x, delta, weight, modality_rows, context.dtype),
        (
            context.example(context.tokens, context.hidden),
            context.example(context.tokens, context.hidden, dtype=context.dtype),
            context.example(context.hidden * (3 if modality_rows else 1)),
        ),
        build,
    )


def _first(module: fx.GraphModule, context: Context, modality_rows: ref.Counts | None) -> int:
    def build(graph: fx.Graph, inputs: list[fx.Node]) -> list[fx.Node]:
        x, weight = inputs
        target = torch.ops.magihuman.norm.default
        runs = list(modality_rows or ())
        return [x, call(graph, target, x=x, weight=weight, modality_rows=runs, dtype=context.dtype)]

    return replace(
        module,
        lambda x, weight: ref.add_norm(x, None, weight, modality_rows, context.dtype),
        (
            context.example(context.tokens, context.hidden),
            context.example(context.hidden * (3 if modality_rows else 1)),
        ),
        build,
    )
