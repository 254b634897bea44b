"""Operator arguments by schema name, on PyTorch's operators and the project's own."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from magihuman.graphs.rewrite import ArgumentError, arguments, call, with_arguments
from magihuman.kernels import ops  # noqa: F401 - registers torch.ops.magihuman
from magihuman.kernels.jit import UNSET

ATEN = torch.ops.aten
OPS = torch.ops.magihuman


def test_defaults_are_filled_in() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    part = graph.call_function(ATEN.slice.Tensor, (x, 1, 2))
    assert arguments(part) == {"self": x, "dim": 1, "start": 2, "end": None, "step": 1}
    assert list(arguments(part)) == ["self", "dim", "start", "end", "step"]
    product = graph.call_function(
        OPS.linear.default, (x,), {"modality_rows": [1, 2, 3], "weight": weight}
    )
    given = {"x": x, "weight": weight, "modality_rows": [1, 2, 3], "route": UNSET}
    assert arguments(product) == given
    assert list(arguments(product)) == list(given)


def test_a_call_orders_by_the_schema() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    product = call(graph, OPS.linear.default, modality_rows=[], weight=weight, x=x)
    assert product.args == (x, weight, [], UNSET) and product.kwargs == {}
    scaled = call(graph, ATEN.add.Tensor, other=weight, self=x)
    assert scaled.args == (x, weight) and scaled.kwargs == {"alpha": 1}  # by name alone
    assert list(graph.nodes) == [x, weight, product, scaled]
    assert list(x.users) == [product, scaled]


def test_replaced_arguments_stand_in_their_places() -> None:
    graph = fx.Graph()
    x, y, weight = (graph.placeholder(name) for name in ("x", "y", "weight"))
    product = graph.call_function(OPS.linear.default, (x, weight, [1, 2, 3]))
    with_arguments(product, x=y, route="library")
    assert product.args == (y, weight, [1, 2, 3], "library")
    assert not x.users and list(y.users) == [product]


def test_errors_name_operator_and_argument() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    product = call(graph, OPS.linear.default, x=x, weight=weight, modality_rows=[])
    with pytest.raises(
        ArgumentError, match=r"magihuman\.linear\.default has no argument 'kind'; .* 'x', 'weight'"
    ):
        with_arguments(product, kind="gelu7")
    assert arguments(product)["route"] == UNSET  # as it was
    with pytest.raises(ArgumentError, match=r"aten\.add\.Tensor has no argument 'others'; .* 'al"):
        call(graph, ATEN.add.Tensor, self=x, other=weight, others=weight)
    with pytest.raises(
        ArgumentError, match=r"linear\.default needs the argument 'modality_rows', which"
    ):
        call(graph, OPS.linear.default, x=x, weight=weight)
    with pytest.raises(ArgumentError, match=r"only calls of operators .* x is placeholder of x"):
        arguments(x)
    item = graph.call_function(operator.getitem, (x, 0))
    with pytest.raises(ArgumentError, match=r"only calls of operators"):
        arguments(item)
    long = graph.call_function(OPS.quantize_fp8.default, (x, 1, 2))
    with pytest.raises(ArgumentError, match=r"quantize_fp8\.default takes at most 1 .* has 3"):
        arguments(long)
