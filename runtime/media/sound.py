"""A driving voice from a file, read through PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from magihuman.runtime.errors import InvalidRequestError

MAX_BLOCK_VALUES = 2**26  # 256 MiB of floats; what is recorded has some 10,000 in a block


def read_audio(
    path: str | os.PathLike[str],
    sample_rate_hz: int,
    limit_s: float,
    formats: Sequence[str] | None = None,
) -> npt.NDArray[np.float32]:
    """Decode a sound file to mono float32 at this rate; what lies beyond `limit_s` is not read.

    formats: FFmpeg's names of those to read, by default all, of which playlists open other files.
    """
    import av

    if not isinstance(path, (str, os.PathLike)):
        raise InvalidRequestError(f"audio must be a path, got a {type(path).__name__}")
    source = Path(path)
    if not os.path.isfile(source):
        state = "is not a file" if os.path.exists(source) else "does not exist"
        raise InvalidRequestError(f"audio must be a readable file, got {source}, which {state}")
    if source.stat().st_size == 0:
        raise InvalidRequestError(f"audio must not be empty, got {source} of 0 bytes")
    blocks: list[npt.NDArray[np.float32]] = []
    samples = 0
    options = {} if formats is None else {"format_whitelist": ",".join(formats)}
    try:
        with av.open(str(source), container_options=options) as container:
            if not container.streams.audio:
                raise InvalidRequestError(
                    f"audio must have a sound track, got {source} without one"
                )
            resampler = av.AudioResampler(format="fltp", rate=sample_rate_hz)
            for frame in _decoded(container):
                _check_block(frame, sample_rate_hz, source)
                for out in resampler.resample(frame):
                    block = _mono(out)
                    blocks.append(block)
                    samples += len(block)
                if samples >= limit_s * sample_rate_hz:
                    break
            blocks += [_mono(out) for out in resampler.resample(None)]
    except av.FFmpegError as error:
        raise InvalidRequestError(
            f"audio must be in a format FFmpeg reads (WAV, MP3, FLAC, ...), got {source}:"
            f" {error.strerror}"
        ) from error
    if not blocks:
        raise InvalidRequestError(f"audio must have sound in it, got {source} with no samples")
    wave = np.concatenate(blocks)
    if not np.isfinite(wave).all():
        raise InvalidRequestError(
            f"audio must be finite, got {source} with NaN or infinite samples"
        )
    return wave


def _check_block(frame: Any, sample_rate_hz: int, source: Path) -> None:
    """Refuse a block that few bytes blow up, as a decoder can, or samples at 1 Hz resampled."""
    channels, given_hz = frame.layout.nb_channels, frame.sample_rate
    values = frame.samples * channels * max(1.0, sample_rate_hz / max(1, given_hz))
    if values > MAX_BLOCK_VALUES:
        raise InvalidRequestError(
            f"audio must come in blocks of no more than {MAX_BLOCK_VALUES} values at"
            f" {sample_rate_hz} Hz, got {source} with {frame.samples} samples of {channels}"
            f" channels at {given_hz} Hz; save it at 8000 Hz or more, in mono or stereo"
        )


def _mono(frame: Any) -> npt.NDArray[np.float32]:
    """The mean of a frame's channels; FFmpeg's own downmix is louder, beyond [-1, 1]."""
    return np.asarray(frame.to_ndarray().mean(axis=0), dtype=np.float32)


def _decoded(container: Any) -> Iterator[Any]:
    """Frames of the first sound track; a damaged tail ends the sound, as players have it."""
    import av

    decoded = 0
    try:
        for frame in container.decode(audio=0):
            decoded += 1
            yield frame
    except av.FFmpegError:
        if not decoded:
            raise
