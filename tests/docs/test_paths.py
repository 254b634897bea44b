"""Files, folders, classes and functions that the pages name are in the tree.

A path counts from the root of the repository or from one of the four packages. A dotted name counts
as ours where its first part is a module, a room or a class of these packages, or an engine.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cache

import pytest

import pages

PACKAGES = ("runtime", "graphs", "kernels", "export")
TOP = (*PACKAGES, "tests", "benchmarks", "deploy", "docs", "examples")
PAGES = (*pages.DOCUMENTED, "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|cu|md|json)|(?:[\w.-]+/)*[\w.-]+/")
BELOW_TOP = re.compile(rf"(?:{'|'.join(TOP)})/[\w./-]+")
DOTTED = re.compile(r"(?:magihuman\.)?(\w+)\.(\w+)(?:\(.*\))?")
CLASS = re.compile(r"[A-Z]+[a-z]\w*[A-Z]\w*")
# Written for users, in folders of theirs.
WRITTEN = {
    "evaluation.json", "job.json", "manifest.json", "model.safetensors.index.json", "request.json",
}  # fmt: skip
MADE = ("benchmarks/results/history", "benchmarks/results/latency.png")  # by `make bench`
FILES = {"bin", "mp4", "safetensors", "sqlite"}  # `weights.bin` is no member
INSTANCES = {"engine": "Engine"}  # as the pages' examples call it


class Names:
    """What the packages and the benchmarks define.

    Attributes:
        modules: names at the top of each module or room, by its name; of both where they share it.
        classes: members of each class, by its name.
    """

    def __init__(self) -> None:
        self.modules: dict[str, set[str]] = defaultdict(set)
        self.classes: dict[str, set[str]] = defaultdict(set)
        for package in (*PACKAGES, "benchmarks"):
            for file in (pages.ROOT / package).rglob("*.py"):
                tree = ast.parse(file.read_text())
                name = file.parent.name if file.stem == "__init__" else file.stem
                self.modules[name] |= _defined(tree.body)
                self.modules[file.parent.name].add(name)
                for node in ast.walk(tree):
                    if isinstance(node, ast.ClassDef):
                        self.classes[node.name] |= _defined(node.body) | _set_on_self(node)
                if file.stem == "__init__":
                    self.modules[name] |= _lazy(tree)


def _defined(body: Iterable[ast.stmt]) -> set[str]:
    """Names that statements bind: definitions, imports and assignments."""
    names = set()
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names


def _lazy(tree: ast.Module) -> set[str]:
    """Names in `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def _set_on_self(node: ast.ClassDef) -> set[str]:
    return {
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute)
        and isinstance(part.ctx, ast.Store)
        and ast.unparse(part.value) == "self"
    }


@cache
def names() -> Names:
    return Names()


def is_there(path: str) -> bool:
    return any((pages.ROOT / place / path).exists() for place in ("", *PACKAGES))


def is_known(owner: str, name: str) -> bool:
    """Whether `owner.name` exists, or is none of ours."""
    places = [names().classes[owner]] if owner in names().classes else []
    if owner in names().modules:
        places.append(names().modules[owner])
    if owner in INSTANCES:
        places.append(names().classes[INSTANCES[owner]])
    return not places or any(name in place for place in places)


def gone(codes: Iterable[str]) -> set[str]:
    """Those pieces of inline code that name something which is not there."""
    found = set()
    for code in codes:
        if PATH.fullmatch(code) or BELOW_TOP.fullmatch(code):
            known = is_there(code) or code in WRITTEN or code.startswith(MADE)
        elif dotted := DOTTED.fullmatch(code):
            known = dotted[2] in FILES or is_known(dotted[1], dotted[2])
        elif CLASS.fullmatch(code):
            known = code in names().classes or hasattr(builtins, code)
        else:
            continue
        found |= set() if known else {code}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    assert gone(pages.code(page)) == set()


def test_what_is_gone_is_found():
    there = {
        "engine/queue.py",
        "graphs/rewrite/",
        "runtime/model",
        "kernels/linear/matmul_sm90.cu",
        "Engine._alone",
        "engine.is_usable",
        "failures.advice",
        "runtime.load",
        "magihuman.runtime",
        "magihuman.runtime.load",
        "passes.epilogue",
        "reference.Sharding",
        "RequestQueue",
        "ValueError",
        "torch.export",
        "weights.bin",
    }
    assert gone(there) == set()
    lost = {
        "queueing.py",
        "runtime/queue.py",
        "graphs/rewrites/",
        "runtime/models",
        "Engine._guard",
        "engine.is_ready",
        "failures.warn",
        "runtime.upload",
        "RequestLine",
        "runtime.load_model(...)",
        "magihuman.runtime.load_model",
    }
    assert gone(lost) == lost


def test_files_written_for_users_are_still_named():
    named = {code for page in PAGES for code in pages.code(page)}
    assert named >= WRITTEN
