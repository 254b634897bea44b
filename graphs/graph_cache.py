"""Rewritten graphs on disk, so that a model is captured once per machine, not once per process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import magihuman.graphs
from magihuman.kernels import reference
from magihuman.kernels.jit import cache

KIND = "graphs"  # in the cache
VERSION = 1
KERNELS = Path(reference.__file__).parent


def key_of(
    config: Any,
    dtype: torch.dtype,
    model: nn.Module,
    quantized: Sequence[str] = (),
    fp8_attention: bool = False,
    ranks: int = 1,
) -> str:
    """A name for all that a rewritten graph depends on: architecture, dtype, the linears with e4m3
    weights, the attention beside them, the processes that share a sequence, torch, and the sources
    of the passes, of the operators and of the model.
    """
    sources = [
        *sorted(Path(magihuman.graphs.__file__).parent.rglob("*.py")),
        *operator_sources(KERNELS),
        Path(str(__import__(type(model).__module__, fromlist=["_"]).__file__)),
    ]
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    facts = (VERSION, torch.__version__, str(dtype), list(quantized), fp8_attention, ranks)
    digest.update(json.dumps([*facts, dataclasses.asdict(config)], sort_keys=True).encode())
    return digest.hexdigest()[:32]


def operator_sources(folder: Path) -> list[Path]:
    """The files below a folder of kernels that a rewritten graph depends on: the references, and
    those that register operators, whose schemas say what the arguments in a kept graph mean.
    """
    return [
        file
        for file in sorted(folder.rglob("*.py"))
        if file.name == "reference.py" or b"torch.library." in file.read_bytes()
    ]


def save(module: fx.GraphModule, key: str, folder: Path | None = None) -> None:
    """Keep a graph whose only tensors are the model's own. A full disk is no error.

    Raises:
        TypeError: an argument in the graph is of a type that cannot be kept.
    """
    nodes = [
        [node.op, node.name, _target(node), _encode(node.args), _encode(node.kwargs)]
        for node in module.graph.nodes
    ]
    cache.write(KIND, key, json.dumps(nodes).encode(), folder)


def load(key: str, model: nn.Module, folder: Path | None = None) -> fx.GraphModule | None:
    """The graph over this model's weights, or None where there is none that can be read."""
    content = cache.read(KIND, key, folder)
    if content is None:
        return None
    try:
        return _build(json.loads(content), model)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def _build(nodes: list[Any], model: nn.Module) -> fx.GraphModule:
    graph = fx.Graph()
    built: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs in nodes:
        resolved = _resolve(target) if op == "call_function" else target
        built[name] = graph.create_node(
            op, resolved, tuple(_decode(args, built)), _decode(kwargs, built), name
        )
    return fx.GraphModule(model, graph)


def _target(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if node.target is operator.getitem:
        return "getitem"
    return str(node.target)  # an operator prints as namespace.name.overload


def _resolve(target: str) -> Callable[..., Any]:
    if target == "getitem":
        return operator.getitem
    namespace, name, overload = target.split(".")
    operators = getattr(getattr(torch.ops, namespace), name)
    overloaded: Callable[..., Any] = getattr(operators, overload)
    return overloaded


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _encode(item) for key, item in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a graph with a {type(value).__name__} in it cannot be kept")


def _decode(value: Any, built: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, built) for item in value]
    if not isinstance(value, dict):
        return value
    if "node" in value:
        return built[value["node"]]
    if "dtype" in value:
        return getattr(torch, value["dtype"])
    return {key: _decode(item, built) for key, item in value["dict"].items()}
