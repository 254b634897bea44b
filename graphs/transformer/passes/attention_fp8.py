"""Attention over e4m3 q, k and v, in the layers whose projection to them has e4m3 weights."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from magihuman.kernels import ops  # noqa: F401 - register torch.ops.magihuman
from magihuman.kernels.parallel import exchange  # noqa: F401 - register torch.ops.magihuman

OPS = torch.ops.magihuman


def run(graph: fx.Graph) -> int:
    """Put the e4m3 operators after the pass for linears. Returns in how many layers."""
    done = 0
    for node in list(graph.nodes):
        if node.target is not OPS.gated_attention.default:
            continue
        made: Any = node.args[0].args[0]  # q, k and v are the items of one
        projection = made.args[0]
        if projection.target is OPS.rows_to_heads.default:
            projection = projection.args[0]
        if projection.target is OPS.linear_fp8.default:
            _replace(graph, node, made)
            done += 1
    return done


def _replace(graph: fx.Graph, attention: fx.Node, made: fx.Node) -> None:
    q, k, v, gate, length, local, _ = cast("tuple[fx.Node, ...]", attention.args)
    with graph.inserting_before(attention):
        narrow = graph.call_function(OPS.qkv_fp8.default, (*made.args[:4], length, *made.args[4:]))
        items = [graph.call_function(operator.getitem, (narrow, i)) for i in range(5)]
        out = graph.call_function(OPS.gated_attention_fp8.default, (*items, gate, length, local))
    attention.replace_all_uses_with(out)
    for node in (attention, q, k, v, made):
        graph.erase_node(node)
