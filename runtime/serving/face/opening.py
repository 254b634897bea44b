"""What a client asks for in its first message: a face, and how its voice will come."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magihuman.runtime import config
from magihuman.runtime.errors import InvalidRequestError, MagiHumanError
from magihuman.runtime.media import ImageTask
from magihuman.runtime.request import Request
from magihuman.runtime.serving.asked.rules import FIELDS, PROMPT, Rule, number, whole
from magihuman.runtime.serving.errors import ApiError, invalid, malformed, no_decoder, shown
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.transfer.data_url import decoded
from magihuman.runtime.serving.uploads import DECODERS, IMAGE_FORMATS

log = logging.getLogger("magihuman")

WINDOW_S = config.LIVE_WINDOW_S
RULES: dict[str, Rule] = {
    "prompt": PROMPT,
    "sample_rate": Rule(
        f"a whole number from {config.MIN_LIVE_RATE_HZ} to {config.MAX_LIVE_RATE_HZ}",
        "say how many samples a second the voice has",
        *whole(config.MIN_LIVE_RATE_HZ, config.MAX_LIVE_RATE_HZ),
        "Of the voice.",
    ),
    "window_seconds": Rule(
        f"a number from {config.MIN_LIVE_WINDOW_S:g} to {config.MAX_LIVE_WINDOW_S:g}",
        f"leave it out for {WINDOW_S:g}",
        *number(config.MIN_LIVE_WINDOW_S, config.MAX_LIVE_WINDOW_S),
        "Of a window.",
    ),
    **{name: FIELDS[name] for name in ("size", "seed", "num_inference_steps")},
}


@dataclass(frozen=True)
class Opening:
    """What a session begins with, checked but for the picture.

    Attributes:
        rate_hz: of the voice.
        options: of `Engine.live`.
        image: a data URL.
    """

    prompt: str
    rate_hz: int
    options: dict[str, Any]
    image: str

    def write_image(self, folder: Path, settings: Settings) -> Path:
        """Have a file made of the picture that this package has written. Raises `ApiError`."""
        source, target = folder / "image.upload", folder / "image"
        with source.open("wb") as file:
            for piece in decoded([self.image.encode("utf-8", "replace")], "image"):
                file.write(piece)
        pixels = settings.limits.image_pixels
        try:
            DECODERS.run("image", ImageTask(str(source), str(target), pixels, IMAGE_FORMATS))
        except InvalidRequestError as error:
            raise invalid(str(error).replace(str(source), "the upload"), "image") from None
        except MagiHumanError as error:
            log.exception("an image cannot be decoded")
            raise no_decoder() from error
        return target


def opening_of(text: str, authorization: str, settings: Settings) -> Opening:
    """Read a first message. authorization: the header, where there is one. Raises `ApiError`."""
    try:
        asked = json.loads(text)
    except (ValueError, RecursionError):
        raise malformed("the first message must be a JSON object") from None
    if not isinstance(asked, dict):
        raise malformed("the first message must be a JSON object")
    check_token(asked.pop("token", None), authorization, settings.token_sha256)
    image = asked.pop("image", None)
    unknown = sorted(set(asked) - RULES.keys())
    if unknown:
        raise invalid(
            f"{shown(unknown[0])} is not known; known are image, token, {', '.join(RULES)}",
            unknown[0],
        )
    values = {
        name: RULES[name].check(name, value) for name, value in asked.items() if value is not None
    }
    if not isinstance(image, str):
        raise invalid("image must be the picture to begin with, as a data URL", "image")
    if "sample_rate" not in values:
        raise invalid("sample_rate must be given: that of the voice", "sample_rate")
    prompt = values.get("prompt", config.LIVE_PROMPT)
    if len(prompt) > settings.limits.prompt_chars:
        limit = settings.limits.prompt_chars
        raise invalid(f"prompt must have no more than {limit} characters", "prompt")
    return Opening(prompt, values["sample_rate"], options_of(values, settings), image)


def options_of(values: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Keywords of `Engine.live`. Raises `ApiError` for a size that this server does not make."""
    width, height = values.get("size", (settings.suited["width"], settings.suited["height"]))
    if width * height > settings.limits.pixels:
        raise invalid(f"size must have no more than {settings.limits.pixels} pixels", "size")
    window_s = values.get("window_seconds", WINDOW_S)
    options = {"width": width, "height": height, "seed": values.get("seed", 42)}
    if "num_inference_steps" in values:
        options["steps"] = values["num_inference_steps"]
    longest = Request("-", seconds=2 * window_s, **options)
    try:
        plan = longest.plan(config.VARIANTS[settings.variant], settings.sr)
    except InvalidRequestError as error:
        raise invalid(str(error), "size") from None
    if settings.capacity is not None and settings.capacity.lacks(plan) is not None:
        raise invalid("size must be one that the engines have memory for; ask for less", "size")
    return {**options, "window_seconds": window_s}


def check_token(given: object, authorization: str, expected: bytes | None) -> None:
    """Raise `ApiError` for a wrong token, or none: of the message, or else the header."""
    if expected is None:
        return
    token = given if isinstance(given, str) else authorization.removeprefix("Bearer ")
    found = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
    if not hmac.compare_digest(found, expected):
        raise ApiError(
            401,
            "invalid_token",
            "this server's token must come as 'token' in the first message, or as 'Authorization:"
            " Bearer TOKEN'",
        )
