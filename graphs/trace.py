"""The whole forward of a model as one FX graph, weights as attributes under their own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn


class CaptureError(RuntimeError):
    """The model cannot be captured as one graph; the message names the line."""


def capture(model: nn.Module, inputs: Mapping[str, Tensor], **options: Any) -> fx.GraphModule:
    """One graph of `model(**inputs, **options)`, without running it.

    Args:
        model: weights may lie on any device; they are shared with the result, not copied.
        inputs: example tensors by argument name, which become the graph's inputs, in this order.
            Their shapes are fixed in the graph, their values are not.
        options: Python values fixed in the graph.

    Raises:
        CaptureError: the forward breaks the graph or uses what cannot be traced.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(
                _Bound(model, options), (), kwargs=dict(inputs), strict=False
            )
    except Exception as error:
        raise CaptureError(f"the model cannot be captured as one graph: {error}") from error
    return _with_attributes(program, model)


class _Bound(nn.Module):
    """A model with some arguments fixed."""

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._options = options

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs, **self._options)


def _with_attributes(program: torch.export.ExportedProgram, model: nn.Module) -> fx.GraphModule:
    """The program's graph with its lifted weights back as attributes, and without its checks."""
    graph = program.graph_module.graph
    signature = program.graph_signature
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = signature.inputs_to_lifted_tensor_constants
    root = nn.Module()
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is METADATA_CHECK:
            graph.erase_node(node)
        elif node.op == "placeholder" and (node.name in lifted or node.name in constants):
            if node.name in lifted:
                name = lifted[node.name].removeprefix("model.")
                value = _attribute(model, name)
            else:
                name = f"constant_{constants[node.name]}".replace(".", "_")
                value = program.constants[constants[node.name]]
            if node.users:
                _set_attribute(root, name, value)
                with graph.inserting_before(node):
                    attribute = graph.create_node("get_attr", name)
                attribute.meta = dict(node.meta)
                node.replace_all_uses_with(attribute)
            graph.erase_node(node)
    output = graph.output_node()
    output.args = (tuple(output.args[0]),)
    module = fx.GraphModule(root, graph)
    module.graph.lint()
    return module


METADATA_CHECK = torch.ops.aten._assert_tensor_metadata.default


def _attribute(module: nn.Module, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _set_attribute(root: nn.Module, name: str, value: Tensor) -> None:
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(value, nn.Parameter):
        root.register_parameter(last, value)
    else:
        root.register_buffer(last, value, persistent=False)
