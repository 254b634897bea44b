"""Stills of a clip: one frame, or a sheet of several, as a small image."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from magihuman.runtime.errors import InvalidRequestError, OutputError
from magihuman.runtime.files import atomic_path
from magihuman.runtime.media.clip import XMP, check_place
from magihuman.runtime.media.guard import freed, opened_video, readable
from magihuman.runtime.media.output.folder import png_info

LONGEST_PX = 512
SHEET_FRAMES, SHEET_TILE_PX = 16, 160
FORMATS = {".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
QUALITY = 85
EARLIER_S = 1e-3  # times are rounded to a clip's time base

Frames = npt.NDArray[np.uint8]


def thumbnail(clip: Path, longest_px: int = LONGEST_PX) -> bytes:
    """A WebP of the frame in the middle of a clip's file, scaled down to `longest_px`.

    Raises `InvalidRequestError` for a file that is missing, damaged or has no picture.
    """
    (image,) = _stills(clip, 1, longest_px)
    return _encoded(image, "WEBP")


def spritesheet(clip: Path, frames: int = SHEET_FRAMES, longest_px: int = SHEET_TILE_PX) -> bytes:
    """A WebP of frames at even distances, in rows from the upper left, as square as it can be.

    frames: fewer where the clip has fewer. longest_px: of each. Raises as `thumbnail` does.
    """
    stills = _stills(clip, frames, longest_px)
    columns = math.ceil(math.sqrt(len(stills)))
    width, height = stills[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(stills) / columns) * height))
    for index, still in enumerate(stills):
        sheet.paste(still, (index % columns * width, index // columns * height))
    return _encoded(sheet, "WEBP")


def write_thumbnail(path: Path, frames: Frames, longest_px: int = LONGEST_PX) -> Path:
    """Write the middle one of frames [T, H, W, 3] as WebP, JPEG or PNG, by the path's suffix.

    The file appears whole or not at all. Returns its absolute path. Raises `OutputError`.
    """
    path = path.absolute()
    check_thumbnail(path)
    image = _scaled(Image.fromarray(frames[len(frames) // 2]), longest_px)
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(_encoded(image, FORMATS[path.suffix.lower()]))
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error}; nothing is left of it") from error
    return path


def check_thumbnail(path: Path) -> None:
    """Raise `OutputError` now where `write_thumbnail` could not write this file later."""
    if path.suffix.lower() not in FORMATS:
        raise OutputError(
            f"the thumbnail's name must end in one of {', '.join(FORMATS)}, got {path.name}"
        )
    check_place(path.absolute(), "thumbnail")


@freed()
def _stills(clip: Path, count: int, longest_px: int) -> list[Image.Image]:
    """So many frames from the middles of equal parts of a clip, scaled down."""
    with readable("the clip", str(clip)), opened_video(clip, "the clip") as container:
        stream = container.streams.video[0]
        length = max(1, stream.frames)
        count = min(count, length)
        wanted = ((2 * index + 1) * length // (2 * count) for index in range(count))
        rate = float(stream.average_rate or 1)
        return [_scaled(_frame_at(container, n / rate), longest_px) for n in wanted]


def _frame_at(container: Any, time_s: float) -> Image.Image:
    """The frame that is shown at a time, decoded from the keyframe before it."""
    stream = container.streams.video[0]
    container.seek(int(time_s / stream.time_base), stream=stream)
    shown = None
    for frame in container.decode(stream):
        if shown is not None and frame.time > time_s + EARLIER_S:
            break
        shown = frame
    if shown is None:
        raise InvalidRequestError(f"the clip must have frames, got none at {time_s:g} s")
    image: Image.Image = shown.to_image()
    return image


def _scaled(image: Image.Image, longest_px: int) -> Image.Image:
    """The image, smaller where it is larger than `longest_px`."""
    image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    return image


def _encoded(image: Image.Image, kind: str) -> bytes:
    """The bytes of a file, with the mark of what a model has made."""
    file = io.BytesIO()
    if kind == "PNG":
        image.save(file, kind, pnginfo=png_info({}))
    else:
        image.save(file, kind, quality=QUALITY, xmp=XMP)
    return file.getvalue()
