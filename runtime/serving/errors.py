"""Errors as clients get them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse

if TYPE_CHECKING:
    from magihuman.runtime.serving.jobs import Jobs
    from magihuman.runtime.serving.record import Job

log = logging.getLogger("magihuman")

DISK, DISK_RETRY_S = "disk", 60
MAX_SHOWN = 100  # characters of what a client chose, where it comes back to it
MAX_NAME = 256  # characters of a field's name
DECODER_RETRY_S = 30  # for a process that decodes to start
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer of 400 or above."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.param = None if param is None else shown(param)
        self.headers = headers

    def response(self) -> JSONResponse:
        """Return it as JSON, with its status and headers."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        # What clients sent can come back in a message, with halves of surrogate pairs in it.
        message = _whole(self.message)
        detail = {
            "message": message,
            "type": TYPES.get(self.status, kind),
            "param": None if self.param is None else _whole(self.param),
            "code": self.code,
        }
        return JSONResponse({"error": detail}, self.status, headers=self.headers)


def invalid(message: str, param: str | None = None) -> ApiError:
    """Return the error of a body that can be read, and asks for what cannot be served."""
    return ApiError(422, "invalid_value", message, param)


def malformed(message: str) -> ApiError:
    """Return the error of a body that cannot be read."""
    return ApiError(400, "malformed_body", message)


def unnamed() -> ApiError:
    """Return the error of a field whose name is too long to be one."""
    return invalid(f"a field's name must have no more than {MAX_NAME} characters")


def shown(text: str) -> str:
    """Return what a client chose as an answer may have it: its beginning, where it is long."""
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def too_large(limit_bytes: int) -> ApiError:
    """Return the error of a body of more bytes than may be."""
    return ApiError(
        413,
        "body_too_large",
        f"the body must have no more than {limit_bytes} bytes; send a smaller image or sound",
    )


def no_video() -> ApiError:
    """Return the error of an id that no video has."""
    return ApiError(404, "video_not_found", "there is no such video, or no more", "video_id")


def no_decoder() -> ApiError:
    """Return the error of a server that can start no process to decode a file."""
    headers = {"Retry-After": str(DECODER_RETRY_S)}
    message = "no process that decodes files can be started; try again later"
    return ApiError(503, "decoder", message, headers=headers)


def retry(seconds: int) -> dict[str, str]:
    """Return the header that says in how many seconds to come again."""
    return {"Retry-After": str(seconds)}


def refused(error: OSError) -> ApiError:
    """Return the error of a disk, or of what a server has in place of one."""
    place = getattr(error, "place", DISK)
    if place == DISK:
        message = f"the server's disk does not take it: {error.strerror}"
    else:  # what it says can name addresses
        log.warning("the %s cannot be used: %s", place, error.strerror)
        message = f"the server's {place} cannot be used now; try again later"
    return ApiError(503, place, message, headers=retry(DISK_RETRY_S))


@contextmanager
def disk_taken() -> Iterator[None]:
    """Turn what a disk does not take into an `ApiError`."""
    try:
        yield
    except OSError as error:
        raise refused(error) from error


async def found(jobs: Jobs, video_id: str) -> Job:
    """Return the job of an id. Raises `ApiError` where there is none."""
    with disk_taken():
        job = await jobs.find(video_id)
    if job is None:
        raise no_video()
    return job


def _whole(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
