"""Films through PyAV, written while frames are still being made; the mp4, of H.264 and AAC."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future, wait
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from magihuman.runtime.errors import InvalidRequestError, OutputError
from magihuman.runtime.media.clip import NOTHING_KNOWN, ClipWriter, Origin, Output, mark
from magihuman.runtime.media.clip import Frames as _Frames
from magihuman.runtime.media.clip import GivenUpError as _GivenUpError
from magihuman.runtime.media.clip import Sound as _Sound
from magihuman.runtime.media.guard import freed, opened_video, readable
from magihuman.runtime.threads import spawn

ENCODER = {
    "preset": "veryfast",
    "crf": "17",
}  # the rate factor fixes the quality, the preset the size
PRESETS = (
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow",
)  # fmt: skip
# The index goes first, tags have any name, and pictures wait for the sound to be in order, however
# late it comes.
CONTAINER = {"movflags": "+faststart+use_metadata_tags", "max_interleave_delta": "0"}
# At this rate no worse than the default coder, which takes five times as long.
AUDIO_ENCODER = {"aac_coder": "fast"}
AUDIO_BIT_RATE = 192_000
AUDIO_BLOCK = 1024
KEYFRAME_S = 2  # from one at which players can begin, and cutters cut, to the next
BT709 = 1  # code point of ITU-T H.273 for matrix, primaries and transfer
LIMITED_RANGE = 1
BITS_PER_PIXEL = 2  # far above what encoders need at this quality


def write_mp4(
    path: Path,
    frames: npt.NDArray[np.uint8],
    audio: npt.NDArray[np.float32],
    fps: int,
    sample_rate_hz: int,
    origin: Origin = NOTHING_KNOWN,
) -> Path:
    """H.264 (yuv420p, BT.709) and AAC, index first, whole or not at all.

    frames: [T, H, W, 3] RGB. audio: [samples, 2], cut to the picture's length. origin: what its
    tags say.
    """
    count, height, width = frames.shape[:3]
    with Mp4Writer(path, count, width, height, fps, sample_rate_hz, origin) as writer:
        writer.add_sound(audio)
        writer.add(frames)
        return writer.finish()


class FilmWriter(ClipWriter):
    """Writes picture and sound into a container. A class over it says which, and what encodes."""

    bits_per_pixel = BITS_PER_PIXEL
    container: ClassVar[str]
    container_options: ClassVar[dict[str, str]]
    marks: ClassVar[dict[str, str]] = {}  # tags that say that a model has made it

    @abstractmethod
    def _add_streams(self, container: Any) -> tuple[Any, Any]:
        """Add a stream for the picture and one for the sound, which have their encoders."""

    @property
    def _keyframe_distance(self) -> str:
        return str(KEYFRAME_S * self._fps)

    @freed()
    def _write(self, temporary: Path) -> None:
        import av

        options = self.container_options
        with av.open(f"file:{temporary}", "w", format=self.container, options=options) as container:
            container.metadata.update({**self._tags, **self.marks})
            self._encode(container)

    def _encode(self, container: Any) -> None:
        picture, sound = self._add_streams(container)
        picture.width, picture.height = self._size
        picture.pix_fmt = "yuv420p"
        tell_colours(picture.codec_context)
        container.start_encoding()  # before two threads use what it opens

        muxing = threading.Lock()
        encoding: Future[None] | None = None
        done = 0
        try:
            for part in self._whole():
                if isinstance(part, _Sound):
                    add = partial(self._add_sound, container, sound, part, muxing)
                    encoding = spawn(add, "magihuman encoder")
                    continue
                for frame in _pictures(part):
                    if self._is_given_up:
                        raise _GivenUpError
                    _mux(container, picture.encode(frame), muxing)
                done += len(part.pixels)
                if done == self._frames:
                    _mux(container, picture.encode(None), muxing)
            assert encoding is not None  # or it would not be whole
            encoding.result()
        finally:
            if encoding is not None:
                wait([encoding])

    def _add_sound(self, container: Any, stream: Any, part: _Sound, muxing: threading.Lock) -> None:
        packets = [packet for samples in self._blocks(part) for packet in stream.encode(samples)]
        _mux(container, packets + stream.encode(None), muxing)

    def _blocks(self, part: _Sound) -> Iterator[Any]:
        """The sound as far as the picture goes, cut for the encoder."""
        wave = self._heard(part)
        for start in range(0, len(wave), AUDIO_BLOCK):
            yield sound_frame(wave[start : start + AUDIO_BLOCK], self._rate, start)


class Mp4Writer(FilmWriter):
    """Writes an mp4 as `write_mp4` does, in a thread of its own, while frames are being made."""

    container, container_options = "mp4", CONTAINER
    most_crf, presets = 51, PRESETS

    @classmethod
    def _check_place(cls, output: Output, needed_bytes: int) -> None:
        if output.suffix != ".mp4":
            raise OutputError(f"the output's name must end in .mp4, got {output.file.name}")
        super()._check_place(output, needed_bytes)

    def _add_streams(self, container: Any) -> tuple[Any, Any]:
        asked = {"crf": self.output.crf, "preset": self.output.preset}
        options = {name: str(value) for name, value in asked.items() if value is not None}
        # A keyframe where the scene changes would move all that follow.
        keyframes = {"g": self._keyframe_distance, "sc_threshold": "0"}
        picture = container.add_stream(
            "libx264", rate=Fraction(self._fps), options={**ENCODER, **keyframes, **options}
        )
        # Whole frames at once, not slices of one (PyAV's choice), which wait for each other.
        picture.codec_context.thread_type = "FRAME"
        return picture, add_aac(container, self._rate)

    def _settle(self, temporary: Path) -> None:
        mark(temporary)
        super()._settle(temporary)


def _mux(container: Any, packets: list[Any], muxing: threading.Lock) -> None:
    """Write packets; pictures and sound come from two threads."""
    with muxing:
        container.mux(packets)


def _pictures(part: _Frames) -> Iterator[Any]:
    """Frames as the encoder takes them; RGB on a CPU is FFmpeg's work, which has it done sooner.

    Its chroma is half a pixel to the right of that of `to_yuv420`.
    """
    import av

    if part.planes is None:
        yield from picture_frames(part.pixels)
        return
    for planes in part.planes:
        yield av.VideoFrame.from_numpy_buffer(planes, format="yuv420p")


def picture_frames(frames: npt.NDArray[np.uint8]) -> Iterator[Any]:
    """RGB frames [T, H, W, 3] as encoders of H.264 and VP9 take them, in yuv420p."""
    import av
    from av.video.reformatter import VideoReformatter

    converter: Any = VideoReformatter()  # one for all frames: it keeps its tables
    for pixels in frames:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        yield converter.reformat(
            frame,
            format="yuv420p",
            dst_colorspace="ITU709",  # by name: PyAV 14.0 looks members up by it alone
            dst_color_range="MPEG",
        )


def sound_frame(samples: npt.NDArray[np.float32], rate_hz: int, begin: int) -> Any:
    """Samples [n, 2] as encoders of sound take them. begin: of the first, in samples."""
    import av

    block = np.ascontiguousarray(samples.T)
    frame: Any = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
    frame.sample_rate, frame.pts = rate_hz, begin
    frame.time_base = Fraction(1, rate_hz)
    return frame


def tell_colours(context: Any) -> None:
    """Have a picture's encoder say that its colours are those of BT.709, in limited range."""
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = LIMITED_RANGE


def add_aac(container: Any, rate_hz: int) -> Any:
    """Add a stream of stereo sound in AAC."""
    sound = container.add_stream("aac", rate=rate_hz, layout="stereo", options=AUDIO_ENCODER)
    sound.bit_rate = AUDIO_BIT_RATE
    return sound


def read_frames(path: Path) -> tuple[npt.NDArray[np.uint8], int]:
    """All frames of a file that `write_mp4` wrote, [T, H, W, 3] RGB, and how many are a second.

    Raises `InvalidRequestError` for what is missing, damaged or no video.
    """
    with readable("the clip", str(path)):
        rate, frames = _read_frames(path)
    if not frames:
        raise InvalidRequestError(f"the clip must have frames, got {path} without one")
    return np.stack(frames), round(rate)


@freed()
def _read_frames(path: Path) -> tuple[float, list[npt.NDArray[np.uint8]]]:
    """Frames a second, and frames, each [H, W, 3] RGB."""
    import av

    try:
        with opened_video(path, "the clip") as container:
            rate = float(container.streams.video[0].average_rate)  # no Fraction since PyAV 19
            frames = [_rgb(frame) for frame in container.decode(video=0)]
    except av.FFmpegError as error:
        raise InvalidRequestError(
            f"the clip must be in a format FFmpeg reads, got {path}: {error.strerror}"
        ) from error
    return rate, frames


def _rgb(frame: Any) -> npt.NDArray[np.uint8]:
    pixels: npt.NDArray[np.uint8] = frame.reformat(
        format="rgb24",
        src_colorspace="ITU709",  # by name: PyAV 14.0 looks members up by it alone
        src_color_range="MPEG",
        dst_color_range="JPEG",
    ).to_ndarray()
    return pixels


def check_output(path: Path, frames: int = 0, width_px: int = 0, height_px: int = 0) -> None:
    """Raise `OutputError` now where `write_mp4` could not write such a clip later."""
    Mp4Writer.check(Output.of(path), frames, width_px, height_px)
