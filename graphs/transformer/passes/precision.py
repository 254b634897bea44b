"""Linears whose weights are in 8 bits take rows in 8 bits: from the norm, from attention, from an
activation.

A linear is one of those where its module has a `weight_scale` beside the `weight`, whose dtype is
that of its rows.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from magihuman.graphs.rewrite import arguments, call
from magihuman.kernels import int8, ops  # noqa: F401 - register torch.ops.magihuman
from magihuman.kernels.reference import FP8, INT8, STATIC_SCALES

OPS = torch.ops.magihuman

LINEARS = (OPS.linear.default, OPS.linear_activation.default, OPS.linear_add_.default)


class Operators(NamedTuple):
    """The operators over operands of one dtype."""

    norm: Any
    quantize: Any
    linear: Any
    activation: Any
    add: Any


OVER = {
    FP8: Operators(
        OPS.norm_fp8.default,
        OPS.quantize_fp8.default,
        OPS.linear_fp8.default,
        OPS.linear_activation_fp8.default,
        OPS.linear_add_fp8_.default,
    ),
    INT8: Operators(
        OPS.norm_int8.default,
        OPS.quantize_int8.default,
        OPS.linear_int8.default,
        OPS.linear_activation_int8.default,
        OPS.linear_add_int8_.default,
    ),
}


def run(graph: fx.Graph, quantized: Mapping[str, torch.dtype]) -> int:
    """Put the operators over 8-bit operands for the linears named, whose weights are `name.weight`.

    quantized: the dtype of each one's weight. Returns the number of linears replaced.
    """
    done = 0
    for node in list(graph.nodes):
        if node.target in LINEARS and _dtype_of(node, quantized) is not None:
            _replace(graph, node, quantized)
            done += 1
    return done


def _dtype_of(node: fx.Node, quantized: Mapping[str, torch.dtype]) -> torch.dtype | None:
    """The dtype of a linear's weight in 8 bits, or None where it has none."""
    weight = arguments(node)["weight"]
    return quantized.get(str(weight.target).removesuffix(".weight"))


def _replace(graph: fx.Graph, node: fx.Node, quantized: Mapping[str, torch.dtype]) -> None:
    given = arguments(node)
    x, weight = given["x"], given["weight"]
    over = OVER[quantized[str(weight.target).removesuffix(".weight")]]
    with graph.inserting_before(node):
        scale = graph.create_node("get_attr", f"{weight.target}_scale")
        product = {
            "weight": weight,
            "weight_scale": scale,
            "modality_rows": given["modality_rows"],
            "route": given["route"],
        }
        if node.target is OPS.linear.default:
            narrow = call(graph, over.linear, **_rows(graph, over, x), **product)
        elif node.target is OPS.linear_activation.default:
            narrow = _activation(graph, over, node, product, quantized)
        else:
            rows = _rows_or_static(graph, over, x)
            narrow = call(graph, over.add, stream=given["stream"], **rows, **product)
    node.replace_all_uses_with(narrow)
    graph.erase_node(node)


def _activation(
    graph: fx.Graph,
    over: Operators,
    node: fx.Node,
    product: dict[str, Any],
    quantized: Mapping[str, torch.dtype],
) -> fx.Node:
    """The product with an activation after it; product: its arguments beside x."""
    given = arguments(node)
    after = {"kind": given["kind"], "padded": given["padded"]}
    if over is OVER[FP8]:
        after["out_dtype"] = _dtype_for_readers(node, quantized)
    return call(graph, over.activation, **_rows(graph, over, given["x"]), **product, **after)


def _dtype_for_readers(node: fx.Node, quantized: Mapping[str, torch.dtype]) -> torch.dtype:
    """e4m3 where only linears with e4m3 weights read a result, else bf16."""
    narrow = all(
        user.target in LINEARS and _dtype_of(user, quantized) == FP8 for user in node.users
    )
    return FP8 if narrow else torch.bfloat16


def _rows(graph: fx.Graph, over: Operators, x: fx.Node) -> dict[str, fx.Node]:
    """Rows in 8 bits and their scales in place of x; the norm makes them itself."""
    if x.target is OPS.norm.default:
        given = arguments(x)
        normed = {name: given[name] for name in ("x", "weight", "modality_rows")}
        pair = call(graph, over.norm, **normed)
    else:
        pair = call(graph, over.quantize, x=x)
    values, scale = (graph.call_function(operator.getitem, (pair, i)) for i in range(2))
    return {"x": values, "x_scale": scale}


def _rows_or_static(graph: fx.Graph, over: Operators, x: fx.Node) -> dict[str, Any]:
    """`_rows`, or x as it is where an activation made it in e4m3, of one scale for all rows."""
    if over is not OVER[FP8]:
        return dict(_rows(graph, over, x))
    if x.target is over.activation:
        given = arguments(x)
        if given["out_dtype"] == FP8:
            scale = STATIC_SCALES[given["kind"]]
            return {"x": x, "x_scale": None, "scale_of_all": scale}
    return {**_rows(graph, over, x), "scale_of_all": 0.0}
