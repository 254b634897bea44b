"""A folder of PNG files, one a frame, with the sound beside them."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from magihuman.runtime.errors import OutputError
from magihuman.runtime.files import atomic_folder, sync_folder
from magihuman.runtime.media.clip import XMP, ClipWriter, Output, Sound, check_folder, check_room
from magihuman.runtime.media.output.wav import wav

XMP_KEY = "XML:com.adobe.xmp"
SOUND = "sound.wav"
FAST = 1  # of zlib: half the time of its default, for a tenth more bytes


class FolderWriter(ClipWriter):
    """Writes 00001.png and so on, and sound.wav, into a folder that is there once it is whole."""

    bits_per_pixel = 24

    @classmethod
    def _check_place(cls, output: Output, needed_bytes: int) -> None:
        folder = output.file
        if os.path.lexists(folder):
            raise OutputError(
                f"the output's folder must not exist yet, got {folder}; name another or remove it"
            )
        check_folder(folder.parent)
        check_room(folder.parent, needed_bytes)

    def _temporary(self) -> AbstractContextManager[Path]:
        return atomic_folder(self.path)

    def _settle(self, temporary: Path) -> None:
        sync_folder(temporary)

    def _write(self, temporary: Path) -> None:
        number = 0
        info = png_info(self._tags)
        for part in self._whole():
            if isinstance(part, Sound):
                content = wav(self._heard(part), self._rate, self._comment)
                (temporary / SOUND).write_bytes(content)
                continue
            for pixels in self._each(part):
                number += 1
                file = temporary / f"{number:05}.png"
                Image.fromarray(pixels).save(file, "PNG", pnginfo=info, compress_level=FAST)


def png_info(tags: dict[str, str]) -> PngInfo:
    """What a PNG says of where it comes from: tags, and that a model has made it."""
    info = PngInfo()
    info.add_itxt(XMP_KEY, XMP.decode())
    for name, text in tags.items():
        info.add_itxt(name, text)
    return info
