"""Links lead somewhere, and what the pages name is there."""

from __future__ import annotations

import posixpath
import re
import tomllib

import pytest

import pages
from magihuman import runtime
from magihuman.runtime.request import Request

EXTERNAL = re.compile(r"[a-z]+:")
NAMED = re.compile(r"(?:benchmarks|docs|examples|tests|runtime|graphs|kernels|export)/[\w./]*\w")
MADE = ("benchmarks/results/history", "benchmarks/results/latency.png")  # by `make bench`


def broken(page: str) -> list[str]:
    """Relative links of a page that lead nowhere."""
    found = []
    for link in pages.links(page):
        if EXTERNAL.match(link):
            continue
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        is_there = (pages.ROOT / target).exists()
        if not is_there or (anchor and anchor not in pages.anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", pages.PAGES)
def test_relative_links_lead_to_files_and_headings(page):
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "odd.md").write_text(
        "# The `a`, b?\n\n[ok](#the-a-b) [no](#the-a) [gone](gone.md) ![gone](gone.png)\n\n"
        "| t |\n|---|\n| [cell](gone.md#a) |\n\n[far](https://example.com/gone)\n"
    )
    assert broken("odd.md") == ["#the-a", "gone.md", "gone.png", "gone.md#a"]


@pytest.mark.parametrize("page", pages.DOCUMENTED)
def test_files_that_are_named_are_there(page):
    texts = [*pages.code(page), *(block.text for block in pages.blocks(page, "sh"))]
    named = {name for text in texts for name in NAMED.findall(text)}
    gone = {name for name in named if not (pages.ROOT / name).exists()}
    assert {name for name in gone if not name.startswith(MADE)} == set()


def test_every_page_is_in_the_readme():
    linked = {link.partition("#")[0] for link in pages.links("README.md")}
    assert {*pages.DOCUMENTED[1:], "SECURITY.md", "CITATION.cff", "CHANGELOG.md"} <= linked


def test_the_readme_stays_short():
    assert len((pages.ROOT / "README.md").read_text().splitlines()) <= 220


def test_the_table_of_keywords_is_that_of_the_code():
    named = [name for row in pages.first_cells("docs/embedding.md", "keyword") for name in row]
    fields = set(Request.__dataclass_fields__) - {"prompt"}
    assert set(named) == fields | {"on_progress", "cancel", "deadline_s", "save"}
    assert len(named) == len(set(named))


def test_the_table_of_errors_is_that_of_the_code():
    named = [name for row in pages.first_cells("docs/embedding.md", "error") for name in row]
    raised = {
        name
        for name in runtime.__all__
        if isinstance(kind := getattr(runtime, name), type) and issubclass(kind, Exception)
    }
    assert set(named) == raised - {"MagiHumanError"}


def test_extras_that_are_named_exist():
    project = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]
    named = {
        extra
        for page in pages.DOCUMENTED
        for text in [*pages.code(page), *(block.text for block in pages.blocks(page, "sh"))]
        for extra in re.findall(r"\.?\[([a-z]+)\]", text)
    }
    assert {"serve", "tensorrt", "cuda"} <= named <= set(project["optional-dependencies"])
