"""A voice that is still coming: fed from any thread, on the clock of those who listen."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterable, Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.signal

from magihuman.runtime import config
from magihuman.runtime.errors import InvalidRequestError, QueueFull, shown
from magihuman.runtime.media import MAX_PEAK
from magihuman.runtime.pipeline import LATENT_SAMPLES, Limits, Waveform

RATE = config.LATENT_AUDIO_RATE_HZ
UP, DOWN = 441, 512  # from that to the rate of what is handed over
FRAME_SAMPLES = config.SAMPLE_RATE_HZ // config.FPS
MIN_RATE_HZ, MAX_RATE_HZ = config.MIN_LIVE_RATE_HZ, config.MAX_LIVE_RATE_HZ
MOST_AHEAD_S = 30.0  # that may be fed and not yet used
QUIET_S = 0.2  # without a sample, after which there is silence
REACH = 16  # samples beyond a frame that its sound is made from

Samples = npt.NDArray[np.float32] | npt.NDArray[np.int16]
Source = Iterable[Samples] | AsyncIterable[Samples]


class LiveVoice:
    """A voice that `Engine.live` follows while it is spoken: `feed` it, and `close` it at its end.

    What is not fed in time is silence, and the face idles. For one session.
    """

    def __init__(self, sample_rate_hz: int, source: Source | None = None) -> None:
        """sample_rate_hz: 8000 to 192000. source: an iterator, or for `Engine.alive` an async one,
        of the samples, as `feed` takes them, in place of calls of that; its end closes the voice.

        Raises `InvalidRequestError`.
        """
        is_whole = isinstance(sample_rate_hz, (int, np.integer))
        if (
            not is_whole
            or isinstance(sample_rate_hz, bool)
            or not MIN_RATE_HZ <= sample_rate_hz <= MAX_RATE_HZ
        ):
            raise InvalidRequestError(
                f"sample_rate_hz must be a whole number from {MIN_RATE_HZ} to {MAX_RATE_HZ}, got"
                f" {shown(sample_rate_hz)}"
            )
        if isinstance(source, np.ndarray) or not (
            source is None or isinstance(source, (Iterable, AsyncIterable))
        ):
            raise InvalidRequestError(
                "source must be an iterator of arrays of samples, got"
                f" {type(source).__name__}; put an array into a list"
            )
        self.rate_hz, self.source = int(sample_rate_hz), source
        self._changed = threading.Condition()
        self._resampler = _Resampler(self.rate_hz)
        self._blocks: deque[Waveform] = deque()
        self._begin = self._end = 0  # of the blocks, in samples from the beginning of the voice
        self._used = 0
        self._came: deque[tuple[int, float]] = deque()  # up to where, and when
        self._zero_s: float | None = None  # when the voice's beginning was spoken
        self._fed_s = 0.0
        self._is_closed = self._is_over = self._is_taken = False
        self._is_idle = self._is_held = False
        self._error: BaseException | None = None

    def feed(self, samples: Samples) -> None:
        """Add what was spoken since the last call: mono [n], float32 of about [-1, 1] or int16.

        Returns at once. Once the session has ended, nothing is done with it.

        Raises:
            InvalidRequestError: they are none, or the voice is closed.
            QueueFull: 30 s wait already.
        """
        mono = checked(samples)
        with self._changed:
            if self._is_over:
                return
            if self._is_closed:
                raise InvalidRequestError("a voice that is closed must be fed no more")
            if self.ahead_s + len(mono) / self.rate_hz > MOST_AHEAD_S:
                raise QueueFull(
                    f"no more than {MOST_AHEAD_S:g} s of a voice may wait; feed it as it is spoken"
                )
            self._feed(mono)

    def close(self) -> None:
        """Say that the voice ends here. A second time does nothing."""
        with self._changed:
            if not self._is_closed:
                self._is_closed = True
                self._add(self._resampler.finish(), time.monotonic())

    # -- of the session that follows it -----------------------------------------------------------

    def take(self) -> None:
        """Be followed by a session. Raises `InvalidRequestError` where another does or did."""
        with self._changed:
            if self._is_taken:
                raise InvalidRequestError("a LiveVoice must be of one session; make another")
            self._is_taken = True

    def begin(self) -> None:
        """Start the clock, where no sample has."""
        with self._changed:
            now = time.monotonic()
            self._fed_s = max(self._fed_s, now)
            if self._zero_s is None:
                self._zero_s = now

    def leave(self) -> None:
        """Take no more of it: the session has ended."""
        with self._changed:
            self._is_over = True
            self._blocks.clear()
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Have the session raise this."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def put(self, samples: object) -> bool:
        """`feed`, without a bound: `ahead_s` is for the caller. Returns whether more is wanted."""
        mono = checked(samples)
        with self._changed:
            if not self._is_over:
                self._feed(mono)
            return not self._is_over

    def has_room(self, most_s: float) -> bool:
        """Whether `put` may be called, where no more than so many seconds are to be ahead.

        Where it may not, samples are held for it, and there is no silence in their place.
        """
        with self._changed:
            self._is_held = self.ahead_s > most_s and not self._is_over
            return not self._is_held

    @property
    def ahead_s(self) -> float:
        """Seconds that are here and not yet used."""
        return (self._end - self._used) / RATE

    @property
    def length(self) -> int | None:
        """Samples that it has, once it is closed."""
        return self._end if self._is_closed else None

    def behind_s(self, end: int) -> float:
        """How long ago the sample `end` came; below 0 where it has not yet."""
        with self._changed:
            assert self._zero_s is not None
            return min(time.monotonic() - self._zero_s - end / RATE, (self._end - end) / RATE)

    def due_s(self, end: int) -> float:
        """When the sample `end` is spoken, by `time.monotonic`."""
        assert self._zero_s is not None
        return self._zero_s + end / RATE

    def came_s(self, sample: int) -> float:
        """When a sample came, by `time.monotonic`."""
        with self._changed:
            return next((at for end, at in self._came if end > sample), time.monotonic())

    def wait(self, end: int, limits: Limits) -> None:
        """Return once there are samples up to `end`, silence among them where none come in time.

        A voice that is closed is as long as it is. Raises what the source has raised, and what
        `Limits.check` does.
        """
        end += REACH
        with self._changed:
            has_waited, began_s = False, time.monotonic()
            while self._end < end and not self._is_closed:
                limits.check()
                self._check()
                now = time.monotonic()
                # In a pause there is silence at once; else a source that was held up goes first.
                quiet_s = self._fed_s if self._is_idle else max(self._fed_s, began_s)
                if not self._is_held and now >= max(self.due_s(end), quiet_s + QUIET_S):
                    if not self._is_idle:
                        self._follow(end, now)
                    self._is_idle, has_waited = True, False
                    self._add(np.zeros(end - self._end, np.float32), now)
                    break
                has_waited = True
                due_s = self.due_s(end) - now
                self._changed.wait(min(limits.look_s(), due_s) if due_s > 0 else limits.look_s())
            self._check()
            if has_waited and not self._is_closed:
                self._follow(end, time.monotonic())

    def samples(self, begin: int, end: int) -> Waveform:
        """Samples `begin` to `end`, with silence where there are none."""
        with self._changed:
            parts, at = [], self._begin
            for block in self._blocks:
                parts.append(block[max(0, begin - at) : max(0, end - at)])
                at += len(block)
        found = np.concatenate([np.zeros(max(0, min(end, 0) - begin), np.float32), *parts])
        return np.pad(found, (0, end - begin - len(found)))

    def sound(self, first: int, frames: int) -> Waveform:
        """The sound of frames, float32 [frames * 1764, 2], as it came."""
        begin, end = first * LATENT_SAMPLES, (first + frames) * LATENT_SAMPLES
        wave = scipy.signal.resample_poly(self.samples(begin - DOWN, end + REACH), UP, DOWN)
        mono = wave[UP : UP + frames * FRAME_SAMPLES].astype(np.float32)
        return np.repeat(mono[:, None], 2, axis=1)

    def use(self, end: int) -> None:
        """Forget what is before the sample `end`, but for what the sound after it is made from."""
        with self._changed:
            self._used = min(end, self._end)
            while self._blocks and self._begin + len(self._blocks[0]) <= end - DOWN:
                self._begin += len(self._blocks.popleft())
            while self._came and self._came[0][0] <= end:
                self._came.popleft()

    def _feed(self, mono: Waveform) -> None:
        now = time.monotonic()
        spoken_s = now - len(mono) / self.rate_hz
        if not self._end:
            self._zero_s = spoken_s
        elif self._is_idle and self._zero_s is not None:
            gap = round((spoken_s - self._zero_s) * RATE) - self._end
            self._add(np.zeros(max(0, gap), np.float32), now)
        self._is_idle = self._is_held = False
        self._fed_s = now
        self._add(self._resampler.add(mono), now)

    def _add(self, block: Waveform, now: float) -> None:
        if len(block):
            self._blocks.append(block)
            self._end += len(block)
            self._came.append((self._end, now))
        self._changed.notify_all()

    def _follow(self, end: int, now: float) -> None:
        """Set the clock to a source that is late: its samples cannot come earlier from now on."""
        assert self._zero_s is not None
        self._zero_s = max(self._zero_s, now - end / RATE)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


class _Resampler:
    """Mono samples of one rate to 51.2 kHz, block by block."""

    def __init__(self, rate_hz: int) -> None:
        self._rate_hz, self._given = rate_hz, 0
        self._graph: Any = None

    def add(self, mono: Waveform) -> Waveform:
        """What they are at 51.2 kHz, as far as the next ones do not matter."""
        if self._rate_hz == RATE or not len(mono):
            return mono
        import av

        if self._graph is None:
            self._graph = av.AudioResampler(format="fltp", layout="mono", rate=RATE)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(mono[None]), format="fltp", layout="mono"
        )
        frame.sample_rate, frame.time_base = self._rate_hz, Fraction(1, self._rate_hz)
        frame.pts, self._given = self._given, self._given + len(mono)
        return _joined(self._graph.resample(frame))

    def finish(self) -> Waveform:
        """What is left."""
        graph, self._graph = self._graph, None
        return np.zeros(0, np.float32) if graph is None else _joined(graph.resample(None))


def _joined(frames: list[Any]) -> Waveform:
    parts = [frame.to_ndarray()[0] for frame in frames]
    return np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32)


def checked(samples: object) -> Waveform:
    """Samples as float32, a copy. Raises `InvalidRequestError` for what `LiveVoice` cannot take."""
    if not isinstance(samples, np.ndarray) or samples.ndim != 1:
        shape = f"an array {samples.shape}" if isinstance(samples, np.ndarray) else shown(samples)
        raise InvalidRequestError(f"a voice must come as mono arrays [n], got {shape}")
    if samples.dtype == np.int16:
        return (samples / np.float32(32768)).astype(np.float32)
    if samples.dtype != np.float32:
        raise InvalidRequestError(
            f"a voice must be float32 or int16, got {samples.dtype}; convert it by astype"
        )
    peak = float(np.abs(samples).max(initial=0.0))
    if not math.isfinite(peak):
        raise InvalidRequestError("a voice must be finite, got NaN or infinity in it")
    if peak > MAX_PEAK:
        raise InvalidRequestError(
            f"a voice must be within {MAX_PEAK:g} times full scale, got {peak:.6g}; scale it to"
            " -1 to 1"
        )
    return samples.astype(np.float32)
