"""How a live picture is asked for, checked before anything runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from magihuman.runtime import config
from magihuman.runtime.errors import InvalidRequestError, shown
from magihuman.runtime.prompts import Prompt
from magihuman.runtime.request import ClipSize, LookOptions, ProgressCallback, Request

PROMPT = "A person looks into the camera and speaks. The camera is static."
WINDOW_S = 1.44  # two of the decoder's windows, with what it sees of the one before
MIN_WINDOW_S, MAX_WINDOW_S = 0.64, 4.0
STRIDE = config.VIDEO_STRIDE[0]  # frames of a latent
LONGER = (1.0, 1.5, 2.0)  # lengths of windows, each where the one before is too slow
OWN = ("audio", "seconds", "continue_from")  # fields that are not for the caller


@dataclass(frozen=True)
class LiveOptions:
    """How a live picture is made.

    Attributes:
        lengths: frames that windows go on for, the shortest first; no other length is made, so
            that captured graphs serve all of them.
        request: the fields of `Request` that all windows have, the image and the seed among them.
        prompt: text.
        on_ready: called once, when the clock starts.
        on_progress, cancel: as of `Engine.generate`.
    """

    lengths: tuple[int, ...]
    request: dict[str, Any]
    prompt: str
    on_ready: Callable[[], None] | None = None
    on_progress: ProgressCallback | None = None
    cancel: threading.Event | None = None


def live_options(
    image: object,
    prompt: str | Prompt,
    window_seconds: float,
    options: LookOptions,
    suited: ClipSize | None,
    **callbacks: Any,
) -> LiveOptions:
    """What `Engine.live` was given. suited: of the model, where it tells. Raises
    `InvalidRequestError`.
    """
    if image is None:
        raise InvalidRequestError("image must be the picture to begin with, got None")
    for name in OWN:
        if name in options:
            raise InvalidRequestError(
                f"{name} must be left out of what speaks live; it has its own"
            )
    size = {} if suited is None else {side: suited[side] for side in ("width", "height")}
    values: dict[str, Any] = {"seed": 42, **size, **options, "image": image}
    text = str(prompt) if isinstance(prompt, Prompt) else prompt
    Request(prompt=text, **values)
    return LiveOptions(lengths_of(window_seconds), values, text, **callbacks)


def lengths_of(window_seconds: float) -> tuple[int, ...]:
    """Frames of the windows that are made. Raises `InvalidRequestError`."""
    is_number = isinstance(window_seconds, (int, float)) and not isinstance(window_seconds, bool)
    if not is_number or not MIN_WINDOW_S <= window_seconds <= MAX_WINDOW_S:
        raise InvalidRequestError(
            f"window_seconds must be {MIN_WINDOW_S:g} to {MAX_WINDOW_S:g}, got"
            f" {shown(window_seconds)}"
        )
    frames = round(window_seconds * config.FPS, 6)
    return tuple(int(frames * factor) // STRIDE * STRIDE for factor in LONGER)
