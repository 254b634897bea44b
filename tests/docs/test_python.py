"""The Python of the pages runs, with the tiny checkpoint and small clips."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sounds import write_sine

import pages
from magihuman import runtime
from magihuman.runtime.evaluate import VerifyOptions
from magihuman.runtime.request import Request, RequestOptions

SMALL = {"seconds": 0.2, "width": 64, "height": 64}
SMALLER = (  # than the text asks for; nano's size is left
    (re.compile(r"\bseconds=[\d.]+"), "seconds=0.2"),
    (re.compile(r"\(480, 256, 5\.0\)"), "(64, 64, 0.2)"),
)
OPTIONS = {runtime.verify: VerifyOptions}  # of the others, those of a request
WITH_PYTHON = [page for page in pages.DOCUMENTED if pages.blocks(page, "python")]


@pytest.fixture
def small_clips(monkeypatch) -> None:
    """Requests that name no size are for small clips."""
    defaults = Request.__init__.__defaults__
    names = [*Request.__dataclass_fields__][-len(defaults) :]
    fewer = tuple(SMALL.get(name, value) for name, value in zip(names, defaults, strict=True))
    monkeypatch.setattr(Request.__init__, "__defaults__", fewer)


def calls(text: str) -> list[tuple[Callable[..., Any], ast.Call]]:
    """Calls of `runtime.X` and of an engine's methods."""
    found = []
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="runtime"), attr=name)):
                found.append((getattr(runtime, name), node))
            case ast.Call(func=ast.Attribute(value=ast.Name(id="engine"), attr=name)):
                found.append((getattr(runtime.Engine, name), node))
    return found


def wrong_keywords(text: str) -> list[str]:
    """Keywords of calls that the functions do not have."""
    wrong = []
    for function, call in calls(text):
        names = set(inspect.signature(function).parameters)
        if "options" in names:
            names |= set(OPTIONS.get(function, RequestOptions).__annotations__)
        wrong += [word.arg for word in call.keywords if word.arg and word.arg not in names]
    return wrong


@pytest.mark.parametrize("page", pages.DOCUMENTED)
def test_keywords_are_those_of_the_functions(page):
    for block in pages.blocks(page, "python"):
        assert wrong_keywords(block.text) == [], str(block)


def test_a_wrong_keyword_is_found():
    text = (
        "with runtime.load('m', vea='fast') as engine:\n    engine.generate('p', second=1, seed=2)"
    )
    assert wrong_keywords(text) == ["vea", "second"]
    assert wrong_keywords("runtime.verify('m', ['p'], score=True, sr_width=2)") == ["sr_width"]
    with pytest.raises(AttributeError):
        wrong_keywords("engine.generates('p')")


@pytest.mark.usefixtures("small_clips")
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_blocks_run(page, tiny_dir, tmp_path, monkeypatch):
    """One after another, as in one module. Every mp4 that they name is written."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("face.png")
    write_sine(tmp_path / "voice.wav", seconds=0.3)
    names: dict[str, Any] = {"runtime": runtime} if page == "docs/export.md" else {}
    ran = 0
    for block in pages.blocks(page, "python"):
        text = block.text.replace("/models/daVinci-MagiHuman", str(tiny_dir))
        text = text.replace('"/models/', f'"{tiny_dir}/')
        for pattern, smaller in SMALLER:
            text = pattern.sub(smaller, text)
        runs = compile(text, str(block), "exec")
        if block.needs is not None:
            continue
        exec(runs, names)  # noqa: S102 - what the pages say
        ran += 1
        for name in re.findall(r'"(\w+\.mp4)"', text):
            assert Path(name).stat().st_size > 1000, str(block)
    if "engine" in names:
        names["engine"].close()
    assert ran or page == "docs/export.md"  # engines alone, which need their GPU
