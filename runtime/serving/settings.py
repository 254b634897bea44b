"""What a server is told once, at its start."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magihuman.runtime.prompts import Enhancer
from magihuman.runtime.request import MAX_SECONDS, MAX_SIDE_PX, STANDARD_SIZE, ClipSize, Plan


@dataclass(frozen=True)
class Limits:
    """What a client may send.

    Attributes:
        body_bytes: of a request, uploads included.
        bodies: that may lie on the disk at once, as large as one may be.
        prompt_chars: of the prompt, and of the negative one.
        queued: videos that may wait.
        seconds, pixels: of a clip; pixels are width times height, before super-resolution.
        image_pixels: of a reference image, read from its header before it is decoded.
        audio_s: of a driving voice, decoded no further than that.
    """

    body_bytes: int = 32 * 2**20
    bodies: int = 16
    prompt_chars: int = 10_000
    queued: int = 64
    seconds: float = MAX_SECONDS
    pixels: int = MAX_SIDE_PX**2
    image_pixels: int = 32_000_000
    audio_s: float = 300.0


@dataclass(frozen=True)
class Capacity:
    """What an engine has room for, as an estimate that leaves its weights out.

    Attributes:
        memory_bytes: of the device.
        token_bytes: that denoising takes for each token of the picture.
        pixel_bytes: that decoding takes for each pixel of a finished frame.
    """

    memory_bytes: int
    token_bytes: float
    pixel_bytes: float

    def missing_bytes(self, plan: Plan) -> int | None:
        """Bytes that a clip takes, where they are more than there are, else None."""
        width, height = plan.size_px
        denoising, decoding = (
            plan.video_tokens * self.token_bytes,
            width * height * self.pixel_bytes,
        )
        needed = int(max(denoising, decoding))
        return needed if needed > self.memory_bytes else None


@dataclass(frozen=True)
class Settings:
    """What the part that speaks HTTP and keeps the videos is told.

    Attributes:
        folder: where jobs and videos are kept.
        model: the name that clients see.
        variant, sr: of the engines, to check requests before they wait.
        keep_s: how long a finished video is kept.
        timeout_s: a video that takes longer, from when an engine has it, fails.
        token_sha256: of the bearer token; None lets everybody in.
        is_local: whether it is for this machine alone, and must be called localhost or by an
            address: a page whose own name is made to lead here calls it by that name.
        limits: what clients may send.
        suited: length and size of a video that is asked for without.
        prompts: that the page has for examples.
        capacity: of each engine, where it is known; what has no room is refused.
        enhancer: rewrites prompts for clients who ask for that; None refuses them.
    """

    folder: Path
    model: str
    variant: str = "distill"
    sr: str | None = None
    keep_s: float = 24 * 3600.0
    timeout_s: float | None = None
    token_sha256: bytes | None = None
    is_local: bool = False
    limits: Limits = field(default_factory=Limits)
    suited: ClipSize = field(default_factory=lambda: ClipSize(**STANDARD_SIZE))
    prompts: tuple[str, ...] = ()
    capacity: Capacity | None = None
    enhancer: Enhancer | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        """Length and size of a video that is asked for without, as clients write them."""
        size = f"{self.suited['width']}x{self.suited['height']}"
        return {"seconds": self.suited["seconds"], "size": size}
