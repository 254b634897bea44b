"""What is kept of a job, and how it is read again: every field is checked, nothing is believed."""

from __future__ import annotations

import json
import os
import re
import reprlib
import secrets
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

from magihuman.runtime.request import ClipSize, Request, RequestOptions

STATE, IMAGE, AUDIO, VIDEO, LIVE = "job.json", "image", "audio", "video.mp4", "live.mp4"
PREFIX = "video_"
MAX_STATE_BYTES = 4 * 2**20  # of a job.json; read, it takes up to thirty times as much
MAX_TIME_S = 1e11  # since 1970: the year 5138
MAX_ATTEMPTS = 2
ID = re.compile(f"{PREFIX}[0-9a-f]{{32}}")
NO_WAIT = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC  # for a pipe's writer, or through a link


class Status(StrEnum):
    """How far a job is."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass
class Job:
    """A video, asked for or made. Times are seconds since 1970.

    Attributes:
        options: fields of `Request` beside the prompt and the files.
        attempts: how often an engine has begun it.
        error: `code` and `message`, where it has failed.
        model: the name that was asked for, where it is one of the server's.
        peak_memory_mb: that the engine has held while it made it, MB of 10^6 bytes.
        stage, progress: what an engine is doing, and how much is done, in percent; not kept.
    """

    prompt: str
    options: dict[str, Any]
    id: str = field(default_factory=lambda: PREFIX + secrets.token_hex(16))
    status: Status = Status.QUEUED
    created_at: float = field(default_factory=time.time)
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    attempts: int = 0
    timings_s: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: dict[str, str] | None = None
    model: str | None = None
    peak_memory_mb: float | None = None
    stage: str | None = None
    progress: int = 0

    @property
    def is_running(self) -> bool:
        """Whether an engine has it."""
        return self.status is Status.IN_PROGRESS

    @property
    def inference_time_s(self) -> float | None:
        """Seconds that an engine has taken for it, once it has ended."""
        if self.started_at is None or self.completed_at is None:
            return None
        return round(max(0.0, self.completed_at - self.started_at), 3)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is done for it."""
        return self.status in (Status.COMPLETED, Status.FAILED)


def request_of(job: Job, folder: Path) -> Request:
    """Return what is to be made, with the uploads in a folder. Raises `InvalidRequestError`."""
    image, audio = (place if place.exists() else None for place in (folder / IMAGE, folder / AUDIO))
    return Request(prompt=job.prompt, image=image, audio=audio, **job.options)


def engine_lost(attempts: int) -> tuple[str, str]:
    """Return code and message of a job whose engine has gone so many times."""
    return (
        "engine_lost",
        f"the process that made this video ended unexpectedly, {attempts} times in a row; ask for a"
        " shorter or smaller one, or look at the server's log",
    )


def kept(job: Job) -> dict[str, object]:
    """Return what `read` is to find again."""
    values = asdict(job)
    del values["stage"], values["progress"]
    return values


def held(folder: Path) -> dict[str, bool]:
    """Return the names in a job's folder, and of each whether it is a file; a link is none.

    Raises:
        ValueError: it is no folder.
        OSError: it cannot be read.
    """
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise ValueError("it must be a folder")
    with os.scandir(folder) as entries:
        return {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}


def read(folder: Path, names: Mapping[str, bool] | None = None) -> Job:
    """Read the job that an earlier release has left in a folder.

    names: what `held` has found there, where it was asked already.

    Raises:
        ValueError: what is there is not what a server has written.
        OSError: it cannot be read.
    """
    names = held(folder) if names is None else names
    check_files(names)
    job = checked(parsed(_content(folder / STATE).decode("utf-8")))
    if job.id != folder.name:
        raise ValueError(f"it is of {job.id}")
    return job


def check_files(names: Mapping[str, bool]) -> None:
    """Raise `ValueError` where what lies in a job's folder, by `held`, is no file but should be."""
    for name in (IMAGE, AUDIO, VIDEO, LIVE):
        if not names.get(name, True):
            raise ValueError(f"{name} must be a file")


def parsed(text: str) -> object:
    """Return what JSON has. Raises `ValueError`."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_file(path: Path) -> bool:
    """Whether a file is there; a link to one is none."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _content(path: Path) -> bytes:
    with open(os.open(path, os.O_RDONLY | NO_WAIT), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("it must be a file")
        # No more than there is: a buffer for all that there may be takes longer than the reading.
        content = file.read(min(facts.st_size, MAX_STATE_BYTES) + 1)
    if len(content) > MAX_STATE_BYTES:
        raise ValueError(f"it must have no more than {MAX_STATE_BYTES} bytes")
    return content


def checked(values: object) -> Job:
    """Make a job of what JSON, or a row of a table, had. Raises `ValueError`."""
    if not isinstance(values, dict):
        raise ValueError(f"it must be a JSON object, got {reprlib.repr(values)}")
    missing = {"prompt", "options", "id", "status"} - values.keys()
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} must be there")
    for name, value in values.items():
        if name not in RULES:
            raise ValueError(f"it has {reprlib.repr(name)}, which is no field of a job")
        rule, is_met = RULES[name]
        if not is_met(value):
            raise ValueError(f"{name} must be {rule}, got {reprlib.repr(value)}")
    request = Request(prompt=values["prompt"], **cast("RequestOptions", values["options"]))
    size = ClipSize(seconds=request.seconds, width=request.width, height=request.height)
    options = {**size, "seed": request.seed} | values["options"]
    job = Job(**values | {"status": Status(values["status"]), "options": options})
    job.progress = 100 if job.status is Status.COMPLETED else 0
    return job


def _is_text(value: object) -> bool:
    """Whether it is text that an answer can have, without halves of surrogate pairs."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_time(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= cast("float", value) <= MAX_TIME_S  # nor is NaN


def _is_time_or_null(value: object) -> bool:
    return value is None or _is_time(value)


def _are_timings(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return all(_is_text(stage) and _is_time(seconds) for stage, seconds in value.items())


def _is_error(value: object) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and value.keys() == {"code", "message"}
        and all(map(_is_text, value.values()))
    )


OPTIONS = RequestOptions.__annotations__.keys() - {"image", "audio", "continue_from"}
# What each field must be, and whether it is; the values of options are `Request`'s to check.
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "prompt": ("text", _is_text),
    "options": (
        f"an object of {', '.join(sorted(OPTIONS))}",
        lambda value: isinstance(value, dict) and value.keys() <= OPTIONS,
    ),
    "id": (
        f"{PREFIX} and 32 hexadecimal digits",
        lambda value: isinstance(value, str) and bool(ID.fullmatch(value)),
    ),
    "status": (
        f"one of {', '.join(Status)}",
        lambda value: isinstance(value, str) and value in list(Status),
    ),
    "created_at": ("a time", _is_time),
    "started_at": ("a time or null", _is_time_or_null),
    "completed_at": ("a time or null", _is_time_or_null),
    "expires_at": ("a time or null", _is_time_or_null),
    "attempts": (
        f"a whole number from 0 to {MAX_ATTEMPTS}",
        lambda value: type(value) is int and 0 <= value <= MAX_ATTEMPTS,
    ),
    "timings_s": ("seconds by stage", _are_timings),
    "warnings": (
        "a list of texts",
        lambda value: isinstance(value, list) and all(map(_is_text, value)),
    ),
    "error": ("code and message, or null", _is_error),
    "model": ("a text or null", lambda value: value is None or _is_text(value)),
    "peak_memory_mb": ("a number or null", _is_time_or_null),
}
