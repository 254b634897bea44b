"""Find every occurrence of a reference function in a graph and put something else there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.passes.utils.matcher_utils import SubgraphMatcher

from magihuman.graphs.trace import capture

# Given the graph and the nodes matched by the function's inputs, adds nodes and returns those that
# stand for the function's outputs.
Build = Callable[[fx.Graph, list[fx.Node]], list[fx.Node]]


class _Function(nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self._fn = fn

    def forward(self, **inputs: Tensor) -> tuple[Any, ...]:
        out = self._fn(*inputs.values())
        return out if isinstance(out, tuple) else (out,)


def replace(
    module: fx.GraphModule, fn: Callable[..., Any], examples: Sequence[Tensor], build: Build
) -> int:
    """Replace each occurrence of `fn` in the graph by what `build` makes.

    The pattern is `fn` traced at the examples' shapes; its inputs match anything. Returns the
    number of replacements.
    """
    named = {f"input_{i}": example for i, example in enumerate(examples)}
    pattern = capture(_Function(fn), named).graph
    pattern.eliminate_dead_code()  # results that `fn` takes apart and does not return
    outputs: list[fx.Node] = list(pattern.output_node().args[0])  # type: ignore[arg-type]
    graph = module.graph
    matcher = SubgraphMatcher(pattern, match_output=False, match_placeholder=False)
    matches = matcher.match(graph)
    position = {node: i for i, node in enumerate(graph.nodes)}
    successor: dict[fx.Node, fx.Node] = {}  # of nodes that an earlier replacement has removed
    for match in matches:
        calls = [match.nodes_map[node] for node in pattern.nodes if node.op == "call_function"]
        calls = sorted(set(calls), key=position.__getitem__)
        replaced = [match.nodes_map[output] for output in outputs]
        with graph.inserting_after(calls[-1]):
            mark = graph.call_function(len, ((),))  # a place to build before, removed below
        with graph.inserting_before(mark):
            replacements = build(
                graph, [successor.get(node, node) for node in match.placeholder_nodes]
            )
        graph.erase_node(mark)
        for old, new in zip(replaced, replacements, strict=True):
            old.replace_all_uses_with(new)
            successor[old] = new
        for node in reversed(calls):
            graph.erase_node(node)
    _sort(graph)
    graph.lint()
    return len(matches)


def _sort(graph: fx.Graph) -> None:
    """Put every node after the nodes it reads: what is built stands behind all that it replaces."""
    placed: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node not in placed:
            _place_inputs(node, node, placed)
            placed.add(node)


def _place_inputs(node: fx.Node, anchor: fx.Node, placed: set[fx.Node]) -> None:
    """Move what `node` reads, and what that reads, to before `anchor`, first things first."""
    for source in node.all_input_nodes:
        if source not in placed:
            _place_inputs(source, anchor, placed)
            anchor.prepend(source)
            placed.add(source)
