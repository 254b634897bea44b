"""What a PNG file says beside its pixels, read apart from them, with bounds (ISO/IEC 15948)."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, TRUECOLOUR, PALETTE, GREY_ALPHA = 0, 2, 3, 4
MAX_PROFILE_BYTES = 16 * 2**20  # the largest in use, for printing, are of 4 MiB
MAX_TEXT_BYTES = 2**20
NUMBERS = 100_000  # that stand for 1 in gAMA and cHRM
EXIF_KEYS = (b"Raw profile type exif", b"Raw profile type APP1")  # as ImageMagick writes it
XMP_KEY = b"XML:com.adobe.xmp"


@dataclass
class Notes:
    """What a PNG file says of its pixels.

    Attributes:
        depth, colour_type: as in its header.
        transparent: the samples of the transparent colour, one or three, at the file's own depth.
        profile: an ICC profile.
        codes: of the primaries, curve, matrix and range of ITU-T H.273, a byte each.
        gamma: the exponent from light to samples.
        chromaticities: x and y of white, red, green and blue.
        is_srgb: whether it says that it is sRGB, which goes before gamma and chromaticities.
        exif: a TIFF structure, after "Exif" and two zeros or not.
        xmp: XML.
    """

    depth: int = 8
    colour_type: int = TRUECOLOUR
    transparent: tuple[int, ...] | None = None
    profile: bytes | None = None
    codes: bytes | None = None
    gamma: float | None = None
    chromaticities: tuple[float, ...] | None = None
    is_srgb: bool = False
    exif: bytes | None = None
    xmp: bytes | None = None


def split(content: bytes) -> tuple[bytes, Notes]:
    """A PNG file of the pixels alone, for Pillow, and what else the file says.

    Texts that inflate beyond 1 MiB and profiles beyond 16 MiB are left out, where Pillow would
    refuse the image for them, and so are animations, of which this leaves the still image. Nothing
    is checked: what is no chunk stays for Pillow to refuse.
    """
    kept, notes = [content[: len(SIGNATURE)]], Notes()
    at = len(SIGNATURE)
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        kind, end = content[at + 4 : at + 8], at + 12 + length
        if end > len(content) or not kind.isalpha():
            break
        body = content[at + 8 : end - 4]
        if kind[:1].isupper() or (kind == b"tRNS" and notes.colour_type == PALETTE):
            kept.append(content[at:end])
        if kind == b"IHDR" and length >= 10:
            notes.depth, notes.colour_type = body[8], body[9]
        else:
            _note(notes, kind, body)
        at = end
    return b"".join([*kept, content[at:]]), notes


def _note(notes: Notes, kind: bytes, body: bytes) -> None:
    match kind:
        case b"tRNS" if notes.colour_type in (GREY, TRUECOLOUR):
            count = 3 if notes.colour_type == TRUECOLOUR else 1
            if len(body) >= 2 * count:
                mask = 2**notes.depth - 1
                samples = struct.unpack_from(f">{count}H", body)
                notes.transparent = tuple(sample & mask for sample in samples)
        case b"iCCP":
            notes.profile = _inflated(body.partition(b"\0")[2][1:], MAX_PROFILE_BYTES)
        case b"cICP":
            notes.codes = body
        case b"gAMA" if len(body) == 4:
            notes.gamma = int.from_bytes(body, "big") / NUMBERS
        case b"cHRM" if len(body) == 32:
            notes.chromaticities = tuple(x / NUMBERS for x in struct.unpack(">8I", body))
        case b"sRGB":
            notes.is_srgb = True
        case b"eXIf":
            notes.exif = body
        case b"tEXt" | b"zTXt":
            key, _, text = body.partition(b"\0")
            if key in EXIF_KEYS:
                plain = text if kind == b"tEXt" else _inflated(text[1:], MAX_TEXT_BYTES)
                notes.exif = notes.exif or _raw_profile(plain)
        case b"iTXt":
            key, _, rest = body.partition(b"\0")
            if key == XMP_KEY and len(rest) > 2:
                text = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
                notes.xmp = _inflated(text, MAX_TEXT_BYTES) if rest[0] else text


def _inflated(content: bytes, limit: int) -> bytes | None:
    """What zlib packed, or None where it is damaged or longer than the limit."""
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(content, limit)
    except zlib.error:
        return None
    return None if inflater.unconsumed_tail or not inflater.eof else plain


def _raw_profile(text: bytes | None) -> bytes | None:
    """ImageMagick's: a name, a length and hexadecimal digits, on lines of their own."""
    parts = (text or b"").split()
    try:
        return bytes.fromhex(b"".join(parts[2:]).decode("ascii"))
    except ValueError:
        return None
