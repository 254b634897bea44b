"""Decoders that die over an upload: what it costs the server."""

from __future__ import annotations

import io
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from video_client import LONG, SMALL, TOKEN_SHA256, kept, until

from magihuman.runtime.media import Decoders
from magihuman.runtime.serving import uploads
from magihuman.runtime.serving.settings import Settings

# Steps long enough not to end while a test lasts, and short enough to be told to end between two.
ENDLESS = {**LONG, "seconds": "2", "size": "256x256"}


@pytest.fixture(scope="module")
def large_png() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@contextmanager
def a_running_job(tmp_path, replica, serve_here):
    settings = Settings(tmp_path / "videos", "tiny", token_sha256=TOKEN_SHA256)
    with serve_here(settings, replica) as local:
        name = local.create(ENDLESS)
        local.when(name, "in_progress")
        yield local
        job = kept(settings.folder)[name]
        assert (job.status, job.attempts) == ("in_progress", 1)
        assert [place.name for place in settings.folder.glob("video_*")] == [name]
        local.delete(name)


def ended(asked: Future, says: str) -> None:
    answer = asked.result(300)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["param"] == "input_reference"
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize("death", [signal.SIGSEGV, signal.SIGKILL, None], ids=str)
def test_a_decoder_that_dies_or_hangs(tmp_path, replica, serve_here, large_png, monkeypatch, death):
    decoders = Decoders(deadline_s=60 if death else 3)
    monkeypatch.setattr(uploads, "DECODERS", decoders)
    with a_running_job(tmp_path, replica, serve_here) as local, ThreadPoolExecutor(1) as pool:
        local.delete(local.create(SMALL, input_reference=large_png))
        (process,) = decoders.processes()
        os.kill(process, signal.SIGSTOP)
        asked = pool.submit(local.post, SMALL, input_reference=large_png)
        until(lambda: not decoders.processes())
        if death:
            time.sleep(0.1)  # it has the task, and does not go on with it
            os.kill(process, death)
            os.kill(process, signal.SIGCONT)
        ended(asked, death.name if death else "takes longer than 3 s")
        local.delete(local.create(SMALL, input_reference=large_png))
    decoders.close()


def test_a_decoder_without_memory(tmp_path, replica, serve_here, large_png, monkeypatch):
    decoders = Decoders(memory_bytes=2**20)  # no more than it has
    monkeypatch.setattr(uploads, "DECODERS", decoders)
    with a_running_job(tmp_path, replica, serve_here) as local, ThreadPoolExecutor(1) as pool:
        ended(pool.submit(local.post, SMALL, input_reference=large_png), "")
    decoders.close()


def test_no_decoder_at_all(tmp_path, replica, serve_here, large_png, monkeypatch):
    """As where the system gives no more processes."""
    decoders = Decoders()
    monkeypatch.setattr(uploads, "DECODERS", decoders)
    with a_running_job(tmp_path, replica, serve_here) as local:
        with monkeypatch.context() as patched:
            patched.setattr("sys.executable", str(tmp_path / "nothing"))
            answer = local.post(SMALL, input_reference=large_png)
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "decoder"
        local.delete(local.create(SMALL, input_reference=large_png))
    decoders.close()
