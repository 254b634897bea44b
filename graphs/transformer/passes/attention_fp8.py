"""Attention over e4m3 q, k and v, in the layers whose projection to them has e4m3 weights."""

from __future__ import annotations

import operator

import torch
from torch import fx

from magihuman.graphs.rewrite import arguments, call
from magihuman.kernels import ops  # noqa: F401 - register torch.ops.magihuman
from magihuman.kernels.jit import UNSET
from magihuman.kernels.parallel import exchange  # noqa: F401 - register torch.ops.magihuman

OPS = torch.ops.magihuman

# Arguments that the e4m3 operators take over from those whose places they take.
SPLIT = ("qkv", "q_weight", "k_weight", "rope", "attended_rows", "heads", "kv_heads")
ATTENTION = ("gate", "length", "local")


def run(graph: fx.Graph) -> int:
    """Put the e4m3 operators, once the linears have theirs.

    Returns the number of layers in which attention was replaced.
    """
    done = 0
    for node in list(graph.nodes):
        if node.target is not OPS.gated_attention.default:
            continue
        split = arguments(node)["q"].args[0]  # q, k and v are the items of one
        projection = arguments(split)["qkv"]
        if projection.target is OPS.rows_to_heads.default:
            projection = arguments(projection)["qkv"]
        if projection.target is OPS.linear_fp8.default:
            _replace(graph, node, split)
            done += 1
    return done


def _replace(graph: fx.Graph, attention: fx.Node, split: fx.Node) -> None:
    """Put the e4m3 operators in place of attention and of what makes its q, k and v."""
    attended, parts = arguments(attention), arguments(split)
    with graph.inserting_before(attention):
        narrow = call(
            graph,
            OPS.qkv_fp8.default,
            length=attended["length"],
            **{name: parts[name] for name in SPLIT},
        )
        q, k, v, qk_scale, v_scale = (
            graph.call_function(operator.getitem, (narrow, i)) for i in range(5)
        )
        out = call(
            graph,
            OPS.gated_attention_fp8.default,
            q=q,
            k=k,
            v=v,
            qk_scale=qk_scale,
            v_scale=v_scale,
            backend=UNSET,
            **{name: attended[name] for name in ATTENTION},
        )
    attention.replace_all_uses_with(out)
    for node in (attention, attended["q"], attended["k"], attended["v"], split):
        graph.erase_node(node)
