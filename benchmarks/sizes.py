"""The two sizes at which the suites run: the published one, and a tiny one for any machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from magihuman.runtime import config
from magihuman.runtime.model import tokens
from magihuman.runtime.model.oobleck import OobleckConfig
from magihuman.runtime.weights import tiny
from measure import LAYOUT, PROMPT

FULL_GIB = 60  # weights and working memory of the whole engine take 49 GiB


@dataclass(frozen=True)
class Size:
    """Architectures, one sequence, and the request that makes a sequence of that length."""

    name: str
    arch: config.DiTConfig
    turbo_vae: config.TurboVAEConfig
    audio_vae: OobleckConfig
    layout: tokens.Layout
    prompt: str
    request: dict[str, Any] = field(default_factory=dict)  # beside the prompt

    @property
    def device(self) -> torch.device:
        """Where this machine runs it."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


FULL = Size(
    "full",
    config.DiTConfig(),
    config.TurboVAEConfig(),
    OobleckConfig(),
    LAYOUT,
    PROMPT,
)
TINY = Size(
    "tiny",
    tiny.DIT,
    tiny.TURBO_VAE,
    tiny.AUDIO_VAE,
    tokens.Layout(frames=4, rows=8, columns=8, audio=13, text=32),
    PROMPT[:32],
    {"seconds": 0.5, "width": 128, "height": 128},
)
SIZES = {size.name: size for size in (FULL, TINY)}


def why_not(name: str) -> str | None:
    """Why a size is not measured on this machine; None for the one that is."""
    gib = 0.0
    if torch.cuda.is_available():
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    if name == "full" and gib < FULL_GIB:
        return f"the full size needs a GPU of {FULL_GIB} GiB"
    if name == "tiny" and gib >= FULL_GIB:
        return "the tiny size is for machines that cannot run the full one"
    return None
