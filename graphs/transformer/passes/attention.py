"""Attention and the head gate become one kernel."""

from __future__ import annotations

import torch
from torch import fx

from magihuman.graphs.rewrite import call, replace
from magihuman.graphs.transformer.passes.context import Context
from magihuman.kernels import ops  # noqa: F401 - registers torch.ops.magihuman
from magihuman.kernels import reference as ref
from magihuman.kernels.jit import UNSET


def run(module: fx.GraphModule, context: Context) -> int:
    """Replace one attention a layer, over all tokens or frame-local."""
    locals_ = [None] if context.local is None else [None, context.local]
    return sum(_run(module, context, local) for local in locals_)


def _run(module: fx.GraphModule, context: Context, local: ref.LocalAttention | None) -> int:
    config = context.config
    heads, kv_heads = context.heads
    rows = sum(context.attended_rows)
    shapes = [(rows, n, config.head_dim) for n in (heads, kv_heads, kv_heads)]

    def build(graph: fx.Graph, inputs: list[fx.Node]) -> list[fx.Node]:
        q, k, v, gate, length = inputs
        return [
            call(
                graph,
                torch.ops.magihuman.gated_attention.default,
                q=q,
                k=k,
                v=v,
                gate=gate,
                length=length,
                local=list(local or ()),
                backend=UNSET,
            )
        ]

    return replace(
        module,
        lambda q, k, v, gate, length: ref.gated_attention(q, k, v, gate, local, length),
        (
            *(context.example(*shape, dtype=context.dtype) for shape in shapes),
            context.example(rows, heads, dtype=context.dtype),
            context.example(dtype=torch.int32),
        ),
        build,
    )
