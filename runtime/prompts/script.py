"""Scripts: several prompts one after another, each for so many seconds of one clip."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from magihuman.runtime.errors import InvalidRequestError, shown
from magihuman.runtime.prompts.prompt import Prompt

MIN_SCENE_S, MAX_SCENE_S = 0.2, 24 * 3600.0
MAX_BYTES, MAX_SCENES = 2**20, 10_000


@dataclass(frozen=True)
class Scene:
    """A part of a long clip.

    Attributes:
        prompt: text, or a `Prompt`.
        seconds: how long it lasts, 0.2 s to a day; made in steps of 0.16 s.
    """

    prompt: str | Prompt
    seconds: float

    def __post_init__(self) -> None:
        is_text = isinstance(self.prompt, (Prompt, str))
        if not is_text or not str(self.prompt).strip():
            raise InvalidRequestError(
                f"a scene's prompt must be text that is not blank, got {shown(self.prompt)}"
            )
        value = self.seconds
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not MIN_SCENE_S <= value <= MAX_SCENE_S or math.isnan(value):
            raise InvalidRequestError(
                f"a scene's seconds must be {MIN_SCENE_S:g} to {MAX_SCENE_S:g}, got {shown(value)}"
            )


def read_script(path: str | os.PathLike[str]) -> list[Scene]:
    """The scenes of a file, a line each: seconds and a prompt, as in `3.2 A woman smiles.`

    A line may also be a JSON object, as in `{"seconds": 5, "prompt": "..."}`, for prompts of
    several lines. Empty lines, and those that begin with #, are left out.

    Raises `InvalidRequestError` with the number of a line that is wrong.
    """
    scenes = []
    for number, line in enumerate(_text(Path(path)).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            scenes.append(_scene(line.strip()))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{path}, line {number}: {error}") from None
    if not 1 <= len(scenes) <= MAX_SCENES:
        raise InvalidRequestError(f"a script must have 1 to {MAX_SCENES} scenes, got {len(scenes)}")
    return scenes


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise InvalidRequestError(f"a script must have at most {MAX_BYTES} bytes, got {path}")
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise InvalidRequestError(
            f"a script must be a text file that can be read, got {path}: {reason}"
        ) from error


def _scene(line: str) -> Scene:
    rule = 'a scene must be seconds and a prompt, or {"seconds": 5, "prompt": "..."}'
    if line.startswith("{"):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            raise InvalidRequestError(f"{rule}, got {shown(line)}") from None
        if values.keys() != {"seconds", "prompt"}:
            raise InvalidRequestError(f"{rule}, got the keys {shown(sorted(values))}")
        return Scene(values["prompt"], values["seconds"])
    seconds, _, prompt = line.partition(" ")
    try:
        return Scene(prompt.strip(), float(seconds))
    except ValueError as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(f"{rule}, got {shown(line)}") from None
