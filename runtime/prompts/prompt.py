"""The form that the model's prompts have: a body, the words that are said, the sound behind them.

The published prompts are written so (daVinci-MagiHuman repository, README.md, "Prompt Guidance").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from magihuman.runtime.errors import InvalidRequestError, shown
from magihuman.runtime.prompts import rules
from magihuman.runtime.prompts.form import (
    DIALOGUE,
    HEADING,
    NO_SOUND,
    SOUND,
    Line,
    line_of,
    one_line,
    sound_of,
    tidy,
)
from magihuman.runtime.prompts.rules import PromptWarning
from magihuman.runtime.prompts.spacing import spaced


@dataclass(frozen=True)
class Prompt:
    """A prompt in the form that the model was trained on. `str` of it is what the model reads.

    Attributes:
        body: 150 to 200 words in English on who is seen and how they speak, in order of time, the
            words that are said among them.
        lines: what is said, in order.
        sound: what is heard behind the voice; None where that is nothing.

    Chinese, Japanese and Korean characters are put apart by single spaces, see `Line`. What is well
    formed and yet not as the model likes it is in `warnings`. Raises `InvalidRequestError` for what
    the form cannot hold.
    """

    body: str
    lines: Sequence[Line] = ()
    sound: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.body, str) or not self.body.strip():
            raise InvalidRequestError(f"body must be text that is not blank, got {self.body!r}")
        body = spaced(tidy(self.body))
        if HEADING.search(body):
            raise InvalidRequestError(
                f"body must have no line that is {DIALOGUE!r} or {SOUND!r}, which begin the other"
                " parts; give those as lines and sound, or read a whole text by Prompt.parse"
            )
        lines = self.lines
        if not isinstance(lines, Iterable) or not all(isinstance(line, Line) for line in lines):
            raise InvalidRequestError(f"lines must be a list of Line, got {shown(lines)}")
        sound = None if self.sound is None else one_line("sound", self.sound, "<>")
        is_none = sound is not None and sound.rstrip(".").casefold() == NO_SOUND.casefold()
        object.__setattr__(self, "body", body)
        object.__setattr__(self, "lines", tuple(lines))
        object.__setattr__(self, "sound", None if is_none else sound)

    def __str__(self) -> str:
        """The whole text."""
        said = "\n".join([DIALOGUE, *map(str, self.lines)])
        sound = f"{SOUND}\n<{self.sound or NO_SOUND}>"
        return "\n\n".join([self.body, *([said] if self.lines else []), sound]) + "\n"

    @property
    def text(self) -> str:
        """What `str` of it is."""
        return str(self)

    @property
    def warnings(self) -> tuple[PromptWarning, ...]:
        """What is missing, or not as the model likes it. How long the words take is left out, since
        a prompt has no length in seconds: `check` takes one.
        """
        return tuple(rules.warnings_of(self.body, self.lines))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a text in the form, however its lines are spaced.

        Raises `InvalidRequestError` where it is not in the form.
        """
        if not isinstance(text, str):
            raise InvalidRequestError(f"a prompt to read must be text, got {shown(text)}")
        body, *parts = HEADING.split(tidy(text))
        headings = parts[::2]
        if headings not in ([DIALOGUE, SOUND], [SOUND]):
            raise InvalidRequestError(
                f"a prompt must have a body, then {DIALOGUE!r} if anybody speaks, then {SOUND!r},"
                f" each on a line of its own and once; got {shown(headings)}"
            )
        contents = dict(zip(headings, parts[1::2], strict=True))
        said = [line.strip() for line in contents.get(DIALOGUE, "").splitlines() if line.strip()]
        return cls(body, [line_of(text) for text in said], sound_of(contents[SOUND]))
