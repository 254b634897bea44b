"""Arguments of operators by the names in their schemas, whatever their order."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import OpOverload


class ArgumentError(ValueError):
    """An operator is asked for an argument that it does not have, or lacks one that it needs."""


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call of an operator, by name, in the schema's order.

    Those that the call leaves out have the schema's defaults. Changing the dictionary changes
    nothing in the graph; `with_arguments` does.

    Raises:
        ArgumentError: the node calls no operator, or its arguments do not fit the schema.
    """
    operator = _operator(node)
    names = [argument.name for argument in operator._schema.arguments]
    if len(node.args) > len(names):
        raise ArgumentError(
            f"{operator} takes at most {len(names)} arguments, {node} has {len(node.args)}; build"
            " the call with rewrite.call"
        )
    return _complete(operator, {**dict(zip(names, node.args, strict=False)), **node.kwargs})


def with_arguments(node: fx.Node, /, **changes: Any) -> None:
    """Replace arguments of a call of an operator, in its place in the graph; the others stay.

    Raises:
        ArgumentError: the operator has no argument of such a name.
    """
    operator = _operator(node)
    node.args, node.kwargs = _ordered(operator, {**arguments(node), **changes})


def call(graph: fx.Graph, operator: OpOverload, /, **named: Any) -> fx.Node:
    """Add a call of an operator where the graph inserts; what is not named has its default.

    Raises:
        ArgumentError: the operator has no argument of such a name, or needs one that is not given.
    """
    return graph.call_function(operator, *_ordered(operator, named))


def _operator(node: fx.Node) -> OpOverload:
    if not isinstance(node.target, OpOverload):
        raise ArgumentError(
            f"only calls of operators have arguments by name, {node} is {node.op} of {node.target};"
            " look at its target first"
        )
    return node.target


def _complete(operator: OpOverload, named: dict[str, Any]) -> dict[str, Any]:
    """The arguments named and the defaults of the others, in the schema's order."""
    complete: dict[str, Any] = {}
    for argument in operator._schema.arguments:
        if argument.name in named:
            complete[argument.name] = named[argument.name]
        elif argument.has_default_value():
            complete[argument.name] = argument.default_value
        else:
            raise ArgumentError(
                f"{operator} needs the argument {argument.name!r}, which is not given; it takes"
                f" {_names(operator)}"
            )
    for name in named:
        if name not in complete:
            raise ArgumentError(f"{operator} has no argument {name!r}; it takes {_names(operator)}")
    return complete


def _names(operator: OpOverload) -> str:
    return ", ".join(repr(argument.name) for argument in operator._schema.arguments)


def _ordered(operator: OpOverload, named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by position, and those that the schema takes by name alone."""
    complete = _complete(operator, named)
    by_name = {a.name for a in operator._schema.arguments if a.kwarg_only}
    positional = tuple(value for name, value in complete.items() if name not in by_name)
    return positional, {name: complete[name] for name in complete if name in by_name}
