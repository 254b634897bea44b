"""A form as HTML sends it without files. It is short, and is read as a whole."""

from __future__ import annotations

from urllib.parse import parse_qsl

from magihuman.runtime.serving.errors import malformed
from magihuman.runtime.serving.transfer.spool import Fields, Shape

ESCAPED = 3  # bytes of one that is percent-encoded


class UrlencodedReader:
    """Keeps the texts of a form in memory; its files are data URLs, as long as they are short."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._content = bytearray()

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes. Raises `ApiError`."""
        self._content += chunk
        if len(self._content) > ESCAPED * self._shape.all_text_bytes:
            raise malformed(
                f"an urlencoded form must have {self._shape.all_text_bytes} bytes at most; send"
                " multipart/form-data"
            )

    def end(self) -> Fields:
        """Return all fields, in order. Raises `ApiError` where it is no such form."""
        try:
            text = self._content.decode("ascii")
            return list(
                parse_qsl(
                    text,
                    keep_blank_values=True,
                    strict_parsing=bool(text),
                    errors="strict",
                    max_num_fields=self._shape.fields,
                )
            )
        except ValueError as error:
            raise malformed(f"the body must be an urlencoded form in UTF-8: {error}") from None

    def close(self) -> None:
        """Forget it."""
        self._content.clear()
