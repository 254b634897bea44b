"""The Markdown pages of the repository: their code blocks, links, headings and inline code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
# Their code, commands and names of files are checked; of all pages, the links.
DOCUMENTED = ("README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")))
PAGES = (
    *DOCUMENTED,
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "examples/nano/README.md",
)


@dataclass(frozen=True)
class Block:
    """A fenced block. needs: what `<!-- needs: ... -->` before it says it cannot do without."""

    page: str
    line: int
    language: str
    text: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def tokens(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text())


def inline(page: str) -> Iterator[Token]:
    """The parts of every line of text: words, code, links."""
    for token in tokens(page):
        yield from token.children or ()


def blocks(page: str, language: str) -> list[Block]:
    found, before = [], None
    for token in tokens(page):
        if token.type == "fence" and token.info == language:
            needs = re.fullmatch(r"<!-- needs: (\w+) -->", before.strip()) if before else None
            assert token.map is not None
            line = token.map[0] + 1
            words = None if needs is None else needs[1]
            found.append(Block(page, line, token.info, token.content, words))
        before = token.content if token.type == "html_block" else None
    return found


def languages(page: str) -> set[str]:
    fenced = {token.info for token in tokens(page) if token.type == "fence"}
    return fenced | {"indented" for token in tokens(page) if token.type == "code_block"}


def code(page: str) -> list[str]:
    """Inline code."""
    return [part.content for part in inline(page) if part.type == "code_inline"]


def links(page: str) -> list[str]:
    """Targets of links and pictures."""
    kinds = {"link_open": "href", "image": "src"}
    return [str(part.attrs[kinds[part.type]]) for part in inline(page) if part.type in kinds]


@cache
def anchors(page: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = [
        "".join(part.content for part in after.children or ())
        for token, after in pairwise(tokens(page))
        if token.type == "heading_open"
    ]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in text}


def rows(page: str, head: str) -> list[list[list[str]]]:
    """Inline code of each cell, by row, of the tables whose first column is `head`."""
    found: list[list[list[str]]] = []
    heads: list[str] = []
    for token, after in pairwise(tokens(page)):
        if token.type == "table_open":
            heads = []
        elif token.type == "th_open":
            heads.append(after.content)
        elif heads[:1] == [head]:
            if token.type == "tr_open":
                found.append([])
            elif token.type == "td_open":
                cell = [p.content for p in after.children or () if p.type == "code_inline"]
                found[-1].append(cell)
    return found


def first_cells(page: str, head: str) -> list[list[str]]:
    """Inline code in the first cell of each row of the tables whose first column is `head`."""
    return [row[0] for row in rows(page, head)]


def commands(text: str) -> list[list[str]]:
    """The simple commands of a shell script, without assignments, redirections and comments."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        is_file = False
        for word in [*lexer, ";"]:
            if is_file:
                is_file = False
            elif word in ("&&", ";", "|", "||", "&"):
                found += [words] if words else []
                words = []
            elif word in (">", "<", ">>"):
                is_file = True
            elif words or not re.fullmatch(r"[A-Z_]+=.*", word):
                words.append(word)
    return found
