"""Norm and rotation of q and k, and their layout, become one kernel."""

from __future__ import annotations

import operator

import torch
from torch import fx

from magihuman.graphs.rewrite import call, replace
from magihuman.graphs.transformer.passes.context import Context
from magihuman.kernels import ops  # noqa: F401 - registers torch.ops.magihuman
from magihuman.kernels import reference as ref


def run(module: fx.GraphModule, context: Context) -> int:
    """Replace one split of a projection a layer. The gates stay a view of the projection."""
    return sum(
        _run(module, context, modality_rows and context.attended_rows)
        for modality_rows in context.groupings
    )


def _run(module: fx.GraphModule, context: Context, attended_rows: ref.Counts | None) -> int:
    config = context.config
    heads, kv_heads = context.heads
    columns = config.qkv_rows // context.ranks
    rows = sum(context.attended_rows)
    norm = config.head_dim * (3 if attended_rows else 1)

    def build(graph: fx.Graph, inputs: list[fx.Node]) -> list[fx.Node]:
        qkv, q_weight, k_weight, rope = inputs
        parts = call(
            graph,
            torch.ops.magihuman.qk_norm_rope.default,
            qkv=qkv,
            q_weight=q_weight,
            k_weight=k_weight,
            rope=rope,
            attended_rows=list(attended_rows or ()),
            heads=heads,
            kv_heads=kv_heads,
        )
        gate = graph.call_function(torch.ops.aten.slice.Tensor, (qkv, 1, columns - heads, columns))
        return [*(graph.call_function(operator.getitem, (parts, i)) for i in range(3)), gate]

    return replace(
        module,
        lambda qkv, q, k, rope: ref.split_qkv(qkv, q, k, rope, attended_rows, heads, kv_heads),
        (
            context.example(rows, columns, dtype=context.dtype),
            context.example(norm),
            context.example(norm),
            context.example(rows, 6 * config.rope_bands),
        ),
        build,
    )
