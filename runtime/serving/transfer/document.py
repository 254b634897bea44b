"""A JSON object, taken apart as it comes, so that long strings in it are never in memory."""

from __future__ import annotations

import json
import re
import secrets

from magihuman.runtime.serving.errors import invalid, malformed, unnamed
from magihuman.runtime.serving.transfer.spool import STRUCTURE_BYTES, Fields, Sent, Shape, Spool

MAX_LONG = 4  # strings that are not kept in memory: two files and two prompts
INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)  # of a string, up to its end or the chunk's


class DocumentReader:
    """Keeps short strings of a JSON object in memory, and puts long ones on the disk."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._kept = bytearray()  # all but long strings, in whose place there are words of its own
        self._mark = secrets.token_hex(16)
        self._long: dict[str, Spool] = {}
        self._structure_bytes = 0
        self._string = bytearray()  # the one that is being read, while it is short
        self._spool: Spool | None = None  # the same, once it is long
        self._is_inside = self._is_escaped = False

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes. Raises `ApiError`, and `OSError` where the disk is full."""
        place = 0
        while place < len(chunk):
            place = self._inside(chunk, place) if self._is_inside else self._outside(chunk, place)

    def end(self) -> Fields:
        """Return all fields, in order. Raises `ApiError` where it is no JSON object."""
        try:
            text = self._kept.decode("utf-8-sig")
            values = json.loads(text, object_pairs_hook=Members)
        except (ValueError, RecursionError) as error:
            raise malformed(f"the body must be JSON: {error}") from None
        if not isinstance(values, Members):
            raise invalid(f"the body must be a JSON object, got a {type(values).__name__}")
        if len(values) > self._shape.fields:
            raise malformed(f"the body must have no more than {self._shape.fields} fields")
        return self._members(values)

    def close(self) -> None:
        """Remove what is on the disk."""
        for spool in [*self._long.values(), self._spool]:
            if spool is not None:
                spool.close()

    def _outside(self, chunk: bytes, start: int) -> int:
        """Read on to the next string, and return where that is."""
        quote = chunk.find(b'"', start)
        end = len(chunk) if quote < 0 else quote + 1
        self._structure_bytes += end - start
        if self._structure_bytes > STRUCTURE_BYTES:
            raise malformed(
                f"the body must have no more than {STRUCTURE_BYTES} bytes beside its strings"
            )
        self._kept += chunk[start:end]
        self._is_inside = quote >= 0
        return end

    def _inside(self, chunk: bytes, start: int) -> int:
        """Read on to the string's end, and return where that is."""
        first = start + 1 if self._is_escaped else start  # whatever it is, it ends nothing
        found = INSIDE.match(chunk, first)
        end = first if found is None else found.end()
        is_end = chunk[end : end + 1] == b'"'
        self._is_escaped = chunk[end : end + 1] == b"\\"
        if self._is_escaped:  # the chunk's last
            end += 1
        self._add(memoryview(chunk)[start:end])
        if not is_end:
            return end
        self._finish()
        return end + 1

    def _add(self, content: memoryview) -> None:
        if self._spool is None and len(self._string) + len(content) <= self._shape.text_bytes:
            self._string += content
            return
        if self._spool is None:
            if len(self._long) >= MAX_LONG:
                raise malformed(f"the body must have no more than {MAX_LONG} long strings")
            self._spool = self._shape.spool()
            self._spool.write(self._string)
            self._string.clear()
        self._spool.write(content)

    def _finish(self) -> None:
        if self._spool is None:
            self._kept += self._string
        else:
            word = f"{self._mark}{len(self._long)}"
            self._kept += word.encode()
            self._long[word] = self._spool
        if len(self._kept) > self._shape.all_text_bytes + STRUCTURE_BYTES:
            raise malformed(f"all texts must have {self._shape.all_text_bytes} bytes at most")
        self._kept += b'"'
        self._string.clear()
        self._spool, self._is_inside = None, False

    def _members(self, values: Members) -> Members:
        if any(name in self._long for name, _ in values):
            raise unnamed()
        return Members((name, self._sent(value)) for name, value in values)

    def _sent(self, value: object) -> object:
        """Return a value with its long strings as what is on the disk of them, at any depth."""
        if isinstance(value, Members):
            return self._members(value)
        if isinstance(value, list):
            return [self._sent(item) for item in value]
        spool = self._long.get(value) if isinstance(value, str) else None
        return value if spool is None else Sent(spool, "json")


class Members(list[tuple[str, object]]):
    """An object of JSON, with names that are there twice."""
