"""Calls between the layers of a rewritten graph, for weights that come to the device in turn."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import fx, nn

LAYER = re.compile(r"block\.layers\.(\d+)\.")
NAME = "before_layer"


class LayersMixedError(RuntimeError):
    """A layer begins before the one before it has ended."""


class _Call(nn.Module):
    def __init__(self, call: Callable[[int], None]) -> None:
        super().__init__()
        self._call = call

    def forward(self, layer: int) -> None:
        self._call(layer)


def call_before_layers(
    module: fx.GraphModule, layers: int, before_layer: Callable[[int], None]
) -> None:
    """Let the graph call `before_layer` with the number of each layer before anything that reads
    the layer's weights, and with the number of layers behind the last.

    Raises:
        LayersMixedError: what reads the weights of one layer stands among the readers of another.
    """
    graph = module.graph
    readers: dict[fx.Node, int] = {}
    for node in graph.nodes:
        layer_of = LAYER.match(str(node.target)) if node.op == "get_attr" else None
        if layer_of is not None:
            readers |= dict.fromkeys(node.users, int(layer_of[1]))
    order = [(node, readers[node]) for node in graph.nodes if node in readers]
    starts = [
        node for at, (node, layer) in enumerate(order) if at == 0 or order[at - 1][1] != layer
    ]
    if [readers[node] for node in starts] != list(range(layers)):
        raise LayersMixedError(
            f"the readers of the weights of {layers} layers must stand in their order, got"
            f" {[readers[node] for node in starts]}"
        )
    module.add_submodule(NAME, _Call(before_layer))
    for layer, node in enumerate(starts):
        with graph.inserting_before(node):
            graph.call_module(NAME, (layer,))
    with graph.inserting_after(order[-1][0]):
        graph.call_module(NAME, (layers,))
    graph.lint()
    module.recompile()
