"""What follows a linear moves into its operator: the activation, or the addition to the stream.

The stream is then changed in place, and the norm that took the sum reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from magihuman.graphs.transformer.passes.context import Context
from magihuman.kernels import ops  # noqa: F401 - registers torch.ops.magihuman
from magihuman.kernels.jit import UNSET

OPS = torch.ops.magihuman


def run(module: fx.GraphModule, context: Context) -> int:
    """Three a layer: an activation and two additions."""
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


def _linear(node: Any) -> tuple[Any, ...] | None:
    """Operands and runs of a linear that nothing else reads."""
    if isinstance(node, fx.Node) and node.target is OPS.linear.default and len(node.users) == 1:
        return tuple(node.args[:3])
    return None


def _activation(graph: fx.Graph, node: fx.Node) -> bool:
    operands = _linear(node.args[0])
    if operands is None:
        return False
    with graph.inserting_before(node):
        fused = graph.call_function(
            OPS.linear_activation.default, (*operands, *node.args[1:], UNSET)
        )
    _replace(graph, node, fused)
    return True


def _add_norm(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> bool:
    total = _added(graph, node)
    if total is None:
        return False
    weight, counts = node.args[2:]
    with graph.inserting_before(node):
        normed = graph.call_function(OPS.norm.default, (total, weight, counts, dtype))
    for part in list(node.users):  # getitem
        part.replace_all_uses_with(normed if part.args[1] else total)
        graph.erase_node(part)
    _erase(graph, node)
    return True


def _add(graph: fx.Graph, node: fx.Node) -> bool:
    total = _added(graph, node)
    if total is None:
        return False
    _replace(graph, node, total)
    return True


def _added(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The stream, a node's first argument, after the linear that is its second was added to it."""
    stream, delta = node.args[:2]
    operands = _linear(delta)
    if operands is None or not _is_last_reader(stream, node):
        return None
    with graph.inserting_before(node):
        return graph.call_function(OPS.linear_add_.default, (stream, *operands, UNSET))


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
