"""Sound from a file, read through PyAV: mono, at one rate, from its beginning to its end."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.media.downmix import MAX_CHANNELS, Wave, mix, samples_of
from magihuman.runtime.media.guard import LOCAL, checked_file, freed, readable, tolerant
from magihuman.runtime.media.ogg import Span, links

MAX_BLOCK_VALUES = 2**26  # 256 MiB of floats; what is recorded has some 10,000 in a block
MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000
MAX_PEAK = 8.0  # of full scale, 18 dB above it
# Containers whose clock begins with the clip; the times of others begin anywhere.
TIMED = ("mov", "matroska")
GAP_S = 0.1  # a shorter one in the midst of a track is how its times were rounded
MAX_LATE_S = 60.0  # a file where everything begins later is a piece of a longer one
DEFAULT = 1  # FFmpeg's flag of the track to play


def read_audio(
    path: str | os.PathLike[str],
    sample_rate_hz: int,
    limit_s: float,
    formats: Sequence[str] | None = None,
) -> Wave:
    """Decode a sound file to mono float32 at this rate; what lies beyond `limit_s` is not read.

    Reads 1 to 64 channels (`mix_weights` says how they are mixed) at 1 to 768 kHz, which may change
    on the way, and the links of a chained Ogg file one after the other. Of several tracks it is the
    default one. A track that begins late, and gaps in it, give silence. Damaged packets are left
    out.

    formats: FFmpeg's names of those to read, by default all, of which playlists open other files.
    Raises `InvalidRequestError` for what cannot be decoded, has samples that are not finite or
    beyond 8 times full scale, or lies outside of these ranges.
    """
    source = checked_file("audio", path)
    with readable("audio", str(source)):
        samples = _samples(_Wave(sample_rate_hz, limit_s), source, formats)
    if not len(samples):
        raise InvalidRequestError(f"audio must have sound in it, got {source} with no samples")
    return samples


@freed()
def _samples(wave: _Wave, source: Path, formats: Sequence[str] | None) -> Wave:
    """All links of a file, one after the other."""
    chain = links(source)
    # A damaged link after the first ends the sound, as the damaged end of a file does.
    parts = chain if len(chain) > 1 else [None]
    for index, part in enumerate(parts):
        if not _read_part(wave, source, part, formats, is_first=index == 0):
            break
    return wave.finish()


def _read_part(
    wave: _Wave,
    source: Path,
    part: tuple[int, int] | None,
    formats: Sequence[str] | None,
    is_first: bool,
) -> bool:
    """Add a file, or a link of it, to the sound; whether there is more to read.

    Raises `InvalidRequestError` where the first part has no sound that can be decoded.
    """
    import av

    options = dict(LOCAL)
    if formats is not None:
        options["format_whitelist"] = ",".join(formats)
    opened = {"container_options": options, **tolerant()}
    try:
        with ExitStack() as stack:
            # By its protocol: a name like 12:30.wav would be an address.
            file = f"file:{source.absolute()}" if part is None else Span(source, *part)
            if isinstance(file, Span):
                stack.enter_context(file)
            container = stack.enter_context(av.open(file, **opened))
            track = _track(container)
            if track is None and is_first:
                what = "a codec that FFmpeg decodes" if container.streams.audio else "a sound track"
                raise InvalidRequestError(f"audio must have {what}, got {source} without one")
            if track is None:
                return True
            clock = _Clock(container, wave) if part is None else None
            for frame in _decoded(container, track):
                channels = _checked(frame, wave.rate_hz, source)
                if clock is not None:
                    clock.place(frame)
                    if wave.is_full:
                        return False
                names = tuple(channel.name for channel in frame.layout.channels)
                wave.add(mix(channels, names), frame.sample_rate)
                if wave.is_full:
                    return False
    except av.FFmpegError as error:
        if not is_first:
            return False
        raise InvalidRequestError(
            f"audio must be in a format FFmpeg reads (WAV, MP3, FLAC, ...), got {source}:"
            f" {error.strerror}"
        ) from error
    return True


def _track(container: Any) -> Any:
    """The sound track that is marked as default, else the first; None where there is none.

    Those that no decoder is known for, which PyAV 14.0 crashes over, are none.
    """
    tracks = [track for track in container.streams.audio if track.codec_context is not None]
    if not tracks:
        return None
    if not hasattr(tracks[0], "disposition"):  # PyAV 14.0
        best = container.streams.best("audio")
        return best if best in tracks else tracks[0]
    return next((track for track in tracks if int(track.disposition) & DEFAULT), tracks[0])


def _decoded(container: Any, track: Any) -> Iterator[Any]:
    """The frames of a track, without packets that are damaged; a damaged tail ends it.

    Raises PyAV's error where nothing can be decoded.
    """
    import av

    decoded, failure = 0, None
    packets = container.demux(track)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:
            failure, packet = error, None
        if packet is None:
            break
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            failure = error
            continue
        for frame in frames:
            decoded += 1
            yield frame
    if not decoded and failure is not None:
        raise failure


def _checked(frame: Any, sample_rate_hz: int, source: Path) -> Any:
    """A frame's channels, [channels, samples], after what it says of itself and its samples.

    Of few bytes a decoder can make many, and of samples at 1 Hz the resampler many more. Raises
    `InvalidRequestError`.
    """
    channels, given_hz = frame.layout.nb_channels, frame.sample_rate
    if not MIN_RATE_HZ <= given_hz <= MAX_RATE_HZ:
        raise InvalidRequestError(
            f"audio must have {MIN_RATE_HZ} to {MAX_RATE_HZ} samples a second, got {source} at"
            f" {given_hz} Hz; save it at 48000 Hz"
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise InvalidRequestError(
            f"audio must have 1 to {MAX_CHANNELS} channels, got {source} with {channels}; save it"
            " in mono or stereo"
        )
    if frame.samples * max(channels, sample_rate_hz / given_hz) > MAX_BLOCK_VALUES:
        raise InvalidRequestError(
            f"audio must come in blocks of no more than {MAX_BLOCK_VALUES} values at"
            f" {sample_rate_hz} Hz, got {source} with {frame.samples} samples of {channels}"
            f" channels at {given_hz} Hz; save it as WAV or FLAC"
        )
    samples = samples_of(frame)
    peak = float(np.abs(samples).max(initial=0.0))
    if not math.isfinite(peak):
        raise InvalidRequestError(
            f"audio must be finite, got {source} with NaN or infinite samples"
        )
    if peak > MAX_PEAK:
        raise InvalidRequestError(
            f"audio must have samples within {MAX_PEAK:g} times full scale, got {source} with one"
            f" of {peak:.6g}; scale it to -1 to 1"
        )
    return samples


class _Clock:
    """Where in the sound a track's frames belong, by their times."""

    def __init__(self, container: Any, wave: _Wave) -> None:
        self._wave = wave
        names = container.format.name.split(",")
        self._is_timed = any(name in TIMED for name in names)
        start_s = (container.start_time or 0) / 1e6
        self._zero_s = 0.0 if self._is_timed and start_s <= MAX_LATE_S else start_s
        self._is_first = True

    def place(self, frame: Any) -> None:
        """Fill up to the frame with silence, where it begins late."""
        is_first, self._is_first = self._is_first, False
        if frame.time is None or not (is_first or self._is_timed):
            return
        late_s = float(frame.time) - self._zero_s - self._wave.length_s
        if late_s > (0 if is_first else GAP_S):
            self._wave.add_silence(late_s)


class _Wave:
    """Sound that comes in blocks of any rate, resampled to one. `length_s` is what was added."""

    def __init__(self, rate_hz: int, limit_s: float) -> None:
        self.rate_hz, self.length_s = rate_hz, 0.0
        self._limit = math.ceil(limit_s * rate_hz)
        self._blocks: list[Wave] = []
        self._samples = 0
        self._given_hz, self._given = 0, 0
        self._resampler: Any = None

    @property
    def is_full(self) -> bool:
        """Whether the limit is reached."""
        return self._samples >= self._limit

    def add(self, block: Wave, rate_hz: int) -> None:
        """Mono samples at a rate of their own."""
        import av

        self.length_s += len(block) / rate_hz
        if rate_hz != self._given_hz:
            self._end_run()
            self._given_hz, self._given = rate_hz, 0
        if rate_hz == self.rate_hz:
            self._keep(block)
            return
        if not len(block):
            return
        if self._resampler is None:
            # From mono to mono: FFmpeg's own mixing crashes over some layouts of many channels.
            self._resampler = av.AudioResampler(format="fltp", layout="mono", rate=self.rate_hz)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(block[None]), format="fltp", layout="mono"
        )
        frame.sample_rate, frame.time_base, frame.pts = rate_hz, Fraction(1, rate_hz), self._given
        self._given += len(block)
        for out in self._resampler.resample(frame):
            self._keep(out.to_ndarray()[0])

    def add_silence(self, seconds: float) -> None:
        """As much of it as goes into the limit."""
        self._end_run()
        self.length_s += seconds
        silent = min(round(seconds * self.rate_hz), max(0, self._limit - self._samples))
        self._keep(np.zeros(silent, np.float32))

    def finish(self) -> Wave:
        """All of it, [samples]."""
        self._end_run()
        return np.concatenate([np.zeros(0, np.float32), *self._blocks])

    def _end_run(self) -> None:
        """Have what the resampler still holds."""
        if self._resampler is not None:
            for out in self._resampler.resample(None):
                self._keep(out.to_ndarray()[0])
        self._resampler, self._given_hz, self._given = None, 0, 0

    def _keep(self, block: Wave) -> None:
        self._blocks.append(np.asarray(block, np.float32))
        self._samples += len(block)
