"""Images of finished videos, made when they are first asked for and kept beside the mp4."""

from __future__ import annotations

import asyncio
import logging
import secrets
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from magihuman.runtime.errors import InvalidRequestError, MagiHumanError
from magihuman.runtime.files import close_to_others
from magihuman.runtime.media import Decoders, StillTask
from magihuman.runtime.serving.errors import ApiError, no_decoder
from magihuman.runtime.serving.storage.files import Stored

log = logging.getLogger("magihuman")

Which = Literal["thumbnail", "spritesheet"]

AT_ONCE = 2  # each has a process of its own


class Stills:
    """Makes images of videos, a few at once. For one event loop."""

    def __init__(self, decoders: Decoders) -> None:
        self._decoders = decoders
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def of(self, video: Path | Stored, which: Which) -> Path | Stored:
        """Return the place of an image of a video, in WebP.

        Raises `OSError` where the disk does not take the image, and `ApiError` where it cannot be
        made.
        """
        if isinstance(video, Stored):
            return await self._of_stored(video, which)
        image = video.with_name(f"{which}.webp")
        async with self._turns:
            if image.is_symlink() or not image.is_file():
                await asyncio.to_thread(self._make, video, image, which)
        return image

    async def _of_stored(self, video: Stored, which: Which) -> Stored:
        """Do the same in the storage, by a copy on this machine's disk."""
        image = video.beside(f"{which}.webp")
        async with self._turns:
            try:
                await asyncio.to_thread(image.storage.size, image.name)
            except FileNotFoundError:
                await asyncio.to_thread(self._make_stored, video, image, which)
        return image

    def _make_stored(self, video: Stored, image: Stored, which: Which) -> None:
        with TemporaryDirectory(prefix=".magihuman-") as folder:
            copy, made = Path(folder, "video.mp4"), Path(folder, "image.webp")
            video.storage.get(video.name, copy)
            self._make(copy, made, which)
            image.storage.put(made, image.name)

    def _make(self, video: Path, image: Path, which: Which) -> None:
        draft = image.with_name(f".magihuman-{secrets.token_hex(4)}.webp")
        try:
            self._decoders.run("still", StillTask(str(video), str(draft), which))
            close_to_others(draft)
            draft.replace(image)
        except InvalidRequestError:
            log.exception("%s has no image", video)
            message = "no image could be made of the video; the server's log has the details"
            raise ApiError(500, "internal_error", message) from None
        except MagiHumanError as error:
            raise no_decoder() from error
        finally:
            draft.unlink(missing_ok=True)
