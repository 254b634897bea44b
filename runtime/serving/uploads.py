"""The body of a new video: read, checked, and put on disk. Nothing in it is trusted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from magihuman.runtime import config
from magihuman.runtime.errors import InvalidRequestError, MagiHumanError
from magihuman.runtime.media import Decoders, ImageTask, SoundTask
from magihuman.runtime.prompts import picture
from magihuman.runtime.request import Plan
from magihuman.runtime.serving.errors import (
    MAX_NAME,
    ApiError,
    invalid,
    malformed,
    shown,
    unnamed,
)
from magihuman.runtime.serving.schema import AUDIO_FIELD, FILES, IMAGE_FIELD, VideoOptions
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.store import AUDIO, IMAGE, Job, request_of
from magihuman.runtime.serving.transfer.data_url import decoded, unescaped
from magihuman.runtime.serving.transfer.document import DocumentReader
from magihuman.runtime.serving.transfer.form import FormReader
from magihuman.runtime.serving.transfer.spool import TOO_LONG, Budget, Fields, Sent, Shape, Spool

log = logging.getLogger("magihuman")

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
# FFmpeg's own names; none of them opens other files or addresses, as playlists do.
AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg", "aac", "mov", "matroska")
NAMES = {IMAGE_FIELD: IMAGE, AUDIO_FIELD: AUDIO}
FORM, JSON = "multipart/form-data", "application/json"
MAX_FIELDS = 32
CHAR_BYTES = 12  # of a character in JSON, written as two halves of a surrogate pair
RETRY_S = 30  # for a process that decodes to start
ENHANCING = threading.BoundedSemaphore(2)  # of those that fill folders; the others go on
DECODERS = Decoders()  # of this process; it starts none before the first upload or `warm`


@dataclass(frozen=True)
class Upload:
    """The content of a file that a client sends.

    Attributes:
        name: of its field.
        sent: where it is, as it came; a short data URL is a text.
    """

    name: str
    sent: Sent | str

    def pieces(self) -> Iterator[bytes]:
        """Yield what the file has in it. Raises `ApiError` where a data URL is none."""
        if isinstance(self.sent, str):
            return decoded([self.sent.encode("utf-8", "replace")], self.name)
        pieces = self.sent.spool.pieces()
        if self.sent.kind == "file":
            return pieces
        return decoded(unescaped(pieces) if self.sent.kind == "json" else pieces, self.name)

    def close(self) -> None:
        """Remove it."""
        if isinstance(self.sent, Sent):
            self.sent.spool.close()


@dataclass(frozen=True)
class NewVideo:
    """A job that can be written, with what was uploaded for it.

    Attributes:
        is_enhanced: whether the prompt is rewritten first.
    """

    job: Job
    uploads: list[Upload]
    settings: Settings
    is_enhanced: bool = False

    def fill(self, folder: Path) -> None:
        """Put the uploads into the folder, once, and refuse what cannot be used. Takes seconds."""
        try:
            for upload in self.uploads:
                name = NAMES[upload.name]
                source = folder / f"{name}.upload"
                with source.open("wb") as file:
                    for piece in upload.pieces():
                        file.write(piece)
                self._decode(upload.name, source, folder / name)
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
            upload.close()

    def _decode(self, name: str, source: Path, target: Path) -> None:
        """Have a file made of an upload that this package has written; engines read no other."""
        limits, files = self.settings.limits, (str(source), str(target))
        try:
            if name == IMAGE_FIELD:
                DECODERS.run("image", ImageTask(*files, limits.image_pixels, IMAGE_FORMATS))
            else:
                seconds = self.job.options["seconds"]
                task = SoundTask(*files, limits.audio_s, seconds, AUDIO_FORMATS)
                DECODERS.run("sound", task)
        except InvalidRequestError as error:
            raise invalid(str(error).replace(str(source), "the upload"), name) from None
        except MagiHumanError as error:
            log.exception("%s cannot be decoded", name)
            headers = {"Retry-After": str(RETRY_S)}
            message = "no process that decodes files can be started; try again later"
            raise ApiError(503, "decoder", message, headers=headers) from error


async def read(request: Request, settings: Settings, budget: Budget) -> NewVideo:
    """Read and check a body. Its files go to the disk as they come.

    budget: counts them until the video's files are filled or closed. Raises `ApiError` for all that
    is wrong, the files' content apart, and `OSError` where the disk does not take them.
    """
    length = request.headers.get("content-length", "")
    if length.isdigit():
        budget.check(int(length[:20]))
    reader = _reader(request.headers.get("content-type", ""), settings, budget)
    try:
        async for chunk in request.stream():
            async with budget.turns:
                await run_in_threadpool(reader.feed, chunk)
        async with budget.turns:
            return await run_in_threadpool(_from_fields, reader, settings)
    except BaseException:
        reader.close()
        raise


def _reader(content_type: str, settings: Settings, budget: Budget) -> FormReader | DocumentReader:
    shape = Shape(
        tuple(FILES),
        MAX_FIELDS,
        CHAR_BYTES * settings.limits.prompt_chars + 1024,
        lambda: Spool(settings.folder, budget),
    )
    kind = content_type.partition(";")[0].strip().lower()
    if kind == FORM:
        return FormReader(content_type, shape)
    if kind == JSON:
        return DocumentReader(shape)
    raise ApiError(
        415,
        "unsupported_media_type",
        f"the body must be {FORM} or {JSON}, got {shown(kind) or 'neither'}",
    )


def _from_fields(reader: FormReader | DocumentReader, settings: Settings) -> NewVideo:
    """Check what has been read. A form and JSON differ in nothing but that numbers may be text."""
    fields = reader.end()
    _check_names(fields)
    values: dict[str, Any] = {}
    uploads: list[Upload] = []
    for name, value in fields:
        if name in FILES:
            uploads.append(_upload(name, value))
        elif isinstance(value, Sent) and value.kind == "file":
            raise invalid(f"{shown(name)} must be a field of the form, got a file", name)
        elif isinstance(value, Sent) or value is TOO_LONG:
            most = settings.limits.prompt_chars
            raise invalid(f"{shown(name)} must have no more than {most} characters", name)
        else:
            values[name] = value
    return _checked(values, uploads, settings, is_strict=isinstance(reader, DocumentReader))


def _check_names(fields: Fields) -> None:
    """Refuse names that are there twice, or too long to be any."""
    names = [name for name, _ in fields]
    if sum(name in FILES for name in names) > len(FILES):
        raise malformed(f"the body must have no more than {len(FILES)} files")
    for index, name in enumerate(names):
        if len(name) > MAX_NAME:
            raise unnamed()
        if name in names[:index]:
            raise invalid(f"{shown(name)} must be given once", name)


def _upload(name: str, value: object) -> Upload:
    if not isinstance(value, (Sent, str)):
        value = ""  # is no data URL
    return Upload(name, value)


def _checked(
    values: Mapping[str, Any], uploads: list[Upload], settings: Settings, is_strict: bool
) -> NewVideo:
    """Check values. is_strict: whether numbers must be numbers; in a form they are text."""
    limits = settings.limits
    try:
        options = VideoOptions.model_validate({**settings.defaults, **values}, strict=is_strict)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"])) or None
        raise invalid(f"{shown(name or 'the body')}: {first['msg']}", name) from None
    if options.model not in (None, settings.model):
        message = f"model must be {settings.model!r}, the one served, got {shown(options.model)!r}"
        raise ApiError(404, "model_not_found", message, "model")
    if options.enhance and settings.enhancer is None:
        message = "enhance needs a server that was started with --enhance; leave it out on this one"
        raise invalid(message, "enhance")
    for name in ("prompt", "negative_prompt"):
        text = getattr(options, name)
        if text is not None and len(text) > limits.prompt_chars:
            raise invalid(
                f"{name} must have no more than {limits.prompt_chars} characters, got {len(text)}",
                name,
            )
    fields = options.fields()
    if fields["seconds"] > limits.seconds:
        raise invalid(
            f"seconds must be no more than {limits.seconds:g} on this server, got"
            f" {fields['seconds']:g}",
            "seconds",
        )
    if fields["width"] * fields["height"] > limits.pixels:
        raise invalid(
            f"size must be of no more than {limits.pixels} pixels on this server, got"
            f" {options.size}",
            "size",
        )
    job = Job(options.prompt, fields)
    try:
        plan = request_of(job, Path()).plan(config.VARIANTS[settings.variant], settings.sr)
    except InvalidRequestError as error:
        raise invalid(str(error)) from None
    _check_room(plan, options, settings)
    return NewVideo(job, uploads, settings, options.enhance)


def _check_room(plan: Plan, options: VideoOptions, settings: Settings) -> None:
    """Refuse what no engine of this server has the memory for."""
    capacity = settings.capacity
    needed = None if capacity is None else capacity.missing_bytes(plan)
    if capacity is not None and needed is not None:
        raise invalid(
            f"a video must fit the memory of this server's engines,"
            f" {capacity.memory_bytes / 2**30:.1f} GiB each, and {options.seconds:g} s of"
            f" {options.size} take about {needed / 2**30:.0f} GiB; ask for a smaller size or fewer"
            " seconds",
            "size",
        )
