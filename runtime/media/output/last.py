"""The last frame of a video, as an image."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.media.guard import freed, opened_video, readable

if TYPE_CHECKING:
    from av.container import InputContainer

# FFmpeg's numbers of colour spaces and ranges.
BT709, SD_SPACES, FULL_RANGE = 1, (5, 6), 2
HD_PX = 720  # rows from which a video that does not say is taken to be BT.709
IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # containers with no video


def is_video(source: str | Path) -> bool:
    """Whether a file begins as MP4, QuickTime, WebM or Matroska do, and not as an image."""
    with open(source, "rb") as file:
        start = file.read(12)
    is_boxed = (
        start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide") and start[8:12] not in IMAGE_BRANDS
    )
    return is_boxed or start.startswith(b"\x1aE\xdf\xa3")


@freed()
def read_last_frame(
    source: str | Path, max_pixels: int | None = None, formats: tuple[str, ...] = ()
) -> Image.Image:
    """Return the last frame of a video's file as it is, in RGB, however long the video is.

    max_pixels: of a frame, where that is bounded. formats: FFmpeg's names of those that may be
    opened, any by default. Raises `InvalidRequestError` for what is missing, damaged or no video.
    """
    with (
        readable("a video", str(source)),
        opened_video(Path(source), "a video", formats) as container,
    ):
        stream = container.streams.video[0]
        width, height = stream.codec_context.width, stream.codec_context.height
        if max_pixels is not None and not 1 <= width * height <= max_pixels:
            raise InvalidRequestError(
                f"a video must have frames of 1 to {max_pixels} pixels, got {width}x{height}; make"
                " it smaller"
            )
        return _last(container)


def _frames(container: InputContainer) -> Iterator[Any]:
    yield from container.decode(video=0)


def _image(frame: Any) -> Image.Image:
    """Return a frame in RGB, by the colours that it says it has, or that its size is made in."""
    is_bt709 = frame.colorspace == BT709 or (
        frame.colorspace not in SD_SPACES and frame.height >= HD_PX
    )
    pixels = frame.reformat(
        format="rgb24",
        src_colorspace="ITU709" if is_bt709 else "ITU601",
        src_color_range="JPEG" if frame.color_range == FULL_RANGE else "MPEG",
        dst_color_range="JPEG",
    )
    return Image.fromarray(pixels.to_ndarray())


def _last(container: InputContainer) -> Image.Image:
    """Decode from the last keyframe, or, where that has nothing, from the beginning."""
    import av

    last: deque[Any] = deque(maxlen=1)
    with suppress(av.FFmpegError):
        if container.duration:
            container.seek(container.duration)
        last.extend(_frames(container))
    if not last:
        container.seek(0)
        last.extend(_frames(container))
    if not last:
        raise InvalidRequestError("a video must have frames, got one without")
    return _image(last[0])
