"""Linears whose weights are e4m3 take e4m3 rows: from the norm, from attention, from an activation.

A linear is one of those where its module has a `weight_scale` beside the `weight`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from magihuman.kernels import ops  # noqa: F401 - registers torch.ops.magihuman
from magihuman.kernels.reference import FP8, STATIC_SCALES

OPS = torch.ops.magihuman

# Positions of x and of the weight among an operator's arguments.
OPERANDS: dict[Any, tuple[int, int]] = {
    OPS.linear.default: (0, 1),
    OPS.linear_activation.default: (0, 1),
    OPS.linear_add_.default: (1, 2),
}


def run(graph: fx.Graph, quantized: Collection[str]) -> int:
    """Put the e4m3 operators for the linears named, weights as `name.weight`. Returns how many."""
    done = 0
    for node in list(graph.nodes):
        if node.target in OPERANDS and _is_quantized(node, quantized):
            _replace(graph, node, quantized)
            done += 1
    return done


def _is_quantized(node: fx.Node, quantized: Collection[str]) -> bool:
    weight: Any = node.args[OPERANDS[node.target][1]]
    return weight.target.removesuffix(".weight") in quantized


def _replace(graph: fx.Graph, node: fx.Node, quantized: Collection[str]) -> None:
    x_at, weight_at = OPERANDS[node.target]
    x: Any = node.args[x_at]
    weight: Any = node.args[weight_at]
    rest = node.args[weight_at + 1 :]
    with graph.inserting_before(node):
        scale = graph.create_node("get_attr", f"{weight.target}_scale")
        if node.target is OPS.linear.default:
            made = graph.call_function(
                OPS.linear_fp8.default, (*_rows(graph, x), weight, scale, *rest)
            )
        elif node.target is OPS.linear_activation.default:
            after, route = rest[:-1], rest[-1]
            readers = [user.target in OPERANDS and user for user in node.users]
            narrow = all(user and _is_quantized(user, quantized) for user in readers)
            dtype = FP8 if narrow else torch.bfloat16
            made = graph.call_function(
                OPS.linear_activation_fp8.default,
                (*_rows(graph, x), weight, scale, *after, dtype, route),
            )
        elif x.target is OPS.linear_activation_fp8.default and FP8 in x.args:
            kind: Any = x.args[5]
            made = graph.call_function(
                OPS.linear_add_fp8_.default,
                (node.args[0], x, None, STATIC_SCALES[kind], weight, scale, *rest),
            )
        else:
            values, x_scale = _rows(graph, x)
            made = graph.call_function(
                OPS.linear_add_fp8_.default,
                (node.args[0], values, x_scale, 0.0, weight, scale, *rest),
            )
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _rows(graph: fx.Graph, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """e4m3 rows and their scales in place of x; the norm makes them itself."""
    make: Callable[..., Any] = OPS.quantize_fp8.default
    arguments: tuple[Any, ...] = (x,)
    if x.target is OPS.norm.default:
        make, arguments = OPS.norm_fp8.default, x.args[:3]
    pair = graph.call_function(make, arguments)
    values, scale = (graph.call_function(operator.getitem, (pair, i)) for i in range(2))
    return values, scale
