"""Every module of the package by itself, in a process that has imported nothing else of it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from magihuman import runtime

PACKAGE = Path(runtime.__file__).parents[1]
NAMESPACE = "torch.ops.magihuman"
WITHOUT_WHEELS = ("ray",)  # of an extra, and not made for every Python

# Libraries, which take seconds, are there before any process is forked. To import a module is to
# import its packages first, so a process is forked from that of its package, and only for a module
# that the package has not brought along: one that it has would find the same in its own.
SCRIPT = """
import importlib, json, os, sys
import av, fastapi, numpy, onnx, onnxscript, PIL.Image, prometheus_client, rich.table, scipy.signal
import torch, triton, typer
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, T5GemmaEncoderModel

named = json.load(sys.stdin)

def look(name):
    found = {name: problem(name)}
    for inner in named:
        if inner.rpartition(".")[0] == name:
            found |= look(inner) if inner in sys.modules else forked(inner)
    return found

def problem(name):
    try:
        importlib.import_module(name)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return [each for each in named[name] if not hasattr(torch.ops.magihuman, each)]

def forked(name):
    ours, its = os.pipe()
    child = os.fork()
    if not child:
        os.close(ours)
        with os.fdopen(its, "w") as answer:
            json.dump(look(name), answer)
        os._exit(0)
    os.close(its)
    with os.fdopen(ours) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return json.loads(said or json.dumps({name: "the process ended"}))

assert not [name for name in sys.modules if name.startswith("magihuman")]
print(json.dumps(look("magihuman")))
"""


def modules() -> Iterator[tuple[str, str]]:
    """Name and text of each."""
    for file in sorted(PACKAGE.glob("*/**/*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(("magihuman", *(part for part in parts if part != "__init__")))
        yield name, file.read_text(encoding="utf-8")


def operators(text: str) -> set[str]:
    """Those of ours that a module names, by the namespace or by a name that it has given it."""
    tree = ast.parse(text)
    spaces = {NAMESPACE}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == NAMESPACE:
            spaces |= {ast.unparse(target) for target in node.targets}
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in spaces
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_every_module_can_be_imported_alone_and_finds_the_operators_it_names():
    named = {name: sorted(operators(text)) for name, text in modules()}
    assert sum(map(bool, named.values())) > 1  # or it would look for none
    for name in list(named):
        named.setdefault(name.rpartition(".")[0], [])  # folders without an __init__.py
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        input=json.dumps(named), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == named.keys()
    excused = [f"ModuleNotFoundError: No module named '{name}'" for name in WITHOUT_WHEELS]
    wrong = {
        name: f"not registered: {', '.join(missing)}" if isinstance(missing, list) else missing
        for name, missing in found.items()
        if missing and missing not in excused
    }
    assert wrong == {}


WITHOUT_TRITON = """
import importlib, sys
sys.modules["triton"] = None  # as where it is not installed
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not any(name.startswith("triton.") for name in sys.modules)
from magihuman.kernels.jit.language import triton
assert triton.jit(len) is len
"""


def test_operators_are_registered_where_triton_is_not_installed():
    """A file that registers one may declare its Triton kernel too."""
    registering = [name for name, text in modules() if "@torch.library.custom_op" in text]
    assert "magihuman.kernels.ops" in registering
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_TRITON, *registering]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Folders that hand out what neighbours may use. Those of kernels, of the command line and of the
# server do not: their files are imported where they are needed, for what they bring along.
ROOMS = {
    "runtime": (
        "engine", "evaluate", "exported", "media", "memory", "model", "parallel", "pipeline",
        "prompts", "weights",
    ),
    "graphs": ("cuda_graphs", "decoder", "rewrite", "text", "transformer"),
}  # fmt: skip


def test_neighbours_import_the_folder_and_not_its_files():
    rooms = {f"magihuman.{top}.{room}" for top, names in ROOMS.items() for room in names}
    assert rooms <= {name for name, _ in modules()}
    wrong = []
    for name, text in modules():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module:
                room = ".".join(node.module.split(".")[:3])
                if room in rooms and node.module != room and not f"{name}.".startswith(f"{room}."):
                    wrong.append(f"{name} imports {node.module}")
    assert wrong == []
