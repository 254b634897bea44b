"""The body of a new video: read, checked, and put on disk. Nothing in it is trusted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from magihuman.runtime.errors import InvalidRequestError, MagiHumanError
from magihuman.runtime.media import Decoders, FrameTask, ImageTask, SoundTask, is_video
from magihuman.runtime.prompts import picture
from magihuman.runtime.serving.asked.choice import is_enhanced, job_of
from magihuman.runtime.serving.asked.names import (
    AUDIO_FIELD,
    IMAGE_FIELD,
    REFERENCES,
    Reference,
    take_apart,
)
from magihuman.runtime.serving.errors import ApiError, invalid, no_decoder, shown
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.store import AUDIO, IMAGE, Job
from magihuman.runtime.serving.transfer.data_url import decoded, unescaped
from magihuman.runtime.serving.transfer.document import DocumentReader
from magihuman.runtime.serving.transfer.fetch import fetched, is_address
from magihuman.runtime.serving.transfer.form import FormReader
from magihuman.runtime.serving.transfer.spool import Budget, Sent, Shape, Spool
from magihuman.runtime.serving.transfer.urlencoded import UrlencodedReader

log = logging.getLogger("magihuman")

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
# FFmpeg's own names; none of them opens other files or addresses, as playlists do.
AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg", "aac", "mov", "matroska")
VIDEO_FORMATS = ("mov", "matroska")
NAMES = {IMAGE_FIELD: IMAGE, AUDIO_FIELD: AUDIO}
FORM, JSON, URLENCODED = (
    "multipart/form-data",
    "application/json",
    "application/x-www-form-urlencoded",
)
MAX_FIELDS = 32
CHAR_BYTES = 12  # of a character in JSON, written as two halves of a surrogate pair
ENHANCING = threading.BoundedSemaphore(2)  # of those that fill folders; the others go on
DECODERS = Decoders()  # of this process; it starts none before the first upload or `warm`

Reader = FormReader | DocumentReader | UrlencodedReader


@dataclass(frozen=True)
class NewVideo:
    """A job that can be written, with what was uploaded for it.

    Attributes:
        is_enhanced: whether the prompt is rewritten first.
    """

    job: Job
    uploads: list[Reference]
    settings: Settings
    is_enhanced: bool = False

    def fill(self, folder: Path) -> None:
        """Put the uploads into the folder, once, and refuse what cannot be used. Takes seconds."""
        try:
            for upload in self.uploads:
                target = folder / NAMES[upload.use]
                source = target.with_suffix(".upload")
                with source.open("wb") as file:
                    for piece in self._pieces(upload):
                        file.write(piece)
                self._decode(upload, source, target)
                source.unlink()
            self._enhance(folder / IMAGE)
        finally:
            self.close()

    def _enhance(self, image: Path) -> None:
        """Have the prompt rewritten, where that is asked for. image: decoded, if there is one."""
        enhancer = self.settings.enhancer if self.is_enhanced else None
        if enhancer is None:
            return
        if not ENHANCING.acquire(blocking=False):
            self.job.warnings.append("the prompt was not rewritten: too many are at once")
            return
        try:
            shown_image = picture(image) if image.exists() else None
            seconds = self.job.options["seconds"]
            made = enhancer.enhance(self.job.prompt, seconds=seconds, image=shown_image)
        finally:
            ENHANCING.release()
        self.job.prompt = made.text
        self.job.warnings.extend(map(str, made.warnings))

    def close(self) -> None:
        """Remove what was uploaded. May be called again."""
        for upload in self.uploads:
            if isinstance(upload.sent, Sent):
                upload.sent.spool.close()

    def _pieces(self, upload: Reference) -> Iterator[bytes]:
        """Yield what a file has in it. Raises `ApiError` where a data URL is none."""
        name, sent = upload.name, upload.sent
        if isinstance(sent, str):
            if is_address(sent) and self.settings.fetched_hosts:
                hosts, limit = self.settings.fetched_hosts, self.settings.limits.body_bytes
                return fetched(sent, name, hosts, limit)
            return decoded([sent.encode("utf-8", "replace")], name)
        pieces = sent.spool.pieces()
        if sent.kind == "file":
            return pieces
        return decoded(unescaped(pieces) if sent.kind == "json" else pieces, name)

    def _decode(self, upload: Reference, source: Path, target: Path) -> None:
        """Have a file made of an upload that this package has written; engines read no other."""
        try:
            if upload.use == IMAGE_FIELD:
                self._decode_image(upload, str(source), str(target))
            else:
                audio_s, seconds = self.settings.limits.audio_s, self.job.options["seconds"]
                task = SoundTask(str(source), str(target), audio_s, seconds, AUDIO_FORMATS)
                DECODERS.run("sound", task)
        except InvalidRequestError as error:
            raise invalid(str(error).replace(str(source), "the upload"), upload.name) from None
        except MagiHumanError as error:
            log.exception("%s cannot be decoded", upload.name)
            raise no_decoder() from error

    def _decode_image(self, upload: Reference, source: str, target: str) -> None:
        pixels = self.settings.limits.image_pixels
        if not is_video(source):
            DECODERS.run("image", ImageTask(source, target, pixels, IMAGE_FORMATS))
            return
        DECODERS.run("frame", FrameTask(source, target, pixels, VIDEO_FORMATS))
        self.job.warnings.append(
            f"{upload.name} is a video, and its last frame was taken as the reference image; its"
            " sound and motion are not continued"
        )


async def read(request: Request, settings: Settings, budget: Budget) -> NewVideo:
    """Read and check a body. Its files go to the disk as they come.

    budget: counts them until the video's files are filled or closed. Raises `ApiError` for all that
    is wrong, the files' content apart, and `OSError` where the disk does not take them.
    """
    length = request.headers.get("content-length", "")
    if length.isdigit():
        budget.check(int(length[:20]))
    shape = _shape(settings, budget)
    reader = _reader(request.headers.get("content-type", ""), shape)
    try:
        async for chunk in request.stream():
            async with budget.turns:
                await run_in_threadpool(reader.feed, chunk)
        async with budget.turns:
            return await run_in_threadpool(_from_fields, reader, shape, settings)
    except BaseException:
        reader.close()
        raise


def _shape(settings: Settings, budget: Budget) -> Shape:
    return Shape(
        tuple(REFERENCES),
        MAX_FIELDS,
        CHAR_BYTES * settings.limits.prompt_chars + 1024,
        lambda: Spool(settings.folder, budget),
    )


def _reader(content_type: str, shape: Shape) -> Reader:
    kind = content_type.partition(";")[0].strip().lower()
    match kind:
        case "multipart/form-data":
            return FormReader(content_type, shape)
        case "application/json":
            return DocumentReader(shape)
        case "application/x-www-form-urlencoded":
            return UrlencodedReader(shape)
    raise ApiError(
        415,
        "unsupported_media_type",
        f"the body must be {FORM}, {JSON} or {URLENCODED}, got {shown(kind) or 'none of them'}",
    )


def _from_fields(reader: Reader, shape: Shape, settings: Settings) -> NewVideo:
    """Check what has been read, which differs in nothing by how it was sent."""
    asked = take_apart(reader.end(), shape, settings.limits.prompt_chars)
    try:
        job, is_wanted = job_of(asked, settings), is_enhanced(asked, settings)
        return NewVideo(job, asked.references, settings, is_wanted)
    except BaseException:
        for file in asked.references:
            if isinstance(file.sent, Sent):
                file.sent.spool.close()
        raise
