"""Which way up an image is, from the one tag that says so, whatever else lies beside it."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

from PIL import Image

TAG, SHORT = 0x0112, 3  # of EXIF, and the type its value has
ENDS = {b"II*\0": "<", b"MM\0*": ">"}
XMP = re.compile(rb'tiff:Orientation(?:\s*=\s*["\']|>)\s*([1-8])')
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation(exif: bytes | None, xmp: bytes | None) -> int:
    """1 to 8 as EXIF counts; 1, upright, where nothing says otherwise.

    exif: a TIFF structure, after "Exif" and two zeros or not. xmp: XML, asked where EXIF is silent.
    Neither need be well formed.
    """
    value = _from_exif(exif or b"")
    if value is None:
        match = XMP.search(xmp or b"")
        value = int(match[1]) if match else None
    return value if value is not None and 1 <= value <= 8 else 1


def orientation_of(info: Mapping[str | tuple[int, int], object]) -> int:
    """The same of what Pillow has read into `Image.info`."""
    exif = info.get("exif")
    raw = info.get("Raw profile type exif")
    if not isinstance(exif, bytes) and isinstance(raw, str):
        try:
            exif = bytes.fromhex("".join(raw.split()[2:]))
        except ValueError:
            exif = None
    xmp = info.get("xmp", info.get("XML:com.adobe.xmp"))
    if isinstance(xmp, str):
        xmp = xmp.encode("utf-8", "replace")
    return orientation(
        exif if isinstance(exif, bytes) else None, xmp if isinstance(xmp, bytes) else None
    )


def _from_exif(exif: bytes) -> int | None:
    """The tag's value in the first directory, None where there is none."""
    exif = exif.removeprefix(b"Exif\0\0")
    end = ENDS.get(exif[:4])
    if end is None:
        return None
    try:
        (at,) = struct.unpack_from(end + "I", exif, 4)
        (count,) = struct.unpack_from(end + "H", exif, at)
        for index in range(count):
            tag, kind, values, value = struct.unpack_from(end + "HHIH", exif, at + 2 + 12 * index)
            if (tag, kind, values) == (TAG, SHORT, 1):
                return int(value)
    except struct.error:  # cut short
        pass
    return None


def upright(image: Image.Image, value: int) -> Image.Image:
    """The image turned so that it is upright, or itself."""
    return image.transpose(TURNS[value]) if value in TURNS else image
