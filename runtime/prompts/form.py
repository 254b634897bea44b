"""The marks of the form that the model's prompts have, and one line of what is said."""

from __future__ import annotations

import re
from dataclasses import dataclass

from magihuman.runtime.errors import InvalidRequestError, shown
from magihuman.runtime.prompts.spacing import spaced

DIALOGUE, SOUND = "Dialogue:", "Background Sound:"
NO_SOUND = "No prominent background sound"
_LINE = re.compile(r'<(?P<who>[^<>]+),(?P<language>[^<>,]+)>\s*:\s*["“](?P<words>.*)["”]')
_SOUND = re.compile(r"<(?P<sound>[^<>]+)>")
HEADING = re.compile(rf"^[^\S\n]*({DIALOGUE}|{SOUND})[^\S\n]*$", re.MULTILINE)


@dataclass(frozen=True)
class Line:
    """What one person says.

    Attributes:
        who: the speaker in about five words, such as "Young man in yellow polo".
        language: its name in English, such as "Mandarin".
        words: what is said, as it is written in that language.

    White space is made single spaces, and Chinese, Japanese and Korean characters are put apart by
    them, so that what is kept is what the model reads. Raises `InvalidRequestError` for what the
    form cannot hold: blanks, < or > in the first two, a comma in the language.
    """

    who: str
    language: str
    words: str

    def __post_init__(self) -> None:
        for name, forbidden in (("who", "<>"), ("language", "<>,"), ("words", "")):
            value = one_line(f"a line's {name}", getattr(self, name), forbidden)
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        """The line as the form has it."""
        return f'<{self.who}, {self.language}>: "{self.words}"'


def line_of(text: str) -> Line:
    """The line that a text in the form is. Raises `InvalidRequestError`."""
    match = _LINE.fullmatch(text)
    if match is None:
        raise InvalidRequestError(
            f'a line below {DIALOGUE!r} must be <who in five words, language>: "words", got'
            f" {shown(text)}"
        )
    return Line(**match.groupdict())


def sound_of(text: str) -> str:
    """The sound that the last part of a text names. Raises `InvalidRequestError`."""
    match = _SOUND.fullmatch(text.strip())
    if match is None:
        raise InvalidRequestError(
            f"below {SOUND!r} there must be one line, <sound> or <{NO_SOUND}>, got {shown(text)}"
        )
    return match["sound"]


def one_line(name: str, value: object, forbidden: str) -> str:
    """A text on one line and spaced, without the form's own marks. Raises `InvalidRequestError`."""
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequestError(f"{name} must be text that is not blank, got {shown(value)}")
    found = [letter for letter in forbidden if letter in value]
    if found:
        raise InvalidRequestError(
            f"{name} must have none of {' '.join(forbidden)}, which the form uses, got"
            f" {shown(value)}"
        )
    return spaced(" ".join(value.split()))


def tidy(text: str) -> str:
    """A text without white space around it or around its lines, which all end by a line feed."""
    return "\n".join(line.strip() for line in text.strip().splitlines())
