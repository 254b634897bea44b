"""Files as data URLs, decoded piece by piece."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator

from magihuman.runtime.serving.errors import invalid

MAX_HEAD = 1000  # bytes before the comma
ESCAPES = re.compile(rb"\\u00([0-7][0-9a-fA-F])")


def decoded(pieces: Iterable[bytes], name: str) -> Iterator[bytes]:
    """Yield the content of a data URL in base64. name: of the field. Raises `ApiError`."""
    head, rest, is_last = b"", b"", False
    for piece in pieces:
        if b"," not in head:
            head += piece
            _check_head(head, name)
            before, comma, piece = head.partition(b",")
            head = before + comma
        content = rest + piece
        whole = len(content) // 4 * 4
        rest = content[whole:]
        if whole:
            if is_last:
                raise _no_base64(name, "there is more after its end")
            yield _plain(content[:whole], name)
            is_last = b"=" in content[:whole]
    if b"," not in head:
        raise _no_url(name)
    if rest:
        raise _no_base64(name, "it is cut, or has more after its end")


def unescaped(pieces: Iterable[bytes]) -> Iterator[bytes]:
    r"""Yield what a string of JSON means; but of its escapes `\/` and `\u00xx` alone.

    Some encoders write `/` and `+` so. What no data URL can have stays, and is no base64.
    """
    rest = b""
    for piece in pieces:
        content = rest + piece
        last = content.rfind(b"\\", max(0, len(content) - 5))  # may be half an escape
        content, rest = (content, b"") if last < 0 else (content[:last], content[last:])
        yield _meant(content)
    yield _meant(rest)


def _meant(content: bytes) -> bytes:
    if b"\\" not in content:
        return content
    content = ESCAPES.sub(lambda found: bytes([int(found[1], 16)]), content)
    return content.replace(b"\\/", b"/")


def _check_head(head: bytes, name: str) -> None:
    before, comma, _ = head.partition(b",")
    is_one = before[:5] == b"data:"[: len(before)] and len(before) <= MAX_HEAD
    if not is_one or (comma and not before.endswith(b";base64")):
        raise _no_url(name)


def _plain(content: bytes, name: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _no_base64(name, str(error)) from None


def _no_url(name: str) -> Exception:
    return invalid(
        f"{name} must be a file of a form, or a data URL (data:...;base64,...); addresses are not"
        " fetched",
        name,
    )


def _no_base64(name: str, reason: str) -> Exception:
    return invalid(f"{name} must be base64: {reason}", name)
