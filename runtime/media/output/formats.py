"""Which format a clip is written in, by the name of its file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from magihuman.runtime.errors import OutputError
from magihuman.runtime.media.clip import NOTHING_KNOWN, ClipWriter, Origin, Output
from magihuman.runtime.media.mp4 import Mp4Writer
from magihuman.runtime.media.output.folder import FolderWriter
from magihuman.runtime.media.output.gif import GifWriter
from magihuman.runtime.media.output.wav import WavWriter
from magihuman.runtime.media.output.webm import WebmWriter

FORMATS: dict[str, type[ClipWriter]] = {
    ".mp4": Mp4Writer,
    ".webm": WebmWriter,
    ".gif": GifWriter,
    ".wav": WavWriter,
    "/": FolderWriter,
}


def writer_type(output: Output) -> type[ClipWriter]:
    """What writes such a file. Raises `OutputError` where its name says no format that is known."""
    known = FORMATS.get(output.suffix)
    if known is None:
        name = os.path.basename(os.fspath(output.path))
        *suffixes, last = (suffix for suffix in FORMATS if suffix != "/")
        raise OutputError(
            f"the output's name must end in {', '.join(suffixes)} or {last}, or in / for a folder"
            f" of PNG files, got {name}"
        )
    return known


def check_output(
    output: str | os.PathLike[str] | Output,
    frames: int = 0,
    width_px: int = 0,
    height_px: int = 0,
) -> None:
    """Raise `OutputError` or `InvalidRequestError` now where `write_clip` could not write such a
    clip later, as `ClipWriter.check` does.
    """
    output = Output.of(output)
    writer_type(output).check(output, frames, width_px, height_px)


def write_clip(
    output: str | os.PathLike[str] | Output,
    frames: npt.NDArray[np.uint8],
    audio: npt.NDArray[np.float32],
    fps: int,
    sample_rate_hz: int,
    origin: Origin = NOTHING_KNOWN,
) -> Path:
    """Write a clip in the format that its name says, whole or not at all, and return its path.

    frames: [T, H, W, 3] RGB. audio: [samples, 2], cut to the picture's length. origin: what its
    tags say. Raises as `check_output` does, and `OutputError` where it cannot be written after all.
    """
    output = Output.of(output)
    count, height, width = frames.shape[:3]
    kind = writer_type(output)
    with kind(output, count, width, height, fps, sample_rate_hz, origin) as writer:
        writer.add_sound(audio)
        writer.add(frames)
        return writer.finish()
