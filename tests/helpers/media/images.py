"""Image files byte by byte, and colour profiles, for what no library would write."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by PNG's colour type
DISPLAY_P3 = (
    (0.51512, 0.24120, -0.00105),
    (0.29198, 0.69225, 0.04189),
    (0.15710, 0.06657, 0.78407),
)


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG file."""
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png(samples: npt.NDArray[np.int64], depth: int, colour_type: int, before: bytes = b"") -> bytes:
    """samples: [H, W, channels], of so many bits. before: chunks before the pixels."""
    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1)
    assert rows.shape[1] == width * CHANNELS[colour_type]
    if depth == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        packed = [np.packbits(row.reshape(-1).astype(bool)).tobytes() for row in bits]
    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in packed))
    body = chunk(b"IHDR", head) + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def iccp(profile: bytes) -> bytes:
    """The chunk of a colour profile."""
    return chunk(b"iCCP", b"profile\0\0" + zlib.compress(profile, 9))


def matrix_profile(primaries: tuple[tuple[float, ...], ...], gamma: float) -> bytes:
    """An ICC profile of RGB: XYZ under D50 of red, green and blue, and one curve for all."""
    tags = {b"%cXYZ" % name: _xyz(*value) for name, value in zip(b"rgb", primaries, strict=True)}
    tags |= {b"%cTRC" % name: _curve(gamma) for name in b"rgb"}
    return _profile(b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    """An ICC profile of grey."""
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def cmyk_profile(lightness: float) -> bytes:
    """An ICC profile of CMYK: cyan is a grey of this L*, key is black, all else is white."""
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * value for value in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4
    for corner in range(16):  # cyan, magenta, yellow and key, each without or in full
        bright = 255 if corner < 8 else round(lightness * 2.55)
        table += bytes([0 if corner % 2 else bright, 128, 128])
    table += ramp * 3
    return _profile(b"CMYK", b"Lab ", {b"A2B0": table}, kind=b"prtr")


def _profile(space: bytes, pcs: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78
    tags = {b"desc": text, b"wtpt": _xyz(0.9642, 1.0, 0.8249), **tags}
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"\0" * 4, 0x02400000, kind, space, pcs)
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28
    head += struct.pack(">3i", 63190, 65536, 54061)  # D50
    return head.ljust(128, b"\0") + table + body


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def exif(*entries: tuple[int, int, int, int], end: str = "<") -> bytes:
    """A TIFF structure with these entries, (tag, type, count, value), and nothing they point to."""
    start = b"II*\0" if end == "<" else b"MM\0*"
    packed = b"".join(
        # A short stands at the beginning of the four bytes of a value.
        struct.pack(end + "HHI", *entry[:3])
        + (
            struct.pack(end + "HH", entry[3], 0)
            if entry[1] == 3
            else struct.pack(end + "I", entry[3])
        )
        for entry in entries
    )
    return start + struct.pack(end + "IH", 8, len(entries)) + packed + b"\0" * 4
