"""What clients of other video servers send, to the server's parts in one process."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import httpx
import numpy as np
import pytest
from PIL import Image
from video_client import BEARER, LONG, SMALL, TOKEN_SHA256, left_in, until

from magihuman.runtime.media import write_mp4
from magihuman.runtime.serving.settings import Limits, Settings

LIMITS = Limits(body_bytes=2_000_000, prompt_chars=200, queued=30, seconds=10, pixels=512 * 512)
TINY = {"prompt": "hi", "width": 64, "height": 32, "num_frames": 5, "num_inference_steps": 1}


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(
        tmp_path / "videos", "tiny", token_sha256=TOKEN_SHA256, limits=LIMITS, aliases=("small",)
    )


@pytest.fixture
def waiting(local, monkeypatch):
    """A server on which nothing is made."""
    monkeypatch.setattr(local.jobs[0], "_launch", lambda job: None)
    return local


@pytest.fixture(scope="module")
def shared(tmp_path_factory, replica, serve_here):
    """One server for many tests, on which nothing is made, either."""
    folder = tmp_path_factory.mktemp("shared") / "videos"
    limits = dataclasses.replace(LIMITS, queued=1000)
    with serve_here(
        Settings(folder, "tiny", token_sha256=TOKEN_SHA256, limits=limits), replica
    ) as s:
        s.jobs[0]._launch = lambda job: None
        yield s


def refused(answer: httpx.Response, status: int, param: str | None) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    return error["message"]


def as_json(local, **values) -> httpx.Response:
    return local.http.post("/v1/videos", json={"prompt": "hi", **values})


def taken(local, **values) -> dict:
    answer = as_json(local, **values)
    assert answer.status_code == 200, answer.text
    return answer.json()


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def both_ways(local, fields: dict) -> list[httpx.Response]:
    """In JSON, in a form with files, and in one without."""
    texts = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in fields.items()
    }
    parts = {name: (None, value) for name, value in texts.items()}
    return [
        local.http.post("/v1/videos", json=fields),
        local.http.post("/v1/videos", files=parts),
        local.http.post("/v1/videos", data=texts),
    ]


# -- sizes, lengths, and what has no use here -----------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "seconds", "size", "says"),
    [
        ({"width": 64, "height": 32, "num_frames": 25}, "1", "64x32", []),
        ({"num_frames": 33, "fps": 16, "size": "64x32"}, "1.32", "64x32", ["fps 16 was"]),
        ({"fps": 25, "seconds": 4, "size": "64X32"}, "4", "64x32", []),
        ({"fps": 24, "seconds": "4", "size": "64*32"}, "4", "64x32", ["fps 24 was"]),
        ({"seconds": 2, "num_frames": 25}, "1", "480x256", ["seconds 2 was"]),
        ({"size": "32x32", "width": 64, "height": 64}, "5", "64x64", ["size 32x32 was"]),
        ({"extra_params": {"num_frames": 25, "size": "64x32"}}, "1", "64x32", []),
        ({"extra_body": {"seconds": "1", "flow_shift": 5}}, "1", "480x256", ["flow_shift"]),
    ],
)
def test_sizes_and_lengths_in_all_words(shared, fields, seconds, size, says):
    for answer in both_ways(shared, {"prompt": "hi", **fields}):
        assert answer.status_code == 200, answer.text
        video = answer.json()
        assert (video["seconds"], video["size"]) == (seconds, size)
        assert len(video["warnings"]) == len(says)
        assert all(text in note for text, note in zip(says, video["warnings"], strict=True))


IGNORED = {
    "user": "me",
    "quality": "high",
    "generate_sound": True,
    "flow_shift": 3.5,
    "lora": {"name": "x"},
    "boundary_ratio": 0.875,
    "response_format": "url",
    "something_else": [1, {"a": None}],
}


def test_what_has_no_use_is_named_in_one_warning(local):
    """From the beginning, and once the video is made, beside what the engine has to say."""
    video = taken(local, **IGNORED, n=1, seed=None, **{**TINY, "width": 72})
    (note,) = video["warnings"]
    assert all(name in note for name in IGNORED) and "n," not in note and "seed" not in note
    done = local.when(video["id"], "completed")
    assert done["warnings"][0] == note and "steps of 32 pixels" in done["warnings"][1]
    for answer in both_ways(local, {**TINY, "quality": "high"}):
        assert "quality" in answer.json()["warnings"][0]
        local.when(answer.json()["id"], "completed")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"n": 2}, "n", "n must be 1, since a request makes one video, got 2; send a request"),
        ({"n": "two"}, "n", "n must be a whole number from 1 up, got 'two'"),
        ({"seconds": 0.1}, "seconds", "seconds must be a number from 0.2 to 60, got 0.1; ask"),
        ({"seconds": 11}, "seconds", "from 0.2 to 10 s on this server, got 11.0; ask for 10 s"),
        ({"num_frames": 300}, "num_frames", "got 300; ask for 10 s, which are 250 frames"),
        ({"num_frames": 4}, "num_frames", "a whole number from 5 to 1500, got 4"),
        ({"size": "480"}, "size", "size must be WIDTHxHEIGHT with 32 to 4096 pixels a side, got"),
        ({"size": "31x32"}, "size", "write it as in 480x256"),
        ({"size": "1024x512"}, "size", "no more than 262144 pixels on this server, got '1024x512'"),
        ({"width": 1024, "height": 512}, "width", "ask for 704x352, or for less"),
        ({"width": 64}, "width", "width must be given together with height, got 64 alone"),
        ({"height": 64}, "height", "height must be given together with width"),
        ({"width": 64.5, "height": 32}, "width", "a whole number of pixels from 32 to 4096"),
        ({"width": 8192, "height": 32}, "width", "a whole number of pixels from 32 to 4096"),
        ({"seed": -1}, "seed", "seed must be a whole number from 0 to 9223372036854775807, got"),
        ({"seed": True}, "seed", "got True; leave it out for 42"),
        ({"num_inference_steps": 0}, "num_inference_steps", "a whole number from 1 to 1000, got"),
        ({"guidance_scale": 0.5}, "guidance_scale", "0 or 1, which both turn guidance off, or a"),
        ({"fps": 0}, "fps", "fps must be a number from 1 to 1000, got"),
        ({"prompt": " "}, "prompt", "prompt must be text that is not blank, got ' '; say what"),
        ({"prompt": ["hi"]}, "prompt", "prompt must be text that is not blank, got "),
        ({"extra_params": "seed=1"}, "extra_params", "must be a JSON object of fields"),
        ({"seed": 1, "extra_params": {"seed": 2}}, "seed", "seed must be given once"),
        ({"extra_params": {"extra_body": {}}}, "extra_body", "must not be within another"),
        ({"x" * 65: 1}, "x" * 65, "no more than 64 characters; leave it out"),
    ],
)
def test_refusals_are_sentences(shared, fields, param, says):
    """They have the rule, the value and the remedy, in all kinds of bodies."""
    before = len(shared.jobs[0]._store.jobs)
    answers = both_ways(shared, {"prompt": "hi", **fields})
    message = refused(answers[0], 422, param)
    assert says in message and ";" in message and "pattern" not in message
    if fields not in ({"seed": True}, {"prompt": ["hi"]}):  # a form has texts alone
        for answer in answers[1:]:
            refused(answer, 422, param)
        assert len(shared.jobs[0]._store.jobs) == before


def test_a_prompt_must_be_there(shared):
    for fields in ({}, {"prompt": None}, {"extra_body": {}}):
        answer = shared.http.post("/v1/videos", json=fields)
        assert "prompt must be given; say" in refused(answer, 422, "prompt")


def test_guidance_that_is_off(local):
    """Of a distilled model too, which refuses any other."""
    for guidance in (0, 1, "0", 1.0):
        name = taken(local, **TINY, guidance_scale=guidance)["id"]
        assert local.when(name, "completed")["warnings"] == []
    refused(as_json(local, guidance_scale=4), 422, "guidance_scale")


# -- the model's name ---------------------------------------------------------------------------


def test_names_of_the_model(waiting):
    assert taken(waiting, model="tiny")["model"] == taken(waiting)["model"] == "tiny"
    assert taken(waiting, model="small")["model"] == "small"
    other = taken(waiting, model="sora-2")
    assert other["model"] == "tiny" and "'sora-2' is not served here" in other["warnings"][0]


def test_strict_names(settings, replica, serve_here):
    strict = dataclasses.replace(settings, is_model_strict=True)
    with serve_here(strict, replica) as local:
        assert "'sora-2'" in refused(as_json(local, model="sora-2"), 404, "model")
        local.when(taken(local, model="small", **TINY)["id"], "completed")


def test_models(local):
    for path in ("/v1/models", "/models"):
        answer = local.http.get(path).json()
        assert answer["object"] == "list" and answer["model_path"] == "tiny"
        assert [each["id"] for each in answer["data"]] == ["tiny", "small"]
    one = local.http.get("/v1/models/small").json()
    assert one == answer["data"][1] and (one["object"], one["root"]) == ("model", "tiny")
    assert "tiny, small" in refused(local.http.get("/v1/models/owner/other"), 404, "model")
    with httpx.Client(base_url=local.url) as stranger:
        for path in ("/v1/models", "/models", "/v1/models/tiny", "/v1/videos"):
            assert stranger.get(path).status_code == 401


# -- the list -----------------------------------------------------------------------------------


def pages(local, **query) -> list[dict]:
    found, after = [], None
    while True:
        params = {**query, **({} if after is None else {"after": after})}
        page = local.http.get("/v1/videos", params=params).json()
        found.append(page)
        if not page["has_more"]:
            return found
        after = page["last_id"]


def test_pages_of_videos(waiting):
    assert waiting.http.get("/v1/videos").json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip
    names = [taken(waiting, seed=seed)["id"] for seed in range(22)]
    newest = waiting.http.get("/v1/videos").json()
    assert [video["id"] for video in newest["data"]] == names[:1:-1] and newest["has_more"]
    assert (newest["first_id"], newest["last_id"]) == (names[-1], names[2])
    assert newest["data"][0] == waiting.get(names[-1])
    for order, expected in (("asc", names), ("desc", names[::-1])):
        found = pages(waiting, order=order, limit=5)
        assert [len(page["data"]) for page in found] == [5, 5, 5, 5, 2]
        assert [video["id"] for page in found for video in page["data"]] == expected
    assert len(waiting.http.get("/v1/videos?limit=100").json()["data"]) == 22


def test_pages_hold_while_videos_come_and_go(waiting):
    """Of those that were there at the first page, every one that stays is seen once."""
    names = [taken(waiting)["id"] for _ in range(6)]
    first = waiting.http.get("/v1/videos?limit=2").json()
    taken(waiting)
    waiting.delete(names[5])
    rest = pages(waiting, limit=2, after=first["last_id"])
    page = waiting.http.get("/v1/videos", params={"limit": 2, "after": first["last_id"]}).json()
    assert [video["id"] for video in page["data"]] == [names[3], names[2]] and rest
    gone = waiting.http.get("/v1/videos", params={"after": names[5]})
    assert "after must be the id" in refused(gone, 404, "after")


@pytest.mark.parametrize(
    ("query", "param", "says"),
    [
        ("limit=0", "limit", "limit must be a whole number from 1 to 100, got '0'"),
        ("limit=101", "limit", "ask for the rest by after"),
        ("limit=x", "limit", "got 'x'"),
        ("order=up", "order", "order must be asc or desc, got 'up'; leave it out"),
    ],
)
def test_pages_that_are_none(shared, query, param, says):
    assert says in refused(shared.http.get(f"/v1/videos?{query}"), 422, param)


# -- while the client waits ---------------------------------------------------------------------


@pytest.mark.usefixtures("same_bytes")
def test_a_video_while_its_client_waits(local):
    form = {name: (None, str(value)) for name, value in TINY.items()}
    answer = local.http.post("/v1/videos/sync", files={**form, "flow_shift": (None, "5")})
    assert answer.status_code == 200 and answer.headers["content-type"] == "video/mp4"
    name = answer.headers["x-request-id"]
    assert answer.content == local.content(name).content
    video = local.get(name)
    assert answer.headers["x-model"] == video["model"] == "tiny"
    assert float(answer.headers["x-inference-time-s"]) == video["inference_time_s"] > 0
    durations = json.loads(answer.headers["x-stage-durations"])
    assert durations == video["stage_durations"] == video["timings_s"] and durations["denoise"] > 0
    peak = float(answer.headers["x-peak-memory-mb"])
    assert peak == pytest.approx(video["peak_memory_mb"], abs=0.001) and peak > 10
    assert "flow_shift" in video["warnings"][0]
    again = local.http.post("/v1/videos/sync", json={**TINY, "seed": "42"})
    assert again.content == answer.content


def test_a_client_that_leaves_cancels(local, settings, replica):
    parts = {name: (None, value) for name, value in LONG.items()}
    with pytest.raises(httpx.ReadTimeout):
        local.http.post("/v1/videos/sync", files=parts, timeout=1.5)
    until(lambda: local.jobs[0]._store.jobs == {})
    until(lambda: replica._engine.queue_length == 0)
    assert left_in(settings.folder) == []
    local.when(local.create(), "completed")


def test_a_video_that_cannot_be_made_while_its_client_waits(settings, replica, serve_here):
    assert "blank" in _sync_refused(settings, replica, serve_here, {"prompt": ""}, 422)
    hurried = dataclasses.replace(settings, timeout_s=0.3)
    assert "0.3 s" in _sync_refused(hurried, replica, serve_here, LONG, 504)


def _sync_refused(settings, replica, serve_here, fields, status) -> str:
    with serve_here(settings, replica) as local:
        answer = local.http.post("/v1/videos/sync", json=fields)
        assert answer.status_code == status, answer.text
        return answer.json()["error"]["message"]


# -- content and images ---------------------------------------------------------------------------


def test_images_of_a_video(local, settings):
    name = taken(local, **{**TINY, "width": 96, "height": 64, "num_frames": 25})["id"]
    local.when(name, "completed")
    with av.open(io.BytesIO(local.content(name).content)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    for variant, size in (("thumbnail", (96, 64)), ("spritesheet", (4 * 96, 4 * 64))):
        answer = local.http.get(f"/v1/videos/{name}/content?variant={variant}")
        assert answer.status_code == 200 and answer.headers["content-type"] == "image/webp"
        with Image.open(io.BytesIO(answer.content)) as image:
            assert (image.format, image.size) == ("WEBP", size)
            first = np.asarray(image.convert("RGB"), np.float32)[:64, :96]
        which = frames[0] if variant == "spritesheet" else frames[len(frames) // 2]
        assert np.abs(first - which).mean() < 12  # of 255: colours are the frame's
        assert local.http.get(f"/v1/videos/{name}/content?variant={variant}").content == (
            answer.content
        )
    assert local.http.get(f"/v1/videos/{name}/content?variant=video").content[4:8] == b"ftyp"
    message = refused(local.http.get(f"/v1/videos/{name}/content?variant=gif"), 422, "variant")
    assert "variant must be video, thumbnail or spritesheet, got 'gif'" in message
    assert not any(path.stat().st_mode & 0o077 for path in settings.folder.rglob("*"))
    local.delete(name)
    assert left_in(settings.folder) == []


def test_the_head_of_content(local):
    name = taken(local, **TINY)["id"]
    local.when(name, "completed")
    whole = local.content(name)
    head = local.http.head(f"/v1/videos/{name}/content")
    assert head.status_code == 200 and head.content == b""
    for key in ("content-length", "content-type", "etag", "accept-ranges"):
        assert head.headers[key] == whole.headers[key]
    assert local.http.head(f"/v1/videos/{name}x/content").status_code == 404
    allowed = local.http.put(f"/v1/videos/{name}/content").headers["allow"]
    assert allowed == "GET, HEAD"


def test_content_that_is_not_there_yet(local):
    name = local.create(LONG)
    for variant in ("video", "thumbnail"):
        answer = local.http.get(f"/v1/videos/{name}/content?variant={variant}")
        refused(answer, 409, "video_id")
        assert int(answer.headers["retry-after"]) >= 1
    local.delete(name)


# -- files in all words ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def red() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return buffer.getvalue()


def image_of(local, settings, answer: httpx.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    with Image.open(settings.folder / answer.json()["id"] / "image") as image:
        return image.convert("RGB")


def test_images_in_all_words(waiting, settings, red):
    url = data_url(red)
    asked = [
        {"input_reference": url},
        {"input_reference": {"image_url": url}},
        {"input_reference": {"image_url": {"url": url}}},
        {"input_reference": [{"image_url": url}]},
        {"image_reference": {"image_url": url}},
        {"image_reference": json.dumps({"image_url": url})},
        {"reference_url": url},
        {"extra_body": {"image_reference": {"image_url": url}}},
    ]
    answers = [as_json(waiting, **fields) for fields in asked]
    forms = [
        {"input_reference[image_url]": (None, url)},
        {"image_reference[image_url][url]": (None, url)},
        {"image_reference": (None, json.dumps({"image_url": url}))},
        {"input_reference": (None, json.dumps({"image_url": url}))},
        {"reference_url": (None, url)},
        {"input_reference": ("a.png", red, "image/png")},
        {"image_reference": ("a.png", red, "image/png")},
    ]
    prompt = {"prompt": (None, "hi")}
    answers += [waiting.http.post("/v1/videos", files={**prompt, **form}) for form in forms]
    answers.append(waiting.http.post("/v1/videos", data={"prompt": "hi", "input_reference": url}))
    for answer in answers:
        assert image_of(waiting, settings, answer).getpixel((5, 5)) == (255, 0, 0)
        assert answer.json()["warnings"] == []


def test_a_large_image_within_an_object(waiting, settings):
    """It goes to the disk as any other, from JSON and from JSON in a form."""
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    inside = {"image_url": data_url(buffer.getvalue())}
    form = {"prompt": (None, "hi"), "image_reference": (None, json.dumps(inside))}
    for answer in (
        as_json(waiting, image_reference=inside),
        waiting.http.post("/v1/videos", files=form),
    ):
        assert np.array_equal(np.asarray(image_of(waiting, settings, answer)), pixels)


def test_voices_in_all_words(waiting, settings, voice):
    url = data_url(voice.read_bytes(), "audio/wav")
    sounds = []
    for fields in ({"audio": url}, {"audio_reference": {"audio_url": url}}):
        name = taken(waiting, **fields)["id"]
        sounds.append((settings.folder / name / "audio").read_bytes())
    assert sounds[0] == sounds[1] and sounds[0][:4] == b"RIFF"


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input_reference": {"file_id": "file-1"}}, "input_reference", "no files are kept here"),
        ({"input_reference": {"x": 1}}, "input_reference", "an object with one of image_url"),
        ({"input_reference": 5}, "input_reference", "got 5; send one file"),
        ({"input_reference": "/etc/passwd"}, "input_reference", "or a data URL"),
        ({"image_reference": "data:image/png,xx"}, "image_reference", "must be a file"),
        ({"image_reference": {"image_url": "http://127.0.0.1/a"}}, "image_reference", "addresses"),
        ({"reference_url": "https://example.org/a.png"}, "reference_url", "are not fetched"),
        ({"input_reference": "A", "reference_url": "B"}, "reference_url", "one of the two"),
        ({"audio_reference": {"audio_url": "data:;base64,AAAA"}}, "audio_reference", "upload"),
    ],
)
def test_files_that_are_none(shared, fields, param, says):
    before = len(shared.jobs[0]._store.jobs)
    assert says in refused(as_json(shared, **fields), 422, param)
    assert len(shared.jobs[0]._store.jobs) == before


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> bytes:
    """Red, and blue in the end."""
    frames = np.zeros((30, 64, 96, 3), np.uint8)
    frames[:25, ..., 0] = frames[25:, ..., 2] = 200
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_mp4(path, frames, np.zeros((30 * 1920, 2), np.float32), 25, 48000)
    return path.read_bytes()


def test_of_a_video_the_last_frame_is_the_reference(waiting, settings, clip):
    url = data_url(clip, "video/mp4")
    form = {"prompt": (None, "hi"), "input_reference": ("clip.mp4", clip, "video/mp4")}
    for answer, name in (
        (waiting.http.post("/v1/videos", files=form), "input_reference"),
        (as_json(waiting, video_reference={"video_url": url}), "video_reference"),
        (as_json(waiting, input_reference=url), "input_reference"),
    ):
        image = image_of(waiting, settings, answer)
        red, green, blue = image.getpixel((48, 32))
        assert image.size == (96, 64) and red < 20 and green < 20 and 180 < blue < 220
        video = waiting.get(answer.json()["id"])
        assert f"{name} is a video, and its last frame" in video["warnings"][0]


def test_videos_that_are_none(local, settings, clip):
    for content in (clip[: len(clip) // 4], clip[:40], b"\x1aE\xdf\xa3" + bytes(100)):
        message = refused(local.post(SMALL, input_reference=content), 422, "input_reference")
        assert "a video" in message and str(settings.folder) not in message
    assert left_in(settings.folder) == []


# -- addresses ------------------------------------------------------------------------------------


@contextmanager
def web(answers: dict[str, tuple[int, dict[str, str], bytes]]) -> Iterator[tuple[str, list[str]]]:
    """A server on loopback, its place, and the paths that it was asked for."""
    asked: list[str] = []
    is_over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status, headers, content = answers[self.path]
            while self.path == "/late" and not is_over.wait(0.05):
                with suppress(OSError):
                    self.wfile.write(b" ")  # of a head that does not end
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}", asked
        is_over.set()
        server.shutdown()
        thread.join()


def test_addresses_of_named_hosts_are_fetched(settings, replica, serve_here, red, monkeypatch):
    answers = {
        "/a.png?x=1": (200, {}, red),
        "/moved": (302, {"Location": "/a.png?x=1"}, b""),
        "/large": (200, {}, bytes(LIMITS.body_bytes + 1)),
        "/cut": (200, {"Content-Length": "1000"}, b"x"),
        "/late": (200, {}, b""),
    }
    with web(answers) as (place, asked):
        open_one = dataclasses.replace(settings, fetched_hosts=(place,))
        with serve_here(open_one, replica) as local:
            monkeypatch.setattr(local.jobs[0], "_launch", lambda job: None)
            url = f"http://{place}/a.png?x=1"
            message = refused(as_json(local, reference_url=url), 422, "reference_url")
            assert "private network" in message and asked == []
            monkeypatch.setattr("magihuman.runtime.serving.transfer.fetch.is_public", bool)
            answer = as_json(local, input_reference={"image_url": url})
            assert image_of(local, settings, answer).getpixel((5, 5)) == (255, 0, 0)
            for path, says in (
                ("/moved", "redirects are not followed"),
                ("/large", "has more than"),
                ("/cut", "before its end"),
                ("/late", "takes longer than 0.5 s"),
            ):
                if path == "/late":
                    monkeypatch.setattr("magihuman.runtime.serving.transfer.fetch.DEADLINE_S", 0.5)
                answer = as_json(local, reference_url=f"http://{place}{path}")
                assert says in refused(answer, 422, "reference_url")
            assert "/a.png?x=1" in asked and asked.count("/a.png?x=1") == 1
            for other in ("http://localhost/x", f"http://u:p@{place}/x", f"http://x@{place}"):
                refused(as_json(local, reference_url=other), 422, "reference_url")
            assert len(asked) == 5 and len(left_in(settings.folder)) == 1


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.1.1", "169.254.169.254", "::1", "fe80::1%eth0", "fd00::1",
     "::ffff:127.0.0.1", "0.1.2.3", "224.0.0.1", "100.64.0.1", "::"],
)  # fmt: skip
def test_private_addresses(address):
    from magihuman.runtime.serving.transfer.fetch import is_public

    assert not is_public(address) and is_public("93.184.215.14") and is_public("2606:4700::1111")


def test_strangers_fetch_nothing(local):
    with httpx.Client(base_url=local.url) as stranger:
        answer = stranger.post("/v1/videos/sync", json=TINY)
        assert answer.status_code == 401 and BEARER["Authorization"] not in answer.text
