"""Colours and transparency of an image in any of Pillow's modes: to sRGB, over white."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

Mask = npt.NDArray[np.bool_]  # [H, W], what is not transparent

MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # by an ICC profile's space
WITH_ALPHA = {"RGBA": "RGB", "LA": "L"}
SIXTEEN_BITS = 257  # steps of 16-bit samples in one of 8 bits

# What a PNG file says by numbers: a curve from samples to light, y = (a x + b)^g from x = d on and
# c x below, and x and y of white, red, green and blue (ITU-T H.273, tables 2 and 3).
Curve = tuple[float, float, float, float, float]  # g, a, b, c, d
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
BT709_CURVE = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
D65 = (0.3127, 0.3290)
BT709 = (*D65, 0.640, 0.330, 0.300, 0.600, 0.150, 0.060)
CURVES = dict.fromkeys((1, 6, 14, 15), BT709_CURVE) | {
    4: (2.2, 1.0, 0.0, 0.0, 0.0),
    5: (2.8, 1.0, 0.0, 0.0, 0.0),
    8: (1.0, 1.0, 0.0, 0.0, 0.0),
    13: SRGB_CURVE,
}
PRIMARIES = {
    1: BT709,
    5: (*D65, 0.640, 0.330, 0.290, 0.600, 0.150, 0.060),
    6: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
LIKE_SRGB = 0.05  # a gamma that differs from 1 / 2.2 by less is meant to be sRGB
D50 = (0.9642, 1.0, 0.8249)
BRADFORD = ((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296))


def profile_of_codes(codes: bytes, is_grey: bool) -> bytes | None:
    """The ICC profile of a cICP chunk: primaries, curve, matrix and range; empty for sRGB. None for
    what is no RGB in full range, has a curve beyond white (PQ and HLG), or is unknown.
    """
    if len(codes) != 4 or codes[2:] != b"\0\1":
        return None
    curve, primaries = CURVES.get(codes[1]), PRIMARIES.get(codes[0])
    if curve is None or primaries is None:
        return None
    return _matrix_profile(curve, primaries, is_grey)


def profile_of_gamma(
    gamma: float, chromaticities: Sequence[float] | None, is_grey: bool
) -> bytes | None:
    """The ICC profile of the chunks gAMA and cHRM; empty for sRGB, None for what makes no sense.

    gamma: the exponent from light to samples. chromaticities: x and y of white, red, green, blue.
    """
    if not 0.1 <= gamma <= 10:
        return None
    curve = (1 / gamma, 1.0, 0.0, 0.0, 0.0)
    if abs(gamma * 2.2 - 1) < LIKE_SRGB:
        curve = SRGB_CURVE
    return _matrix_profile(curve, chromaticities or BT709, is_grey)


def _matrix_profile(curve: Curve, xy: Sequence[float], is_grey: bool) -> bytes | None:
    """An ICC profile (ICC.1:2022) of grey or RGB; empty for sRGB, None where xy are no colours."""
    is_srgb = is_grey or float(np.abs(np.subtract(xy, BT709)).max()) < 0.001
    if curve == SRGB_CURVE and is_srgb:
        return b""
    curves = b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + _fixed(curve)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + _fixed(D50)}
    if is_grey:
        return _profile(b"GRAY", tags | {b"kTRC": curves})
    try:
        columns = _under_d50(np.reshape(xy, (4, 2)))
        colours = {b"%cXYZ" % name: column for name, column in zip(b"rgb", columns, strict=True)}
        tags |= {name: b"XYZ \0\0\0\0" + _fixed(column) for name, column in colours.items()}
    except (ValueError, ArithmeticError, np.linalg.LinAlgError, struct.error):
        return None
    return _profile(b"RGB ", tags | {b"%cTRC" % name: curves for name in b"rgb"})


def _under_d50(xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """XYZ of red, green and blue, one a row, adapted from white, the first of xy, to D50."""
    with np.errstate(all="raise"):
        x, y = xy.T
        xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y], axis=1)
        white, colours = xyz[0], xyz[1:]
        scaled = colours * np.linalg.solve(colours.T, white)[:, None]
        cones = np.array(BRADFORD)
        gains = (cones @ D50) / (cones @ white)
        return np.asarray(scaled @ (np.linalg.inv(cones) @ np.diag(gains) @ cones).T)


def _fixed(values: Sequence[float] | npt.NDArray[np.float64]) -> bytes:
    """Raises `struct.error` for what 16 bits before the point do not hold."""
    return struct.pack(f">{len(values)}i", *(round(float(value) * 65536) for value in values))


def _profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x04200000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + _fixed(D50)
    return head.ljust(128, b"\0") + table + body


def opaque_rgb(image: Image.Image, profile: bytes | None, mask: Mask | None = None) -> Image.Image:
    """An RGB image in sRGB, transparency laid over white.

    image: loaded, of any mode but F. profile: its ICC profile, empty for sRGB; one that is broken,
    or for another kind of samples, is ignored. mask: what is not transparent, in place of what the
    image says.
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
    if profile:
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
