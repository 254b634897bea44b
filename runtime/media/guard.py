"""What a decoder meets in a file is the file's fault: one error for all that can go wrong."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from magihuman.runtime.errors import InvalidRequestError

LOCAL = {"protocol_whitelist": "file"}  # what a file names elsewhere is not opened


@contextmanager
def readable(what: str, name: str) -> Iterator[None]:
    """Turn every exception of a decoder inside into an `InvalidRequestError` that names the file.

    what: the request's field, "image" or "audio". name: of the file, for the message. Pillow,
    PyAV, struct and zlib raise what they like over damaged or hostile files, `MemoryError` and
    `RecursionError` among it. Raises `InvalidRequestError`; what is no `Exception`, such as
    `KeyboardInterrupt`, passes.
    """
    try:
        yield
    except InvalidRequestError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidRequestError(
            f"{what} must be whole, but {name} cannot be decoded ({reason}); save it again"
        ) from error


@contextmanager
def freed() -> Iterator[None]:
    """Free the containers and codecs that PyAV has made inside, which a function of its own holds.

    They refer to each other, so that they and their threads, a few for each processor, would stay
    until Python next looks for such objects everywhere: hundreds of megabytes later. Looking among
    the newest takes less than a millisecond.
    """
    try:
        yield
    finally:
        gc.collect(1)


def checked_file(what: str, source: object) -> Path:
    """The path of a file that is there and is not empty.

    what: the request's field, for the message. Raises `InvalidRequestError`.
    """
    if not isinstance(source, (str, os.PathLike)) or not isinstance(os.fspath(source), str):
        raise InvalidRequestError(f"{what} must be a path, got a {type(source).__name__}")
    path = Path(source)
    if not os.path.isfile(path):
        state = "is not a file" if os.path.exists(path) else "does not exist"
        raise InvalidRequestError(f"{what} must be a readable file, got {path}, which {state}")
    try:
        size = path.stat().st_size
    except OSError as error:  # it has gone meanwhile
        raise InvalidRequestError(f"{what} {path} cannot be read: {error.strerror}") from error
    if size == 0:
        raise InvalidRequestError(f"{what} must not be empty, got {path} of 0 bytes")
    return path


@contextmanager
def opened_video(source: Path, what: str, formats: tuple[str, ...] = ()) -> Iterator[Any]:
    """Open a video's file for PyAV to read, and none that it names elsewhere.

    what: it is, for the message. formats: FFmpeg's names of those that may be opened, any by
    default. Raises `InvalidRequestError` where there is no such file, or no picture in it.
    """
    import av

    if not source.is_file():
        raise InvalidRequestError(f"{what} must be a file that exists, got {source}")
    options = {"format_whitelist": ",".join(formats)} if formats else {}
    # By its protocol: a name like 12:30.mp4 would be an address.
    file = f"file:{source.absolute()}"
    with av.open(file, container_options={**LOCAL, **options}, **tolerant()) as container:
        if not container.streams.video:
            raise InvalidRequestError(f"{what} must have a picture, got {source} without one")
        yield container


def tolerant() -> dict[str, str]:
    """Keywords of `av.open` that have it read tags in another encoding than UTF-8.

    PyAV 19 reads them so by itself, and has no such keyword.
    """
    import av

    return {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
