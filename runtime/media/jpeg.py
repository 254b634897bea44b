"""What a JPEG file says of its orientation, apart from its pixels (ITU-T T.81, Exif 2.32)."""

from __future__ import annotations

SIGNATURE = b"\xff\xd8\xff"
SCAN, APP1, APP2 = 0xDA, 0xE1, 0xE2
ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
EXIF, XMP, FRAMES = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"MPF\0"


def split(content: bytes) -> tuple[bytes, bytes | None, bytes | None]:
    """A JPEG file without EXIF, XMP and further frames, for Pillow, and its EXIF and its XMP.

    Pillow reads a resolution from EXIF when it opens a file, and warns of what is malformed there.
    Nothing is checked: what is no segment stays for Pillow to refuse.
    """
    kept, exif, xmp = [content[:2]], None, None
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        kind = content[at + 1]
        if kind == 0xFF:  # fill
            at += 1
            continue
        if kind == SCAN:
            break
        end = at + 2
        if kind not in ALONE:
            end += int.from_bytes(content[at + 2 : at + 4], "big")
        if end > len(content) or end < at + 2:
            break
        body = content[at + 4 : end]
        if kind == APP1 and body.startswith(EXIF):
            exif = exif or body
        elif kind == APP1 and body.startswith(XMP):
            xmp = xmp or body
        elif not (kind == APP1 or (kind == APP2 and body.startswith(FRAMES))):
            kept.append(content[at:end])
        at = end
    return b"".join([*kept, content[at:]]), exif, xmp
