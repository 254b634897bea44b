"""Window after window of a picture that speaks, none of them further behind its voice than need be.

Two windows are under way at most: the voice of the next is encoded while the one before has the
device. `LiveOptions.lengths` are what windows may last. Where the device falls behind they become
longer, which costs less a second; where that does not do, frames are repeated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from magihuman.runtime import config
from magihuman.runtime.engine.live.chunk import LiveChunk
from magihuman.runtime.engine.live.options import STRIDE, LiveOptions
from magihuman.runtime.engine.live.voice import LiveVoice
from magihuman.runtime.errors import Cancelled
from magihuman.runtime.pipeline import LATENT_SAMPLES, Frames, Limits, Waveform
from magihuman.runtime.request import MAX_SEED, Request, Video
from magihuman.runtime.threads import spawn

Emit = Callable[[LiveChunk], None]
Begin = Callable[[Request], Callable[[], Video]]  # takes a place in the queue, and gives the work
Costs = dict[int, float]  # seconds that a window of so many frames takes
SILENCE = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Part:
    """A stretch of the voice, and what is made of it.

    Attributes:
        first: of the frames that are handed over, from the beginning.
        length: frames of the window, beside the one that it goes on from.
        keep: frames of it that are handed over.
        due_s: when its last sound is spoken, by `time.monotonic`.
        came_s: when its first sound came.
        voice: mono at 51.2 kHz, that of the frame which it goes on from among it.
        sound: of the frames that are handed over.
        is_last: whether the voice ends here.
    """

    first: int
    length: int
    keep: int
    due_s: float
    came_s: float
    voice: Waveform = field(repr=False)
    sound: Waveform = field(repr=False)
    is_last: bool


class Session:
    """One picture that speaks, from its first window to its last."""

    def __init__(
        self,
        begin: Begin,
        begin_again: Callable[[], None],
        voice: LiveVoice,
        options: LiveOptions,
        limits: Limits,
        costs: Costs,
    ) -> None:
        """begin: of the engine, a window. begin_again: has the next window be a first one. limits:
        end all of it. costs: known from a session before, and noted for the next.
        """
        self._begin, self._begin_again, self._limits = begin, begin_again, limits
        self._voice, self._options, self._costs = voice, options, costs
        self._longer = 0  # which of the lengths is in use
        self._made = 0  # frames that have been handed over, or will be
        self._index = self._windows = 0
        self._free_s = 0.0  # when the device will be free
        self._ended_s = 0.0  # when the last window had been made
        self._last: Frames | None = None  # the last frame that was handed over
        self._is_over = False

    def run(self, emit: Emit, pump: Callable[[], Future[None] | None]) -> None:
        """Make all chunks, in order. pump: starts to take the voice from its source, if it has one.

        Raises what a window raises, or the source of the voice.
        """
        working: list[Future[None]] = []
        pumping: Future[None] | None = None
        try:
            self._rehearse()
            self._voice.begin()
            pumping = pump()
            if self._options.on_ready is not None:
                self._options.on_ready()
            while not self._is_over:
                self._catch_up(working, emit)
                part = self._cut()
                if part is None:
                    break
                work = self._begin(self._request(part.voice, part.length))
                before = working[-1] if working else None
                working = [*working[-1:], spawn(partial(self._make, part, work, before, emit))]
                if before is not None:
                    before.result()
            settle(working)
            if not self._is_over:
                self._repeat(1, emit, is_last=True)
        except Cancelled:
            self._limits.stop.set()
            wait(working)
            for future in working:  # one that has failed has ended the others
                error = future.exception()
                if error is not None and not isinstance(error, Cancelled):
                    raise error from None
            raise
        finally:
            self._voice.leave()
            self._limits.stop.set()
            wait(working)
            if pumping is not None:
                pumping.cancel()

    def _rehearse(self) -> None:
        """Make windows of silence, so that graphs are captured and caches filled, and throw them
        away: once for an engine all lengths, and each time what reads the image and the prompt.
        """
        lengths = self._options.lengths
        missing = [length for length in lengths if length not in self._costs]
        for length in [lengths[0], *missing]:
            voice = np.zeros((length + 1) * LATENT_SAMPLES, np.float32)
            start_s = time.monotonic()
            self._begin(self._request(voice, length))()
            # Capturing graphs is part of it: no more than what it takes to keep up.
            self._costs[length] = min(time.monotonic() - start_s, length / config.FPS)
        self._windows = 0
        self._begin_again()

    def _catch_up(self, working: list[Future[None]], emit: Emit) -> None:
        """Repeat the last frame as long as the device is too far behind the voice, and choose how
        long the next window is.
        """
        lengths = self._options.lengths
        most_s = lengths[-1] / config.FPS
        if self._made and self._behind_s() > most_s:
            settle(working)
            self._free_s = 0.0
            if self._behind_s() > most_s:
                self._longer = len(lengths) - 1
            while (behind_s := self._behind_s()) > most_s:
                self._repeat(min(int(behind_s * config.FPS), lengths[-1]), emit, is_last=False)
        self._adapt()

    def _behind_s(self) -> float:
        """How long the voice of the shortest window will have waited once the device is free."""
        length = self._options.lengths[0]
        wait_s = max(0.0, self._free_s - time.monotonic())
        return self._voice.behind_s((self._made + length) * LATENT_SAMPLES) + wait_s

    def _adapt(self) -> None:
        """Choose the length of the next window."""
        behind_s, lengths = self._behind_s(), self._options.lengths
        if behind_s > lengths[0] / config.FPS / 2:
            self._longer = min(self._longer + 1, len(lengths) - 1)
        elif behind_s <= 0:
            self._longer = max(self._longer - 1, 0)

    def _cut(self) -> Part | None:
        """Wait for the voice of the next window; None where it has ended with the one before."""
        voice, length = self._voice, self._options.lengths[self._longer]
        begin = max(0, self._made - 1)  # the frame that it goes on from
        end = begin + length + 1
        voice.wait(end * LATENT_SAMPLES, self._limits)
        keep, total = end - self._made, voice.length
        if total is not None and total <= end * LATENT_SAMPLES:
            keep = math.ceil(total / LATENT_SAMPLES) - self._made
            if keep <= 0 and self._made:
                return None
            keep, self._is_over = max(1, keep), True
        heard = voice.samples(begin * LATENT_SAMPLES, end * LATENT_SAMPLES)
        part = self._part(length, keep, end, self._is_over, heard)
        self._free_s = max(self._free_s, time.monotonic()) + self._costs[length]
        return part

    def _part(
        self, length: int, keep: int, end: int, is_last: bool, heard: Waveform = SILENCE
    ) -> Part:
        """The next frames, `keep` of them, whose voice is used up then. end: of what is made."""
        voice, first = self._voice, self._made
        part = Part(
            first=first,
            length=length,
            keep=keep,
            due_s=voice.due_s(end * LATENT_SAMPLES),
            came_s=voice.came_s(first * LATENT_SAMPLES),
            voice=heard,
            sound=voice.sound(first, keep),
            is_last=is_last,
        )
        self._made += keep
        voice.use((self._made - 1) * LATENT_SAMPLES)
        return part

    def _request(self, voice: Waveform, length: int) -> Request:
        like = self._options.request
        seed = (like.seed + self._windows) % (MAX_SEED + 1)
        self._windows += 1
        return replace(like, audio=voice, seconds=length / config.FPS, seed=seed)

    def _make(
        self, part: Part, work: Callable[[], Video], before: Future[None] | None, emit: Emit
    ) -> None:
        """Make a window, and hand it over after the one before."""
        try:
            start_s = time.monotonic()
            frames = work().frames
            end_s = time.monotonic()
            self._costs[part.length] = end_s - max(start_s, self._ended_s)
            self._ended_s = end_s
            if before is not None:
                before.result()
            if self._last is not None:
                frames = joined(self._last, frames)
            self._hand_over(part, frames[: part.keep], emit)
        except BaseException:
            self._limits.stop.set()  # ends what waits for the voice
            raise

    def _repeat(self, count: int, emit: Emit, is_last: bool) -> None:
        """Hand over the last frame again, with the voice of that time."""
        assert self._last is not None
        part = self._part(count, count, self._made + count, is_last)
        self._hand_over(part, np.repeat(self._last[None], count, axis=0), emit, repeated=count)

    def _hand_over(self, part: Part, frames: Frames, emit: Emit, repeated: int = 0) -> None:
        now = time.monotonic()
        self._last = frames[-1].copy()
        index, self._index = self._index, self._index + 1
        emit(
            LiveChunk(
                frames=frames,
                first_frame=part.first,
                audio=part.sound,
                fps=config.FPS,
                sample_rate_hz=config.SAMPLE_RATE_HZ,
                is_last=part.is_last,
                seed=self._options.request.seed,
                index=index,
                start_s=part.first / config.FPS,
                window_s=part.length / config.FPS,
                delay_s=now - part.came_s,
                late=now > part.due_s + part.length / config.FPS,
                repeated=repeated,
            )
        )


def settle(working: Iterable[Future[None]]) -> None:
    """Wait for windows, and raise what the first of them has raised."""
    for future in working:
        future.result()


def joined(last: Frames, frames: Frames) -> Frames:
    """The frames of a window behind the first, which is that of `last`: what the two differ by is
    faded out over the next ones.
    """
    after = frames[1:]
    differs = last.astype(np.float32) - frames[0]
    for index in range(min(STRIDE - 1, len(after))):
        share = 1 - (index + 1) / STRIDE
        after[index] = (after[index] + share * differs).round().clip(0, 255).astype(np.uint8)
    return after
