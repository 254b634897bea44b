"""Graphs that were kept: rebuilt from data, and made again where a file says anything odd.

All files here are kept as `save` keeps them, with the digest of what they say.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import golden
from magihuman.graphs import graph_cache
from magihuman.graphs.transformer import compile as compiling
from magihuman.graphs.transformer.options import CompileOptions
from magihuman.graphs.transformer.passes.context import Context
from magihuman.kernels.jit import cache
from magihuman.runtime.model.dit import DiT

INPUTS = ("video", "audio", "text", "rope", "length")
KEY = "planted"
OP, NAME, TARGET, ARGS, KWARGS = range(5)  # of a node in a file
FUZZED = 300


@pytest.fixture(scope="module")
def model() -> DiT:
    return golden.dit(local=False)


@pytest.fixture(scope="module")
def nodes(model: DiT, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What a file says of the golden transformer."""
    folder = tmp_path_factory.mktemp("graphs")
    context = Context(model.config, (6, 4, 3), torch.bfloat16, torch.device("cpu"))
    compiling.compile_forward(model, context, CompileOptions(cache=folder))
    (file,) = folder.iterdir()
    return json.loads(cache.read(graph_cache.KIND, file.name, folder))


def planted(nodes: Any, model: DiT, folder: Path) -> fx.GraphModule | None:
    text = nodes if isinstance(nodes, str) else json.dumps(nodes)
    cache.write(graph_cache.KIND, KEY, text.encode(), folder)
    return graph_cache.load(KEY, model, folder, INPUTS)


def first(nodes: list[Any], op: str, target: str = "") -> list[Any]:
    return next(node for node in nodes if node[OP] == op and target in node[TARGET])


def test_a_graph_comes_back_as_it_was(model: DiT, nodes: list[Any], tmp_path: Path) -> None:
    module = planted(nodes, model, tmp_path)
    assert module is not None
    graph_cache.save(module, "again", tmp_path)
    assert json.loads(cache.read(graph_cache.KIND, "again", tmp_path)) == nodes
    assert {op for op, *_ in nodes} == {"placeholder", "get_attr", "call_function", "output"}


def test_an_operator_that_is_not_read_is_not_kept(model: DiT, tmp_path: Path) -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),)),))
    graph_cache.save(fx.GraphModule(model, graph), KEY, tmp_path)
    assert not list(tmp_path.iterdir())


# -- code ---------------------------------------------------------------------------------------

CODE = "__import__('pathlib').Path({!r}).touch()"
CARRIERS: dict[str, Callable[[list[Any], str], object]] = {
    "a name": lambda nodes, code: first(nodes, "get_attr").__setitem__(NAME, code),
    "an input's name": lambda nodes, code: first(nodes, "placeholder").__setitem__(NAME, code),
    "a default": lambda nodes, code: first(nodes, "placeholder").__setitem__(TARGET, f"x={code}"),
    "an annotation": lambda nodes, code: first(nodes, "placeholder").__setitem__(
        TARGET, f"x: {code}"
    ),
    "an input's argument": lambda nodes, code: first(nodes, "placeholder").__setitem__(
        ARGS, [code]
    ),
    "a tensor": lambda nodes, code: first(nodes, "get_attr").__setitem__(TARGET, f'"+{code}+"'),
    "a tensor's path": lambda nodes, code: first(nodes, "get_attr").__setitem__(
        TARGET, first(nodes, "get_attr")[TARGET] + f'.a"), {code}, ("'
    ),
    "a keyword": lambda nodes, code: first(nodes, "call_function").__setitem__(
        KWARGS, {"dict": {f"x={code}, y": 1}}
    ),
    "an operator": lambda nodes, code: first(nodes, "call_function").__setitem__(TARGET, code),
    "a dtype": lambda nodes, code: first(nodes, "call_function")[ARGS].append({"dtype": code}),
    "a reference": lambda nodes, code: first(nodes, "call_function")[ARGS].append({"node": code}),
    "a method": lambda nodes, code: first(nodes, "call_function").__setitem__(
        slice(OP, TARGET + 1), ["call_method", "x", code]
    ),
    "a module": lambda nodes, code: first(nodes, "call_function").__setitem__(
        slice(OP, TARGET + 1), ["call_module", "x", code]
    ),
    "a kind of node": lambda nodes, code: first(nodes, "get_attr").__setitem__(OP, code),
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_no_code_of_a_file_runs(carrier: str, model: DiT, nodes: list[Any], tmp_path: Path) -> None:
    changed, mark = copy.deepcopy(nodes), tmp_path / "mark"
    CARRIERS[carrier](changed, CODE.format(str(mark)))
    assert changed != nodes
    module = planted(changed, model, tmp_path / "graphs")
    assert not mark.exists()
    assert module is None


# -- operators and arguments --------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "aten.gone.default",
        "aten.linear.gone",
        "aten.from_file.default",
        "aten.set_.source_Storage",
        "aten.linear.__class__",
        "aten.linear.__call__",
        "magihuman.gone.default",
        "magihuman.linear.__init__",
        "magihuman.__class__.mro",
        "load_library.__func__.__call__",
        "import_module.__func__.__call__",
        "prims.view_of.default",
        "aten.linear",
        "aten.linear.default.more",
        "",
        "....",
        None,
        7,
        ["getitem"],
        {"dict": {}},
    ],
)
def test_every_operator_has_to_be_on_the_list(
    target: object, model: DiT, nodes: list[Any], tmp_path: Path
) -> None:
    """Whichever is renamed: one of each that is in the graph."""
    for old in {node[TARGET] for node in nodes if node[OP] == "call_function"}:
        changed = copy.deepcopy(nodes)
        first(changed, "call_function", old)[TARGET] = target
        assert planted(changed, model, tmp_path) is None, old


def _swapped(nodes: list[Any], one: str, other: str) -> None:
    first(nodes, "call_function", one)[TARGET] = first(nodes, "call_function", other)[TARGET]


ODD: dict[str, Callable[[list[Any]], object]] = {
    "no nodes": lambda nodes: nodes.clear(),
    "no output": lambda nodes: nodes.pop(),
    "two outputs": lambda nodes: nodes.append([*nodes[-1][:NAME], "again", *nodes[-1][TARGET:]]),
    "a node twice": lambda nodes: nodes.insert(0, nodes[0]),
    "a short node": lambda nodes: nodes[3].pop(),
    "a node too late": lambda nodes: nodes.insert(-1, nodes.pop(0)),
    "an input less": lambda nodes: nodes.remove(first(nodes, "placeholder", "length")),
    "an input more": lambda nodes: nodes.insert(0, ["placeholder", "x", "x", [], {"dict": {}}]),
    "inputs in another order": lambda nodes: nodes.insert(0, first(nodes, "placeholder", "rope")),
    "another tensor": lambda nodes: first(nodes, "get_attr").__setitem__(TARGET, "block.gone"),
    "a module for a tensor": lambda nodes: first(nodes, "get_attr").__setitem__(TARGET, "block"),
    "another attribute": lambda nodes: first(nodes, "get_attr").__setitem__(TARGET, "forward"),
    "a keyword for a name": lambda nodes: first(nodes, "get_attr").__setitem__(NAME, "lambda"),
    "another operator": lambda nodes: _swapped(nodes, "magihuman.norm", "aten.linear"),
    "an argument less": lambda nodes: first(nodes, "call_function", "norm")[ARGS].clear(),
    "an argument more": lambda nodes: first(nodes, "call_function", "norm")[ARGS].extend([1] * 99),
    "a number for a tensor": lambda nodes: first(nodes, "call_function", "norm")[ARGS].__setitem__(
        0, 7
    ),
    "a text for a number": lambda nodes: first(nodes, "call_function", "slice")[ARGS].__setitem__(
        1, "0"
    ),
    "no dtype": lambda nodes: first(nodes, "call_function", "slice")[ARGS].__setitem__(
        1, {"dtype": "load"}
    ),
    "a large number": lambda nodes: first(nodes, "call_function", "slice")[ARGS].__setitem__(
        1, 10**30
    ),
    "a part that is not there": lambda nodes: first(nodes, "call_function", "getitem")[
        ARGS
    ].__setitem__(1, 99),
    "an output that is no tensor": lambda nodes: nodes[-1].__setitem__(ARGS, [["text"]]),
    "numbers for nodes": lambda nodes: nodes.__setitem__(slice(None), [1, 2]),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_odd_is_made_again(odd: str, model: DiT, nodes: list[Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(nodes)
    ODD[odd](changed)
    assert planted(changed, model, tmp_path) is None


@pytest.mark.parametrize(
    "text",
    ["", "null", "7", '"text"', "{}", "[[", "[" * 100_000, "[" + "9" * 5000 + "]", "[null]"],
)
def test_what_is_no_list_of_nodes_is_made_again(text: str, model: DiT, tmp_path: Path) -> None:
    assert planted(text, model, tmp_path) is None


def test_a_long_file_is_made_again(model: DiT, nodes: list[Any], tmp_path: Path) -> None:
    text = json.dumps(nodes) + " " * graph_cache.MOST_BYTES
    assert planted(text, model, tmp_path) is None


# -- generated ----------------------------------------------------------------------------------

VALUES = (
    None, True, -1, 10**6, 10**30, 0.5, float("nan"), "", "x", "a b", "getitem", "__class__", [],
    [[]], {}, {"dict": {}}, {"node": "x"}, {"dtype": "float32"}, {"dtype": "load"}, {"a": 1},
)  # fmt: skip


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value, with every key that it has."""
    if isinstance(value, (list, dict)):
        for key in range(len(value)) if isinstance(value, list) else value:
            yield value, key
            yield from _places(value[key])


def test_any_change_of_a_file_is_refused_or_harmless(
    model: DiT, nodes: list[Any], tmp_path: Path
) -> None:
    """One value after another of seed 0, in one place; and the text cut, or with a byte changed."""
    draw = random.Random(0)
    refused, text = 0, json.dumps(nodes)
    known = {target for op, _, target, *_ in nodes if op == "call_function"}
    for number in range(FUZZED):
        changed: Any = copy.deepcopy(nodes)
        if number % 5 == 0:
            changed = text[: draw.randrange(len(text))]
        elif number % 5 == 1:
            place = draw.randrange(len(text))
            changed = text[:place] + chr(draw.randrange(32, 127)) + text[place + 1 :]
        else:
            owner, key = draw.choice(list(_places(changed)))
            owner[key] = draw.choice(VALUES)
        module = planted(changed, model, tmp_path)
        refused += module is None
        if module is not None:
            calls = [node for node in module.graph.nodes if node.op == "call_function"]
            assert {graph_cache._target(node) for node in calls} <= known
            tensors = {node.target for node in module.graph.nodes if node.op == "get_attr"}
            assert tensors <= model.state_dict().keys()
    assert refused > FUZZED // 2
