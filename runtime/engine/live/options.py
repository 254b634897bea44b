"""How a live picture is asked for, checked before anything runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from magihuman.runtime import config
from magihuman.runtime.engine.long import check_window_s
from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.prompts import Prompt
from magihuman.runtime.request import ClipSize, LookOptions, ProgressCallback, Request

STRIDE = config.VIDEO_STRIDE[0]  # frames of a latent
LONGER = (1.0, 1.5, 2.0)  # lengths of windows, each where the one before is too slow
OWN = ("audio", "seconds", "continue_from")  # fields that are not for the caller


@dataclass(frozen=True)
class LiveOptions:
    """How a live picture is made.

    Attributes:
        lengths: frames that windows go on for, the shortest first; no other length is made, so
            that captured graphs serve all of them.
        request: what all windows have of theirs, the image and the first's seed among it.
        on_ready: called once, when the clock starts.
        on_progress, cancel: as of `Engine.generate`.
    """

    lengths: tuple[int, ...]
    request: Request
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
    values: dict[str, Any] = {**size, **options, "image": image}
    request = Request(prompt=str(prompt) if isinstance(prompt, Prompt) else prompt, **values)
    return LiveOptions(lengths_of(window_seconds), request, **callbacks)


def lengths_of(window_seconds: float) -> tuple[int, ...]:
    """Frames of the windows that are made. Raises `InvalidRequestError`."""
    check_window_s(window_seconds, config.MIN_LIVE_WINDOW_S, config.MAX_LIVE_WINDOW_S)
    frames = round(window_seconds * config.FPS, 6)
    return tuple(int(frames * factor) // STRIDE * STRIDE for factor in LONGER)
