"""Bodies over real HTTP: what is refused, and what they cost the server."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from connections import half_sent
from PIL import Image
from video_client import SMALL, TOKEN_SHA256, left_in, until

from magihuman.runtime.serving.records.database import FILE
from magihuman.runtime.serving.settings import Limits, Settings

BODY_BYTES = 3_000_000
LIMITS = Limits(body_bytes=BODY_BYTES, bodies=2, prompt_chars=100, queued=8)
PARTS = {"prompt": "hi", "seconds": "0.2", "size": "32x32", "num_inference_steps": "1"}
LINE = b"\r\n--the-line"
FORM_TYPE = "multipart/form-data; boundary=the-line"


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(tmp_path / "videos", "tiny", token_sha256=TOKEN_SHA256, limits=LIMITS)


@pytest.fixture(scope="module")
def large_png() -> bytes:
    """Of some hundred kilobytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def form(*parts: tuple[str, bytes]) -> bytes:
    """Of the rest of Content-Disposition, and content."""
    head = LINE + b"\r\nContent-Disposition: form-data; "
    return b"".join(head + rest.encode() + b"\r\n\r\n" + content for rest, content in parts)[2:]


def posted(local, content: bytes, kind: str = FORM_TYPE) -> httpx.Response:
    return local.http.post("/v1/videos", content=content, headers={"Content-Type": kind})


def taken(folder: Path) -> int:
    """Bytes of files without a name that this process has in the folder, SQLite's journal apart."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # of this listing itself
            place = os.readlink(link)
            if str(folder) in place and FILE not in place and os.stat(link).st_nlink == 0:
                total += os.stat(link).st_size
    return total


# -- forms and JSON say the same ---------------------------------------------------------------


@pytest.mark.parametrize("end", [b"", LINE, LINE + b"-"], ids=range(3))
def test_a_form_without_its_last_boundary_is_refused(local, settings, large_png, end):
    """It may have been cut in the midst of the image."""
    fields = [(f'name="{name}"', value.encode()) for name, value in PARTS.items()]
    whole = form(*fields, ('name="input_reference"; filename="a.png"', large_png))
    for content in (whole + end, form(*fields) + end, form(*fields)[:-3] + end, end[2:]):
        answer = posted(local, content)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["code"] == "malformed_body"
    assert left_in(settings.folder) == []
    name = posted(local, whole + LINE + b"--").json()["id"]
    local.when(name, "completed")


def as_form(fields: list[tuple[str, str]]) -> tuple[bytes, str]:
    parts = [(f'name="{name}"', value.encode("utf-8", "surrogateescape")) for name, value in fields]
    return form(*parts) + LINE + b"--\r\n", FORM_TYPE


def as_json(fields: list[tuple[str, str]]) -> tuple[bytes, str]:
    parts = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields)
    text = "{" + ", ".join(parts) + "}"
    content = text.encode().replace(b"\\udcff", b"\xff")
    return content, "application/json"


IMAGE = "input_reference"
ALIKE = [
    ([("prompt", "a"), ("prompt", "b")], 422, "prompt"),
    ([("prompt", "a"), ("prompt", "a")], 422, "prompt"),
    ([("prompt", "a"), ("quality", "a"), ("quality", "b")], 422, "quality"),
    ([("prompt", "a"), ("audio", "data:;base64,"), ("audio", "data:;base64,")], 422, "audio"),
    ([("prompt", "a")] + 3 * [("audio", "data:;base64,")], 400, None),
    ([("prompt", "x" * 101)], 422, "prompt"),
    ([("prompt", "x" * 100_000)], 422, "prompt"),
    ([("prompt", "a"), ("negative_prompt", "é" * 100_000)], 422, "negative_prompt"),
    ([("prompt", "a"), ("size", "x" * 100_000)], 422, "size"),
    ([("prompt", "a"), ("model", "m" * 1000)], 404, "model"),
    ([("prompt", "a"), ("model", "m" * 100_000)], 422, "model"),
    ([("prompt", "a"), ("x" * 200, "a")], 422, "x" * 97 + "..."),
    ([("prompt", "a"), ("x" * 2000, "a")], 422, None),
    ([("prompt", "a"), ("x" * 100_000, "a")], 422, None),
    ([("prompt", "a"), ("x" * 2000, "a"), ("x" * 2000, "b")], 422, None),
    ([("prompt", "a")] + [(f"n{i}", "") for i in range(40)], 400, None),
    ([("prompt", "a"), (IMAGE, "x" * 100_000)], 422, IMAGE),
    ([("prompt", "a"), (IMAGE, "data:;base64," + "%" * 9000)], 422, IMAGE),
    ([("prompt", "a"), (IMAGE, "data:;base64," + "A" * 2000)], 422, IMAGE),
    ([("prompt", "a\udcff")], 400, None),
    ([], 422, "prompt"),
    ([("prompt", "x" * (BODY_BYTES + 1))], 413, None),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "param"), ALIKE, ids=range(len(ALIKE)))
def test_forms_and_json_are_refused_alike_and_briefly(local, settings, fields, status, param):
    # Without a field a form is none.
    kinds = [as_form(fields or [("seed", "1")]), as_json(fields)]
    answers = [posted(local, *kind) for kind in kinds]
    errors = [answer.json()["error"] for answer in answers]
    assert [answer.status_code for answer in answers] == [status] * 2, errors
    assert errors[0]["code"] == errors[1]["code"]
    assert [error["param"] for error in errors] == [param] * 2
    assert max(len(answer.content) for answer in answers) < 600
    assert left_in(settings.folder) == []


def test_an_unknown_content_type_is_not_told_at_length(local):
    answer = posted(local, b"", "text/" + "x" * 5000)
    assert answer.status_code == 415 and len(answer.content) < 600


@pytest.mark.parametrize("escaped", ["/", "\\/", "\\u002f"])
def test_a_large_file_in_json_is_the_same_as_in_a_form(
    local, settings, large_png, monkeypatch, escaped
):
    monkeypatch.setattr(local.jobs[0], "_launch", lambda job: None)  # it waits
    url = "data:image/png;base64," + base64.b64encode(large_png).decode()
    texts = {name: value for name, value in PARTS.items() if name in ("prompt", "size")}
    content = json.dumps({**texts, "input_reference": url}).replace("/", escaped).encode()
    fields = [(f'name="{name}"', value.encode()) for name, value in texts.items()]
    in_text = form(*fields, ('name="input_reference"', url.encode()))
    in_file = form(*fields, ('name="input_reference"; filename="a"', large_png))
    bodies = [(content, "application/json")]
    bodies += [(text + LINE + b"--", FORM_TYPE) for text in (in_text, in_file)]
    names = [posted(local, *body).json()["id"] for body in bodies]
    images = [(settings.folder / name / "image").read_bytes() for name in names]
    assert images[0] == images[1] == images[2]
    with Image.open(io.BytesIO(large_png)) as image:
        assert Image.open(io.BytesIO(images[0])).tobytes() == image.tobytes()


# -- what bodies cost -------------------------------------------------------------------------


def pieces_of(*parts: tuple[bytes, int]) -> Iterator[bytes]:
    for part, times in parts:
        for _ in range(times):
            yield part


@pytest.mark.parametrize("kind", ["application/json", FORM_TYPE])
def test_a_large_body_is_never_in_memory(settings, replica, serve_here, kind):
    """40 MB of one; the client of this test sends it piece by piece."""
    limits = Limits(body_bytes=50_000_000, bodies=2)
    roomy = Settings(settings.folder, "tiny", token_sha256=TOKEN_SHA256, limits=limits)
    piece = b"A" * 2**16
    if kind == FORM_TYPE:
        head = form(('name="prompt"', b"hi"), ('name="audio"; filename="a"', b""))
        end = LINE + b"--"
    else:
        head, end = b'{"prompt": "hi", "audio": "data:;base64,', b'"}'
    headers = {"Content-Type": kind}
    with serve_here(roomy, replica) as local:
        assert local.post(SMALL, audio=b"no sound").status_code == 422  # all is imported
        tracemalloc.start()
        try:
            content = pieces_of((head, 1), (piece, 610), (end, 1))
            answer = local.http.post("/v1/videos", content=content, headers=headers, timeout=120)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert answer.status_code == 422 and "audio" in answer.json()["error"]["message"]
        assert peak < 10_000_000
        until(lambda: taken(settings.folder) == 0)


HALF = form(('name="prompt"', b"hi"), ('name="audio"; filename="a"', b"x" * (BODY_BYTES - 1000)))


def test_all_clients_share_one_budget_of_bytes(local, settings, large_png):
    with ExitStack() as clients:
        for _ in range(LIMITS.bodies):
            clients.enter_context(half_sent(local, HALF, BODY_BYTES, FORM_TYPE))
        until(lambda: taken(settings.folder) == LIMITS.bodies * (BODY_BYTES - 1000))
        announced = posted(local, b"x" * 5000)
        refused = local.http.post(
            "/v1/videos",
            content=pieces_of((HALF, 1)),
            headers={"Content-Type": FORM_TYPE},
        )
        for answer in (announced, refused):
            assert answer.status_code == 429, answer.text
            assert answer.json()["error"]["code"] == "uploads_full"
            assert int(answer.headers["retry-after"]) >= 1
        local.delete(local.create())  # what is small has room
    until(lambda: taken(settings.folder) == 0)
    for _ in range(3):
        local.delete(local.create(SMALL, input_reference=large_png))
    assert left_in(settings.folder) == []


def test_what_fails_gives_its_bytes_back(local, settings, large_png, monkeypatch):
    """Whatever it is that fails, and however often."""

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rounds = 2 * LIMITS.bodies * BODY_BYTES // len(large_png) + 1
    with monkeypatch.context() as patched:
        patched.setattr("magihuman.runtime.serving.store.atomic_folder", full)
        for _ in range(rounds):
            answer = local.post(SMALL, input_reference=large_png)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "disk"
    for _ in range(rounds):
        assert local.post({"x": "y"}, input_reference=large_png).status_code == 422
    local.delete(local.create(SMALL, input_reference=large_png))
    until(lambda: taken(settings.folder) == 0)  # what an answer has been sent from is closed after


def test_a_disk_that_is_full_while_a_body_comes(local, settings, large_png, monkeypatch):
    settings.folder.rename(settings.folder.with_name("away"))
    answer = local.post(SMALL, input_reference=large_png)
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert answer.json()["error"]["code"] == "disk"
    settings.folder.with_name("away").rename(settings.folder)
    local.delete(local.create(SMALL, input_reference=large_png))
