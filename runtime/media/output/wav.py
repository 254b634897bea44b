"""The sound of a clip alone, as a WAV file of 16 bits a sample."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from magihuman.runtime.files import version
from magihuman.runtime.media.clip import NAME, XMP, ClipWriter, Sound

PCM, CHANNELS, SAMPLE_BYTES = 1, 2, 2
FULL_SCALE = 2**15 - 1


class WavWriter(ClipWriter):
    """Writes the sound, and nothing of the picture."""

    bits_per_pixel = 1  # of frames of 128x128, the sound has less a frame

    def _write(self, temporary: Path) -> None:
        content = b""
        for part in self._whole():
            if isinstance(part, Sound):
                content = wav(self._heard(part), self._rate, self._comment)
        temporary.write_bytes(content)


def wav(samples: npt.NDArray[np.float32], rate_hz: int, comment: str | None) -> bytes:
    """A WAV file of samples [n, 2] within [-1, 1], marked as made by a model."""
    sizes = (PCM, CHANNELS, rate_hz, rate_hz * CHANNELS * SAMPLE_BYTES)
    layout = struct.pack("<HHIIHH", *sizes, CHANNELS * SAMPLE_BYTES, 8 * SAMPLE_BYTES)
    data = np.rint(samples * FULL_SCALE).astype("<i2").tobytes()
    body = _chunk(b"fmt ", layout)
    if comment is not None:
        facts = _chunk(b"ICMT", comment.encode() + b"\0")
        facts += _chunk(b"ISFT", f"{NAME} {version()}".encode() + b"\0")
        body += _chunk(b"LIST", b"INFO" + facts)
    body += _chunk(b"_PMX", XMP) + _chunk(b"data", data)
    return _chunk(b"RIFF", b"WAVE" + body)


def _chunk(name: bytes, content: bytes) -> bytes:
    padding = b"\0" * (len(content) % 2)
    return name + struct.pack("<I", len(content)) + content + padding
