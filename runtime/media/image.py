"""A reference image from a file or from Pillow: upright, sRGB, of the size that is wanted."""

from __future__ import annotations

import io
import os
import threading
from contextlib import ExitStack
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.media import jpeg, png
from magihuman.runtime.media.colour import (
    Mask,
    is_other,
    opaque_rgb,
    profile_of_codes,
    profile_of_gamma,
)
from magihuman.runtime.media.guard import checked_file, readable
from magihuman.runtime.media.orientation import orientation, orientation_of, upright

MAX_PIXELS = 100_000_000
# A Pillow image that was opened and not read yet must not be read by two threads at once. An image
# always gets the same of these locks, and rarely another one's.
LOCKS = tuple(threading.Lock() for _ in range(64))


def open_image(
    source: str | os.PathLike[str] | Image.Image,
    *,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """An RGB image in sRGB, upright, transparency laid over white. Decodes it whole.

    Colours are converted by an ICC profile, if there is one that fits, or by the numbers that a PNG
    file has in its place; orientation comes from EXIF or XMP. Of several frames it is the first
    one. All else beside the pixels is ignored, however damaged. An image of Pillow's may be given
    to several threads at once, and is left as it is, but for being loaded.

    max_pixels: refused above, before it is decoded. formats: Pillow's names of those to read, by
    default all, some of which are left to other programs. Raises `InvalidRequestError` for what is
    missing, empty, damaged, too large or no image.
    """
    if isinstance(source, Image.Image):
        name = "the one given"
        with readable("image", name), LOCKS[id(source) // 64 % len(LOCKS)]:
            _check(source, name, max_pixels)
            image = source.copy()
        with readable("image", name):
            return _finished(image, is_tiff=source.format == "TIFF")
    if not isinstance(source, (str, os.PathLike)):
        raise InvalidRequestError(
            f"image must be a path or a PIL image, got a {type(source).__name__}"
        )
    path = checked_file("image", source)
    with readable("image", str(path)), ExitStack() as stack:
        try:
            file, notes = _plain(stack.enter_context(path.open("rb")))
            image = stack.enter_context(Image.open(file, formats=formats))
        except UnidentifiedImageError:
            kinds = "a format Pillow reads (PNG, JPEG, WebP, ...)"
            if formats is not None:
                kinds = f"one of the formats {', '.join(formats)}"
            raise InvalidRequestError(f"image must be in {kinds}, got {path}") from None
        except (OSError, Image.DecompressionBombError) as error:
            raise InvalidRequestError(f"image {path} cannot be read: {error}") from error
        _check(image, str(path), max_pixels)
        image.load()
        if notes is None:
            return _finished(image, is_tiff=image.format == "TIFF")
        profile = _profile(notes)
        if profile is None:
            profile = image.info.get("icc_profile")
        rgb = opaque_rgb(image, profile, _mask(image, notes, file))
        return upright(rgb, orientation(notes.exif, notes.xmp))


def _plain(file: BinaryIO) -> tuple[BinaryIO, png.Notes | None]:
    """A file of the pixels alone, and what else it says, where that is read here."""
    head = file.read(len(png.SIGNATURE))
    file.seek(0)
    if head == png.SIGNATURE:
        content, notes = png.split(file.read())
        return io.BytesIO(content), notes
    if head.startswith(jpeg.SIGNATURE):
        content, exif, xmp = jpeg.split(file.read())
        return io.BytesIO(content), png.Notes(exif=exif, xmp=xmp)
    return file, None


def _check(image: Image.Image, name: str, max_pixels: int) -> None:
    """Raise `InvalidRequestError` for what should not be decoded."""
    if not 0 < image.width * image.height <= max_pixels:
        raise InvalidRequestError(
            f"image must have 1 to {max_pixels} pixels, got {image.width}x{image.height}; scale it"
        )
    if image.mode == "F":
        raise InvalidRequestError(
            f"image must have whole numbers as samples, but {name} has floats of no known"
            " range; save it as PNG"
        )


def _profile(notes: png.Notes) -> bytes | None:
    """What the colours of a file are, empty for sRGB; None where it does not say."""
    is_grey = notes.colour_type in (png.GREY, png.GREY_ALPHA)
    by_codes = None if notes.codes is None else profile_of_codes(notes.codes, is_grey)
    if by_codes is not None:
        return by_codes
    if notes.profile is not None or notes.is_srgb or notes.gamma is None:
        return notes.profile
    return profile_of_gamma(notes.gamma, notes.chromaticities, is_grey)


def _finished(image: Image.Image, is_tiff: bool) -> Image.Image:
    """A loaded image by what Pillow has read of it. Pillow turns TIFF upright by itself."""
    info = image.info
    profile, gamma = info.get("icc_profile"), info.get("gamma")
    notes = png.Notes(
        colour_type=png.TRUECOLOUR if image.mode.startswith(("RGB", "P")) else png.GREY,
        profile=profile if isinstance(profile, bytes) else None,
        gamma=gamma if isinstance(gamma, float) else None,
        chromaticities=info.get("chromaticity"),
        is_srgb="srgb" in info,
    )
    rgb = opaque_rgb(image, _profile(notes))
    return rgb if is_tiff else upright(rgb, orientation_of(image.info))


def _mask(image: Image.Image, notes: png.Notes, file: BinaryIO) -> Mask | None:
    """What is not of a PNG file's transparent colour, compared before samples become 8 bits."""
    if notes.transparent is None:
        return None
    if notes.colour_type == png.GREY:
        values = np.asarray(image.convert("L") if image.mode == "1" else image)
        scale = 1 if notes.depth > 8 else 255 // (2**notes.depth - 1)
        return is_other(values, (notes.transparent[0] * scale,))
    upper = np.asarray(image)
    if notes.depth == 8:
        return is_other(upper, notes.transparent)
    # Pillow keeps the upper half of 16 bits. Read as if their bytes were in the other order, it is
    # the lower half.
    file.seek(0)
    with Image.open(file, formats=("PNG",)) as again:
        again.tile = [(*tile[:3], "RGB;16L") for tile in again.tile]  # type: ignore[misc]
        lower = np.asarray(again)
    return is_other(upper.astype(np.uint16) << 8 | lower, notes.transparent)


def fit(image: Image.Image, width_px: int, height_px: int) -> Image.Image:
    """Centre-crop to the target's aspect, then resize (Lanczos)."""
    if image.height / image.width > height_px / width_px:
        width, height = image.width, max(1, image.width * height_px // width_px)
    else:
        width, height = max(1, image.height * width_px // height_px), image.height
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (round(left), round(top), round(left) + width, round(top) + height)
    return image.crop(box).resize((width_px, height_px), Image.Resampling.LANCZOS)
