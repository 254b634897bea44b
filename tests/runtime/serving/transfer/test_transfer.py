"""Bodies taken apart as they come, whatever the pieces are."""

from __future__ import annotations

import base64
import json
import os
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from magihuman.runtime.serving.errors import ApiError
from magihuman.runtime.serving.transfer.data_url import decoded, unescaped
from magihuman.runtime.serving.transfer.document import DocumentReader
from magihuman.runtime.serving.transfer.form import FormReader
from magihuman.runtime.serving.transfer.spool import TOO_LONG, Budget, Sent, Shape, Spool

FORM_TYPE = "multipart/form-data; boundary=the-line"
SHORT = 50  # bytes of a text that is kept in memory


def shape(folder: Path, budget: Budget) -> Shape:
    return Shape(("image", "audio"), 6, SHORT, lambda: Spool(folder, budget))


def form(*parts: tuple[str, bytes]) -> bytes:
    """Of the rest of Content-Disposition, and content."""
    head = "--the-line\r\nContent-Disposition: form-data"
    lines = [f"{head}; {rest}\r\n\r\n".encode() + content + b"\r\n" for rest, content in parts]
    return b"".join(lines) + b"--the-line--\r\n"


def pieces(content: bytes, size: int) -> Iterator[bytes]:
    return (content[start : start + size] for start in range(0, len(content), size))


def fed(reader: FormReader | DocumentReader, content: bytes, size: int = 7) -> list:
    """All fields, with what is on the disk in place of where it is."""
    for piece in pieces(content, size):
        reader.feed(piece)
    return [
        (name, b"".join(value.spool.pieces()) if isinstance(value, Sent) else value)
        for name, value in reader.end()
    ]


def refused(reader: FormReader | DocumentReader, content: bytes) -> ApiError:
    with pytest.raises(ApiError) as raised:
        fed(reader, content)
    return raised.value


# -- forms ------------------------------------------------------------------------------------

NEARLY = b"\r\n--the-lin\r\n--the-linE\r\n-" * 20  # like a boundary, and none
WHOLE = form(
    ('name="prompt"', "höre".encode()),
    ('name="image"; filename="a.png"', NEARLY),
    ('name="size"', b"x" * (SHORT + 1)),
    ('name="audio"', b"data:,x"),
    ('name="seed"; filename="f"', b""),
)[:-2]
FIELDS = [("prompt", "höre"), ("image", NEARLY), ("size", TOO_LONG), ("audio", b"data:,x")]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 11, 100, 10_000])
def test_a_form_in_pieces(tmp_path, size):
    budget = Budget(10_000)
    content = WHOLE.replace(WHOLE[WHOLE.rindex(b"--the-line\r\n") : -len(b"--the-line--")], b"")
    reader = FormReader(FORM_TYPE, shape(tmp_path, budget))
    assert fed(reader, content, size) == FIELDS
    assert budget.taken == len(NEARLY) + len("data:,x")
    assert list(tmp_path.iterdir()) == []  # the files have no names
    reader.close()
    assert budget.taken == 0


def test_a_form_cut_anywhere_is_none(tmp_path):
    content = form(('name="prompt"', b"hi"), ('name="image"; filename="a.png"', b"pixels" * 5))
    whole = content.rstrip()
    for end in range(len(whole)):
        reader = FormReader(FORM_TYPE, shape(tmp_path, Budget(1000)))
        assert refused(reader, whole[:end]).status == 400, whole[:end]
    for rest in (b"", b"\r\n", b"\r\nwhat follows is not looked at --the-line"):
        reader = FormReader(FORM_TYPE, shape(tmp_path, Budget(1000)))
        assert len(fed(reader, whole + rest)) == 2


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([("name=x", b"\xff")], 400),
        ([("", b"hi")], 400),
        ([(f"name=x{i}", b"") for i in range(7)], 400),
        ([(f'name=x{i}; filename="a"', b"") for i in range(3)], 400),
        ([(f"name=x{i}", b"x" * SHORT) for i in range(5)], 400),
        ([(f'name="{"x" * 100_000}"', b"")], 422),
        ([("name=x\r\nX-Other: " + "x" * 100_000, b"")], 422),
    ],
    ids=range(7),
)
def test_forms_that_are_refused(tmp_path, parts, status):
    budget = Budget(1000)
    reader = FormReader(FORM_TYPE, shape(tmp_path, budget))
    error = refused(reader, form(*parts))
    assert error.status == status and len(error.message) < 200
    reader.close()
    assert budget.taken == 0


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary="])
def test_a_form_without_a_boundary(tmp_path, kind):
    with pytest.raises(ApiError, match="must have a boundary"):
        FormReader(kind, shape(tmp_path, Budget(1)))


# -- JSON -------------------------------------------------------------------------------------


def some_text(dice: random.Random) -> str:
    alphabet = 'ab"\\/\n\u00e9\u20ac\U0001f600'
    return "".join(dice.choices(alphabet, k=dice.choice([0, 1, 5, 20, 60, 300])))


def some_document(dice: random.Random) -> dict[str, object]:
    short = ["x", "", 3, -1.5e3, True, None, [], {}, ["a", {"b": 'c"'}], "\\"]
    values = [some_text(dice) for _ in range(2)] + dice.sample(short, 3)
    return {f'n"{index}\\': value for index, value in enumerate(values)}


@pytest.mark.parametrize("seed", range(100))
def test_documents_in_pieces_are_what_json_says(tmp_path, seed):
    dice = random.Random(seed)
    document, is_ascii = some_document(dice), dice.choice([True, False])
    content = json.dumps(document, ensure_ascii=is_ascii, indent=dice.choice([None, 1])).encode()
    content = dice.choice([b"", b"\xef\xbb\xbf", b" \n"]) + content
    reader = DocumentReader(shape(tmp_path, Budget(100_000)))
    for name, value in fed(reader, content, dice.choice([1, 2, 5, 64, 10_000])):
        if isinstance(value, bytes):
            assert len(value) > SHORT
            value = json.loads(b'"' + value + b'"')
        assert value == document.pop(name) or isinstance(value, list)  # pairs, in place of objects
    assert document == {}


def test_a_document_cut_anywhere_is_none(tmp_path):
    whole = json.dumps({"prompt": 'a"b\\', "image": "data:" + "x" * 100, "n": {"m": [1]}}).encode()
    for end in range(len(whole)):
        reader = DocumentReader(shape(tmp_path, Budget(1000)))
        assert refused(reader, whole[:end]).code == "malformed_body", whole[:end]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"a": "\xff"}', 400),
        (json.dumps({"a": "b"}).encode("utf-16"), 400),
        (b'{"a": 1} {"b": 2}', 400),
        (b"[" * 1_000_000, 400),
        (b"[" + b"[]," * 10_000 + b"[]]", 400),
        (b'{"a": ' + b"1" * 5000 + b"}", 400),
        (b'["' + b'","' * 1000 + b'"]', 422),
        (b'["' + b'","' * 100_000 + b'"]', 400),
        (json.dumps({"a": ["x" * SHORT] * 400}).encode(), 400),
        (json.dumps({"a": ["x" * 100] * 5}).encode(), 400),
        (json.dumps({f"n{i}": 1 for i in range(7)}).encode(), 400),
        (json.dumps({"x" * 100_000: 1}).encode(), 422),
        (b'"' + b"x" * 100 + b'"', 422),
    ],
    ids=range(13),
)
def test_documents_that_are_refused(tmp_path, content, status):
    budget = Budget(1_000_000)
    reader = DocumentReader(shape(tmp_path, budget))
    error = refused(reader, content)
    assert error.status == status and len(error.message) < 200
    reader.close()
    assert budget.taken == 0


def test_a_long_document_is_not_in_memory(tmp_path):
    """30 MB, of every kind of string."""
    reader = DocumentReader(shape(tmp_path, Budget(10**8)))
    tracemalloc.start()
    reader.feed(b'{"image": "')
    for unit in (b"A" * 60_000, b'\\"' * 30_000, b"\\\\" * 30_000, b"\\u00e9" * 10_000):
        for _ in range(125):
            reader.feed(unit)
    reader.feed(b'"}')
    ((name, value),) = reader.end()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (name, sum(map(len, value.spool.pieces()))) == ("image", 30_000_000)
    assert peak < 2_000_000
    reader.close()


# -- data URLs --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 5, 1000])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 300])
def test_data_urls_in_pieces(size, length):
    content = random.Random(length).randbytes(length)
    text = b"data:image/png;base64," + base64.b64encode(content)
    for escaped in (text, text.replace(b"/", b"\\/").replace(b"+", b"\\u002b")):
        assert b"".join(decoded(unescaped(pieces(escaped, size)), "image")) == content


@pytest.mark.parametrize(
    "url",
    [
        b"",
        b"dat",
        b"data:",
        b"data:image/png;base64",
        b"data:image/png,AAAA",
        b"data:" + b"x" * 5000 + b";base64,AAAA",
        b"http://127.0.0.1/a.png",
        b"data:;base64,A",
        b"data:;base64,AA",
        b"data:;base64,AA==AAAA",
        b"data:;base64,AA==A",
        b"data:;base64,AA=A",
        b"data:;base64,A===",
        b"data:;base64,AAA\n",
        b"data:;base64,AA-_",
        b"data:;base64,AA\\u003d=",
        b"data:;base64,AA\\\\/",
    ],
    ids=range(17),
)
@pytest.mark.parametrize("size", [1, 4, 10_000])
def test_data_urls_that_are_none(url, size):
    with pytest.raises(ApiError) as raised:
        list(decoded(pieces(url, size), "image"))
    assert (raised.value.status, raised.value.param) == (422, "image")


# -- the budget -------------------------------------------------------------------------------


def test_one_budget_for_all(tmp_path):
    budget = Budget(100)
    one, other = Spool(tmp_path, budget), Spool(tmp_path, budget)
    one.write(b"x" * 60)
    other.write(b"x" * 40)
    with pytest.raises(ApiError) as raised:
        other.write(b"x")
    assert (raised.value.status, raised.value.code) == (429, "uploads_full")
    assert int(raised.value.headers["Retry-After"]) >= 1
    one.close()
    one.close()
    assert budget.taken == 40
    other.write(b"x")
    assert b"".join(other.pieces()) == b"x" * 41
    with pytest.raises(ValueError, match="gone"):
        one.write(b"x")
    other.close()
    Spool(tmp_path, budget).write(b"x")  # and forgotten
    assert budget.taken == 0
    assert not os.listdir(tmp_path)


def test_a_place_that_cannot_be_opened_takes_nothing(tmp_path):
    budget = Budget(100)
    with pytest.raises(FileNotFoundError):
        Spool(tmp_path / "none", budget)
    assert budget.taken == 0
