"""An engine that is called from where it cannot serve: a forked process, its own callbacks."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from magihuman import runtime
from magihuman.runtime import MagiHumanError, Progress

SMALL = {"seconds": 0.2, "width": 32, "height": 32, "steps": 1}

FORK = """
import asyncio, os, signal, sys, threading, time
from magihuman import runtime

SMALL = {"seconds": 0.2, "width": 32, "height": 32, "steps": 1}
engine = runtime.load(sys.argv[1], device="cpu")
engine.generate("hi", **SMALL)
stream = engine.generate_stream("hi", **{**SMALL, "steps": 3})

async def take():
    return await engine.agenerate("hi", **SMALL)

CALLS = {
    "generate": lambda: engine.generate("hi", deadline_s=0.5, **SMALL),
    "stream": lambda: engine.generate_stream("hi", **SMALL),
    "agenerate": lambda: asyncio.run(take()),
    "agenerate_stream": lambda: engine.agenerate_stream("hi", **SMALL),
    "warmup": lambda: engine.warmup([(32, 32, 0.2)]),
    "follow": lambda: engine.follow(),
    "close": lambda: engine.close(),
    "next": lambda: next(stream),
    "close_stream": lambda: stream.close(),
    "load": lambda: runtime.load(sys.argv[1], device="cpu"),
}
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    for name, call in CALLS.items():
        try:
            call()
        except runtime.MagiHumanError as error:
            print(name, error)
        else:
            print(name, "did not raise")
    sys.stdout.flush()
    os._exit(0)
_, status = os.waitpid(pid, 0)
print("status", status, "usable", engine.is_usable)
for chunk in stream:
    pass
engine.generate("hi", **SMALL)
engine.close()
print("done")
"""


def test_a_forked_process_is_told_so(tiny_dir):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(tiny_dir)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert done.returncode == 0 and lines.pop("status") == "0 usable True", (
        done.stdout + done.stderr
    )
    assert len(lines) == 10
    for name, text in lines.items():
        assert "forked" in text and "spawn" in text, name
    assert done.stdout.endswith("done\n")  # the parent goes on


@pytest.fixture
def fresh(tiny_dir):
    with runtime.load(tiny_dir, device="cpu") as loaded:
        yield loaded


async def _awaited(engine: runtime.Engine) -> runtime.Video:
    return await engine.agenerate("ho", **SMALL)


CALLS = {
    "generate": lambda engine: engine.generate("ho", **SMALL),
    "generate_stream": lambda engine: engine.generate_stream("ho", **SMALL),
    "agenerate": lambda engine: asyncio.run(_awaited(engine)),
    "warmup": lambda engine: engine.warmup([(32, 32, 0.2)]),
    "close": lambda engine: engine.close(),
}


def refused(engine: runtime.Engine, call: str, errors: list[BaseException]) -> None:
    try:
        CALLS[call](engine)
    except MagiHumanError as error:
        errors.append(error)


def in_time(work) -> None:
    """Run it in a thread that is not waited for if it hangs."""
    errors = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(120)
    assert not thread.is_alive(), "it waits for itself"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("call", CALLS)
def test_a_callback_may_not_call_its_engine(fresh, call):
    errors: list[BaseException] = []

    def on_progress(progress: Progress) -> None:
        if progress.stage == "denoise":
            refused(fresh, call, errors)

    clips = []
    in_time(lambda: clips.append(fresh.generate("hi", on_progress=on_progress, **SMALL)))
    assert len(errors) == 2  # before the step and after it
    assert all("callback" in str(error) and "thread" in str(error) for error in errors)
    again = fresh.generate("hi", **SMALL)  # the engine is as it was
    assert np.array_equal(again.frames, clips[0].frames)


@pytest.mark.parametrize("call", ["generate", "close"])
@pytest.mark.parametrize("where", ["request", "queue", "text", "denoise", "decode_video"])
def test_nor_may_a_hook(tiny_dir, call, where):
    errors: list[BaseException] = []

    class Hook:
        engine: runtime.Engine

        @contextlib.contextmanager
        def span(self, name: str, request: int):
            if name == where:
                refused(self.engine, call, errors)
            yield

    hook = Hook()
    with runtime.load(tiny_dir, device="cpu", hooks=[hook]) as engine:
        hook.engine = engine
        in_time(lambda: engine.generate("hi", **SMALL))
        hook.engine = None
        assert errors and all("callback" in str(error) for error in errors)


def test_what_a_callback_raises_of_it_ends_the_request(fresh):
    def on_progress(progress: Progress) -> None:
        fresh.generate("ho", **SMALL)

    with pytest.raises(MagiHumanError, match="callback"):
        in_time(lambda: fresh.generate("hi", on_progress=on_progress, **SMALL))
    fresh.generate("hi", **SMALL)


def test_nor_may_a_callback_wait_for_a_stream_behind_it(fresh):
    errors: list[BaseException] = []
    streams = []
    gate = threading.Event()

    def on_progress(progress: Progress) -> None:
        assert gate.wait(300)
        if progress.stage == "denoise" and not errors:
            try:
                next(streams[0])
            except MagiHumanError as error:
                errors.append(error)

    def first() -> None:
        fresh.generate("hi", on_progress=on_progress, **SMALL)

    thread = threading.Thread(target=first, daemon=True)
    thread.start()
    while not fresh.queue_length:
        pass
    streams.append(fresh.generate_stream("ho", **SMALL))
    gate.set()
    thread.join(120)
    assert not thread.is_alive()
    assert "callback" in str(errors[0])
    assert sum(len(chunk.frames) for chunk in streams[0]) == 5  # and no chunk is lost


def test_another_engine_may_be_called(tiny_dir, fresh):
    made = []
    with runtime.load(tiny_dir, device="cpu") as other:

        def on_progress(progress: Progress) -> None:
            if progress.stage == "denoise" and not made:
                made.append(other.generate("hi", **SMALL))

        clip = fresh.generate("hi", on_progress=on_progress, **SMALL)
    assert np.array_equal(clip.frames, made[0].frames)


def test_who_takes_chunks_may_call_the_engine(fresh):
    """The clip is made in a thread of its own, which waits for nobody."""
    for chunk in fresh.generate_stream("hi", **SMALL):
        clip = fresh.generate("hi", **SMALL)
        assert np.array_equal(chunk.frames, clip.frames[: len(chunk.frames)])
        fresh.close()
