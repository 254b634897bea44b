"""Files that have been damaged at random, as nobody would think of."""

from __future__ import annotations

import struct
import zlib

import numpy as np

TELLING = (0, 1, 2, 7, 8, 127, 128, 254, 255)  # bytes that are the edge of something
LENGTHS = (0, 1, 12, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def mutated(seed: bytes, random: np.random.Generator) -> bytes:
    """A seed with one to four changes: of bytes, lengths, pieces, or its end."""
    content = bytearray(seed)
    for _ in range(int(random.integers(1, 5))):
        # Headers are where a file says most: half of all changes are there.
        end = len(content) if random.random() < 0.5 else min(len(content), 200)
        at = int(random.integers(0, max(1, end)))
        size = int(random.integers(1, 65))
        match int(random.integers(0, 7)):
            case 0:  # a bit
                if content:
                    content[at] ^= 1 << int(random.integers(0, 8))
            case 1:
                content[at : at + 1] = bytes([TELLING[int(random.integers(0, len(TELLING)))]])
            case 2:  # noise
                content[at : at + size] = random.bytes(size)
            case 3:
                del content[at:]
            case 4:  # a piece again, or another one's
                other = int(random.integers(0, max(1, len(content))))
                content[at:at] = content[other : other + size]
            case 5:
                del content[at : at + size]
            case 6:
                order = ">I" if random.random() < 0.5 else "<I"
                value = LENGTHS[int(random.integers(0, len(LENGTHS)))]
                content[at : at + 4] = struct.pack(order, value)
    whole = bytes(content)
    return _checked(whole) if random.random() < 0.5 else whole


def _checked(content: bytes) -> bytes:
    """A PNG file's checksums made right again, or its decoder would look no further."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    fixed, at = bytearray(content), 8
    while at + 12 <= len(fixed):
        (length,) = struct.unpack_from(">I", fixed, at)
        end = at + 12 + length
        if end > len(fixed):
            break
        struct.pack_into(">I", fixed, end - 4, zlib.crc32(fixed[at + 4 : end - 4]))
        at = end
    return bytes(fixed)
