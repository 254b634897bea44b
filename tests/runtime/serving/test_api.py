"""The server's parts in one process, with an engine and real HTTP; all but Ray."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import errno
import html
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
from connections import half_sent
from mutants import mutated
from PIL import Image
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from sounds import write_sine
from video_client import BEARER, LONG, SMALL, TOKEN_SHA256, kept, left_in, until

from magihuman.runtime import PrometheusHooks
from magihuman.runtime.cli.serve import ServeOptions, _settings
from magihuman.runtime.serving.jobs import WRITERS
from magihuman.runtime.serving.messages import EngineLost, Figures, Made, Report
from magihuman.runtime.serving.metrics import EngineFigures
from magihuman.runtime.serving.records.database import RecordsError
from magihuman.runtime.serving.records.records import Records
from magihuman.runtime.serving.replica import EngineReplica
from magihuman.runtime.serving.settings import Limits, Settings
from magihuman.runtime.serving.store import AUDIO, IMAGE, Job, Store
from magihuman.runtime.serving.uploads import DECODERS

LIMITS = Limits(
    body_bytes=200_000,
    prompt_chars=100,
    queued=3,
    image_pixels=10_000,
    audio_s=2,
    seconds=10,
    pixels=512 * 512,
)


# Steps long enough not to end while a test lasts, and short enough to be told to end between two.
ENDLESS = {**LONG, "seconds": "2", "size": "256x256"}


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(tmp_path / "videos", "tiny", token_sha256=TOKEN_SHA256, limits=LIMITS)


def error_of(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def as_json(local, **values) -> httpx.Response:
    return local.http.post("/v1/videos", json={"prompt": "hi", **values})


def data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# -- a video from beginning to end ------------------------------------------------------------


@pytest.mark.usefixtures("same_bytes")
def test_a_video_is_what_the_engine_makes(local, settings, replica, face, voice, tmp_path):
    asked = {"prompt": "A woman says: hello!", "seconds": "0.36", "size": "64x96", "seed": "7"}
    asked |= {"num_inference_steps": "2", "model": "tiny"}
    with face.open("rb") as image, voice.open("rb") as sound:
        answer = local.post(asked, input_reference=image, audio=sound)
    video = answer.json()
    assert answer.status_code == 200
    assert re.fullmatch("video_[0-9a-f]{32}", video["id"])
    assert (video["object"], video["model"], video["progress"]) == ("video", "tiny", 0)
    assert video["status"] in ("queued", "in_progress") and video["error"] is None
    assert (video["seconds"], video["size"], video["seed"]) == ("0.36", "64x96", 7)
    done = local.when(video["id"], "completed")
    assert done["progress"] == 100 and done["stage"] is None
    assert done["created_at"] <= done["started_at"] <= done["completed_at"] < done["expires_at"]
    assert {"text", "denoise", "decode_video", "write"} <= set(done["timings_s"])
    content = local.content(video["id"])
    assert content.headers["content-type"] == "video/mp4"
    assert not any(path.stat().st_mode & 0o077 for path in settings.folder.rglob("*"))
    options = {"seconds": 0.36, "width": 64, "height": 96, "seed": 7, "steps": 2}
    replica._engine.generate(
        "A woman says: hello!", image=face, audio=voice, save=tmp_path / "own.mp4", **options
    )
    assert content.content == (tmp_path / "own.mp4").read_bytes()


@pytest.mark.usefixtures("same_bytes")
def test_json_says_the_same_as_a_form(local, face, voice):
    with face.open("rb") as image, voice.open("rb") as sound:
        one = local.create(SMALL, input_reference=image, audio=sound)
    answer = as_json(
        local,
        seconds=0.2,
        size="32x32",
        num_inference_steps=1,
        input_reference=data_url("image/png", face.read_bytes()),
        audio=data_url("audio/wav", voice.read_bytes()),
    )
    other = answer.json()["id"]
    for name in (one, other):
        local.when(name, "completed")
    assert local.content(one).content == local.content(other).content


def test_progress_goes_up(settings, replica, serve_here):
    seen = []

    async def make(work):
        async with aclosing(replica.make(work)) as events:
            async for event in events:
                yield event
                known = len(seen)
                while len(seen) < known + 2:  # the first may have been asked for before
                    await asyncio.sleep(0.001)

    with serve_here(settings, replica, make) as local:
        name = local.create({**SMALL, "num_inference_steps": "10"})

        def is_done() -> bool:
            video = local.get(name)
            seen.append((video["progress"], video["stage"]))
            return video["status"] == "completed"

        until(is_done)
    progress = [percent for percent, _ in seen]
    assert progress == sorted(progress) and progress[-1] == 100
    assert {p for p, stage in seen if stage == "denoise"} == {8 * step for step in range(11)}


# -- what suits the model and fits the memory ---------------------------------------------------


@pytest.fixture
def small_model(tiny_dir, tmp_path) -> Path:
    """The tiny model, which says that it has learnt small clips."""
    folder = shutil.copytree(tiny_dir, tmp_path / "small")
    (folder / "request.json").write_text('{"seconds": 0.2, "width": 96, "height": 64}')
    return folder


def test_length_and_size_are_the_models_where_they_are_left_out(small_model, tmp_path, serve_here):
    """In a form, in JSON, in what is made, in the description and in the page's form."""
    options = ServeOptions(model=str(small_model), folder=tmp_path / "videos")
    replica = EngineReplica({"model": small_model, "device": "cpu"}, [])
    with serve_here(_settings(options, TOKEN_SHA256, 2**33, rows=512), replica) as local:
        asked = {"prompt": "hi", "num_inference_steps": "1"}
        answers = [local.post(asked).json(), as_json(local, num_inference_steps=1).json()]
        assert [(a["seconds"], a["size"]) for a in answers] == [("0.2", "96x64")] * 2
        done = local.when(answers[0]["id"], "completed")
        with av.open(io.BytesIO(local.content(done["id"]).content)) as file:
            picture = file.streams.video[0]
            assert (picture.width, picture.height, picture.frames) == (96, 64, 5)
        assert done["warnings"] == []
        beyond = local.when(local.create({**SMALL, "size": "128x64"}), "completed")["warnings"]
        assert len(beyond) == 1 and "128x64 pixels are beyond" in beyond[0]
        operation = local.http.get("/openapi.json").json()["paths"]["/v1/videos"]["post"]
        for body in operation["requestBody"]["content"].values():
            fields = body["schema"]["properties"]
            assert (fields["seconds"]["default"], fields["size"]["default"]) == (0.2, "96x64")
            assert body["schema"]["required"] == ["prompt"]
        page = local.http.get("/").text
        assert 'value="0.2"' in page and 'value="96x64"' in page and "{{" not in page
    replica.close()


def test_a_server_of_another_model_has_the_standard_size(local):
    """480x256 and 5 s, of which no warning says that they were made otherwise."""
    page = local.http.get("/").text
    assert 'type="number" value="5"' in page and 'value="480x256"' in page
    video = local.http.get(f"/v1/videos/{local.create({'prompt': 'hi'})}").json()
    assert (video["seconds"], video["size"]) == ("5", "480x256")
    local.delete(video["id"])


@pytest.mark.parametrize(
    ("size", "seconds", "is_taken"),
    [
        ("4096x4096", "60", False),
        ("4096x4096", "0.2", False),  # one frame is too large to decode
        ("1024x1024", "60", False),  # frames are not, and the clip is too long
        ("64x64", "0.2", True),
    ],
)
def test_what_no_engine_has_memory_for_is_refused(
    tiny_dir, tmp_path, replica, serve_here, size, seconds, is_taken
):
    """With the limits that a server has when it is told none."""
    options = ServeOptions(model=str(tiny_dir), folder=tmp_path / "videos")
    settings = _settings(options, TOKEN_SHA256, memory_bytes=24 * 2**30, rows=27648)
    with serve_here(settings, replica) as local:
        asked = {"prompt": "hi", "size": size, "seconds": seconds, "num_inference_steps": "1"}
        answer = local.post(asked)
        if is_taken:
            assert answer.status_code == 200
            return
        error = error_of(answer, 422)
        assert error["param"] == "size"
        assert "24.0 GiB each" in error["message"] and f"{size} take about" in error["message"]
        assert list((tmp_path / "videos").glob("video_*")) == []


def test_warnings_reach_the_client(local):
    done = local.when(local.create({**SMALL, "size": "40x32"}), "completed")
    assert any("steps of 32 pixels" in note for note in done["warnings"])


def test_parts_of_the_content(local):
    name = local.create()
    local.when(name, "completed")
    whole = local.content(name)
    part = local.content(name, Range="bytes=100-199")
    assert (part.status_code, part.content) == (206, whole.content[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole.content)}"
    assert local.content(name, Range="bytes=-10").content == whole.content[-10:]
    assert local.content(name, Range=f"bytes={len(whole.content)}-").status_code == 416
    with av.open(io.BytesIO(whole.content)) as file:
        assert file.streams.video[0].frames == 5 and len(file.streams.audio) == 1


def test_videos_are_made_in_the_order_they_were_asked_for(local):
    running = local.create(LONG)
    local.when(running, "in_progress")
    names = [local.create({**SMALL, "seed": str(seed)}) for seed in range(3)]
    local.delete(running)
    ends = [local.when(name, "completed")["completed_at"] for name in names]
    assert ends == sorted(ends)


# -- removing ---------------------------------------------------------------------------------


def test_removing_cancels_what_runs_and_what_waits(local, settings, replica):
    done = samples(local).get(("magihuman_requests_total", "done"), 0)
    names = [local.create(LONG) for _ in range(4)]
    local.when(names[0], "in_progress")
    assert local.get(names[3])["status"] == "queued"
    for name in reversed(names):
        local.delete(name)
        error_of(local.http.get(f"/v1/videos/{name}"), 404)
        error_of(local.http.delete(f"/v1/videos/{name}"), 404)
    until(lambda: replica._engine.queue_length == 0)
    assert left_in(settings.folder) == []
    local.when(local.create(), "completed")
    # None of the others was made to its end.
    assert samples(local)["magihuman_requests_total", "done"] == done + 1


def test_removing_a_finished_one(local, settings):
    name = local.create()
    local.when(name, "completed")
    local.delete(name)
    assert error_of(local.content(name), 404)["code"] == "video_not_found"
    assert left_in(settings.folder) == []


def test_finished_ones_expire(settings, replica, serve_here, monkeypatch):
    monkeypatch.setattr("magihuman.runtime.serving.jobs.SWEEP_S", 0.05)
    brief = Settings(settings.folder, "tiny", keep_s=0.5, token_sha256=TOKEN_SHA256)
    with serve_here(brief, replica) as local:
        name = local.create()
        until(lambda: local.http.get(f"/v1/videos/{name}").status_code == 404)
        assert left_in(settings.folder) == [] and kept(settings.folder) == {}


def test_expiry_goes_on_where_one_cannot_be_removed(settings, replica, serve_here, monkeypatch):
    monkeypatch.setattr("magihuman.runtime.serving.jobs.SWEEP_S", 0.05)
    expire, failures = Store.expire, [OSError("not now")]

    def fail_once(store) -> None:
        if failures:
            raise failures.pop()
        expire(store)

    monkeypatch.setattr(Store, "expire", fail_once)
    brief = Settings(settings.folder, "tiny", keep_s=0.1, token_sha256=TOKEN_SHA256)
    with serve_here(brief, replica) as local:
        name = local.create()
        until(lambda: local.http.get(f"/v1/videos/{name}").status_code == 404)


def test_a_file_that_was_removed_by_hand(local, settings):
    name = local.create()
    local.when(name, "completed")
    (settings.folder / name / "video.mp4").unlink()
    assert error_of(local.content(name), 404)["code"] == "video_not_found"


# -- refusals ---------------------------------------------------------------------------------


def test_there_is_nothing_to_play_before_the_end(local):
    name = local.create(LONG)
    error = error_of(local.content(name), 409)
    assert (error["code"], error["param"]) == ("not_completed", "video_id")
    local.delete(name)


def test_a_full_line(local):
    names = [local.create(LONG) for _ in range(2)]  # both are with the engine
    for name in names:
        local.when(name, "in_progress")
    names += [local.create(LONG) for _ in range(3)]
    answer = local.post()
    assert error_of(answer, 429)["type"] == "rate_limit_error"
    assert int(answer.headers["retry-after"]) >= 1
    for name in names:
        local.delete(name)
    local.when(local.create(), "completed")


TOKENLESS = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer wrong"},
    {"Authorization": BEARER["Authorization"] + "x"},
    {"Authorization": BEARER["Authorization"][:-1]},
    {"Authorization": BEARER["Authorization"].replace("Bearer", "Basic")},
    {"Authorization": b"Bearer \xff\xfe"},
]


@pytest.mark.parametrize("headers", TOKENLESS, ids=range(len(TOKENLESS)))
def test_wrong_tokens(local, headers):
    name = "video_" + "0" * 32
    with httpx.Client(base_url=local.url, headers=headers) as stranger:
        for method, path in (
            ("POST", "/v1/videos"),
            ("GET", f"/v1/videos/{name}"),
            ("GET", f"/v1/videos/{name}/content"),
            ("DELETE", f"/v1/videos/{name}"),
            ("GET", "/metrics"),
        ):
            answer = stranger.request(method, path)
            assert error_of(answer, 401)["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/", "/health", "/ready", "/openapi.json"):
            assert stranger.get(path).status_code == 200


def test_without_a_token_everybody_is_let_in(settings, replica, serve_here):
    with (
        serve_here(Settings(settings.folder, "tiny"), replica) as local,
        httpx.Client(base_url=local.url) as stranger,
    ):
        assert stranger.get("/v1/videos/none").status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": "x" * 101}, "prompt"),
        ({"prompt": "hi", "negative_prompt": "x" * 101}, "negative_prompt"),
        ({"prompt": "hi", "seconds": "0.1"}, "seconds"),
        ({"prompt": "hi", "seconds": "61"}, "seconds"),
        ({"prompt": "hi", "seconds": "10.1"}, "seconds"),
        ({"prompt": "hi", "size": "512x513"}, "size"),
        ({"prompt": "hi", "seconds": "nan"}, "seconds"),
        ({"prompt": "hi", "seconds": "five"}, "seconds"),
        ({"prompt": "hi", "size": "31x32"}, "size"),
        ({"prompt": "hi", "size": "32x4097"}, "size"),
        ({"prompt": "hi", "size": "480"}, "size"),
        ({"prompt": "hi", "seed": "-1"}, "seed"),
        ({"prompt": "hi", "seed": str(2**63)}, "seed"),
        ({"prompt": "hi", "num_inference_steps": "0"}, "num_inference_steps"),
        ({"prompt": "hi", "n": "2"}, "n"),
        ({"prompt": "hi", "audio": "http://127.0.0.1/voice.wav"}, "audio"),
        ({"prompt": "hi", "input_reference": "file:///etc/passwd"}, "input_reference"),
        ({"prompt": "hi", "input_reference": "data:image/png;base64,%%"}, "input_reference"),
        ({"prompt": "hi", "input_reference": "data:image/png;base64,"}, "input_reference"),
    ],
)
def test_values_that_cannot_be_served(local, settings, fields, param):
    parts = {name: (None, value) for name, value in fields.items()} or {"x": (None, "y")}
    assert error_of(local.http.post("/v1/videos", files=parts), 422)["param"] == param
    assert error_of(local.http.post("/v1/videos", json=fields), 422)["param"] == param
    assert left_in(settings.folder) == []


def test_what_the_engine_would_refuse_is_refused_before_it_waits(local):
    error = error_of(as_json(local, guidance_scale=3), 422)
    assert "must stay unset for the distill variant" in error["message"]


def test_numbers_in_json_may_be_text(local):
    """As OpenAI's clients send seconds, and others all of them."""
    assert error_of(as_json(local, seed=True), 422)["param"] == "seed"
    assert error_of(as_json(local, seed="7x"), 422)["param"] == "seed"
    answer = as_json(local, seconds="0.2", size="32x32", num_inference_steps="1", seed="7")
    video = answer.json()
    assert (video["seconds"], video["seed"]) == ("0.2", 7)
    local.when(video["id"], "completed")


def test_a_field_given_twice(local):
    parts = [("prompt", (None, "a")), ("prompt", (None, "b"))]
    assert error_of(local.http.post("/v1/videos", files=parts), 422)["param"] == "prompt"


def test_a_file_where_a_field_belongs(local, face):
    parts = {"prompt": ("face.png", face.read_bytes())}
    assert error_of(local.http.post("/v1/videos", files=parts), 422)["param"] == "prompt"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
    ids=range(5),
)
def test_bodies_that_are_no_json(local, body):
    headers = {"Content-Type": "application/json"}
    answer = local.http.post("/v1/videos", content=body, headers=headers)
    assert error_of(answer, 400)["code"] == "malformed_body"


@pytest.mark.parametrize("body", ["[]", "1", "null", '"prompt"'])
def test_json_that_is_no_object(local, body):
    headers = {"Content-Type": "application/json; charset=utf-8"}
    error_of(local.http.post("/v1/videos", content=body, headers=headers), 422)


def test_halves_of_surrogate_pairs(local):
    headers = {"Content-Type": "application/json"}
    for body in (r'{"prompt": "\ud800"}', r'{"prompt": "hi", "\ud800": 1}'):
        error_of(local.http.post("/v1/videos", content=body, headers=headers), 422)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"prompt=hi"),
        ("multipart/form-data; boundary=x", b"prompt=hi"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\nhi"),
    ],
    ids=range(3),
)  # fmt: skip
def test_bodies_that_are_no_form(local, kind, body):
    answer = local.http.post("/v1/videos", content=body, headers={"Content-Type": kind})
    assert answer.status_code in (400, 422), answer.text


def test_too_many_files_and_fields(local, face):
    parts = [("input_reference", ("a.png", b"x"))] * 3
    error_of(local.http.post("/v1/videos", files=parts), 400)
    error_of(local.http.post("/v1/videos", files=[(f"f{i}", (None, "")) for i in range(40)]), 400)


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form"])
def test_other_kinds_of_bodies(local, kind):
    answer = local.http.post("/v1/videos", content=b"prompt=hi", headers={"Content-Type": kind})
    assert error_of(answer, 415)["code"] == "unsupported_media_type"


def test_bodies_beyond_the_limit(local, settings):
    content = b"x" * (LIMITS.body_bytes + 1)
    error_of(local.http.post("/v1/videos", content=content), 413)
    assert error_of(local.post(SMALL, input_reference=content), 413)["code"] == "body_too_large"

    def without_a_length():
        yield b'{"prompt": "'
        for _ in range(20):
            yield b"x" * 20_000

    headers = {"Content-Type": "application/json"}
    error_of(local.http.post("/v1/videos", content=without_a_length(), headers=headers), 413)
    assert left_in(settings.folder) == []


def test_pages_of_others_cannot_post(local):
    for headers in (
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://example.org"},
        {"Origin": "null"},
    ):
        answer = local.http.post("/v1/videos", json={"prompt": "hi"}, headers=headers)
        assert error_of(answer, 403)["code"] == "forbidden_origin"
    for headers in ({"Sec-Fetch-Site": "same-origin"}, {"Origin": local.url}):
        answer = local.http.post("/v1/videos", json={}, headers=headers)
        assert error_of(answer, 422)["param"] == "prompt"


FOREIGN_HOSTS = (
    "example.org",
    "example.org:8000",
    "localhost.example.org",
    "localhost:8000.example.org",
    "localhost:",
    "localhost:http",
    "localhost.",
    "1.2.3.4.x",
    "1.2.3.4@example.org",
    "127.1",
    "127.0.0.1:8000:1",
    "[::1].example.org",
    "[::1].example.org:8000",
    "[::1]example.org",
    "[::1",
    "[::1]:x",
    "[::1%.example.org]",
    "[::1%25eth0]",
    "[127.0.0.1]",
    "[localhost]",
    "::1",
    "[]",
    "",
)


def test_a_server_for_one_machine_has_no_other_name(settings, replica, serve_here):
    here = dataclasses.replace(settings, token_sha256=None, is_local=True)
    with serve_here(here, replica) as local:
        for host in FOREIGN_HOSTS:
            answer = local.http.get("/v1/videos/none", headers={"Host": host})
            assert error_of(answer, 403)["code"] == "forbidden_host", host
        for host in ("localhost", "LocalHost:8000", "127.0.0.1:8000", "[::1]:8000", "192.168.0.7"):
            assert error_of(local.http.get("/v1/videos/none", headers={"Host": host}), 404)


@pytest.mark.parametrize("path", ["/v1/videos/", "/health/", "/v1/videos/none/"])
def test_nobody_is_sent_elsewhere(local, path):
    answer = local.http.get(path, headers={"Host": "example.org"})
    assert error_of(answer, 404) and "location" not in answer.headers


def test_paths_and_methods_that_are_not_there(local):
    assert error_of(local.http.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(local.http.put("/v1/videos"), 405)["code"] == "method_not_allowed"
    answer = local.http.put("/v1/videos/none")
    assert error_of(answer, 405) and answer.headers["allow"] == "DELETE, GET"
    for name in ("video_", "..", "..%2F..%2Fetc%2Fpasswd", "%00", "video_" + "0" * 32):
        error_of(local.http.get(f"/v1/videos/{name}"), 404)


# -- uploads ----------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A PNG that says to be so large, with no pixels in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A small PNG with 100 MB of compressed text."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    content = b"k\0\0" + zlib.compress(b"x" * 100_000_000, 9)
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content
    chunk += struct.pack(">I", zlib.crc32(b"zTXt" + content))
    whole = buffer.getvalue()
    return whole[:33] + chunk + whole[33:]  # after the header


def saved(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no image", "must be in one of the formats PNG, JPEG, WEBP, got the upload"),
        (b"", "must not be empty"),
        (png(200, 100), "1 to 10000 pixels, got 200x100"),
        (png(30_000, 30_000), "exceeds limit"),
        (png(50, 50), "cannot be decoded"),
        (saved("PNG")[:60], "cannot be"),
        (saved("GIF"), "must be in one of the formats"),
        (saved("EPS"), "must be in one of the formats"),  # would start another program
    ],
    ids=range(8),
)
def test_images_that_are_none(local, settings, content, says):
    error = error_of(local.post(SMALL, input_reference=content), 422)
    assert error["param"] == "input_reference" and says in error["message"]
    assert str(settings.folder) not in error["message"]
    assert left_in(settings.folder) == []


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_that_are_some(local, kind):
    local.when(local.create(SMALL, input_reference=saved(kind)), "completed")


def test_text_beside_an_image_is_not_read(local):
    local.when(local.create(SMALL, input_reference=text_bomb()), "completed")


def test_sounds_that_are_none(local, settings, tmp_path):
    target = write_sine(tmp_path / "target.wav", seconds=0.4)
    playlists = [
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{target}'\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
    ]
    brief = write_sine(tmp_path / "brief.wav", seconds=0.1).read_bytes()
    long = write_sine(tmp_path / "long.mp3", seconds=4).read_bytes()
    for content, says in [
        (b"no sound" * 100, "must be in a format"),
        (b"", "must not be empty"),
        (brief, "at least 0.2 s"),
        (long, "no longer than 2 s"),
        *((text.encode(), "must be in a format") for text in playlists),
    ]:
        error = error_of(local.post(SMALL, audio=content), 422)
        assert error["param"] == "audio" and says in error["message"], error
        assert str(settings.folder) not in error["message"]
        assert str(target) not in error["message"]
    assert left_in(settings.folder) == []


@pytest.mark.parametrize("kind", ["wav", "mp3", "flac"])
def test_sounds_that_are_some(local, kind, tmp_path):
    content = write_sine(tmp_path / f"voice.{kind}", seconds=0.5).read_bytes()
    local.when(local.create(SMALL, audio=content), "completed")


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_decoder_that_crashes_costs_one_answer(local, settings, voice, number):
    kept = local.create(SMALL, audio=voice.read_bytes())
    (process,) = DECODERS.processes()
    os.kill(process, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(local.post, SMALL, audio=voice.read_bytes())
        until(lambda: not DECODERS.processes())
        time.sleep(0.1)  # it has the task, and does not go on with it
        os.kill(process, number)
        os.kill(process, signal.SIGCONT)
        error = error_of(asked.result(300), 422)
    assert error["param"] == "audio" and number.name in error["message"]
    local.when(kept, "completed")
    local.when(local.create(SMALL, audio=voice.read_bytes()), "completed")
    assert len(left_in(settings.folder)) == 2  # and nothing of the other


def test_engines_are_given_no_file_of_a_stranger(local, settings, face, voice, monkeypatch):
    monkeypatch.setattr(local.jobs[0], "_launch", lambda job: None)  # it waits
    name = local.create(SMALL, input_reference=face.read_bytes(), audio=voice.read_bytes())
    folder = settings.folder / name
    assert sorted(path.name for path in folder.iterdir()) == [AUDIO, IMAGE]
    with Image.open(folder / IMAGE) as image:
        assert (image.format, image.mode) == ("BMP", "RGB")
    with av.open(str(folder / AUDIO)) as sound:
        stream = sound.streams.audio[0]
        assert (stream.codec_context.name, stream.rate, stream.channels) == ("pcm_f32le", 51200, 1)


def test_hostile_uploads_change_nothing(local, settings, voice, request):
    """500 of them with `--fuzz-count 20000`."""
    seeds = {"input_reference": [saved("PNG"), saved("JPEG"), saved("WEBP")]}
    seeds["audio"] = [voice.read_bytes()]
    random = np.random.default_rng(0)
    for index in range(request.config.getoption("--fuzz-count") // 40):
        field = ("input_reference", "audio")[index % 2]
        seed = seeds[field][index % len(seeds[field])]
        answer = local.post(SMALL, **{field: mutated(seed, random)})
        assert answer.status_code in (200, 422), answer.text
        if answer.status_code == 200:
            local.http.delete(f"/v1/videos/{answer.json()['id']}")
        else:
            error = error_of(answer, 422)
            assert error["param"] == field and str(settings.folder) not in error["message"]
    local.when(local.create(SMALL, audio=voice.read_bytes()), "completed")


HALF = (b'{"prompt": "', 1000, "application/json")


def test_a_client_that_goes_away_leaves_nothing(local, settings):
    with half_sent(local, *HALF):
        until(lambda: local.jobs[0]._arriving == 1)
    local.when(local.create(), "completed")
    assert len(left_in(settings.folder)) == 1
    until(lambda: local.jobs[0]._arriving == 0)
    key = ("magihuman_http_requests_total", "/v1/videos", "400", "POST")
    until(lambda: key in samples(local))  # and not as a fault of the server


def test_bodies_that_are_being_sent_have_a_place_in_line(local):
    with ExitStack() as clients:
        for _ in range(LIMITS.queued):
            clients.enter_context(half_sent(local, *HALF))
        until(lambda: local.jobs[0]._arriving == LIMITS.queued)
        assert error_of(local.post(), 429)["code"] == "queue_full"
    until(lambda: local.jobs[0]._arriving == 0)
    local.when(local.create(), "completed")


def test_a_body_that_takes_too_long(local, monkeypatch):
    monkeypatch.setattr("magihuman.runtime.serving.routes.BODY_S", 0.2)
    with half_sent(local, *HALF) as connection:
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408 ")
    until(lambda: local.jobs[0]._arriving == 0)


def test_few_uploads_are_decoded_at_once(local):
    decoding, most, full = [], [], threading.Barrier(WRITERS, timeout=300)

    def fill(folder) -> None:
        decoding.append(folder)
        most.append(len(decoding))
        full.wait()  # so many are
        time.sleep(0.05)  # one more would have begun meanwhile
        decoding.remove(folder)

    async def add() -> list[str]:
        options = {"seconds": 0.2, "width": 32, "height": 32, "seed": 1, "steps": 1}
        jobs = [Job("hi", options) for _ in range(3 * WRITERS)]
        await asyncio.gather(*(local.jobs[0].add(job, fill) for job in jobs))
        return [job.id for job in jobs]

    for name in local.run(add()):
        local.delete(name)
    assert max(most) == WRITERS


# -- failures, restarts -----------------------------------------------------------------------


def test_a_deadline(settings, replica, serve_here):
    hurried = Settings(settings.folder, "tiny", timeout_s=0.5, token_sha256=TOKEN_SHA256)
    with serve_here(hurried, replica) as local:
        failed = local.when(local.create(LONG), "failed")
        assert failed["error"]["code"] == "deadline_exceeded"
        assert error_of(local.content(failed["id"]), 409)["code"] == "not_completed"


def test_an_unexpected_error_is_told_without_its_details(local, replica, monkeypatch):
    def fail(latents):
        raise ValueError("a secret")

    monkeypatch.setattr(replica._engine._parts.audio_vae, "decode", fail)
    failed = local.when(local.create(), "failed")
    assert failed["error"]["code"] == "internal_error"
    assert "secret" not in failed["error"]["message"] and "log" in failed["error"]["message"]
    monkeypatch.undo()
    local.when(local.create(), "completed")


def lost_times(replica, times: int):
    """The engine's own `make`, which is lost in the midst of its first so many videos."""
    left = [times]

    async def make(work):
        if left[0] > 0:
            left[0] -= 1
            yield Report("denoise", 1, 2)
            raise EngineLost("as if killed")
        async for event in replica.make(work):
            yield event

    return make


class Kept:
    """The engine's own `make`, which keeps what it has made until it is let go."""

    def __init__(self, replica) -> None:
        self.replica = replica
        self.made, self.let_go = threading.Event(), threading.Event()

    async def make(self, work):
        async with aclosing(self.replica.make(work)) as events:
            async for event in events:
                if isinstance(event, Made):
                    self.made.set()
                    while not self.let_go.is_set():
                        await asyncio.sleep(0.001)
                yield event


def test_a_lost_engine(settings, replica, serve_here, monkeypatch):
    monkeypatch.setattr("magihuman.runtime.serving.jobs.PAUSE_S", 0.1)
    with serve_here(settings, replica, lost_times(replica, 1)) as local:
        name = local.create()
        local.when(name, "completed")
        assert local.jobs[0].requeued == 1
    with serve_here(settings, replica, lost_times(replica, 2)) as local:
        failed = local.when(local.create(), "failed")
        assert failed["error"]["code"] == "engine_lost"
        assert "2 times in a row" in failed["error"]["message"]
        assert local.get(name)["status"] == "completed"  # of the server before


def test_states_that_the_disk_does_not_take_hold_nothing_up(
    settings, replica, serve_here, monkeypatch
):
    def full(records, *jobs):
        if any(job.attempts for job in jobs):
            raise RecordsError(errno.ENOSPC, "No space left on device")
        save(records, *jobs)

    save = Records.save
    monkeypatch.setattr("magihuman.runtime.serving.jobs.PAUSE_S", 0.1)
    monkeypatch.setattr(Records, "save", full)
    with serve_here(settings, replica, lost_times(replica, 1)) as local:
        name = local.create()
        local.when(name, "completed")
        assert local.content(name).status_code == 200


def test_an_end_that_the_disk_has_refused_outlives_a_restart(
    disk, replica, serve_here, monkeypatch
):
    """What a client has been told, failed or gone, is so after a restart."""
    monkeypatch.setattr("magihuman.runtime.serving.jobs.SWEEP_S", 0.05)
    settings = Settings(disk.place / "videos", "tiny", token_sha256=TOKEN_SHA256)

    async def make(work):
        yield Report("denoise", 1, 2)
        await asyncio.sleep(3600)

    with serve_here(settings, replica, make) as local:
        name, other = local.create(), local.create()
        for each in (name, other):
            local.when(each, "in_progress")
        disk.refuse(True)
        error = error_of(local.http.delete(f"/v1/videos/{other}"), 503)
        assert error["code"] == "disk" and local.get(other)["id"] == other
        disk.refuse(False)
        local.delete(other)
        disk.fill()

        async def fail() -> None:
            jobs = local.jobs[0]
            jobs._store.fail(jobs.get(name), "disk", "the disk is full")

        local.run(fail())
        assert local.get(name)["status"] == "failed"
        disk.free()
        until(lambda: kept(settings.folder)[name].status == "failed")
    with serve_here(settings, replica) as local:
        assert local.get(name)["error"] == {"code": "disk", "message": "the disk is full"}
        error_of(local.http.get(f"/v1/videos/{other}"), 404)


def test_a_restart_takes_up_what_waited(settings, replica, serve_here):
    with serve_here(settings, replica) as local:
        done = local.create()
        local.when(done, "completed")
        content = local.content(done).content
    with serve_here(settings, replica, Kept(replica).make) as local:
        names = [local.create({**SMALL, "num_inference_steps": steps}) for steps in ("99", *"111")]
        local.when(names[0], "in_progress")
    found = Store(settings.folder, settings.keep_s).jobs
    assert [found[name].attempts for name in names] == [0] * 4
    with serve_here(settings, replica) as local:
        assert local.content(done).content == content
        for name in names:
            local.when(name, "completed")


def test_draining(settings, replica, serve_here):
    kept = Kept(replica)
    with serve_here(settings, replica, kept.make) as local:
        running = local.create()
        assert kept.made.wait(300)
        beside = local.create(ENDLESS)
        local.when(beside, "in_progress")
        waiting = local.create()
        drain = threading.Thread(target=lambda: local.run(local.jobs[0].drain(5)))
        drain.start()
        until(lambda: local.jobs[0].is_draining)
        kept.let_go.set()  # only milliseconds are left for it to do
        until(lambda: local.http.get("/ready").status_code == 503)
        assert local.http.get("/ready").json() == {"status": "draining"}
        answer = local.post()
        assert error_of(answer, 503)["code"] == "draining" and "retry-after" in answer.headers
        drain.join()
        assert local.get(running)["status"] == "completed"
        assert local.get(beside)["status"] == local.get(waiting)["status"] == "queued"
        assert local.http.get("/health").status_code == 200


def test_a_video_asked_for_as_draining_begins_is_kept(settings, replica, serve_here):
    with serve_here(settings, replica) as local:
        jobs = local.jobs[0]

        def fill(folder) -> None:
            jobs.is_draining = True

        async def add():
            job = Job("hi", {"seconds": 0.2, "width": 32, "height": 32, "seed": 1, "steps": 1})
            await jobs.add(job, fill)
            return job

        name = local.run(add()).id
        assert local.get(name)["status"] == "queued"
    with serve_here(settings, replica) as local:
        local.when(name, "completed")


# -- metrics, the description -----------------------------------------------------------------


def samples(local) -> dict[tuple, float]:
    answer = local.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics(local):
    before = samples(local)
    name = local.create()
    local.when(name, "completed")
    error_of(local.http.get("/v1/videos/none"), 404)
    after = samples(local)

    def more(*key) -> float:
        return after[key] - before.get(key, 0)

    assert after["magihuman_videos", "completed"] == 1
    assert after["magihuman_videos", "queued"] == 0
    assert after["magihuman_videos_requeued_total",] == 0
    assert more("magihuman_requests_total", "done") == 1
    assert more("magihuman_stage_seconds_count", "denoise") == 1
    assert more("magihuman_http_requests_total", "/v1/videos", "200", "POST") == 1
    assert more("magihuman_http_requests_total", "/v1/videos/{video_id}", "404", "GET") == 1


def counted(engine: str, process: int, order: int, done: int) -> Figures:
    registry = CollectorRegistry()
    hooks = PrometheusHooks(registry)
    for number in range(done):
        with hooks.span("request", number):
            pass
    hooks._running.inc()
    return Figures(engine, process, order, list(registry.collect()))


def test_figures_of_engines_are_added_up():
    """Of one that has ended, what it has counted stays, and what it was doing does not."""
    figures, own = EngineFigures(), os.getpid()
    with subprocess.Popen(["sleep", "60"]) as other:
        for each in (counted("a", own, 2, done=3), counted("a", own, 1, done=1)):
            figures.note(each)  # the first is the later one
        figures.note(counted("b", other.pid, 0, done=4))
        assert summed(figures) == (7, 2)
        other.kill()
    for _ in range(2):
        assert summed(figures) == (7, 1)
    figures.note(counted("c", own, 0, done=1))
    assert summed(figures) == (8, 2)
    assert b"_created" not in figures.text() and b'le="+Inf"' in figures.text()


def summed(figures: EngineFigures) -> tuple[float, float]:
    """Requests that are done, and those in progress."""
    registry = CollectorRegistry()
    registry.register(figures)
    done = registry.get_sample_value("magihuman_requests_total", {"outcome": "done"})
    return done, registry.get_sample_value("magihuman_requests_in_progress")


def test_words_that_clients_choose_are_no_labels(local):
    """There would be no end to them."""
    for word in ("BREW", "WHEN"):
        local.metrics[0].count(word, "other", 405)
    key = ("magihuman_http_requests_total", "405", "other", "other")
    assert samples(local)[key] == 2


def test_the_description(local):
    described = local.http.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/health", "/ready", "/metrics", "/v1/videos", "/v1/videos/{video_id}",
        "/v1/videos/{video_id}/content", "/v1/videos/{video_id}/stream",
        "/v1/videos/{video_id}/events", "/v1/videos/sync", "/v1/models", "/v1/models/{model}",
        "/models",
    }  # fmt: skip
    body = described["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(body) == {"multipart/form-data", "application/json"}
    for kind in body.values():
        assert kind["schema"]["properties"]["prompt"]["maxLength"] == LIMITS.prompt_chars
    assert "HTTPValidationError" not in json.dumps(described)


@pytest.mark.parametrize(("path", "script"), [("/", "main.js"), ("/live", "live.js")])
def test_the_page_loads_files_of_its_own_alone(local, path, script):
    page = httpx.get(local.url + path)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page.text)
    loaded = re.findall(r"""(?:src|href)="(static/[^"]+)\"""", page.text)
    assert set(loaded) == {"static/page.css", f"static/{script}"}
    for name, kind in zip(sorted(loaded), ("text/javascript", "text/css"), strict=True):
        answer = httpx.get(f"{local.url}/{name}")
        assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
        assert answer.headers["x-content-type-options"] == "nosniff"
        for other in re.findall(r"""from "\./([^"]+)\"""", answer.text):
            assert httpx.get(f"{local.url}/static/{other}").status_code == 200
    for name in ("page.html", "live.html", "none.js", "..%2fapi.py", "%2e%2e/api.py", ""):
        assert httpx.get(f"{local.url}/static/{name}").status_code == 404


def test_the_page_has_the_models_prompts(settings, replica, serve_here):
    asked = ('A man says: "</select>{{size}}"', "Two & three")
    with serve_here(dataclasses.replace(settings, prompts=asked), replica) as local:
        options = re.findall("<option>(.*?)</option>", local.http.get("/").text)
    assert tuple(html.unescape(option) for option in options) == asked
    assert "<" not in "".join(options)


@pytest.mark.parametrize("variant", ["base", "distill"])
def test_the_page_asks_for_guidance_where_the_model_has_it(settings, replica, serve_here, variant):
    with serve_here(dataclasses.replace(settings, variant=variant), replica) as local:
        page = local.http.get("/").text
    for name in ("guidance_scale", "negative_prompt"):
        label = page[: page.index(f'id="{name}"')].rpartition("<label")[2].partition(">")[0]
        assert ("hidden" in label) == (variant == "distill")
