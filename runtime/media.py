"""Files in and out: sound and clips read through PyAV, where a clip is to go checked."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from magihuman.runtime.errors import InvalidRequestError, OutputError

MAX_BLOCK_VALUES = 2**26  # 256 MiB of floats; what is recorded has some 10,000 in a block
BITS_PER_PIXEL = 2  # far above what H.264 needs at this quality, for the check of free space


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
    """Of few bytes a decoder can make many, and of samples at 1 Hz the resampler many more."""
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


def read_frames(path: Path) -> tuple[npt.NDArray[np.uint8], int]:
    """All frames of a file that `write_mp4` wrote, [T, H, W, 3] RGB, and how many are a second."""
    import av

    if not path.is_file():
        raise InvalidRequestError(f"the clip must be a file that exists, got {path}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InvalidRequestError(f"the clip must have a picture, got {path} without one")
            rate = float(container.streams.video[0].average_rate)  # no Fraction since PyAV 19
            frames = [
                frame.reformat(
                    format="rgb24",
                    src_colorspace="ITU709",  # by name: PyAV 14.0 looks members up by it alone
                    src_color_range="MPEG",
                    dst_color_range="JPEG",
                ).to_ndarray()
                for frame in container.decode(video=0)
            ]
    except av.FFmpegError as error:
        raise InvalidRequestError(
            f"the clip must be in a format FFmpeg reads, got {path}: {error.strerror}"
        ) from error
    if not frames:
        raise InvalidRequestError(f"the clip must have frames, got {path} without one")
    return np.stack(frames), round(rate)


def check_output(path: Path, frames: int = 0, width_px: int = 0, height_px: int = 0) -> None:
    """Raise `OutputError` now where `write_mp4` could not write such a clip later."""
    path = path.absolute()
    folder = path.parent
    if path.suffix.lower() != ".mp4":
        raise OutputError(f"the output's name must end in .mp4, got {path.name}")
    if os.path.isdir(path):
        raise OutputError(f"the output must be a file, got the folder {path}")
    if not os.path.isdir(folder):
        raise OutputError(f"the output's folder must exist, got {folder}; create it first")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".magihuman-"):
            pass
    except OSError as error:
        raise OutputError(
            f"the output's folder {folder} cannot be written to: {error.strerror}"
        ) from error
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OutputError(
            f"the output's name must be one the disk takes, got {path.name}: {error.strerror}"
        ) from error
    needed = frames * width_px * height_px * BITS_PER_PIXEL // 8 + 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"the disk of {folder} must have {needed / 2**20:.0f} MiB free for this clip, got"
            f" {free / 2**20:.1f} MiB"
        )
