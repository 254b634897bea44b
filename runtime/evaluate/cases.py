"""What an evaluation makes clips of: prompts, with what is said in them and what they go with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magihuman.runtime.errors import InvalidRequestError, shown
from magihuman.runtime.media import open_driving_audio, open_image
from magihuman.runtime.prompts import HEADING, Line, Prompt, guessed_language, guessed_lines
from magihuman.runtime.request import Request

MAX_BYTES, MAX_CASES = 2**22, 10_000
KEYS = ("prompt", "image", "audio", "words")
RULE = 'each line must be a JSON object such as {"prompt": "...", "words": "..."}'


@dataclass(frozen=True)
class Case:
    """One clip to make, in every precision.

    Attributes:
        prompt: text, as of `Request`.
        image, audio: reference image and driving voice, where there are any.
        words: what is said; None where the prompt tells.

    Raises `InvalidRequestError` for words that are blank.
    """

    prompt: str
    image: Path | None = None
    audio: Path | None = None
    words: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "words"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise InvalidRequestError(f"{name} must be text that is not blank, got {value!r}")

    @property
    def lines(self) -> list[Line]:
        """What is said: `words`, else the dialogue of a prompt in the form, else what it has in
        quotation marks.
        """
        if self.words is not None:
            return [Line("speaker", guessed_language(self.words), self.words)]
        try:
            return list(Prompt.parse(self.prompt).lines)
        except InvalidRequestError:
            return guessed_lines(self.prompt)


def read_cases(path: str | os.PathLike[str]) -> list[Case]:
    """The cases of a file.

    A file of JSON lines, told by a name that ends in .jsonl or by { as its first character, has an
    object on each line: `prompt`, and where wanted `image`, `audio` and `words`. Images and voices
    are looked for from the file's folder. Any other file has a prompt on each line or, where there
    are blank lines or the headings of `Prompt` in it, in each block between blank lines; a block
    that begins with a heading goes on with the prompt before it.

    Raises `InvalidRequestError` for a file that cannot be read or has no prompt, and with the
    number of a line of JSON that is wrong.
    """
    path = Path(path)
    text = _text(path)
    if path.suffix.lower() == ".jsonl" or text.lstrip().startswith("{"):
        cases = list(_json_cases(path, text))
    else:
        cases = [Case(prompt) for prompt in _prompts(text)]
    if not 1 <= len(cases) <= MAX_CASES:
        raise InvalidRequestError(
            f"a file of prompts must have 1 to {MAX_CASES}, got {len(cases)} in {path}"
        )
    return cases


def check_case(case: Case, request: Request) -> None:
    """Raise `InvalidRequestError` now where the case's image or voice could not be read later."""
    if case.image is not None:
        open_image(case.image)
    if case.audio is not None:
        open_driving_audio(case.audio, request.seconds)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise InvalidRequestError(
                f"a file of prompts must have at most {MAX_BYTES} bytes, got {path}; split it"
            )
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise InvalidRequestError(
            f"a file of prompts must be a text file that can be read, got {path}: {reason}"
        ) from error


def _prompts(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.strip().splitlines()]
    if all(lines) and not HEADING.search("\n".join(lines)):
        return lines
    prompts: list[str] = []
    for block in "\n".join(lines).split("\n\n"):
        if not block.strip():
            continue
        if prompts and HEADING.match(block.lstrip()):
            prompts[-1] += f"\n\n{block.strip()}"
        else:
            prompts.append(block.strip())
    return prompts


def _json_cases(path: Path, text: str) -> Iterator[Case]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield _case(line, path.parent)
            except InvalidRequestError as error:
                raise InvalidRequestError(f"{path}, line {number}: {error}") from None


def _case(line: str, folder: Path) -> Case:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidRequestError(f"{RULE}, got {shown(line)}") from None
    if not isinstance(values, dict) or "prompt" not in values or not set(values) <= set(KEYS):
        raise InvalidRequestError(
            f"{RULE}, with no other keys than {', '.join(KEYS)}, got {shown(values)}"
        )
    for name, value in values.items():
        if not isinstance(value, str) and (name == "prompt" or value is not None):
            raise InvalidRequestError(f"{name} must be text, got {shown(value)}")
    files = {name: folder / values[name] for name in ("image", "audio") if values.get(name)}
    return Case(values["prompt"], words=values.get("words"), **files)
