"""The embedder of text leaves the graph, which then takes text embedded.

No step changes what a prompt is embedded to, so it is computed once for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

EMBEDDER = "adapter.text_embedder"


def run(module: fx.GraphModule) -> int:
    """Let the graph's input `text` be [Nt, hidden] fp32, what `embed` makes of text.

    Returns 1, or 0 and leaves the graph as it is where something else is done to text.
    """
    graph = module.graph
    text = next(node for node in graph.nodes if node.op == "placeholder" and node.name == "text")
    embedded = next(iter(text.users), None)
    if len(text.users) != 1 or embedded is None or not _is_embedder(embedded):
        return 0
    embedded.replace_all_uses_with(text)
    graph.erase_node(embedded)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return 1


def embed(model: nn.Module, text: Tensor) -> Tensor:
    """The embedding [Nt, hidden] fp32 of text [Nt, C] fp32, as the model's forward makes it."""
    embedded: Tensor = model.get_submodule(EMBEDDER)(text)
    return embedded


def _is_embedder(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.linear.default:
        return False
    weights = [str(source.target) for source in node.all_input_nodes[1:]]
    return weights == [f"{EMBEDDER}.weight", f"{EMBEDDER}.bias"]
