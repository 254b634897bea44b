"""Sound files to feed the runtime, and the pitch of what comes back."""

from __future__ import annotations

import struct
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


def wav(
    wave: npt.NDArray[np.float32],
    rate_hz: int,
    *,
    mask: int | None = None,
    is_float: bool = False,
    extra: bytes = b"",
) -> bytes:
    """A WAV file, byte by byte: for what no muxer would write.

    wave: [channels, samples]. mask: which loudspeakers they are for; without, the file does not
    say. is_float: float32 as given, not 16 bits. extra: chunks before the samples.
    """
    channels, bits = len(wave), 32 if is_float else 16
    samples = wave.T.astype("<f4") if is_float else np.round(wave.T * 32767).astype("<i2")
    kind = 3 if is_float else 1
    block = channels * bits // 8
    fields = (channels, rate_hz, rate_hz * block % 2**32, block, bits)
    if mask is None:
        layout = struct.pack("<HHIIHH", kind, *fields)
    else:
        rest = bytes.fromhex("000000001000800000aa00389b71")
        layout = struct.pack("<HHIIHHHHIH", 0xFFFE, *fields, 22, bits, mask, kind) + rest
    body = b"WAVE" + _chunk(b"fmt ", layout) + extra + _chunk(b"data", samples.tobytes())
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def write_track(
    path: Path,
    tracks: list[npt.NDArray[np.float32]],
    rate_hz: int = 48000,
    late_s: float = 0.0,
    default: int | None = None,
) -> Path:
    """A video of 2 s with mono tracks of sound, which begin later than the picture.

    default: the track that is marked so, alone.
    """
    codec = "pcm_s16le" if path.suffix in (".avi", ".mov") else "flac"
    with av.open(str(path), "w") as container:
        picture = container.add_stream("mpeg4", rate=25)
        picture.width, picture.height, picture.pix_fmt = 64, 64, "yuv420p"
        streams = [container.add_stream(codec, rate=rate_hz, layout="mono") for _ in tracks]
        for index, stream in enumerate(streams):
            stream.codec_context.format = "s16"
            if default is not None:
                from av.stream import Disposition  # not in PyAV 14.0

                stream.disposition = Disposition.default if index == default else Disposition(0)
        container.start_encoding()
        for index in range(50):
            image = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            image.pts, image.time_base = index, Fraction(1, 25)
            container.mux(picture.encode(image))
        container.mux(picture.encode(None))
        for stream, wave in zip(streams, tracks, strict=True):
            size = stream.codec_context.frame_size or 4608
            for start in range(0, len(wave), size):
                part = np.round(wave[None, start : start + size] * 32767).astype(np.int16)
                frame = av.AudioFrame.from_ndarray(part, format="s16", layout="mono")
                frame.sample_rate, frame.time_base = rate_hz, Fraction(1, rate_hz)
                frame.pts = start + round(late_s * rate_hz)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
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
