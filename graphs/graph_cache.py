"""Rewritten graphs on disk, so that a model is captured once per machine, not once per process.

fx turns a graph into Python code, and runs that. So nothing of a file becomes a part of it but what
is known or checked here: names that are plain words, the model's own tensors, operators of a list,
arguments by the operators' schemas, and constants.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from keyword import iskeyword
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

import magihuman.graphs
from magihuman.graphs.rewrite import arguments
from magihuman.kernels import reference
from magihuman.kernels.jit import cache

KIND = "graphs"  # in the cache
VERSION = 1
KERNELS = Path(reference.__file__).parent
MOST_BYTES = 2**22  # of a graph; that of the published transformer has a quarter of a million
WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
GETITEM = "getitem"
# What a rewritten graph has beside this project's operators; others are not read from a file.
PLAIN = ("aten.cat.default", "aten.flatten.using_ints", "aten.linear.default", "aten.slice.Tensor")
OWN = torch.ops.magihuman
CONSTANTS: dict[str, tuple[type, ...]] = {  # by the type of an argument in a schema
    "int": (int, torch.dtype),
    "float": (int, float),
    "number": (int, float),
    "bool": (bool,),
    "str": (str,),
}

log = logging.getLogger("magihuman")


def key_of(
    config: Any,
    dtype: torch.dtype,
    model: nn.Module,
    quantized: Mapping[str, torch.dtype] | None = None,
    fp8_attention: bool = False,
    ranks: int = 1,
) -> str:
    """A name for all that a rewritten graph depends on: architecture, dtype, the linears with
    weights in 8 bits and their dtype, the attention beside them, the processes that share a
    sequence, torch, and the sources of the passes, of the operators and of the model.
    """
    sources = [
        *sorted(Path(magihuman.graphs.__file__).parent.rglob("*.py")),
        *operator_sources(KERNELS),
        Path(str(__import__(type(model).__module__, fromlist=["_"]).__file__)),
    ]
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    narrow = {name: str(own) for name, own in (quantized or {}).items()}
    facts = (VERSION, torch.__version__, str(dtype), narrow, fp8_attention, ranks)
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
    """Keep a graph whose only tensors are the model's own. A full disk is no error, and a graph
    that `load` would not take is not kept.

    Raises:
        TypeError: an argument in the graph is of a type that cannot be kept.
    """
    nodes = [
        [node.op, node.name, _target(node), _encode(node.args), _encode(node.kwargs)]
        for node in module.graph.nodes
    ]
    for op, _, target, _, _ in nodes:
        if op == "call_function" and not _is_known(target):
            log.debug("the graph is not kept: %s is none of the operators that are read", target)
            return
    cache.write(KIND, key, json.dumps(nodes).encode(), folder)


def load(
    key: str, model: nn.Module, folder: Path | None = None, inputs: Sequence[str] | None = None
) -> fx.GraphModule | None:
    """The graph over this model's weights, or None where there is none that can be read.

    inputs: the names of what it has to take, in this order.
    """
    content = cache.read(KIND, key, folder)
    if content is None or len(content) > MOST_BYTES:
        return None
    try:
        return _build(json.loads(content), model, inputs)
    except Exception as error:  # whatever it says, it is a file that cannot be used
        log.debug("the graph %s is made again: %s", key, error)
        return None


class _OddGraphError(ValueError):
    """A file says what `save` does not write."""


def _check(is_so: bool, rule: str, *values: object) -> None:
    if not is_so:
        raise _OddGraphError(rule.format(*map(repr, values)))


def _build(nodes: Any, model: nn.Module, inputs: Sequence[str] | None) -> fx.GraphModule:
    building = _Building({*dict(model.named_parameters()), *dict(model.named_buffers())})
    for op, name, target, args, kwargs in nodes:
        building.add(op, name, target, args, kwargs)
    taken = [node.target for node in building.graph.nodes if node.op == "placeholder"]
    _check(inputs is None or taken == list(inputs), "a graph takes {}, got {}", inputs, taken)
    _check(building.is_closed, "a graph has one output, its last node")
    building.graph.lint()
    return fx.GraphModule(model, building.graph)


@dataclass
class _Building:
    """A graph as far as it has been read. tensors: the names of those that the model has."""

    tensors: set[str]
    graph: fx.Graph = field(default_factory=fx.Graph)
    built: dict[str, fx.Node] = field(default_factory=dict)
    is_closed: bool = False

    def add(self, op: object, name: object, target: object, args: Any, kwargs: Any) -> None:
        """Add the next node; `_OddGraphError`, or another error, for what is none."""
        word = _word(name)
        _check(not self.is_closed and word not in self.built, "{} comes too late", word)
        args, kwargs = tuple(_decode(args, self.built)), _decode(kwargs, self.built)
        if op == "call_function":
            node = self.graph.create_node(op, _resolve(target), args, kwargs, word)
            _check_call(node)
        elif op == "output":
            (results,) = args
            _check(type(results) is list and all(map(_is_tensor, results)), "outputs are tensors")
            _check(not kwargs and bool(results), "an output has nothing beside its tensors")
            node = self.graph.output(tuple(results))
            self.is_closed = True
        else:
            _check(op in ("placeholder", "get_attr"), "a node is no {}", op)
            _check(not args and not kwargs, "{} has no arguments", word)
            is_known = target in self.tensors if op == "get_attr" else target == _word(target)
            _check(is_known, "{} is none of the model's tensors, and no word", target)
            node = self.graph.create_node(str(op), str(target), name=word)
        self.built[word] = node


def _word(name: object) -> str:
    """A name that is a plain word in Python, and none that means something there."""
    if not isinstance(name, str) or not WORD.fullmatch(name) or iskeyword(name):
        raise _OddGraphError(f"names are words, got {name!r}")
    return name


def _check_call(node: fx.Node) -> None:
    """Check a call against its operator's schema."""
    if node.target is operator.getitem:
        source, index = node.args
        _check(isinstance(source, fx.Node) and not node.kwargs, "{} takes of a node", node)
        results = _results(source)
        _check(type(index) is int and 0 <= index < results != 1, "{} takes what is not there", node)
        return
    given = arguments(node)
    for argument in node.target._schema.arguments:  # type: ignore[union-attr]  # an operator
        value, kind = given[argument.name], str(argument.type)
        _check(_suits(value, kind), "{} must be {}, got {}", argument.name, kind, value)


def _suits(value: object, kind: str) -> bool:
    """Whether a value can be an argument of this type of a schema."""
    if kind.startswith("Optional["):
        return value is None or _suits(value, kind[len("Optional[") : -1])
    if kind.startswith("List["):
        inner = kind[len("List[") : -1]
        return isinstance(value, (list, tuple)) and all(_suits(item, inner) for item in value)
    if kind == "Tensor":
        return _is_tensor(value)
    if not isinstance(value, CONSTANTS.get(kind, ())) or (kind == "bool") != (type(value) is bool):
        return False
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def _is_tensor(value: object) -> bool:
    """Whether this is a node that gives one tensor."""
    return isinstance(value, fx.Node) and _results(value) == 1


def _results(node: Any) -> int:
    """How many tensors a node gives."""
    return len(node.target._schema.returns) if isinstance(node.target, OpOverload) else 1


def _target(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if node.target is operator.getitem:
        return GETITEM
    return str(node.target)  # an operator prints as namespace.name.overload


def _is_known(target: str) -> bool:
    """Whether `load` takes a call of it."""
    try:
        return bool(_resolve(target))
    except (_OddGraphError, AttributeError):
        return False


def _resolve(target: object) -> Callable[..., Any]:
    """The operator of a name; it has to be one of this project's, or of the list."""
    if target == GETITEM:
        return operator.getitem
    _check(isinstance(target, str), "a target is a name, got {}", target)
    namespace, name, overload = map(_word, str(target).split("."))
    _check(namespace == OWN.name or target in PLAIN, "{} is not on the list", target)
    operators = getattr(OWN if namespace == OWN.name else torch.ops.aten, name)
    overloaded = getattr(operators, overload)
    _check(isinstance(overloaded, OpOverload), "{} is no operator", target)
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
    ((kind, content),) = value.items()
    if kind == "node":
        return built[content]
    if kind == "dtype":
        dtype = getattr(torch, _word(content))
        _check(isinstance(dtype, torch.dtype), "{} is no dtype", content)
        return dtype
    _check(kind == "dict", "{} is nothing that is kept", kind)
    return {_word(key): _decode(item, built) for key, item in content.items()}
