"""What a file says of where it comes from: tags, and the mark that a model has made it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from magihuman.runtime.files import version

NAME = "magihuman"
# Of IPTC's controlled vocabulary, "Digital Source Type NewsCodes".
AI_GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about=""'
    ' xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    f"<Iptc4xmpExt:DigitalSourceType>{AI_GENERATED}</Iptc4xmpExt:DigitalSourceType>"
    f"<xmp:CreatorTool>{NAME}</xmp:CreatorTool>"
    "</rdf:Description></rdf:RDF></x:xmpmeta>"
    '<?xpacket end="w"?>'
).encode()
# Of XMP in files of ISO base media (XMP specification, part 3, 1.1.6).
XMP_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
XMP_BOX = (8 + 16 + len(XMP)).to_bytes(4, "big") + b"uuid" + XMP_UUID + XMP
# What no text of a file may hold: ends of C's strings and other controls, but for line breaks.
CONTROLS = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Origin:
    """What a clip was made from.

    Attributes:
        prompt: as it was given.
        seed: of the request.
        model: a name, without the folders of a path.
    """

    prompt: str = ""
    seed: int | None = None
    model: str = ""

    def tags(self) -> dict[str, str]:
        """Text by name, valid in every format; what is not known is left out."""
        seed = "" if self.seed is None else str(self.seed)
        facts = {"prompt": self.prompt, "seed": seed, "model": self.model}
        known = {name: plain(text) for name, text in facts.items() if text}
        return {**known, "version": f"{NAME} {version()}"} if known else {}


def plain(text: str) -> str:
    """The text with a replacement character for each that a file's text cannot hold."""
    valid = text.encode("utf-8", "replace").decode("utf-8")
    return CONTROLS.sub("\N{REPLACEMENT CHARACTER}", valid)


def mark(path: Path) -> None:
    """Add the mark to the end of an mp4. Raises `OSError`."""
    with path.open("ab") as file:
        file.write(XMP_BOX)


def xmp_of(path: Path) -> bytes | None:
    """The XMP of a file of ISO base media, None where it has none. Raises `OSError`."""
    for kind, content in _boxes(path):
        if kind == b"uuid" and content.startswith(XMP_UUID):
            return content.removeprefix(XMP_UUID)
    return None


def _boxes(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each box of a file; content only of those kinds that may be XMP."""
    with path.open("rb") as file:
        while len(head := file.read(8)) == 8:
            size, kind, start = int.from_bytes(head[:4], "big"), head[4:], 8
            if size == 1:
                size, start = int.from_bytes(file.read(8), "big"), 16
            if size < start:  # 0: to the end of the file
                return
            is_wanted = kind == b"uuid"
            yield kind, file.read(size - start) if is_wanted else b""
            if not is_wanted:
                file.seek(size - start, 1)
