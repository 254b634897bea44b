"""The fields of a body, taken apart: what is known, what is a file, and what is ignored.

A file has a name of its own in each server's words, and comes as a file of a form, as text, or
within an object: `{"input_reference": {"image_url": "data:..."}}`, in a form also
`input_reference[image_url]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from magihuman.runtime.serving.asked.rules import FIELDS, HALVES, said
from magihuman.runtime.serving.errors import MAX_NAME, invalid, malformed, shown, unnamed
from magihuman.runtime.serving.transfer.document import DocumentReader, Members
from magihuman.runtime.serving.transfer.spool import TOO_LONG, Fields, Sent, Shape

IMAGE_FIELD, AUDIO_FIELD = "input_reference", "audio"
# What is a file, and for which of the two it stands. Of a video the last frame is the image.
REFERENCES = {
    IMAGE_FIELD: IMAGE_FIELD,
    "image_reference": IMAGE_FIELD,
    "reference_url": IMAGE_FIELD,
    "video_reference": IMAGE_FIELD,
    AUDIO_FIELD: AUDIO_FIELD,
    "audio_reference": AUDIO_FIELD,
}
KEYS = ("image_url", "video_url", "audio_url", "url")  # in an object in place of a file
EXTRAS = ("extra_params", "extra_body")  # objects, or JSON as text, with more fields in them
PATH = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
MOST_FIELDS = 64  # those in `EXTRAS` included
MAX_DEPTH = 3  # of objects around one file
MAX_UNKNOWN = 64  # characters of a name that is ignored, which a warning has in it


@dataclass(frozen=True)
class Reference:
    """A file that a client sends. name: of its field. sent: where it is; a short one is a text."""

    name: str
    sent: Sent | str

    @property
    def use(self) -> str:
        """What it stands for: `IMAGE_FIELD` or `AUDIO_FIELD`."""
        return REFERENCES[base(self.name)]


@dataclass
class Asked:
    """A body taken apart.

    Attributes:
        values: of the fields in `FIELDS`, as they were sent; none is null.
        references: the files, at most one for each use.
        ignored: names that are not known here.
    """

    values: dict[str, object] = field(default_factory=dict)
    references: list[Reference] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def base(name: str) -> str:
    """Return a field's name without what a form has in brackets after it."""
    found = PATH.fullmatch(name)
    return found[1] if found else name


def is_reference(name: str) -> bool:
    """Whether a field of this name may be a file."""
    found = PATH.fullmatch(name)
    if found is None or found[1] not in REFERENCES:
        return False
    return all(key in KEYS for key in re.findall(r"\[([^\[\]]*)\]", found[2]) if key)


def take_apart(fields: Fields, shape: Shape, most_chars: int) -> Asked:
    """Sort fields by what they are. Raises `ApiError` for those that cannot be read.

    shape: of the body, for JSON within a form. most_chars: that a text may have.
    """
    asked = Asked()
    _add(asked, fields, shape, most_chars)
    for name in [name for name in EXTRAS if name in asked.values]:
        _add(asked, _object(name, asked.values.pop(name)), shape, most_chars)
    for name in [name for name in EXTRAS if name in asked.values]:
        raise invalid(f"{name} must not be within another such field; give its fields once", name)
    return asked


def _add(asked: Asked, fields: Iterable[tuple[str, object]], shape: Shape, most_chars: int) -> None:
    seen = {*asked.values, *asked.ignored, *(file.name for file in asked.references)}
    fields = list(fields)
    if sum(is_reference(name) for name, _ in fields) > shape.most_files:
        raise malformed(f"the body must have no more than {shape.most_files} files")
    for name, value in fields:
        _check_name(name, seen)
        seen.add(name)
        if len(seen) > MOST_FIELDS:
            raise malformed(f"the body must have no more than {MOST_FIELDS} fields")
        if is_reference(name):
            _add_reference(asked, name, value, shape)
        elif name not in FIELDS and name not in EXTRAS:
            _ignore(asked, name, value)
        elif isinstance(value, Sent) and value.kind == "file":
            raise invalid(f"{shown(name)} must be a field of the form, got a file", name)
        elif isinstance(value, Sent) or value is TOO_LONG:
            raise invalid(f"{shown(name)} must have no more than {most_chars} characters", name)
        elif value is not None:
            asked.values[name] = value


def _ignore(asked: Asked, name: str, value: object) -> None:
    if len(name) > MAX_UNKNOWN:
        raise invalid(
            f"{shown(name)} is no field that is known here, and such a name must have no more than"
            f" {MAX_UNKNOWN} characters; leave it out",
            name,
        )
    if isinstance(value, Sent):
        value.spool.close()
    if value is not None:
        asked.ignored.append(name)


def _check_name(name: str, seen: set[str]) -> None:
    if len(name) > MAX_NAME:
        raise unnamed()
    if HALVES.search(name):
        raise invalid("a field's name must be valid Unicode", name)
    if name in seen:
        raise invalid(f"{shown(name)} must be given once; leave the others out", name)


def _add_reference(asked: Asked, name: str, value: object, shape: Shape) -> None:
    sent = _within(name, value, shape)
    if sent is None:
        return
    new = Reference(name, sent)
    for other in asked.references:
        if other.use == new.use:
            what = "image" if new.use == IMAGE_FIELD else "voice"
            raise invalid(
                f"{shown(name)} must not be beside {other.name}: a video has one reference"
                f" {what}; leave one of the two out",
                name,
            )
    asked.references.append(new)


def _within(name: str, value: object, shape: Shape, depth: int = 0) -> Sent | str | None:
    """Return the file or the address in what stands for a file, None for null."""
    if isinstance(value, list) and not isinstance(value, Members) and len(value) == 1:
        value = value[0]
    value = _parsed(value, shape)
    if value is None or isinstance(value, (Sent, str)):
        return value
    if isinstance(value, Members) and depth < MAX_DEPTH:
        known = dict(value)
        given = [key for key in KEYS if known.get(key) is not None]
        if len(given) == 1:
            return _within(name, known[given[0]], shape, depth + 1)
        if "file_id" in known:
            raise invalid(
                f"{shown(name)} must not be a file_id, since no files are kept here; send the file"
                " itself, or a data URL",
                name,
            )
    raise invalid(
        f"{shown(name)} must be a file, a data URL (data:...;base64,...), or an object with one of"
        f" {', '.join(KEYS)}, got {said(value)}; send one file",
        name,
    )


def _parsed(value: object, shape: Shape) -> object:
    """Return the object that a text is as JSON; what is none stays."""
    pieces: Iterable[bytes]
    if isinstance(value, str):
        if not value.lstrip().startswith("{"):
            return value
        pieces = [value.encode("utf-8", "replace")]
    elif isinstance(value, Sent) and value.kind == "text":
        start = next(iter(value.spool.pieces()), b"").lstrip()
        if not start.startswith(b"{"):
            return value
        pieces = value.spool.pieces()
    else:
        return value
    reader = DocumentReader(shape)
    try:
        for piece in pieces:
            reader.feed(piece)
        found = reader.end()
    except BaseException:
        reader.close()
        raise
    if isinstance(value, Sent):
        value.spool.close()
    return Members(found)


def _object(name: str, value: object) -> Fields:
    """Return the members of an object, or of the JSON that a text is."""
    if isinstance(value, str):
        parse: Callable[..., object] = json.loads
        with suppress(ValueError, RecursionError):
            value = parse(value, object_pairs_hook=Members)
    if not isinstance(value, Members):
        raise invalid(
            f"{name} must be a JSON object of fields, or one written as text, got"
            f" {said(value)}; give the fields themselves",
            name,
        )
    return list(value)
