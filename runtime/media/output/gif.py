"""The GIF of a clip, which has no sound: each frame has a palette of its own."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from magihuman.runtime.media.clip import XMP, ClipWriter, Frames
from magihuman.runtime.media.guard import freed

COLOURS = 256
TRAILER = b"\x3b"
COMMENT, XMP_BLOCK = b"\x21\xfe", b"\x21\xff\x0bXMP DataXMP"
# After XMP, which is no sequence of blocks: wherever a reader that takes it for one gets in here,
# it is led to the end (XMP specification, part 3, 1.1.2).
MAGIC = b"\x01" + bytes(range(255, -1, -1)) + b"\0"
BLOCK_BYTES = 255


class GifWriter(ClipWriter):
    """Writes an endless GIF of the frames."""

    bits_per_pixel = 8

    @freed()
    def _write(self, temporary: Path) -> None:
        import av

        with av.open(f"file:{temporary}", "w", format="gif") as container:
            stream = container.add_stream("gif", rate=Fraction(self._fps))
            stream.width, stream.height = self._size
            stream.pix_fmt = "pal8"
            for part in self._whole():
                if isinstance(part, Frames):
                    for pixels in self._each(part):
                        container.mux(stream.encode(_indexed(pixels)))
            container.mux(stream.encode(None))
        with temporary.open("r+b") as file:
            file.seek(-len(TRAILER), 2)
            file.write(self._notes() + TRAILER)

    def _notes(self) -> bytes:
        """What the file says of where it comes from, as extensions."""
        notes = XMP_BLOCK + XMP + MAGIC
        if self._comment is not None:
            text = self._comment.encode()
            parts = (text[i : i + BLOCK_BYTES] for i in range(0, len(text), BLOCK_BYTES))
            notes += COMMENT + b"".join(bytes([len(part)]) + part for part in parts) + b"\0"
        return notes


def _indexed(pixels: npt.NDArray[np.uint8]) -> Any:
    """A frame in its own 256 colours."""
    import av

    image = Image.fromarray(pixels).quantize(COLOURS, Image.Quantize.MEDIANCUT)
    assert image.palette is not None
    palette = np.zeros((COLOURS, 4), np.uint8)
    palette[:, 0] = 255  # A, R, G, B
    colours = np.frombuffer(image.palette.getdata()[1], np.uint8).reshape(-1, 3)
    palette[: len(colours), 1:] = colours
    return av.VideoFrame.from_ndarray((np.asarray(image), palette), format="pal8")
