"""Attention over e4m3 q, k and v, in the layers whose projection to them has e4m3 weights."""

from __future__ import annotations

import operator

import torch
from torch import fx

from magihuman.graphs.rewrite import CompileError, arguments, call
from magihuman.kernels import ops  # noqa: F401 - register torch.ops.magihuman
from magihuman.kernels.jit import UNSET
from magihuman.kernels.parallel import exchange  # noqa: F401 - register torch.ops.magihuman

OPS = torch.ops.magihuman

# Arguments that the e4m3 operators take over from those whose places they take.
TABLES = ("q_weight", "k_weight", "rope", "attended_rows")
PROJECTION = ("qkv", "heads", "kv_heads")
ATTENTION = ("length", "local")


def run(graph: fx.Graph) -> int:
    """Put the e4m3 operators, once the linears have theirs. What had their places is then dead.

    Returns the number of layers in which attention was replaced.
    """
    done = 0
    for node in list(graph.nodes):
        if node.target is not OPS.gated_attention.default:
            continue
        split = arguments(node)["q"].args[0]  # q, k and v are the items of one
        projection = arguments(split)["qkv"]
        exchanged = projection if projection.target is OPS.rows_to_heads.default else None
        if exchanged is not None:
            projection = arguments(exchanged)["qkv"]
        if projection.target is OPS.linear_fp8.default:
            _replace(graph, node, split, exchanged)
            done += 1
    return done


def _replace(
    graph: fx.Graph, attention: fx.Node, split: fx.Node, exchanged: fx.Node | None
) -> None:
    """Put the e4m3 operators in place of attention and of what makes its q, k and v.

    exchanged: the rows for heads that these are made of, where processes share a sequence. Both
    exchanges are then taken in.
    """
    attended, tables = arguments(attention), {n: arguments(split)[n] for n in TABLES}
    shared, last = {}, attention
    source = split
    if exchanged is not None:
        shared["ranks"] = arguments(exchanged)["ranks"]
        source, last = exchanged, _back(attention)
    with graph.inserting_before(attention):
        parts = call(
            graph,
            OPS.qkv_fp8.default if exchanged is None else OPS.rows_to_heads_fp8.default,
            length=attended["length"],
            **tables,
            **{name: arguments(source)[name] for name in PROJECTION},
            **shared,
        )
        names = ("q", "k", "v", "qk_scale", "v_scale", *(("gate",) if shared else ()))
        narrow = {
            name: graph.call_function(operator.getitem, (parts, i)) for i, name in enumerate(names)
        }
        out = call(
            graph,
            (OPS.gated_attention_fp8_to_rows if shared else OPS.gated_attention_fp8).default,
            **{"gate": attended["gate"], **narrow},
            backend=UNSET,
            **{name: attended[name] for name in ATTENTION},
            **shared,
        )
    last.replace_all_uses_with(out)


def _back(attention: fx.Node) -> fx.Node:
    """The exchange of heads for rows that attention's result goes to, flattened, and alone."""
    node = attention
    while node.target is not OPS.heads_to_rows.default:
        if len(node.users) != 1:
            raise CompileError(
                "attention of several processes must go into one heads_to_rows and nowhere else,"
                f" {node} has {len(node.users)} users; mend passes/attention_fp8.py"
            )
        node = next(iter(node.users))
    return node
