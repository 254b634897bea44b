"""Colours and transparency of an image in any of Pillow's modes: to sRGB, over white."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

Mask = npt.NDArray[np.bool_]  # [H, W], what is not transparent

MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # by an ICC profile's space
WITH_ALPHA = {"RGBA": "RGB", "LA": "L"}
SIXTEEN_BITS = 257  # steps of 16-bit samples in one of 8 bits


def opaque_rgb(image: Image.Image, profile: bytes | None, mask: Mask | None = None) -> Image.Image:
    """An RGB image in sRGB, transparency laid over white.

    image: loaded, of any mode but F. profile: its ICC profile; one that is broken, or for another
    kind of samples, is ignored. mask: what is not transparent, in place of what the image says.
    """
    colours, alpha = _split(image)
    if mask is not None:
        alpha = Image.fromarray(mask.astype(np.uint8) * 255)
    colours = _srgb(colours, profile)
    if alpha is None:
        return colours
    colours.putalpha(alpha)
    white = Image.new("RGBA", colours.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, colours).convert("RGB")


def is_other(samples: npt.NDArray[Any], transparent: tuple[int, ...]) -> Mask:
    """What is not of the transparent colour: samples [H, W] or [H, W, 3], at its own depth."""
    different: Mask = np.zeros(samples.shape[:2], np.bool_)
    for channel, value in zip(np.atleast_3d(samples).transpose(2, 0, 1), transparent, strict=True):
        different |= channel != value
    return different


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours without transparency, and that as mode L where there is any."""
    mode, transparent = image.mode, image.info.get("transparency")
    if mode in ("RGBa", "La", "PA") or (mode == "P" and _is_transparent(image)):
        image = image.convert("LA" if mode == "La" else "RGBA")
    if image.mode in WITH_ALPHA:
        alpha = image.getchannel("A")
        return image.convert(WITH_ALPHA[image.mode]), alpha
    values: npt.NDArray[Any] | None = None
    if mode.startswith("I"):  # Pillow's own conversion to 8 bits would clip
        values = np.asarray(image)
        colours = Image.fromarray((values.clip(0, 65535) // SIXTEEN_BITS).astype(np.uint8))
    elif mode == "1":
        colours = image.convert("L")
        values = np.asarray(colours)
        if isinstance(transparent, int):
            transparent = 255 if transparent else 0
    else:
        colours = image if mode in MODES.values() else image.convert("RGB")
        if mode in ("L", "RGB"):
            values = np.asarray(colours)
    given = (transparent,) if isinstance(transparent, int) else transparent
    channels = 3 if mode == "RGB" else 1
    if values is None or not isinstance(given, tuple) or len(given) != channels:
        return colours, None
    if channels == 3 and max(given) > 255:  # of 16 bits, of which Pillow keeps the upper half
        given = tuple(sample >> 8 for sample in given)
    mask = is_other(values, given)
    return colours, Image.fromarray(mask.astype(np.uint8) * 255)


def _is_transparent(image: Image.Image) -> bool:
    """Whether a palette has transparent entries."""
    palette = image.palette
    return "transparency" in image.info or (palette is not None and palette.mode == "RGBA")


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image of mode RGB, L, CMYK or LAB as RGB in sRGB, by its profile."""
    if image.mode == "LAB":  # an ICC connection space itself
        return _transformed(image, ImageCms.createProfile("LAB"))
    if profile is not None:
        try:
            described = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if MODES.get(described.profile.xcolor_space.strip()) == image.mode:
                return _transformed(image, described)
        except Exception:  # the colours as they are, as viewers show them
            return image.convert("RGB")
    return image.convert("RGB")


def _transformed(image: Image.Image, profile: Any) -> Image.Image:
    """As the profile's maker meant it to be shown."""
    transformed = ImageCms.profileToProfile(
        image,
        profile,
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.PERCEPTUAL,
        outputMode="RGB",
    )
    assert transformed is not None  # since it is not in place
    return transformed
