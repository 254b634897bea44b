"""The mp4 of a clip, through PyAV: H.264 and AAC, written while frames are still being made."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from magihuman.runtime.errors import InvalidRequestError, OutputError
from magihuman.runtime.files import atomic_path, sync
from magihuman.runtime.media.clip.place import check_place
from magihuman.runtime.media.guard import readable, tolerant

ENCODER = {
    "preset": "veryfast",
    "crf": "17",
}  # the rate factor fixes the quality, the preset the size
# The index goes first, and pictures wait for the sound to be in order, however late it comes.
CONTAINER = {"movflags": "+faststart", "max_interleave_delta": "0"}
# At this rate no worse than the default coder, which takes five times as long.
AUDIO_ENCODER = {"aac_coder": "fast"}
AUDIO_BIT_RATE = 192_000
AUDIO_BLOCK = 1024
BT709 = 1  # code point of ITU-T H.273 for matrix, primaries and transfer
LIMITED_RANGE = 1
LOCAL = {"protocol_whitelist": "file"}
BITS_PER_PIXEL = 2  # far above what H.264 needs at this quality, for the check of free space


def write_mp4(
    path: Path,
    frames: npt.NDArray[np.uint8],
    audio: npt.NDArray[np.float32],
    fps: int,
    sample_rate_hz: int,
) -> Path:
    """H.264 (yuv420p, BT.709) and AAC, index first, whole or not at all.

    frames: [T, H, W, 3] RGB. audio: [samples, 2], cut to the picture's length.
    """
    count, height, width = frames.shape[:3]
    with Mp4Writer(path, count, width, height, fps, sample_rate_hz) as writer:
        writer.add_sound(audio)
        writer.add(frames)
        return writer.finish()


class Mp4Writer:
    """Writes an mp4 as `write_mp4` does, in a thread of its own, while frames are still being made.

    A context that ends without `finish` leaves nothing of the file, and raises nothing of its own.
    """

    def __init__(
        self,
        path: Path,
        frames: int,
        width_px: int,
        height_px: int,
        fps: int,
        sample_rate_hz: int,
    ) -> None:
        """Raises `OutputError` where such a clip could not be written. Nothing is written yet."""
        self.path = path.absolute()
        check_output(self.path, frames, width_px, height_px)
        self._frames, self._fps, self._rate = frames, fps, sample_rate_hz
        self._size = width_px, height_px
        self._parts: queue.SimpleQueue[_Frames | _Sound | _End] = queue.SimpleQueue()
        self._muxing = threading.Lock()  # pictures and sound come from two threads
        self._error: BaseException | None = None
        self._is_finished = self._is_given_up = False
        self._thread = threading.Thread(target=self._run, name="mp4", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._is_finished:
            self._is_given_up = True  # what waits to be encoded is not
            self._parts.put(_End(is_wanted=False))
            self._thread.join()

    def add(
        self, frames: npt.NDArray[np.uint8], planes: npt.NDArray[np.uint8] | None = None
    ) -> None:
        """The next frames, [n, H, W, 3]; they are read later and must stay as they are.

        planes: what `kernels/decoder/reference.py`'s `to_yuv420` makes of them, if made already:
            [n, 3 H / 2, W], of H a multiple of 4.
        """
        self._parts.put(_Frames(frames, planes))

    def add_sound(self, audio: npt.NDArray[np.float32]) -> None:
        """All of the sound, [samples, 2], at any time; from any thread."""
        self._parts.put(_Sound(audio))

    def finish(self) -> Path:
        """Wait for the file, once all frames and the sound are added. Before, there is none.

        Raises:
            OutputError: it could not be written; nothing is left of it.
        """
        self._parts.put(_End(is_wanted=True))
        self._thread.join()
        self._is_finished = True
        if self._error is not None:
            raise self._error
        return self.path

    def _run(self) -> None:
        import av

        try:
            with atomic_path(self.path) as temporary:
                with av.open(
                    f"file:{temporary}", "w", format="mp4", options=CONTAINER
                ) as container:
                    self._write(container)
                sync(temporary)
        except _GivenUpError:
            pass
        except (OSError, av.FFmpegError) as error:
            self._error = OutputError(
                f"{self.path} could not be written: {error}; nothing is left of it"
            )
            self._error.__cause__ = error
        except BaseException as error:  # raised in the caller's thread
            self._error = error

    def _write(self, container: Any) -> None:
        picture = container.add_stream("libx264", rate=Fraction(self._fps), options=ENCODER)
        picture.width, picture.height = self._size
        picture.pix_fmt = "yuv420p"
        context = picture.codec_context
        # Whole frames at once, not slices of one (PyAV's choice), which wait for each other.
        context.thread_type = "FRAME"
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        sound = container.add_stream("aac", rate=self._rate, layout="stereo", options=AUDIO_ENCODER)
        sound.bit_rate = AUDIO_BIT_RATE
        container.start_encoding()  # before two threads use what it opens

        done, encoding = 0, None
        with ThreadPoolExecutor(1, "aac") as pool:
            while done < self._frames or encoding is None:
                part = self._parts.get()
                if isinstance(part, _End):
                    raise _GivenUpError
                if isinstance(part, _Sound):
                    encoding = pool.submit(self._add_sound, container, sound, part.samples)
                    continue
                for frame in _pictures(part):
                    if self._is_given_up:
                        raise _GivenUpError
                    self._mux(container, picture.encode(frame))
                done += len(part.pixels)
                if done == self._frames:
                    self._mux(container, picture.encode(None))
            encoding.result()
        end = self._parts.get()  # the caller may give up even now
        if not isinstance(end, _End) or not end.is_wanted:
            raise _GivenUpError

    def _add_sound(self, container: Any, stream: Any, audio: npt.NDArray[np.float32]) -> None:
        packets = [packet for samples in self._blocks(audio) for packet in stream.encode(samples)]
        self._mux(container, packets + stream.encode(None))

    def _mux(self, container: Any, packets: list[Any]) -> None:
        with self._muxing:
            container.mux(packets)

    def _blocks(self, audio: npt.NDArray[np.float32]) -> Iterator[Any]:
        """The sound as far as the picture goes, cut for the encoder."""
        import av

        length = min(len(audio), round(self._frames / self._fps * self._rate))
        wave = np.ascontiguousarray(audio[:length].T, dtype=np.float32).clip(-1, 1)
        for start in range(0, length, AUDIO_BLOCK):
            block = np.ascontiguousarray(wave[:, start : start + AUDIO_BLOCK])
            samples = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
            samples.sample_rate = self._rate
            samples.pts = start
            samples.time_base = Fraction(1, self._rate)
            yield samples


@dataclass(frozen=True)
class _Frames:
    pixels: npt.NDArray[np.uint8]
    planes: npt.NDArray[np.uint8] | None


@dataclass(frozen=True)
class _Sound:
    samples: npt.NDArray[np.float32]


@dataclass(frozen=True)
class _End:
    is_wanted: bool  # whether the file is


class _GivenUpError(Exception):
    """The caller left before the end."""


def _pictures(part: _Frames) -> Iterator[Any]:
    """Frames as the encoder takes them; RGB on a CPU is FFmpeg's work, which has it done sooner.

    Its chroma is half a pixel to the right of that of `to_yuv420`.
    """
    import av
    from av.video.reformatter import VideoReformatter

    if part.planes is not None:
        for planes in part.planes:
            yield av.VideoFrame.from_numpy_buffer(planes, format="yuv420p")
        return
    converter: Any = VideoReformatter()  # one for all frames: it keeps its tables
    for pixels in part.pixels:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        yield converter.reformat(
            frame,
            format="yuv420p",
            dst_colorspace="ITU709",  # by name: PyAV 14.0 looks members up by it alone
            dst_color_range="MPEG",
        )


def read_frames(path: Path) -> tuple[npt.NDArray[np.uint8], int]:
    """All frames of a file that `write_mp4` wrote, [T, H, W, 3] RGB, and how many are a second.

    Raises `InvalidRequestError` for what is missing, damaged or no video.
    """
    if not path.is_file():
        raise InvalidRequestError(f"the clip must be a file that exists, got {path}")
    with readable("the clip", str(path)):
        rate, frames = _read_frames(path)
    if not frames:
        raise InvalidRequestError(f"the clip must have frames, got {path} without one")
    return np.stack(frames), round(rate)


def _read_frames(path: Path) -> tuple[float, list[npt.NDArray[np.uint8]]]:
    """Frames a second, and frames, each [H, W, 3] RGB."""
    import av

    try:
        # By its protocol: a name like 12:30.mp4 would be an address.
        file = f"file:{path.absolute()}"
        with av.open(file, container_options=LOCAL, **tolerant()) as container:
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
    return rate, frames


def check_output(path: Path, frames: int = 0, width_px: int = 0, height_px: int = 0) -> None:
    """Raise `OutputError` now where `write_mp4` could not write such a clip later."""
    path = path.absolute()
    if path.suffix.lower() != ".mp4":
        raise OutputError(f"the output's name must end in .mp4, got {path.name}")
    check_place(path, needed_bytes=frames * width_px * height_px * BITS_PER_PIXEL // 8)
