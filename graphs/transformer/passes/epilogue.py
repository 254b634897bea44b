"""What follows a linear moves into its operator: the activation, or the addition to the stream.

The stream is then changed in place, and the norm that took the sum reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from magihuman.graphs.rewrite import arguments, call
from magihuman.graphs.transformer.passes.context import Context
from magihuman.kernels import ops  # noqa: F401 - registers torch.ops.magihuman
from magihuman.kernels.jit import UNSET

OPS = torch.ops.magihuman


def run(module: fx.GraphModule, context: Context) -> int:
    """Replace three nodes a layer: an activation and two additions."""
    graph = module.graph
    count = 0
    for node in list(graph.nodes):
        if node.target is OPS.activation.default:
            count += _activation(graph, node)
        elif node.target is OPS.add_norm.default:
            count += _add_norm(graph, node, context.dtype)
        elif node.target is torch.ops.aten.add.Tensor:
            count += _add(graph, node)
    graph.lint()
    return count


def _linear(node: Any) -> dict[str, Any] | None:
    """Operands and runs, by name, of a linear that nothing else reads."""
    if isinstance(node, fx.Node) and node.target is OPS.linear.default and len(node.users) == 1:
        given = arguments(node)
        return {name: given[name] for name in ("x", "weight", "modality_rows")}
    return None


def _activation(graph: fx.Graph, node: fx.Node) -> bool:
    given = arguments(node)
    operands = _linear(given["x"])
    if operands is None:
        return False
    after = {name: given[name] for name in ("kind", "padded")}
    with graph.inserting_before(node):
        fused = call(graph, OPS.linear_activation.default, **operands, **after, route=UNSET)
    _replace(graph, node, fused)
    return True


def _add_norm(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> bool:
    given = arguments(node)
    total = _added(graph, node, given["x"], given["delta"])
    if total is None:
        return False
    weight, rows = given["weight"], given["modality_rows"]
    with graph.inserting_before(node):
        normed = call(
            graph, OPS.norm.default, x=total, weight=weight, modality_rows=rows, dtype=dtype
        )
    for part in list(node.users):  # getitem
        part.replace_all_uses_with(normed if part.args[1] else total)
        graph.erase_node(part)
    _erase(graph, node)
    return True


def _add(graph: fx.Graph, node: fx.Node) -> bool:
    stream, delta = node.args
    total = _added(graph, node, stream, delta)
    if total is None:
        return False
    _replace(graph, node, total)
    return True


def _added(graph: fx.Graph, node: fx.Node, stream: Any, delta: Any) -> fx.Node | None:
    """The stream that a node reads, after the linear that is to be added to it, `delta`, was."""
    operands = _linear(delta)
    if operands is None or not _is_last_reader(stream, node):
        return None
    with graph.inserting_before(node):
        return call(graph, OPS.linear_add_.default, stream=stream, **operands, route=UNSET)


def _is_last_reader(stream: Any, node: fx.Node) -> bool:
    """Whether what `stream` holds may be lost after `node`."""
    return stream.op == "call_function" and all(user <= node for user in stream.users)


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    _erase(graph, old)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """The node and the linear that it read."""
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        if source.target is OPS.linear.default:
            graph.erase_node(source)
