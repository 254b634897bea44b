"""What each field of a new video must be: one rule for reading it and for its description."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from magihuman.runtime.config import FPS
from magihuman.runtime.request import (
    MAX_SECONDS,
    MAX_SEED,
    MAX_SIDE_PX,
    MAX_STEPS,
    MIN_SECONDS,
    MIN_SIDE_PX,
)
from magihuman.runtime.serving.errors import ApiError, invalid, shown

NUMBER = "^[0-9]{1,3}([.][0-9]{1,6})?$"
WHOLE = "^[0-9]{1,20}$"
FLAG = "^([Tt]rue|[Ff]alse|yes|no|on|off|1|0)$"
SIZE = "^[0-9]{2,4}[xX*×][0-9]{2,4}$"  # noqa: RUF001 - as people write it
MIN_FRAMES, MAX_FRAMES = math.ceil(MIN_SECONDS * FPS), int(MAX_SECONDS * FPS)
MAX_FPS, MAX_COUNT = 1000, 1000
HALVES = re.compile("[\ud800-\udfff]")  # of surrogate pairs, which no UTF-8 has

Read = Callable[[Any], Any]
Schema = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """What a field must be.

    Attributes:
        must: what follows "must be" in the sentence of an error.
        remedy: what to do instead.
        read: returns the value as it is used; raises `ValueError` for any that is not allowed.
        kinds: JSON schemas, one of which it fits.
        description: for the OpenAPI description.
    """

    must: str
    remedy: str
    read: Read
    kinds: tuple[Schema, ...]
    description: str

    def check(self, name: str, value: object) -> Any:
        """Return the value as it is used. Raises `ApiError` with a sentence that says the rule."""
        try:
            return self.read(value)
        except ValueError:
            raise refusal(name, self.must, value, self.remedy) from None

    def schema(self) -> Schema:
        """Return it for the OpenAPI description; null is as if it were left out."""
        return {"anyOf": [*self.kinds, {"type": "null"}], "description": self.description}


def refusal(name: str, must: str, value: object, remedy: str) -> ApiError:
    """Return the error that says a field's rule, what was given and what to do."""
    return invalid(f"{shown(name)} must be {must}, got {said(value)}; {remedy}", name)


def said(value: object) -> str:
    """Return a value as an error may show it."""
    return shown(repr(value)) if isinstance(value, (str, int, float)) else "a value of another kind"


def whole(least: int, most: int) -> tuple[Read, tuple[Schema, ...]]:
    """Return what reads a whole number in a range, also as text, and its schemas."""

    def read(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(WHOLE, value):
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise ValueError
        return value

    kinds = (
        {"type": "integer", "minimum": least, "maximum": most},
        {"type": "string", "pattern": WHOLE},
    )
    return read, kinds


def number(least: float, most: float, also: tuple[float, ...] = ()) -> tuple[Read, Any]:
    """Return what reads a number in a range, also as text, and its schemas."""

    def read(value: Any) -> float:
        if isinstance(value, str) and re.fullmatch(NUMBER, value):
            value = float(value)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not (least <= value <= most or value in also):
            raise ValueError
        return float(value)

    plain = {"type": "number", "minimum": min(least, *also, least), "maximum": most}
    return read, (plain, {"type": "string", "pattern": NUMBER})


def text(value: Any) -> str:
    """Return what is text that an answer can have. Raises `ValueError`."""
    if not isinstance(value, str) or HALVES.search(value):
        raise ValueError
    return value


def _prompt(value: Any) -> str:
    if not text(value).strip():
        raise ValueError
    return value


def _flag(value: Any) -> bool:
    if isinstance(value, str) and re.fullmatch(FLAG, value):
        value = value in ("True", "true", "yes", "on", "1")
    if not isinstance(value, bool):
        raise ValueError
    return value


def _size(value: Any) -> tuple[int, int]:
    if not isinstance(value, str) or not re.fullmatch(SIZE, value):
        raise ValueError
    width, height = map(int, re.findall("[0-9]+", value))
    if not all(MIN_SIDE_PX <= side <= MAX_SIDE_PX for side in (width, height)):
        raise ValueError
    return width, height


SIDE_MUST = f"a whole number of pixels from {MIN_SIDE_PX} to {MAX_SIDE_PX}"
SIDES = whole(MIN_SIDE_PX, MAX_SIDE_PX)
TEXT: Schema = {"type": "string"}
TEXT_MUST = "text of valid Unicode"

PROMPT = Rule(
    "text that is not blank",
    "say what is seen and said",
    _prompt,
    ({"type": "string", "pattern": r"\S"},),
    "What is seen and said.",
)
FIELDS: dict[str, Rule] = {
    "prompt": PROMPT,
    "model": Rule(
        TEXT_MUST, "leave it out, or name the model served", text, (TEXT,), "The model's name."
    ),
    "seconds": Rule(
        f"a number from {MIN_SECONDS:g} to {MAX_SECONDS:g}",
        "ask for a length in this range",
        *number(MIN_SECONDS, MAX_SECONDS),
        "Of the clip.",
    ),
    "size": Rule(
        f"WIDTHxHEIGHT with {MIN_SIDE_PX} to {MAX_SIDE_PX} pixels a side",
        "write it as in 480x256",
        _size,
        ({"type": "string", "pattern": SIZE},),
        "Width and height in pixels, before super-resolution.",
    ),
    "width": Rule(SIDE_MUST, "or give size", *SIDES, "Pixels, with height, in place of size."),
    "height": Rule(SIDE_MUST, "or give size", *SIDES, "Pixels, with width, in place of size."),
    "num_frames": Rule(
        f"a whole number from {MIN_FRAMES} to {MAX_FRAMES}",
        "or give seconds",
        *whole(MIN_FRAMES, MAX_FRAMES),
        f"In place of seconds; {FPS} frames are one.",
    ),
    "fps": Rule(
        f"a number from 1 to {MAX_FPS}",
        f"leave it out: clips have {FPS} frames a second",
        *number(1, MAX_FPS),
        f"Clips have {FPS} frames a second; any other number is a warning.",
    ),
    "seed": Rule(
        f"a whole number from 0 to {MAX_SEED}",
        "leave it out for 42",
        *whole(0, MAX_SEED),
        "Same seed, same clip; 42 by default.",
    ),
    "negative_prompt": Rule(
        TEXT_MUST, "leave it out for the model's", text, (TEXT,), "What guidance moves away from."
    ),
    "num_inference_steps": Rule(
        f"a whole number from 1 to {MAX_STEPS}",
        "leave it out for as many as the model was made for",
        *whole(1, MAX_STEPS),
        "Denoising steps.",
    ),
    "guidance_scale": Rule(
        "0 or 1, which both turn guidance off, or a number from 1 to 100",
        "leave it out for the model's",
        *number(1, 100, also=(0,)),
        "Of the base model; 0 and 1 turn it off.",
    ),
    "enhance": Rule(
        "true or false",
        "leave it out for false",
        _flag,
        ({"type": "boolean"}, {"type": "string", "pattern": FLAG}),
        "Have the prompt rewritten first, by the endpoint of this server's operator.",
    ),
    "n": Rule(
        "a whole number from 1 up",
        "leave it out",
        *whole(1, MAX_COUNT),
        "Videos, of which a request makes one.",
    ),
}
