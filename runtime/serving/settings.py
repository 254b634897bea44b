"""What a server is told once, at its start."""

from __future__ import annotations

from collections.abc import Mapping
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


@dataclass
class Capacity:
    """What an engine has room for.

    Attributes:
        memory_bytes: of the device, or its limit, weights included.
        token_bytes: that denoising takes for each token of the picture.
        pixel_bytes: that decoding takes for each pixel of a finished frame.
        room_bytes: what the engines' memory plan leaves each stage, once one has told.
    """

    memory_bytes: int
    token_bytes: float
    pixel_bytes: float
    room_bytes: Mapping[str, int] = field(default_factory=dict)

    def plan(self, room_bytes: Mapping[str, int]) -> None:
        """Note what an engine has planned for."""
        self.room_bytes = dict(room_bytes)

    def lacks(self, plan: Plan) -> tuple[int, int] | None:
        """Bytes that a stage of a clip takes, by the least that it can, and those that it has.

        None where every stage has as many as it takes.
        """
        width, height = plan.size_px
        upscaled = (plan.sr_rows or 0) * (plan.sr_columns or 0)
        needed = {
            "denoise": plan.frames * plan.rows * plan.columns * self.token_bytes,
            "super_resolve": plan.frames * upscaled * self.token_bytes,
            "decode": width * height * self.pixel_bytes,
        }
        for stage, count in needed.items():
            room = min(self.memory_bytes, self.room_bytes.get(stage, self.memory_bytes))
            if count > room:
                return int(count), room
        return None


@dataclass(frozen=True)
class Shared:
    """What several API processes have together.

    Attributes:
        database: URL of the records.
        storage: URL of clips and uploads, or a folder that all machines have.
        lease_s: how long an API process has a video without saying that it still runs.
    """

    database: str = field(repr=False)  # can have a password
    storage: str
    lease_s: float = 15.0


@dataclass(frozen=True)
class Settings:
    """What the part that speaks HTTP and keeps the videos is told.

    Attributes:
        folder: where jobs and videos are kept.
        model: the name that clients see.
        aliases: names that clients may ask for beside it.
        is_model_strict: whether another name is refused, and not taken with a warning.
        fetched_hosts: from which addresses in requests are fetched; others are refused.
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
        shared: where records and files lie that several processes have; None keeps all in `folder`.
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
    aliases: tuple[str, ...] = ()
    is_model_strict: bool = False
    fetched_hosts: tuple[str, ...] = ()
    shared: Shared | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the model, the one that answers have first."""
        return self.model, *self.aliases

    @property
    def defaults(self) -> dict[str, Any]:
        """Length and size of a video that is asked for without, as clients write them."""
        size = f"{self.suited['width']}x{self.suited['height']}"
        return {"seconds": self.suited["seconds"], "size": size}
