"""The commands of the pages: all are ones that there are, and those that can run here do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

import pytest
import typer
from PIL import Image
from sounds import write_sine
from starlette.routing import WebSocketRoute
from typer.testing import CliRunner

import pages
from magihuman.export.cli import cli
from magihuman.runtime.serving.api import create_app
from magihuman.runtime.serving.schema import FILES, VideoOptions
from magihuman.runtime.serving.settings import Settings

PROMPT = "A woman with long black hair in a yellow shirt on a pink background says: ho ba hu"
SMALL = ("--seconds", "0.2", "--width", "64", "--height", "64")
SMALLER = {  # options that make a run take a second
    "generate": (*SMALL, "--steps", "2"),
    "verify": (*SMALL, "--steps", "2"),
    "evaluate": (*SMALL, "--steps", "2"),
    "explain": (*SMALL, "--text-tokens", "16"),
}
COMMANDS = typer.main.get_command(cli.app).commands
OPTIONS = {
    name: {option for parameter in command.params for option in parameter.opts}
    | {option for parameter in command.params for option in parameter.secondary_opts}
    for name, command in COMMANDS.items()
}
SHELL = [block for page in pages.DOCUMENTED for block in pages.blocks(page, "sh")]
WITH_RUNS = sorted(
    {
        block.page
        for block in SHELL
        if block.needs is None and "magihuman " in block.text and block.page != "docs/serving.md"
    }
)


def named(program: str) -> list[list[str]]:
    """The arguments of a program in all blocks."""
    return [w[1:] for block in SHELL for w in pages.commands(block.text) if w[0] == program]


def test_every_block_says_what_it_is():
    said = {language for page in pages.DOCUMENTED for language in pages.languages(page)}
    assert said == {"python", "sh", "text"}


def test_programs_are_known():
    known = {"magihuman", "make", "python", "pytest", ".venv/bin/pytest", "pip", "curl"}
    known |= {"cmake", "ctest", "build/magihuman-decode"}
    assert {w[0] for block in SHELL for w in pages.commands(block.text)} == known


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_the_command_line_takes_what_is_shown(block):
    for words in pages.commands(block.text):
        if words[0] == "magihuman":
            COMMANDS[words[1]].make_context(words[1], words[2:])


def test_engines_are_exported_for_a_gpu_that_need_not_be_here():
    """As they stand, the examples work on any machine that has the extra."""
    page = [block for block in SHELL if block.page == "docs/export.md"]
    shown = [words for block in page for words in pages.commands(block.text)]
    engines = [words for words in shown if words[0] == "magihuman" and "tensorrt" in words]
    assert len(engines) == 2 and all("--sm" in words for words in engines)


def test_options_and_commands_in_the_text_exist():
    everything = set().union(*OPTIONS.values()) | {"--help"}
    seen = 0
    for page in pages.DOCUMENTED:
        for text in pages.code(page):
            words = text.split()
            if words[0] == "magihuman" and len(words) > 1 and words[1].isalpha():
                allowed = OPTIONS[words[1]] | {"--help"}
            elif words[0] in OPTIONS and len(words) > 1:
                allowed = OPTIONS[words[0]]
            elif text.startswith("--"):
                allowed = everything
            else:
                continue
            options = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert options <= allowed, f"{page}: {text}"
            seen += 1
    assert seen > 40


def test_all_commands_are_in_the_table():
    rows = pages.first_cells("docs/cli.md", "command")
    assert sorted(rows) == sorted([f"magihuman {name}"] for name in COMMANDS)


def test_targets_of_make_exist():
    makefile = (pages.ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    shown = {words[0] for words in named("make")}
    shown |= {
        text.split()[1]
        for page in pages.DOCUMENTED
        for text in pages.code(page)
        if text.startswith("make ")
    }
    assert {"demo", "test", "bench"} <= shown <= targets


def test_scripts_have_the_options_that_are_shown():
    shown = [words for words in named("python") if not words[0].startswith("-")]
    for script, *options in shown:
        source = (pages.ROOT / script).read_text()
        assert all(f'"{word}"' in source for word in options if word.startswith("--"))
    assert len(shown) >= 3


def test_variables_of_cmake_exist():
    given = {
        match[1]
        for words in named("cmake")
        for word in words
        if (match := re.match(r"-D(\w+)=", word))
    }
    lists = [*pages.ROOT.glob("CMakeLists.txt"), *pages.ROOT.glob("export/**/CMakeLists.txt")]
    text = "".join(file.read_text() for file in lists)
    assert given and all(re.search(rf"\b{name}\b", text) for name in given)


def test_the_server_takes_the_fields_that_are_shown():
    (words,) = [w for w in named("curl") if "-F" in w]
    shown = {words[i + 1].partition("=")[0] for i, word in enumerate(words) if word == "-F"}
    fields = set(VideoOptions.model_fields) | set(FILES)
    assert shown == {"prompt", "seconds", "size", "input_reference", "audio"} and shown <= fields
    told = set(pages.code("docs/serving.md"))
    assert fields <= told


def test_the_server_has_the_routes_and_codes_that_are_told(tmp_path):
    async def is_ready() -> bool:
        return True

    def nothing() -> NoReturn:
        raise AssertionError("its description needs no jobs")

    app = create_app(Settings(tmp_path, "m"), nothing, is_ready, nothing)
    described = app.openapi()["paths"]
    routes = {(m.upper(), path) for path, methods in described.items() for m in methods}
    told = [row for rows in pages.first_cells("docs/serving.md", "request") for row in rows]
    shown = {tuple(row.replace("{id}", "{video_id}").split()) for row in told}
    sockets = {("WS", r.path) for r in app.routes if isinstance(r, WebSocketRoute)}
    assert shown == routes | sockets | {("GET", "/openapi.json")}
    answers = {
        code for ways in described.values() for way in ways.values() for code in way["responses"]
    }
    errors = {int(code) for code in answers if int(code) >= 400}
    text = (pages.ROOT / "docs" / "serving.md").read_text()
    rows = re.findall(r"^\| (\d{3}[\d, ]*)", text, re.MULTILINE)
    codes = {int(code) for row in rows for code in re.findall(r"\d+", row)}
    assert codes | {409} == errors  # 409 is told with the route that gives it


@pytest.mark.parametrize("page", WITH_RUNS)
def test_commands_run(page, tiny_dir, tmp_path, monkeypatch):
    """On the tiny checkpoint and small clips, in the order of the page."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("face.png")
    write_sine(tmp_path / "voice.wav", seconds=0.3)
    Path("prompts.txt").write_text("A man nods.\n")
    stand_ins = {
        "DIR": str(tiny_dir),
        "/models/daVinci-MagiHuman": str(tiny_dir),
        "PROMPT": PROMPT,
        "FILE": "prompts.txt",
        "block.layers.39.*": "block.layers.4.*",  # the tiny one's last
    }
    for block in pages.blocks(page, "sh"):
        for words in pages.commands(block.text) if block.needs is None else ():
            if words[0] == "magihuman":
                run([stand_ins.get(word, word) for word in words[1:]], str(block))


def run(words: list[str], block: str) -> None:
    """One command, and the file or folder that it is told to write."""
    smaller = list(SMALLER.get(words[0], ()))
    if words[0] in ("generate", "evaluate") and "-m" not in words and "--model" not in words:
        smaller = ["--seconds", "0.2"]  # nano, in its size
    if "--sr" in words and words[0] == "generate":
        smaller += ["--sr-width", "96", "--sr-height", "96", "--sr-steps", "2"]
    if words[0] == "export":
        smaller = ["--no-verify", *(() if "--audio" in words else ("--size", "32x32"))]
    result = CliRunner().invoke(cli.app, [*words, *smaller])
    allowed = (0, 1) if words[0] == "verify" else (0,)  # a tiny checkpoint may fail, and says so
    assert result.exit_code in allowed, f"{block}: {words}\n{result.output}"
    if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
        raise result.exception
    for option in ("-o", "--out", "--html"):
        if option in words:
            path = Path(words[words.index(option) + 1])
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            assert sum(file.stat().st_size for file in files) > 1000
