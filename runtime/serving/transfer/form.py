"""A multipart form, taken apart as it comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from magihuman.runtime.serving.errors import malformed, unnamed
from magihuman.runtime.serving.transfer.spool import (
    STRUCTURE_BYTES,
    TOO_LONG,
    Fields,
    Sent,
    Shape,
    Spool,
)


@dataclass
class _Part:
    """One field. `is_long`: whether its text had no room, and was left out."""

    header: bytearray = field(default_factory=bytearray)
    disposition: bytes = b""
    header_bytes: int = 0
    name: str = ""
    text: bytearray = field(default_factory=bytearray)
    spool: Spool | None = None
    is_file: bool = False
    is_long: bool = False


class FormReader:
    """Keeps the texts of a form in memory and puts its files on the disk."""

    def __init__(self, content_type: str, shape: Shape) -> None:
        """content_type: the header, with the boundary. Raises `ApiError` where it has none."""
        self._shape = shape
        self._fields: Fields = []
        self._spools: list[Spool] = []
        self._part = _Part()
        self._parts, self._text_bytes, self._is_whole = 0, 0, False
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        if not boundary:
            raise malformed("a form must have a boundary in its Content-Type")
        steps: dict[str, Callable[..., None]] = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._whole,
        }
        callbacks: Any = steps
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise malformed(f"the body must be a form: {error}") from None
        self._parser.max_header_size = 2**30  # they are bounded here, and of any version

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes. Raises `ApiError`, and `OSError` where the disk is full."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise malformed(f"the body must be a form: {error}") from None

    def end(self) -> Fields:
        """Return all fields, in order. Raises `ApiError` where the form is not whole."""
        if not self._is_whole:
            raise malformed("a form must end with its last boundary, and was cut before it")
        return self._fields

    def close(self) -> None:
        """Remove what is on the disk."""
        for spool in self._spools:
            spool.close()

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > self._shape.fields:
            raise malformed(f"the body must have no more than {self._shape.fields} fields")
        self._part = _Part()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._grow(end - start)
        self._part.header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._grow(end - start)
        if self._part.header.lower() == b"content-disposition":
            self._part.disposition += data[start:end]

    def _grow(self, count: int) -> None:
        self._part.header_bytes += count
        if self._part.header_bytes > STRUCTURE_BYTES:
            raise unnamed()  # nothing else is long there

    def _header_end(self) -> None:
        self._part.header.clear()

    def _headers_end(self) -> None:
        part = self._part
        options = parse_options_header(part.disposition)[1]
        if b"name" not in options:
            raise malformed("each part of a form must have a name in its Content-Disposition")
        part.name = _text(options[b"name"])
        part.is_file = b"filename" in options
        if part.is_file or part.name.partition("[")[0] in self._shape.files:
            if len(self._spools) >= self._shape.most_files:
                raise malformed(f"the body must have no more than {self._shape.most_files} files")
            part.spool = self._shape.spool()
            self._spools.append(part.spool)

    def _data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.spool is not None:
            part.spool.write(memoryview(data)[start:end])
            return
        if part.is_long or len(part.text) + end - start > self._shape.text_bytes:
            part.is_long = True
            part.text.clear()
            return
        part.text += data[start:end]
        self._text_bytes += end - start
        if self._text_bytes > self._shape.all_text_bytes:
            raise malformed(f"all texts must have {self._shape.all_text_bytes} bytes at most")

    def _end(self) -> None:
        part = self._part
        value: object = TOO_LONG if part.is_long else _text(part.text)
        if part.spool is not None:
            value = Sent(part.spool, "file" if part.is_file else "text")
        self._fields.append((part.name, value))

    def _whole(self) -> None:
        self._is_whole = True


def _text(content: bytes | bytearray) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise malformed(f"the body must be in UTF-8: {error.reason}") from None
