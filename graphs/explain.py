"""What compiling changes: operations, kernel launches and bytes of each kind of layer.

Nothing runs: the model is built without memory and the graphs are walked with shapes alone. One
layer of each kind is captured and counted as often as the architecture has it.
"""

from __future__ import annotations

import dataclasses
import html
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from magihuman.graphs.rewrite import CompileReport
from magihuman.graphs.trace import capture
from magihuman.graphs.transformer import (
    TRACE_ROWS,
    Context,
    example_inputs,
    rewrite,
    route_linears,
    specialize,
)
from magihuman.kernels.jit import UNSET
from magihuman.kernels.reference import Counts

META = torch.device("meta")
VIEWS = {
    "chunk", "expand", "flatten", "slice", "select", "split", "split_with_sizes", "transpose",
    "unflatten", "unsqueeze", "view",
}  # fmt: skip
OUTSIDE = "embedders and heads"
OWN_ROUTE = "128x192"  # of linears: one launch each, whatever follows and however many experts


@dataclass(frozen=True)
class Row:
    """One operation of one kind of layer, over the whole forward pass."""

    layers: str
    operation: str
    calls: int
    launches: int
    gigabytes: float


@dataclass(frozen=True)
class Explanation:
    """The forward pass before and after the passes."""

    modality_rows: Counts
    before: list[Row]
    after: list[Row]

    def totals(self) -> dict[str, dict[str, float]]:
        """The sums of calls, launches and gigabytes, "before" and "after"."""
        return {
            side: {
                name: sum(getattr(row, name) for row in rows)
                for name in ("calls", "launches", "gigabytes")
            }
            for side, rows in (("before", self.before), ("after", self.after))
        }


def explain(
    build: Callable[[Any], nn.Module], config: Any, modality_rows: Counts, dtype: torch.dtype
) -> Explanation:
    """Explain a model for sequences of so many tokens.

    Args:
        build: makes a model of a given architecture.
        config: the architecture, without frame-local layers.
        modality_rows: tokens of video, audio and text.
        dtype: of the linears inside the blocks.

    Raises:
        CaptureError: the forward is not one graph.
        CompileError: a pass found more or fewer places than the architecture has.
    """
    kinds = layer_kinds(config)
    small = one_of_each(config)
    with META:
        model = build(small)
    context = Context(small, modality_rows, dtype, META)
    inputs = example_inputs(context)
    before = capture(model, inputs, local=None)
    after = rewrite(model, Context(small, TRACE_ROWS, dtype, META), CompileReport())
    specialize(after, modality_rows, UNSET)
    route_linears(after, sum(modality_rows), OWN_ROUTE)
    return Explanation(
        modality_rows, *(_Counter(module, kinds).rows(inputs) for module in (before, after))
    )


@dataclass(frozen=True)
class Kind:
    """Layers that have weights and activation in common, and how many there are."""

    modality: bool
    gelu: bool
    layers: int

    @property
    def name(self) -> str:
        """How many layers there are of what weights and activation, for people to read."""
        weights = "weights per modality" if self.modality else "shared weights"
        return f"{self.layers} x {weights}, {'GELU7' if self.gelu else 'SwiGLU7'}"


def layer_kinds(config: Any) -> list[Kind]:
    """The kinds of layer of an architecture, in order of first appearance.

    The very first layer is a kind of its own: nothing is added before its first norm.
    """
    layers_of: dict[tuple[bool, bool, bool], int] = {}
    for layer in range(config.num_layers):
        key = (layer in config.modality_layers, layer in config.gelu7_layers, layer == 0)
        layers_of[key] = layers_of.get(key, 0) + 1
    return [Kind(modality, gelu, layers) for (modality, gelu, _), layers in layers_of.items()]


def one_of_each(config: Any) -> Any:
    """The architecture with a single layer of each kind."""
    kinds = layer_kinds(config)
    return dataclasses.replace(
        config,
        num_layers=len(kinds),
        modality_layers=tuple(i for i, kind in enumerate(kinds) if kind.modality),
        gelu7_layers=tuple(i for i, kind in enumerate(kinds) if kind.gelu),
    )


class _Counter(fx.Interpreter):
    """Runs a graph on shapes and adds up what each node would do."""

    def __init__(self, module: fx.GraphModule, kinds: list[Kind]) -> None:
        super().__init__(module)
        self._kinds = kinds
        self._sums: dict[tuple[str, str], list[float]] = {}
        self._kind: Kind | None = None

    def rows(self, inputs: dict[str, Tensor]) -> list[Row]:
        """Run the graph on these inputs and return all rows, in order of first appearance."""
        self.run(*inputs.values())
        return [
            Row(layers, operation, int(calls), int(launches), size / 1e9)
            for (layers, operation), (calls, launches, size) in self._sums.items()
        ]

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        for source in n.all_input_nodes:
            layer = re.match(r"block\.layers\.(\d+)\.", str(source.target))
            if source.op == "get_attr":
                self._kind = self._kinds[int(layer[1])] if layer else None
        if n.op == "call_function" and n.target is not operator.getitem:
            self._add(n, out)
        return out

    def _add(self, node: fx.Node, out: Any) -> None:
        operation = str(node.target).removesuffix(".default")
        launches = 0 if operation.split(".")[1] in VIEWS else 1
        tensors = [self.env[source] for source in node.all_input_nodes] + [out]
        if operation == "aten.to.dtype" and tensors[0].dtype == out.dtype:
            launches = 0
        size = sum(
            part.numel() * part.element_size()
            for value in tensors
            for part in (value if isinstance(value, (list, tuple)) else (value,))
        )
        times = self._kind.layers if self._kind else 1
        key = (self._kind.name if self._kind else OUTSIDE, operation)
        sums = self._sums.setdefault(key, [0, 0, 0])
        sums[0] += times
        sums[1] += times * launches
        sums[2] += times * size if launches else 0


def to_html(explanation: Explanation) -> str:
    """A page that a person can read, in one file."""
    sides = []
    largest = max(row.gigabytes for row in explanation.before + explanation.after)
    for title, rows in (("Before", explanation.before), ("After", explanation.after)):
        totals = explanation.totals()[title.lower()]
        body, shown = [], ""
        for row in rows:
            if row.layers != shown:
                body.append(f"<tr><th colspan=5>{html.escape(row.layers)}</th></tr>")
                shown = row.layers
            bar = f"<div style='width:{200 * row.gigabytes / largest:.0f}px'></div>"
            body.append(
                f"<tr><td>{html.escape(row.operation)}<td>{row.calls}<td>{row.launches}"
                f"<td>{row.gigabytes:.2f}<td>{bar}</tr>"
            )
        sides.append(
            f"<section><h2>{title}: {totals['launches']:.0f} launches,"
            f" {totals['gigabytes']:.1f} GB</h2><table><tr><th>operation<th>calls<th>launches"
            f"<th>GB<th></tr>{''.join(body)}</table></section>"
        )
    video, audio, text = explanation.modality_rows
    return (
        "<!doctype html><meta charset=utf-8><title>One forward pass</title><style>"
        "body{font:14px sans-serif;margin:2em}section{display:inline-block;vertical-align:top;"
        "margin-right:3em}td,th{padding:2px 8px;text-align:left}td:nth-child(n+2){text-align:right}"
        "td div{background:#69c;height:10px}</style>"
        f"<h1>One forward pass of {video} video, {audio} audio and {text} text tokens</h1>"
        + "".join(sides)
    )
