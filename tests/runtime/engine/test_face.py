"""A face whose voice is still coming, on the tiny model."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time

import numpy as np
import pytest
import scipy.signal
from PIL import Image

from magihuman import runtime
from magihuman.runtime.engine.live.options import lengths_of
from magihuman.runtime.engine.live.session import joined
from magihuman.runtime.model import Oobleck
from magihuman.runtime.pipeline import Limits

RATE, LATENT, FRAME = 51_200, 2048, 1764
SMALL = {"width": 64, "height": 64, "steps": 1, "window_seconds": 0.64}
FACE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))


def noise(seconds: float, seed: int = 1) -> np.ndarray:
    """Of which no two stretches are alike."""
    samples = np.random.default_rng(seed).standard_normal(round(seconds * RATE)).astype(np.float32)
    return samples.clip(-4, 4) / 8


def blocks(voice: np.ndarray, samples: int = 4096):
    """As a source gives them."""
    for start in range(0, len(voice), samples):
        yield voice[start : start + samples]


def sound_of(voice: np.ndarray, samples: int) -> np.ndarray:
    """What is to be heard of it."""
    whole = scipy.signal.resample_poly(np.pad(voice, (0, 8 * LATENT)), 441, 512)
    return whole[:samples]


def check_row(chunks: list[runtime.LiveChunk]) -> np.ndarray:
    """That each begins where the one before has ended, and the sound of all."""
    done = 0
    for index, chunk in enumerate(chunks):
        assert (chunk.index, chunk.first_frame) == (index, done)
        assert chunk.start_s == pytest.approx(done / 25)
        assert chunk.audio.shape == (len(chunk.frames) * FRAME, 2)
        assert chunk.is_last == (index == len(chunks) - 1)
        assert chunk.repeated in (0, len(chunk.frames)) and chunk.delay_s > 0
        done += len(chunk.frames)
    return np.concatenate([chunk.audio for chunk in chunks])


@pytest.mark.parametrize("seconds", [0.3, 1.32, 2.5])  # of a part, of whole and of other windows
def test_all_of_a_voice_is_heard_once_and_in_order(engine, seconds):
    voice = noise(seconds)
    with engine.live(FACE, runtime.LiveVoice(RATE, blocks(voice)), **SMALL) as stream:
        chunks = list(stream)
    sound = check_row(chunks)
    np.testing.assert_allclose(sound[:, 0], sound_of(voice, len(sound)), atol=1e-5)
    assert engine.queue_length == 0
    frames = sum(len(chunk.frames) for chunk in chunks)
    assert seconds * 25 - 1e-6 <= frames <= seconds * 25 + 2


def test_a_window_is_what_a_clip_that_goes_on_would_be(engine):
    """Read once, encoded once, and the same frames as by `continue_from`, but for how they join."""
    voice, look = noise(1.92), {**SMALL, "window_seconds": 0.64}
    options = {"width": 64, "height": 64, "steps": 1}
    with engine.live(FACE, runtime.LiveVoice(RATE, blocks(voice)), "hi", **look) as stream:
        chunks = list(stream)
    voice = np.pad(voice, (0, 64 * LATENT))
    before, last, seed = None, None, 42
    for chunk in chunks:
        if chunk.repeated:  # on a machine that is busy
            assert (chunk.frames == last).all()
            continue
        length, begin = round(chunk.window_s * 25), max(0, chunk.first_frame - 1)
        part = voice[begin * LATENT : (begin + length + 1) * LATENT]
        first = (
            {"image": FACE, **options} if before is None else {"continue_from": before, "steps": 1}
        )
        before = engine.generate("hi", audio=part, seconds=length / 25, seed=seed, **first)
        wanted = before.frames if last is None else joined(last, before.frames.copy())
        assert (chunk.frames == wanted[: len(chunk.frames)]).all()
        last, seed = chunk.frames[-1], seed + 1
    assert seed >= 44


def test_two_windows_fade_into_each_other():
    last, frames = np.full((2, 2, 3), 100, np.uint8), np.full((9, 2, 2, 3), 60, np.uint8)
    made = joined(last, frames)
    assert made[:, 0, 0, 0].tolist() == [90, 80, 70, 60, 60, 60, 60, 60]
    assert joined(last, np.full((2, 2, 2, 3), 255, np.uint8)).shape[0] == 1


def test_the_next_voice_is_encoded_while_this_window_denoises(engine, monkeypatch):
    encoded, counts = threading.Condition(), {"voice": 0, "text": 0, "image": 0}

    def spy(owner: type, name: str) -> None:
        real = owner.encode

        def encode(self, *arguments, **options):
            with encoded:
                counts[name] += 1
                encoded.notify_all()
            return real(self, *arguments, **options)

        monkeypatch.setattr(owner, "encode", encode)

    spy(Oobleck, "voice")
    spy(type(engine._parts.text_encoder), "text")
    spy(type(engine._parts.image_vae), "image")
    ready = threading.Event()
    overlaps = []

    def wait_for_the_next(progress: runtime.Progress) -> None:
        if ready.is_set() and progress.stage == "denoise" and progress.step == 1:
            with encoded:
                before = rehearsed + 1 + len(overlaps)
                overlaps.append(encoded.wait_for(lambda: counts["voice"] > before, timeout=300))

    def note() -> None:
        nonlocal rehearsed
        rehearsed = counts["voice"]
        ready.set()

    rehearsed = 0
    voice = runtime.LiveVoice(RATE, blocks(noise(5.0)))
    longer = {**SMALL, "window_seconds": 1.6}  # a machine that stops for 3 s is not too slow
    with engine.live(FACE, voice, on_ready=note, on_progress=wait_for_the_next, **longer) as stream:
        next(stream)
    assert overlaps[0]
    assert counts["text"] == counts["image"] == 1


def test_a_face_that_is_told_nothing_moves(engine):
    voice = runtime.LiveVoice(16_000)
    chunks = []
    with engine.live(FACE, voice, **SMALL) as stream:
        for chunk in stream:
            chunks.append(chunk)
            if len(chunks) == 3:
                voice.close()
    sound = check_row(chunks)
    assert not sound.any() and len(chunks) >= 3
    frames = np.concatenate([chunk.frames for chunk in chunks if not chunk.is_last])
    moved = np.abs(np.diff(frames.astype(int), axis=0)).mean((1, 2, 3))
    assert (moved > 0).all()


def test_an_engine_that_is_too_slow_says_so(engine):
    """It takes longer windows, and where these do not help repeats frames, with their sound."""
    ready = threading.Event()

    def dawdle(progress: runtime.Progress) -> None:
        if ready.is_set() and progress.stage == "denoise" and progress.step == 1:
            time.sleep(1.5)

    voice = noise(5.0)
    source = runtime.LiveVoice(RATE, blocks(voice))
    with engine.live(FACE, source, on_ready=ready.set, on_progress=dawdle, **SMALL) as stream:
        chunks = list(stream)
    sound = check_row(chunks)
    np.testing.assert_allclose(sound[:, 0], sound_of(voice, len(sound)), atol=1e-5)
    lengths = {n / 25 for n in lengths_of(0.64)}
    made = [chunk for chunk in chunks if not chunk.repeated]
    assert {chunk.window_s for chunk in made} <= lengths
    assert made[0].window_s == min(lengths) < max(chunk.window_s for chunk in made)
    assert chunks[0].late and all(chunk.late for chunk in chunks if chunk.repeated)
    repeated = [chunk for chunk in chunks if chunk.repeated]
    assert repeated
    for chunk in repeated:
        assert (chunk.frames == chunks[chunk.index - 1].frames[-1]).all()


def endless(closed: threading.Event, given: list[int]):
    try:
        for index in itertools.count():
            given.append(index)
            yield np.zeros(2048, np.float32)
    finally:
        closed.set()


@pytest.mark.parametrize("how", ["close", "cancel", "forget"])
def test_what_is_cancelled_ends(engine, how):
    closed, cancel, given = threading.Event(), threading.Event(), []
    voice = runtime.LiveVoice(RATE, endless(closed, given))
    stream = engine.live(FACE, voice, cancel=cancel, **SMALL)
    next(stream)
    if how == "close":
        stream.close()
        assert engine.queue_length == 0
        assert next(stream, None) is None
    elif how == "cancel":
        cancel.set()
        with pytest.raises(runtime.Cancelled):
            list(stream)
        assert engine.queue_length == 0
    else:
        del stream
    assert closed.wait(300)
    voice.feed(np.zeros(100, np.float32))  # nobody's any more, and no error


def test_chunks_that_nobody_takes_hold_the_session_up(engine):
    closed, given = threading.Event(), []
    with engine.live(FACE, runtime.LiveVoice(RATE, endless(closed, given)), **SMALL):
        known, since = 0, time.monotonic()
        while time.monotonic() - since < 2:
            if len(given) != known:
                known, since = len(given), time.monotonic()
            assert len(given) < 25 * 12  # seconds: of some windows, and what is ahead of them
            time.sleep(0.05)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "image must be"),
        ({"voice": np.zeros(100, np.float32)}, "must be a LiveVoice"),
        ({"audio": "voice.wav"}, "audio must be left out"),
        ({"seconds": 5}, "seconds must be left out"),
        ({"continue_from": "a.mp4"}, "continue_from must be left out"),
        ({"window_seconds": 0.5}, "window_seconds must be 0.64 to 4"),
        ({"window_seconds": True}, "window_seconds must be"),
        ({"window_seconds": float("nan")}, "window_seconds must be"),
        ({"width": 8}, "width must be"),
        ({"prompt": " "}, "prompt must be"),
        ({"guidance": 3.0}, "guidance must stay unset"),
    ],
)
def test_what_cannot_speak(engine, options, message):
    asked = {"image": FACE, "voice": runtime.LiveVoice(16_000), **SMALL, **options}
    with pytest.raises(runtime.InvalidRequestError, match=message):
        engine.live(**asked)
    assert engine.queue_length == 0


@pytest.mark.parametrize("rate", [0, 7999, 192_001, 16_000.0, True, "16000", None])
def test_rates_that_are_none(rate):
    with pytest.raises(runtime.InvalidRequestError, match="sample_rate_hz must be a whole number"):
        runtime.LiveVoice(rate)


NO_SAMPLES = [
    (np.zeros((10, 2), np.float32), "mono"),
    ([0.0, 0.1], "mono"),
    (0.5, "mono"),
    (np.zeros(10), "float32 or int16, got float64"),
    (np.zeros(10, np.uint8), "float32 or int16"),
    (np.array([0, np.nan], np.float32), "finite"),
    (np.array([0, -np.inf], np.float32), "finite"),
    (np.full(10, 9, np.float32), "8 times full scale"),
]


@pytest.mark.parametrize(("samples", "message"), NO_SAMPLES)
def test_samples_that_are_none(samples, message):
    with pytest.raises(runtime.InvalidRequestError, match=message):
        runtime.LiveVoice(16_000).feed(samples)


def test_a_source_that_gives_no_samples_or_fails(engine):
    def broken():
        yield np.zeros(2048, np.float32)
        raise OSError("the microphone has been pulled out")

    voice = runtime.LiveVoice(RATE, broken())
    with pytest.raises(OSError, match="pulled out"), engine.live(FACE, voice, **SMALL) as stream:
        list(stream)
    voice = runtime.LiveVoice(RATE, [np.zeros(2048)])
    with (
        pytest.raises(runtime.InvalidRequestError, match="float32"),
        engine.live(FACE, voice, **SMALL) as stream,
    ):
        list(stream)
    with pytest.raises(runtime.InvalidRequestError, match="put an array into a list"):
        runtime.LiveVoice(RATE, np.zeros(100, np.float32))
    with pytest.raises(runtime.InvalidRequestError, match="of one session"):
        engine.live(FACE, voice, **SMALL)


def test_a_window_that_fails_ends_the_session(engine):
    """While the next one waits for its voice."""
    ready = threading.Event()

    def fail(progress: runtime.Progress) -> None:
        if ready.is_set() and progress.stage == "decode_video":
            raise ValueError("the hook does not want to")

    voice = runtime.LiveVoice(RATE)
    voice.feed(noise(0.7))
    stream = engine.live(FACE, voice, on_ready=ready.set, on_progress=fail, **SMALL)
    with pytest.raises(ValueError, match="does not want to"):
        next(stream)
    assert engine.queue_length == 0 and next(stream, None) is None


def test_an_image_that_is_none(engine, tmp_path):
    path = tmp_path / "face.png"
    path.write_bytes(b"no picture")
    with (
        pytest.raises(runtime.InvalidRequestError, match="image"),
        engine.live(path, runtime.LiveVoice(RATE), **SMALL) as stream,
    ):
        next(stream)
    assert engine.queue_length == 0


# -- event loops ----------------------------------------------------------------------------------


def test_an_event_loop_s_own_source(engine):
    voice = noise(1.0)

    async def source():
        for block in blocks(voice):
            yield block
            await asyncio.sleep(0)

    async def run() -> list[runtime.LiveChunk]:
        async with engine.alive(FACE, runtime.LiveVoice(RATE, source()), **SMALL) as chunks:
            return [chunk async for chunk in chunks]

    chunks = asyncio.run(run())
    sound = check_row(chunks)
    np.testing.assert_allclose(sound[:, 0], sound_of(voice, len(sound)), atol=1e-5)
    with pytest.raises(runtime.InvalidRequestError, match=r"call alive\(\)"):
        engine.live(FACE, runtime.LiveVoice(RATE, source()), **SMALL)


def test_an_async_source_that_waits_is_ended_with_the_session(engine):
    async def run() -> bool:
        closed = asyncio.Event()

        async def source():
            try:
                yield np.zeros(2048, np.float32)
                await asyncio.Event().wait()
            finally:
                closed.set()

        async with engine.alive(FACE, runtime.LiveVoice(RATE, source()), **SMALL) as chunks:
            await anext(chunks)
        return await asyncio.wait_for(closed.wait(), 60)

    assert asyncio.run(run())
    assert engine.queue_length == 0


# -- the clock of a voice -------------------------------------------------------------------------


def test_what_is_fed_in_time_is_not_parted():
    voice = runtime.LiveVoice(RATE)
    voice.begin()
    samples = noise(1.0)
    for block in blocks(samples, 1000):
        voice.feed(block)
    voice.wait(20 * LATENT, Limits())
    np.testing.assert_array_equal(voice.samples(0, 20 * LATENT), samples[: 20 * LATENT])
    voice.use(10 * LATENT)
    part = voice.samples(10 * LATENT - 512, 20 * LATENT)
    np.testing.assert_array_equal(part, samples[10 * LATENT - 512 : 20 * LATENT])
    assert voice.ahead_s == pytest.approx((len(samples) - 10 * LATENT) / RATE)


def test_what_is_not_fed_is_silence_until_it_is():
    voice, samples = runtime.LiveVoice(RATE), noise(0.2)
    voice.begin()
    voice.feed(samples)
    voice.wait(10 * LATENT, Limits())  # 0.4 s, of which half is there
    assert voice.samples(0, len(samples)).any()
    assert not voice.samples(len(samples), 10 * LATENT).any()
    time.sleep(0.3)
    voice.feed(samples)
    voice.close()
    spoken = np.flatnonzero(voice.samples(10 * LATENT + 16, voice.length))
    assert spoken[0] > 0 and spoken[-1] - spoken[0] < len(samples)  # after what nobody spoke
    np.testing.assert_array_equal(voice.samples(voice.length - len(samples), voice.length), samples)


def test_a_source_that_was_held_up_is_not_silent():
    """However long ago it was asked for more."""
    voice = runtime.LiveVoice(RATE)
    voice.begin()
    voice.feed(noise(1.0))
    time.sleep(0.5)
    assert not voice.has_room(0.5)
    feeding = threading.Timer(0.6, lambda: voice.put(noise(1.0, seed=2)))
    feeding.start()
    voice.wait(45 * LATENT, Limits())
    np.testing.assert_array_equal(voice.samples(RATE, 2 * RATE), noise(1.0, seed=2))
    voice.use(45 * LATENT)
    assert voice.has_room(0.5)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_other_rates_and_whole_numbers(rate):
    times = np.arange(rate) / rate
    voice = runtime.LiveVoice(rate)
    for block in np.array_split(np.sin(2 * np.pi * 220 * times) * 16_000, 50):
        voice.feed(block.astype(np.int16))
    voice.close()
    voice.close()
    assert abs(voice.length - RATE) <= 64
    wanted = np.sin(2 * np.pi * 220 * np.arange(RATE) / RATE) * 16_000 / 32768
    found = voice.samples(0, RATE)[1000:-1000]
    assert np.abs(found - wanted[1000:-1000]).max() < 0.01
    with pytest.raises(runtime.InvalidRequestError, match="closed"):
        voice.feed(np.zeros(10, np.int16))


def test_no_more_may_wait_than_half_a_minute():
    voice = runtime.LiveVoice(8_000)
    for _ in range(30):
        voice.feed(np.zeros(7_990, np.int16))
    with pytest.raises(runtime.QueueFull, match="30 s"):
        voice.feed(np.zeros(8_000, np.int16))


def test_super_resolution_goes_on_too(tiny_dir):
    small = {**SMALL, "sr_width": 96, "sr_height": 96, "sr_steps": 1}
    with runtime.load(tiny_dir, sr="540p", device="cpu") as sr:
        voice = runtime.LiveVoice(RATE, blocks(noise(1.0)))
        with sr.live(FACE, voice, **small) as stream:
            chunks = list(stream)
    check_row(chunks)
    assert chunks[0].frames.shape[1:] == (96, 96, 3) and len(chunks) >= 2
