"""Sound files to feed the runtime, and the pitch of what comes back."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

CODECS = {".wav": "pcm_s16le", ".mp3": "libmp3lame", ".flac": "flac"}
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def sine(rate_hz: int, seconds: float, hz: float = 440.0) -> npt.NDArray[np.float32]:
    """[samples], amplitude 0.5."""
    time = np.arange(round(rate_hz * seconds)) / rate_hz
    return (0.5 * np.sin(2 * np.pi * hz * time)).astype(np.float32)


def write_sine(
    path: Path, rate_hz: int = 48000, channels: int = 1, seconds: float = 1.0, hz: float = 440.0
) -> Path:
    """The same sine in every channel; the container and codec follow from the suffix."""
    return write_wave(path, np.stack([sine(rate_hz, seconds, hz)] * channels), rate_hz)


def write_wave(path: Path, wave: npt.NDArray[np.float32], rate_hz: int) -> Path:
    """wave: [channels, samples]."""
    layout = LAYOUTS[len(wave)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix], rate=rate_hz, layout=layout)
        resampler = av.AudioResampler(format=stream.format, layout=layout, rate=rate_hz)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate_hz, 0, Fraction(1, rate_hz)
        buffer = av.AudioFifo()
        for part in resampler.resample(frame):
            buffer.write(part)
        size = stream.codec_context.frame_size or 1024
        parts = [*buffer.read_many(size), buffer.read(0, partial=True)]
        for part in [*filter(None, parts), None]:
            container.mux(stream.encode(part))
    return path


def write_silent_video(path: Path) -> Path:
    """An mp4 with a picture and no sound track."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def loudest_hz(wave: npt.NDArray[np.float32], rate_hz: int) -> float:
    """Frequency of the highest peak of the spectrum; its bins are rate / samples apart."""
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return float(np.argmax(spectrum)) * rate_hz / len(wave)
