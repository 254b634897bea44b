"""Windows of a clip as fragments of H.264 and AAC, each encoded to its end at once."""

from __future__ import annotations

import io
import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from magihuman.runtime.media.clip import XMP_BOX
from magihuman.runtime.media.fragments.boxes import (
    Run,
    Sample,
    fragment,
    init_segment,
    length_prefixed,
)
from magihuman.runtime.media.guard import freed
from magihuman.runtime.media.mp4 import (
    AUDIO_BLOCK,
    add_aac,
    picture_frames,
    sound_frame,
    tell_colours,
)

# Nothing is kept for later: no pictures that refer to later ones, and no looking ahead.
ENCODER = {"preset": "superfast", "tune": "zerolatency", "crf": "20"}
CONTAINER = {"movflags": "empty_moov+default_base_moof"}
VIDEO_TRACK, AUDIO_TRACK = 1, 2


class Fragments:
    """Encodes windows of a clip, each to what a player can have at once.

    For one thread at a time.
    """

    def __init__(self, fps: int, sample_rate_hz: int) -> None:
        self._fps, self._rate = fps, sample_rate_hz
        self._encoders: _Encoders | None = None
        self._number = 0

    def add(
        self, frames: npt.NDArray[np.uint8], audio: npt.NDArray[np.float32], is_last: bool
    ) -> bytes:
        """Encode the next window: a fragment, behind what a file begins with where it is the first.

        frames: [n, H, W, 3] RGB, n at least 1. audio: [samples, 2], of the same span; of the last
        window, what is longer than its frames is left out. Raises `av.FFmpegError`.
        """
        beginning = b""
        if self._encoders is None:
            self._encoders = _Encoders(frames.shape[2], frames.shape[1], self._fps, self._rate)
            beginning = self._encoders.init
        self._number += 1
        return beginning + fragment(self._number, self._encoders.runs(frames, audio, is_last))

    def close(self) -> None:
        """Free the encoders. May be called again."""
        encoders, self._encoders = self._encoders, None
        if encoders is not None:
            encoders.close()


class FragmentWriter:
    """Writes a fragmented mp4, a fragment for each window, that can be read while it grows.

    For one thread at a time. Whatever ends it, what is written is playable as far as it goes.
    """

    def __init__(self, path: Path, fps: int, sample_rate_hz: int) -> None:
        """Make a file that the user alone can read, in place of what is there. Raises `OSError`."""
        path.unlink(missing_ok=True)
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._file = open(number, "wb", buffering=0)  # noqa: SIM115 - closed with this
        self._fragments = Fragments(fps, sample_rate_hz)
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add(
        self, frames: npt.NDArray[np.uint8], audio: npt.NDArray[np.float32], is_last: bool
    ) -> int:
        """Encode and write the next window, as `Fragments.add` says, and return the bytes of the
        file so far. Raises `OSError` or `av.FFmpegError`.
        """
        self._write(self._fragments.add(frames, audio, is_last))
        return self._bytes

    def close(self) -> None:
        """Close the file, which stays as it is. May be called again."""
        self._file.close()
        self._fragments.close()

    def _write(self, content: bytes) -> None:
        view = memoryview(content)
        while view:
            view = view[self._file.write(view) :]
        self._bytes += len(content)


class _Encoders:
    """Of picture and sound, and how far they are.

    Attributes:
        init: what a file begins with, that a model has made it among that.
    """

    def __init__(self, width_px: int, height_px: int, fps: int, sample_rate_hz: int) -> None:
        import av

        self._fps, self._rate = fps, sample_rate_hz
        self._frames = self._samples = 0  # that have come
        self._rest = np.empty((0, 2), np.float32)  # of the sound, less than a block
        self._begun = {VIDEO_TRACK: 0, AUDIO_TRACK: 0}  # where the next run begins
        file = io.BytesIO()
        # It writes the beginning alone, and stays open for as long as its encoders are needed.
        self._container: Any = av.open(file, "w", format="mp4", options=CONTAINER)
        self._picture = self._container.add_stream("libx264", rate=fps, options=ENCODER)
        self._picture.width, self._picture.height = width_px, height_px
        self._picture.pix_fmt = "yuv420p"
        tell_colours(self._picture.codec_context)
        self._sound = add_aac(self._container, sample_rate_hz)
        self._container.start_encoding()
        self.init = init_segment(file.getvalue()) + XMP_BOX

    def close(self) -> None:
        """Free what they hold."""
        with freed():
            self._container.close()
            self._container = self._picture = self._sound = None

    def runs(
        self, frames: npt.NDArray[np.uint8], audio: npt.NDArray[np.float32], is_last: bool
    ) -> list[Run]:
        """Encode a window: its pictures, and the sound as far as there are whole blocks of it."""
        pictures = self._pictures(frames)
        end = round(self._frames / self._fps * self._rate)
        runs = [
            self._run(VIDEO_TRACK, pictures),
            self._run(
                AUDIO_TRACK, self._blocks(audio[: end - self._samples - len(self._rest)], is_last)
            ),
        ]
        return [run for run in runs if run.samples]

    def _run(self, track: int, samples: list[Sample]) -> Run:
        begin = self._begun[track]
        self._begun[track] += sum(sample.duration for sample in samples)
        return Run(track, begin, samples)

    def _pictures(self, frames: npt.NDArray[np.uint8]) -> list[Sample]:
        """The first can be decoded without those before it."""
        from av.video.frame import PictureType

        duration = round(1 / self._fps / self._picture.time_base)
        samples = []
        for index, frame in enumerate(picture_frames(frames)):
            frame.pts, frame.time_base = self._frames, Fraction(1, self._fps)
            if index == 0:
                frame.pict_type = PictureType.I
            self._frames += 1
            for packet in self._picture.encode(frame):
                units = length_prefixed(bytes(packet))
                samples.append(Sample(units, duration, packet.is_keyframe))
        return samples

    def _blocks(self, audio: npt.NDArray[np.float32], is_last: bool) -> list[Sample]:
        """The encoder's own first block, from before the beginning, is left out."""
        wave = np.concatenate([self._rest, audio])
        whole = len(wave) if is_last else len(wave) // AUDIO_BLOCK * AUDIO_BLOCK
        self._rest = wave[whole:]
        packets = []
        for start in range(0, whole, AUDIO_BLOCK):
            block = wave[start : min(start + AUDIO_BLOCK, whole)].clip(-1, 1)
            packets += self._sound.encode(sound_frame(block, self._rate, self._samples))
            self._samples += len(block)
        if is_last:
            packets += self._sound.encode(None)
        return [
            Sample(bytes(packet), AUDIO_BLOCK, is_sync=True)
            for packet in packets
            if packet.pts >= 0
        ]
