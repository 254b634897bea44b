"""A face that is talked to, over a WebSocket, in one process."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from video_client import LONG, SMALL, TOKEN, TOKEN_SHA256, until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from magihuman.runtime.media import read_audio, read_frames
from magihuman.runtime.serving.face import routes
from magihuman.runtime.serving.face import talk as session
from magihuman.runtime.serving.front.bounds import Bounds
from magihuman.runtime.serving.settings import Limits, Settings

RATE = 16_000
QUIET = {"num_inference_steps": 1, "size": "64x64", "window_seconds": 0.64, "sample_rate": RATE}


@pytest.fixture
def settings(tmp_path) -> Settings:
    limits = Limits(prompt_chars=100, pixels=128 * 128)
    return Settings(tmp_path / "videos", "tiny", token_sha256=TOKEN_SHA256, limits=limits)


def talk(local, **headers: str) -> ClientConnection:
    address = local.url.replace("http:", "ws:") + "/v1/live"
    return connect(address, additional_headers=headers, proxy=None, open_timeout=300)


def picture(face: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(face.read_bytes()).decode()


def opening(face: Path, **others: object) -> str:
    return json.dumps({"image": picture(face), "token": TOKEN, **QUIET, **others})


def voice(seconds: float) -> bytes:
    times = np.arange(round(seconds * RATE)) / RATE
    return (np.sin(2 * np.pi * 200 * times) * 12_000).astype("<i2").tobytes()


def told(client: ClientConnection, kind: str) -> dict:
    """The next message of text of this kind; no error comes before it."""
    while True:
        message = client.recv(timeout=120)
        if isinstance(message, str):
            found = json.loads(message)
            assert found["type"] in (kind, "window", "stream"), found
            if found["type"] == kind:
                return found


def refused(client: ClientConnection) -> tuple[dict, int]:
    """The error that a client is told, and the code that it is closed with."""
    error = json.loads(client.recv(timeout=120))
    assert error["type"] == "error"
    with pytest.raises(ConnectionClosed):
        client.recv(timeout=120)
    return error["error"], client.close_code


def test_a_voice_comes_back_with_a_face(local, face, tmp_path):
    with talk(local) as client:
        client.send(opening(face, prompt="A man nods.", seed=3))
        assert json.loads(client.recv(timeout=120)) == {"type": "ready"}
        sound = voice(1.5)
        for start in range(0, len(sound), 3200):
            client.send(sound[start : start + 3200])
        client.send('{"type": "end"}')
        messages = list(client)
        assert client.close_code == 1000
    texts = [message for message in messages if isinstance(message, str)]
    pieces = [message for message in messages if isinstance(message, bytes)]
    said = [json.loads(text) for text in texts]
    assert said[-1] == {"type": "end"}
    stream = next(each for each in said if each["type"] == "stream")
    assert stream["media_type"].startswith('video/mp4; codecs="avc1.')
    windows = [each for each in said if each["type"] == "window"]
    frames = sum(window["frames"] for window in windows)
    assert [window["index"] for window in windows] == list(range(len(windows)))
    assert windows[0]["start_s"] == 0 and windows[0]["delay_s"] > 0
    path = tmp_path / "talk.mp4"
    path.write_bytes(b"".join(pieces))
    assert len(read_frames(path)[0]) == frames >= 37
    heard = read_audio(path, RATE, 10)
    assert len(heard) / RATE == pytest.approx(frames / 25, abs=0.05)
    assert np.abs(heard[: RATE // 2]).max() == pytest.approx(12_000 / 32768, rel=0.2)
    until(lambda: local.jobs[0]._faces == 0)


WRONG = [
    ("no json", "malformed_body", 1008),
    ("[]", "malformed_body", 1008),
    ({"token": "wrong"}, "invalid_token", 1008),
    ({"token": None}, "invalid_token", 1008),
    ({"image": None}, "invalid_value", 1008),
    ({"image": "face.png"}, "invalid_value", 1008),
    ({"image": "data:image/png;base64,AAAA"}, "invalid_value", 1008),
    ({"sample_rate": None}, "invalid_value", 1008),
    ({"sample_rate": 100}, "invalid_value", 1008),
    ({"size": "512x512"}, "invalid_value", 1008),
    ({"window_seconds": 60}, "invalid_value", 1008),
    ({"window_seconds": float("nan")}, "invalid_value", 1008),
    ({"prompt": " "}, "invalid_value", 1008),
    ({"prompt": "a" * 101}, "invalid_value", 1008),
    ({"audio": "voice.wav"}, "invalid_value", 1008),
]


def test_what_nobody_can_begin_with(local, face):
    for wrong, code, closed in WRONG:
        with talk(local) as client:
            client.send(wrong if isinstance(wrong, str) else opening(face, **wrong))
            error, how = refused(client)
        assert (error["code"], how) == (code, closed), wrong
        assert error["message"]
    with talk(local) as client:
        client.send(b"1234")
        assert refused(client)[0]["code"] == "malformed_body"
    assert local.jobs[0]._faces == 0


@pytest.mark.parametrize(
    ("wrong", "code"),
    [(b"123", "invalid_value"), (bytes(300_000), "body_too_large"), ("x", "malformed_body")],
)
def test_what_is_no_voice(local, face, wrong, code):
    with talk(local) as client:
        client.send(opening(face))
        told(client, "ready")
        client.send(wrong)
        error, how = refused(client)
    assert (error["code"], how) == (code, 1008)
    until(lambda: local.jobs[0]._faces == 0)


def test_pages_of_others_do_not_talk(local):
    for headers in ({"Origin": "http://elsewhere.example"}, {"Sec-Fetch-Site": "cross-site"}):
        with pytest.raises(InvalidStatus) as refusal, talk(local, **headers):
            pass
        assert refusal.value.response.status_code == 403
    port = local.url.rpartition(":")[2]
    with talk(local, Origin=f"http://127.0.0.1:{port}"):
        pass


def test_an_engine_talks_to_one(local, face):
    """And makes no video meanwhile; whoever comes is told so at once."""
    with talk(local) as first:
        first.send(opening(face))
        told(first, "ready")
        with talk(local) as second:
            second.send(opening(face))
            error, how = refused(second)
            assert (error["code"], how) == ("busy", 1013)
        name = local.create(SMALL)
        told(first, "window")
        assert local.get(name)["status"] == "queued"
    local.when(name, "completed")
    running = local.create(LONG)
    local.when(running, "in_progress")
    with talk(local, Authorization=f"Bearer {TOKEN}") as third:
        third.send(opening(face, token=None))
        assert refused(third)[0]["code"] == "busy"
    local.delete(running)


def test_a_client_that_leaves_frees_the_engine(local, face, replica):
    with talk(local) as client:
        client.send(opening(face))
        told(client, "ready")
        client.send(voice(0.2))
    until(lambda: local.jobs[0]._faces == 0)
    until(lambda: replica._engine.queue_length == 0)
    name = local.create(SMALL)
    local.when(name, "completed")


def test_a_server_that_stops_says_so(local, face):
    with talk(local) as client:
        client.send(opening(face))
        told(client, "ready")
        local.run(local.jobs[0].close())
        while True:
            message = client.recv(timeout=120)
            if isinstance(message, str) and json.loads(message)["type"] == "error":
                break
        assert json.loads(message)["error"]["code"] == "draining"
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=120)
        assert client.close_code == 1001


def test_bounds_of_messages_and_of_silence(settings, replica, serve_here, face, monkeypatch):
    monkeypatch.setattr(session, "SILENT_S", 0.3)
    monkeypatch.setattr(routes, "OPENING_S", 0.3)
    large = opening(face)
    with serve_here(settings, replica, bounds=Bounds(message_bytes=len(large) + 100)) as local:
        with talk(local) as client:  # says nothing
            assert refused(client)[0]["code"] == "too_slow"
        with talk(local) as client:
            with suppress(ConnectionClosed):
                client.send("x" * (len(large) + 200))
            with pytest.raises(ConnectionClosed):
                client.recv(timeout=120)
        assert client.close_code == 1009
        monkeypatch.setattr(routes, "OPENING_S", 60)
        with talk(local) as client:
            client.send(large)
            told(client, "ready")
            assert json.loads(list(client)[-1]) == {"type": "end"}  # it has said nothing since
        until(lambda: local.jobs[0]._faces == 0)
