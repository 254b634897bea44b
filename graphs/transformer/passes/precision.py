"""Linears whose weights are e4m3 take e4m3 rows: from the norm, from attention, from an activation.

A linear is one of those where its module has a `weight_scale` beside the `weight`.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from magihuman.graphs.rewrite import arguments, call
from magihuman.kernels import ops  # noqa: F401 - registers torch.ops.magihuman
from magihuman.kernels.reference import FP8, STATIC_SCALES

OPS = torch.ops.magihuman

LINEARS = (OPS.linear.default, OPS.linear_activation.default, OPS.linear_add_.default)


def run(graph: fx.Graph, quantized: Collection[str]) -> int:
    """Put the e4m3 operators for the linears named, whose weights are `name.weight`.

    Returns the number of linears replaced.
    """
    done = 0
    for node in list(graph.nodes):
        if node.target in LINEARS and _is_quantized(node, quantized):
            _replace(graph, node, quantized)
            done += 1
    return done


def _is_quantized(node: fx.Node, quantized: Collection[str]) -> bool:
    weight = arguments(node)["weight"]
    return str(weight.target).removesuffix(".weight") in quantized


def _replace(graph: fx.Graph, node: fx.Node, quantized: Collection[str]) -> None:
    given = arguments(node)
    x, weight = given["x"], given["weight"]
    with graph.inserting_before(node):
        scale = graph.create_node("get_attr", f"{weight.target}_scale")
        product = {
            "weight": weight,
            "weight_scale": scale,
            "modality_rows": given["modality_rows"],
            "route": given["route"],
        }
        if node.target is OPS.linear.default:
            narrow = call(graph, OPS.linear_fp8.default, **_rows(graph, x), **product)
        elif node.target is OPS.linear_activation.default:
            narrow = call(
                graph,
                OPS.linear_activation_fp8.default,
                **_rows(graph, x),
                **product,
                kind=given["kind"],
                padded=given["padded"],
                out_dtype=_dtype_for_readers(node, quantized),
            )
        else:
            narrow = call(
                graph,
                OPS.linear_add_fp8_.default,
                stream=given["stream"],
                **_rows_or_static(graph, x),
                **product,
            )
    node.replace_all_uses_with(narrow)
    graph.erase_node(node)


def _dtype_for_readers(node: fx.Node, quantized: Collection[str]) -> torch.dtype:
    """e4m3 where only linears with e4m3 weights read a result, else bf16."""
    readers = node.users
    narrow = all(user.target in LINEARS and _is_quantized(user, quantized) for user in readers)
    return FP8 if narrow else torch.bfloat16


def _rows(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
    """e4m3 rows and their scales in place of x; the norm makes them itself."""
    if x.target is OPS.norm.default:
        given = arguments(x)
        normed = {name: given[name] for name in ("x", "weight", "modality_rows")}
        pair = call(graph, OPS.norm_fp8.default, **normed)
    else:
        pair = call(graph, OPS.quantize_fp8.default, x=x)
    values, scale = (graph.call_function(operator.getitem, (pair, i)) for i in range(2))
    return {"x": values, "x_scale": scale}


def _rows_or_static(graph: fx.Graph, x: fx.Node) -> dict[str, Any]:
    """`_rows`, or x as it is where an activation made it in e4m3, of one scale for all rows."""
    if x.target is OPS.linear_activation_fp8.default:
        given = arguments(x)
        if given["out_dtype"] == FP8:
            scale = STATIC_SCALES[given["kind"]]
            return {"x": x, "x_scale": None, "scale_of_all": scale}
    return {**_rows(graph, x), "scale_of_all": 0.0}
