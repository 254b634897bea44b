"""A reference image from a file or from Pillow: upright, RGB, of the size that is wanted."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from magihuman.runtime.errors import InvalidRequestError

MAX_PIXELS = 100_000_000


def open_image(
    source: str | os.PathLike[str] | Image.Image,
    *,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """An RGB image, turned upright by its EXIF tag, transparency laid over white. Decodes it whole.

    max_pixels: refused above, before it is decoded. formats: Pillow's names of those to read, by
    default all, some of which are left to other programs. Raises `InvalidRequestError` for what is
    missing, empty, damaged, too large or no image.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "the one given", max_pixels)
    if not isinstance(source, (str, os.PathLike)):
        raise InvalidRequestError(
            f"image must be a path or a PIL image, got a {type(source).__name__}"
        )
    path = Path(source)
    if not os.path.isfile(path):
        state = "is not a file" if os.path.exists(path) else "does not exist"
        raise InvalidRequestError(f"image must be a readable file, got {path}, which {state}")
    try:
        if path.stat().st_size == 0:
            raise InvalidRequestError(f"image must not be empty, got {path} of 0 bytes")
        with open(path, "rb") as file, Image.open(file, formats=formats) as image:
            return _upright_rgb(image, str(path), max_pixels)
    except UnidentifiedImageError:
        kinds = "a format Pillow reads (PNG, JPEG, WebP, ...)"
        if formats is not None:
            kinds = f"one of the formats {', '.join(formats)}"
        raise InvalidRequestError(f"image must be in {kinds}, got {path}") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise InvalidRequestError(f"image {path} cannot be read: {error}") from error


def _upright_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    if not 0 < image.width * image.height <= max_pixels:
        raise InvalidRequestError(
            f"image must have 1 to {max_pixels} pixels, got {image.width}x{image.height}; scale it"
        )
    if image.mode == "F":
        raise InvalidRequestError(
            f"image must have whole numbers as samples, but {name} has floats of no known"
            " range; save it as PNG"
        )
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
            image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidRequestError(
            f"image must be whole, but {name} cannot be decoded ({error}); save it again"
        ) from error


def fit(image: Image.Image, width_px: int, height_px: int) -> Image.Image:
    """Centre-crop to the target's aspect, then resize (Lanczos)."""
    if image.height / image.width > height_px / width_px:
        width, height = image.width, max(1, image.width * height_px // width_px)
    else:
        width, height = max(1, image.height * width_px // height_px), image.height
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (round(left), round(top), round(left) + width, round(top) + height)
    return image.crop(box).resize((width_px, height_px), Image.Resampling.LANCZOS)
