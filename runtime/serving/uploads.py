"""The body of a new video: read, checked, and put on disk. Nothing in it is trusted."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from magihuman.runtime import config
from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.media import Decoders, ImageTask, SoundTask
from magihuman.runtime.request import Plan
from magihuman.runtime.serving.errors import ApiError, invalid
from magihuman.runtime.serving.schema import AUDIO_FIELD, FILES, IMAGE_FIELD, VideoOptions
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.store import AUDIO, IMAGE, Job, request_of

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
# FFmpeg's own names; none of them opens other files or addresses, as playlists do.
AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg", "aac", "mov", "matroska")
NAMES = {IMAGE_FIELD: IMAGE, AUDIO_FIELD: AUDIO}
FORM, JSON = "multipart/form-data", "application/json"
MAX_FIELDS = 32
DECODERS = Decoders()  # of this process; it starts none before the first upload or `warm`


@dataclass(frozen=True)
class NewVideo:
    """A job that can be written, with what was uploaded for it."""

    job: Job
    uploads: dict[str, BinaryIO]
    settings: Settings

    def fill(self, folder: Path) -> None:
        """Put the uploads into the folder, once, and refuse what cannot be used. Takes seconds."""
        for name, upload in self.uploads.items():
            source, target = folder / f"{NAMES[name]}.upload", folder / NAMES[name]
            with upload, source.open("wb") as file:
                shutil.copyfileobj(upload, file)
            self._decode(name, source, target)
            source.unlink()

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


async def read(request: Request, settings: Settings) -> NewVideo:
    """Read and check a body. Raises `ApiError` for all that is wrong, its files' content apart."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == JSON:
        body = await request.body()
        return await asyncio.to_thread(_from_json, body, settings)
    if kind == FORM:
        return await _from_form(request, settings)
    raise ApiError(
        415, "unsupported_media_type", f"the body must be {FORM} or {JSON}, got {kind or 'neither'}"
    )


def _from_json(body: bytes, settings: Settings) -> NewVideo:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "malformed_body", f"the body must be JSON: {error}") from None
    if not isinstance(values, dict):
        raise invalid(f"the body must be a JSON object, got a {type(values).__name__}")
    uploads: dict[str, BinaryIO] = {}
    for name in FILES:
        if name in values:
            uploads[name] = io.BytesIO(_data_url(values.pop(name), name))
    return _checked(values, uploads, settings, is_strict=True)


async def _from_form(request: Request, settings: Settings) -> NewVideo:
    longest = 4 * settings.limits.prompt_chars + 1024  # bytes of one field
    try:
        form = await request.form(
            max_files=len(FILES), max_fields=MAX_FIELDS, max_part_size=longest
        )
    except (MultiPartException, ValueError, LookupError) as error:
        raise ApiError(400, "malformed_body", f"the body must be a form: {error}") from None
    try:
        return _from_fields(form, settings)
    except ApiError:
        await form.close()
        raise


def _from_fields(form: FormData, settings: Settings) -> NewVideo:
    values: dict[str, Any] = {}
    uploads: dict[str, BinaryIO] = {}
    for name, value in form.multi_items():
        if name in values or name in uploads:
            raise invalid(f"{name} must be given once", name)
        if isinstance(value, UploadFile):
            if name not in FILES:
                raise invalid(f"{name} must be a field of the form, got a file", name)
            uploads[name] = value.file
        elif name in FILES:
            uploads[name] = io.BytesIO(_data_url(value, name))
        else:
            values[name] = value
    return _checked(values, uploads, settings, is_strict=False)


def _data_url(value: object, name: str) -> bytes:
    head, comma, content = value.partition(",") if isinstance(value, str) else ("", "", "")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise invalid(
            f"{name} must be a file of a form, or a data URL (data:...;base64,...); addresses are"
            " not fetched",
            name,
        )
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{name} must be base64: {error}", name) from None


def _checked(
    values: Mapping[str, Any], uploads: dict[str, BinaryIO], settings: Settings, is_strict: bool
) -> NewVideo:
    """Check values. is_strict: whether numbers must be numbers; in a form they are text."""
    limits = settings.limits
    try:
        options = VideoOptions.model_validate({**settings.defaults, **values}, strict=is_strict)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"])) or None
        raise invalid(f"{name}: {first['msg']}", name) from None
    if options.model not in (None, settings.model):
        message = f"model must be {settings.model!r}, the one served, got {options.model!r}"
        raise ApiError(404, "model_not_found", message, "model")
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
    return NewVideo(job, uploads, settings)


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
