"""An engine in a service: many callers, streams, event loops, and what goes wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import threading
import time
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from sounds import write_sine

from magihuman import runtime
from magihuman.runtime import (
    Cancelled,
    Chunk,
    DeadlineExceeded,
    DeviceError,
    EngineUnusable,
    InvalidRequestError,
    MagiHumanError,
    QueueFull,
    Request,
    config,
)
from magihuman.runtime.media import Mp4Writer
from magihuman.runtime.request import RequestOptions

SMALL = {"seconds": 0.2, "width": 32, "height": 32, "steps": 1}
LONG = {"seconds": 2.0, "width": 32, "height": 32, "steps": 1}  # 49 frames, windows of 25 and 24


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Requests run beside each other here: with two threads each they get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh(tiny_dir):
    with runtime.load(tiny_dir, device="cpu", queue_limit=2) as loaded:
        yield loaded


class Gate:
    """Holds a request on the device until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.reports = 0

    def __call__(self, progress: runtime.Progress) -> None:
        self.reports += 1
        self.reached.set()
        assert self.opened.wait(300)


class Caller:
    """A request in a thread of its own, on the device when this returns where it has a gate."""

    def __init__(self, engine: runtime.Engine, gate: Gate | None = None, **options) -> None:
        self.video: runtime.Video | None = None
        self.error: BaseException | None = None

        def run() -> None:
            try:
                self.video = engine.generate("hi", on_progress=gate, **{**SMALL, **options})
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run)
        self.thread.start()
        if gate is not None:
            assert gate.reached.wait(300)

    def end(self) -> Caller:
        self.thread.join()
        return self


def until(condition) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def same(a: runtime.Video, b: runtime.Video) -> bool:
    return np.array_equal(a.frames, b.frames) and np.array_equal(a.audio, b.audio)


def joined(chunks: list[Chunk]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([c.frames for c in chunks]), np.concatenate([c.audio for c in chunks])


def test_the_keywords_are_the_requests_fields():
    fields = set(Request.__dataclass_fields__) - {"prompt"}
    assert set(RequestOptions.__annotations__) == fields


# -- many callers -----------------------------------------------------------------------------


@pytest.mark.usefixtures("same_bytes")
def test_clips_made_beside_others_are_those_made_alone(tiny_dir, tmp_path):
    """With everything that is encoded, decoded and written beside a neighbour's denoising."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    voice = write_sine(tmp_path / "voice.wav", seconds=0.3)
    kinds = [{}, {"image": Image.fromarray(pixels)}, {"audio": voice}, {"width": 64}]
    with runtime.load(tiny_dir, variant="base", device="cpu") as engine:
        shared = {**SMALL, "negative_prompt": "x"}
        jobs = [{**shared, "seed": seed, **kind} for seed in (1, 2) for kind in kinds]
        alone = [engine.generate("hi", **job) for job in jobs]
        callers = [Caller(engine, save=tmp_path / f"{i}.mp4", **job) for i, job in enumerate(jobs)]
        for i, (caller, expected) in enumerate(zip(callers, alone, strict=True)):
            assert same(caller.end().video, expected)
            again = expected.save(tmp_path / "again.mp4")
            assert (tmp_path / f"{i}.mp4").read_bytes() == again.read_bytes()


def test_encoding_happens_while_another_denoises(fresh, monkeypatch):
    encoded, gate = threading.Event(), Gate()
    encode = fresh._parts.text_encoder.__class__.encode
    first = Caller(fresh, gate)

    def spy(encoder, ids):
        encoded.set()
        return encode(encoder, ids)

    monkeypatch.setattr(fresh._parts.text_encoder.__class__, "encode", spy)
    second = Caller(fresh)
    assert encoded.wait(300)  # the first is still on the device
    assert first.video is None
    gate.opened.set()
    assert same(first.end().video, second.end().video)
    assert second.video.timings_s["queue"] > 0


def test_the_file_is_finished_while_another_denoises(fresh, monkeypatch, tmp_path):
    finish = Mp4Writer.finish
    writing, written = threading.Event(), threading.Event()

    def slow(writer):
        writing.set()
        assert written.wait(300)
        return finish(writer)

    monkeypatch.setattr(Mp4Writer, "finish", slow)
    first = Caller(fresh, save=tmp_path / "clip.mp4")
    assert writing.wait(300)
    assert fresh.generate("hi", **SMALL) is not None and first.video is None
    written.set()
    assert first.end().video is not None and (tmp_path / "clip.mp4").exists()


def test_the_queue_is_bounded(fresh):
    gate = Gate()
    first = Caller(fresh, gate)
    others = [Caller(fresh), Caller(fresh)]
    until(lambda: fresh.queue_length == 3)
    with pytest.raises(QueueFull, match="no more than 2 requests may wait"):
        fresh.generate("hi", **SMALL)
    with pytest.raises(QueueFull):
        fresh.generate_stream("hi", **SMALL)
    with pytest.raises(InvalidRequestError, match="prompt must be text"):  # said all the same
        fresh.generate(" ", **SMALL)
    gate.opened.set()
    assert all(caller.end().video is not None for caller in [first, *others])
    assert fresh.queue_length == 0


def test_waiting_requests_end_at_once(fresh):
    gate, cancel = Gate(), threading.Event()
    first = Caller(fresh, gate)
    second, third = Caller(fresh, cancel=cancel), Caller(fresh, deadline_s=0.2)
    cancel.set()
    assert isinstance(second.end().error, Cancelled)
    assert isinstance(third.end().error, DeadlineExceeded)
    assert first.video is None and fresh.queue_length == 1
    gate.opened.set()
    assert first.end().video is not None


@pytest.mark.parametrize("method", ["generate", "generate_stream"])
def test_what_is_no_path_takes_no_place_in_line(fresh, method):
    with pytest.raises(TypeError):
        getattr(fresh, method)("hi", **SMALL, save=1)
    assert fresh.queue_length == 0


def test_who_waits_for_a_capture_leaves_at_once(fresh):
    """Nothing is encoded while a graph is captured, which can take a minute."""
    with fresh._parts.encoding, pytest.raises(DeadlineExceeded):
        fresh.generate("hi", **SMALL, deadline_s=0.1)
    assert fresh.queue_length == 0
    assert len(fresh.generate("hi", **SMALL).frames) == 5


def test_a_deadline_ends_a_running_request(engine):
    start, reports = time.monotonic(), []
    options = {**SMALL, "steps": 1000, "on_progress": reports.append}
    with pytest.raises(DeadlineExceeded, match=r"must be done within 0\.3 s"):
        engine.generate("hi", **options, deadline_s=0.3)
    assert time.monotonic() - start >= 0.3
    assert len(reports) < 1000  # amid its steps
    assert len(engine.generate("hi", **SMALL, deadline_s=100).frames) == 5
    with pytest.raises(InvalidRequestError, match="deadline_s must be a number"):
        engine.generate("hi", **SMALL, deadline_s=-1)


def test_closing_refuses_those_who_wait(tiny_dir):
    engine, gate = runtime.load(tiny_dir, device="cpu"), Gate()
    assert engine.is_usable
    first = Caller(engine, gate)
    second = Caller(engine)
    until(lambda: engine.queue_length == 2)
    closing = threading.Thread(target=engine.close)
    closing.start()
    with pytest.raises(MagiHumanError, match="the engine is closed"):
        raise second.end().error
    gate.opened.set()
    closing.join()
    assert first.end().video is not None and not engine.is_usable


@pytest.mark.parametrize("limit", [-1, 1.5, True, None])
def test_the_bound_is_a_whole_number(tiny_dir, limit):
    with pytest.raises(InvalidRequestError, match="queue_limit must be a whole number"):
        runtime.load(tiny_dir, device="cpu", queue_limit=limit)


# -- streams ----------------------------------------------------------------------------------


def test_a_stream_is_the_clip_in_pieces(engine):
    clip = engine.generate("a" * 641, **LONG)
    chunks = list(engine.generate_stream("a" * 641, **LONG))
    frames, audio = joined(chunks)
    assert np.array_equal(frames, clip.frames) and np.array_equal(audio, clip.audio)
    assert [(c.first_frame, len(c.frames), c.is_last) for c in chunks] == [
        (0, 25, False),
        (25, 24, True),
    ]
    assert len(chunks[0].audio) == 25 * 44100 // 25  # as long as its frames
    assert {(c.fps, c.sample_rate_hz, c.seed) for c in chunks} == {(25, 44100, 42)}
    assert chunks[0].timings_s == {} and chunks[0].warnings == ()
    assert list(chunks[1].timings_s) == list(clip.timings_s)
    assert chunks[1].warnings == clip.warnings != ()


def test_chunks_come_while_the_clip_is_decoded(engine, monkeypatch):
    """Each is there before the next window is decoded, which waits for it to be taken."""
    taken = threading.Semaphore(0)
    windows = engine._parts.turbo_vae.windows

    def slow(latent):
        for i, window in enumerate(windows(latent)):
            if i:
                assert taken.acquire(timeout=300)
            yield window

    monkeypatch.setattr(engine._parts.turbo_vae, "windows", slow)
    lasts = []
    for chunk in engine.generate_stream("hi", **{**LONG, "seconds": 3.0}):
        lasts.append(chunk.is_last)
        taken.release()
    assert lasts == [False, False, True]


def test_a_slow_consumer_does_not_hold_the_device(engine):
    stream = engine.generate_stream("hi", **LONG)
    assert len(next(stream).frames) == 25
    assert engine.generate("hi", **SMALL) is not None
    assert next(stream).is_last and list(stream) == []


def test_closing_a_stream_cancels_it(fresh, tmp_path):
    gate = Gate()
    stream = fresh.generate_stream("hi", **SMALL, on_progress=gate, save=tmp_path / "clip.mp4")
    assert gate.reached.wait(300)
    closing = threading.Thread(target=stream.close)
    closing.start()
    until(stream._limits.stop.is_set)
    gate.opened.set()
    closing.join()
    assert fresh.queue_length == 0 and list(stream) == [] and list(tmp_path.iterdir()) == []
    assert fresh.generate("hi", **SMALL) is not None


def test_an_exception_of_the_consumer_frees_the_device(fresh):
    def consume() -> None:
        with fresh.generate_stream("hi", **{**LONG, "seconds": 5.0}) as chunks:
            for _ in chunks:
                raise KeyError

    with pytest.raises(KeyError):
        consume()
    assert fresh.queue_length == 0
    assert fresh.generate("hi", **SMALL) is not None


def test_a_stream_that_is_forgotten_is_cancelled(fresh):
    gate = Gate()
    stream = fresh.generate_stream("hi", **{**SMALL, "steps": 1000}, on_progress=gate)
    assert gate.reached.wait(300)
    made = stream._made
    del stream
    gc.collect()
    gate.opened.set()
    made.result(300)
    assert fresh.queue_length == 0
    assert gate.reports == 1  # of a thousand steps


def test_errors_of_a_stream(engine, monkeypatch):
    with pytest.raises(InvalidRequestError, match="guidance must stay unset"):  # at once
        engine.generate_stream("hi", **SMALL, guidance=5.0)
    with pytest.raises(InvalidRequestError, match="image must be a readable file"):
        next(engine.generate_stream("hi", **SMALL, image="no.png"))

    def fail(latents):
        raise ValueError("no sound")

    monkeypatch.setattr(engine._parts.audio_vae, "decode", fail)
    stream = engine.generate_stream("hi", **SMALL)
    with pytest.raises(ValueError, match="no sound"):
        next(stream)
    assert list(stream) == []


# -- event loops ------------------------------------------------------------------------------


def test_awaited_clips_are_the_same(engine):
    async def run() -> list[runtime.Video]:
        return await asyncio.gather(
            *(engine.agenerate("hi", seed=seed, **SMALL) for seed in (1, 2, 1))
        )

    one, two, again = asyncio.run(run())
    assert same(one, engine.generate("hi", seed=1, **SMALL)) and same(one, again)
    assert not same(one, two)


def test_an_awaited_stream(engine):
    async def run() -> list[Chunk]:
        async with engine.agenerate_stream("hi", **LONG) as chunks:
            return [chunk async for chunk in chunks]

    frames, audio = joined(asyncio.run(run()))
    clip = engine.generate("hi", **LONG)
    assert np.array_equal(frames, clip.frames) and np.array_equal(audio, clip.audio)


@pytest.mark.parametrize("is_stream", [False, True])
def test_cancelling_the_task_cancels_the_request(fresh, is_stream):
    async def run() -> None:
        gate = Gate()
        options = {**SMALL, "steps": 1000, "on_progress": gate}

        async def take() -> None:
            if not is_stream:
                await fresh.agenerate("hi", **options)
            else:
                async for _ in fresh.agenerate_stream("hi", **options):
                    pass

        task = asyncio.create_task(take())
        await asyncio.to_thread(gate.reached.wait, 60)
        task.cancel()
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        if is_stream:
            await asyncio.to_thread(until, lambda: fresh.queue_length == 0)
        assert fresh.queue_length == 0  # already, where the clip was awaited
        assert len((await fresh.agenerate("hi", **SMALL)).frames) == 5

    asyncio.run(run())


def test_leaving_an_awaited_stream_early_frees_the_device(fresh):
    async def run() -> None:
        async with fresh.agenerate_stream("hi", **{**LONG, "seconds": 5.0}) as chunks:
            async for _ in chunks:
                break
        assert fresh.queue_length == 0

    asyncio.run(run())


def test_errors_of_awaited_requests(fresh):
    async def run() -> None:
        with pytest.raises(InvalidRequestError, match="prompt must be text"):
            await fresh.agenerate(" ", **SMALL)
        with pytest.raises(DeadlineExceeded):
            await fresh.agenerate("hi", **{**SMALL, "steps": 1000}, deadline_s=0.2)
        with pytest.raises(InvalidRequestError, match="audio must be a readable file"):
            async for _ in fresh.agenerate_stream("hi", **SMALL, audio="no.wav"):
                pass

    asyncio.run(run())


# -- failures ---------------------------------------------------------------------------------


class Cache:
    """Counts how often captured graphs are given up; there are none on a CPU."""

    released = 0

    def release(self) -> None:
        self.released += 1


def failing(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("seam", ["turbo_vae.windows", "dit.forward", "audio_vae.decode"])
def test_out_of_memory_frees_caches_and_says_what_fits(fresh, monkeypatch, error, seam):
    cache = Cache()
    parts = dataclasses.replace(fresh._parts, captured=(cache,))
    monkeypatch.setattr(fresh, "_parts", parts)
    monkeypatch.setattr("magihuman.runtime.memory.estimate.free_bytes", lambda device: 8 * 2**20)
    with monkeypatch.context() as patch:
        name, method = seam.split(".")
        patch.setattr(getattr(parts, name), method, failing(error))
        with pytest.raises(DeviceError, match=r"cpu ran out of memory: 0\.2 s of 32x32") as caught:
            fresh.generate("hi", **SMALL)
    assert not isinstance(caught.value, EngineUnusable) and caught.value.__cause__ is error
    assert "0.0 GiB are free now" in str(caught.value)
    assert cache.released == 1 and fresh.is_usable
    assert len(fresh.generate("hi", **SMALL).frames) == 5


def test_out_of_memory_lets_go_of_what_filled_it(fresh, monkeypatch):
    sizes = []

    def fill(latent):
        filling = torch.zeros(1024, 1024)
        sizes.append(weakref.ref(filling))
        raise torch.OutOfMemoryError(f"no room beside {filling.shape}")

    monkeypatch.setattr(fresh._parts.turbo_vae, "windows", fill)
    with pytest.raises(DeviceError) as caught:
        fresh.generate("hi", **SMALL)
    assert sizes[0]() is None and caught.value is not None  # though the error is still held


@pytest.mark.parametrize("is_awaited", [False, True])
def test_errors_that_are_kept_keep_no_tensors(fresh, monkeypatch, is_awaited):
    latents = []

    def fail(latent):
        latents.append(weakref.ref(latent))
        raise ValueError("its own")

    monkeypatch.setattr(fresh._parts.turbo_vae, "windows", fail)
    with pytest.raises(ValueError, match="its own") as caught:
        asyncio.run(fresh.agenerate("hi", **SMALL)) if is_awaited else fresh.generate("hi", **SMALL)
    assert latents[0]() is None and caught.value is not None


def test_what_has_no_memory_to_encode_beside_others_encodes_alone(fresh, monkeypatch):
    expected, calls = fresh.generate("hi", **SMALL), []
    encode = fresh._parts.text_encoder.__class__.encode

    def once(encoder, ids):
        calls.append(ids)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(encoder, ids)

    monkeypatch.setattr(fresh._parts.text_encoder.__class__, "encode", once)
    assert same(fresh.generate("hi", **SMALL), expected) and len(calls) == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: unspecified launch failure"),
    ],
)
@pytest.mark.parametrize("seam", ["turbo_vae.windows", "dit.forward", "image_vae.encode"])
def test_a_cuda_error_makes_the_engine_unusable(tiny_dir, monkeypatch, error, seam):
    with runtime.load(tiny_dir, device="cpu") as engine:
        name, method = seam.split(".")
        gate, image = Gate(), Image.new("RGB", (40, 40))
        monkeypatch.setattr(getattr(engine._parts, name), method, failing(error))
        if name == "image_vae":
            gate.opened.set()
            first = Caller(engine, image=image)
        else:
            first = Caller(engine, gate)
            second = Caller(engine)
            until(lambda: engine.queue_length == 2)
            gate.opened.set()
            assert isinstance(second.end().error, EngineUnusable)
        assert isinstance(first.end().error, EngineUnusable) and first.error.__cause__ is error
        assert not engine.is_usable and engine.queue_length == 0
        start = time.monotonic()
        with pytest.raises(EngineUnusable, match=r"load again in a new process.*CUDA error: "):
            engine.generate("hi", **SMALL)
        assert time.monotonic() - start < 1
        with pytest.raises(EngineUnusable):
            engine.generate_stream("hi", **SMALL)


def test_nothing_of_a_failed_device_is_freed(tiny_dir, monkeypatch):
    """PyTorch would end the process."""
    held = []

    def fail(latent):
        made = torch.zeros(4)
        held.extend(weakref.ref(value) for value in (latent, made))
        raise RuntimeError(f"CUDA error: device-side assert triggered beside {made.shape}")

    with runtime.load(tiny_dir, device="cpu") as engine:
        monkeypatch.setattr(engine._parts.turbo_vae, "windows", fail)
        with pytest.raises(EngineUnusable):
            engine.generate("hi", **SMALL)
    gc.collect()
    assert len(held) == 2 and all(tensor() is not None for tensor in held)


@pytest.mark.parametrize("error", [ValueError("its own"), RuntimeError("its own"), SystemExit(3)])
def test_other_errors_pass_and_leave_the_engine_usable(fresh, monkeypatch, error):
    expected = fresh.generate("hi", **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(fresh._parts.turbo_vae, "windows", failing(error))
        with pytest.raises(type(error)) as caught:
            fresh.generate("hi", **SMALL)
    assert caught.value is error and fresh.is_usable
    assert same(fresh.generate("hi", **SMALL), expected)


# -- warming up -------------------------------------------------------------------------------


@pytest.mark.parametrize("sr", [None, "540p"])
def test_warming_up_runs_every_model_and_changes_nothing(tiny_dir, monkeypatch, caplog, sr):
    with runtime.load(tiny_dir, variant="base", sr=sr, device="cpu") as engine:
        monkeypatch.setitem(config.SR_SIZES, "540p", (64, 32))
        options = {**SMALL, "negative_prompt": "x"}
        expected = engine.generate("hi", **options)
        parts, ran = engine._parts, []
        models = {"dit": parts.dit, "decoder": parts.turbo_vae.decoder}
        if parts.sr_dit is not None:
            models["sr_dit"] = parts.sr_dit
        for name, model in models.items():
            model.register_forward_pre_hook(lambda model, inputs, name=name: ran.append(name))
        with caplog.at_level(logging.INFO, logger="magihuman"):
            taken_s = engine.warmup([(32, 32, 0.2), (64, 32, 0.4)], text_tokens=[3, 70])
        assert set(ran) == set(models)
        assert ran.count("dit") == 4 and ran.count("decoder") == 2
        assert list(taken_s) == [(32, 32, 0.2), (64, 32, 0.4)] and min(taken_s.values()) > 0
        assert "nothing is compiled on cpu" in caplog.text
        assert same(engine.generate("hi", **options), expected)


@pytest.mark.parametrize(
    ("sizes", "lengths", "message"),
    [
        ([(32, 32, 0.2), (16, 32, 0.2)], [3], "width must be"),
        ([(32, 32, 100.0)], [3], "seconds must be"),
        ([(32, 32, 0.2)], [3, 641], "text_tokens must be whole numbers from 1 to 640, got 641"),
        ([(32, 32, 0.2)], [0], "text_tokens must be"),
    ],
)
def test_a_wrong_size_is_refused_before_anything_runs(engine, monkeypatch, sizes, lengths, message):
    monkeypatch.setattr(engine, "hold", failing(AssertionError("it ran")))
    with pytest.raises(InvalidRequestError, match=message):
        engine.warmup(sizes, text_tokens=lengths)


def test_order_is_kept_across_kinds_of_calls(fresh):
    """Streams, awaited and plain requests stand in one line."""
    order, gate = [], Gate()
    first = Caller(fresh, gate)
    stream = fresh.generate_stream("hi", **SMALL, on_progress=lambda _: order.append("stream"))
    plain = threading.Thread(
        target=lambda: fresh.generate("hi", **SMALL, on_progress=lambda _: order.append("plain"))
    )
    plain.start()
    until(lambda: fresh.queue_length == 3)
    gate.opened.set()
    first.end()
    plain.join()
    assert len(list(stream)) == 1
    assert order[0] == "stream" and sum(a != b for a, b in pairwise(order)) == 1
