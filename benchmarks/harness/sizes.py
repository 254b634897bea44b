"""The two sizes at which the suites run: the published one, and a tiny one for any machine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from harness.measure import LAYOUT, PROMPT, STEPS, device
from magihuman import runtime
from magihuman.runtime import config
from magihuman.runtime.model import tokens
from magihuman.runtime.model.oobleck import OobleckConfig
from magihuman.runtime.weights import tiny

FULL_GIB = 60  # weights and working memory of the whole engine take 49 GiB


@dataclass(frozen=True)
class Size:
    """Architectures, one sequence, and the request that makes a sequence of that length.

    Attributes:
        pixels: width and height of the clips of each name; the first are those of `layout`.
        latents: frames of latents of the clips that decoders are timed with.
        steps: of the distilled model's loop.
        seconds: of a request.
    """

    name: str
    arch: config.DiTConfig
    turbo_vae: config.TurboVAEConfig
    audio_vae: OobleckConfig
    layout: tokens.Layout
    prompt: str
    pixels: dict[str, tuple[int, int]]
    latents: int
    steps: int
    seconds: float
    request: dict[str, Any] = field(default_factory=dict)  # beside the prompt

    @property
    def device(self) -> torch.device:
        """Where this machine runs it."""
        return device()


FULL = Size(
    "full",
    config.DiTConfig(),
    config.TurboVAEConfig(),
    OobleckConfig(),
    LAYOUT,
    PROMPT,
    {"256p": (480, 256), **config.SR_SIZES},
    LAYOUT.frames,
    STEPS,
    5.0,
)
TINY = Size(
    "tiny",
    tiny.DIT,
    tiny.TURBO_VAE,
    tiny.AUDIO_VAE,
    tokens.Layout(frames=4, rows=8, columns=8, audio=13, text=32),
    PROMPT[:32],
    {"256p": (128, 128), "540p": (160, 128), "1080p": (192, 128)},
    16,
    STEPS,
    0.5,
    {"seconds": 0.5, "width": 128, "height": 128},
)
# The scripts with --tiny: a layer of each kind, and a block of each resolution.
LEAST = replace(
    TINY,
    arch=replace(tiny.DIT, num_layers=3, modality_layers=(0, 2)),
    turbo_vae=replace(tiny.TURBO_VAE, decoder_layers_per_block=(1,) * 5),
    layout=replace(TINY.layout, rows=4, columns=4),
    pixels={"256p": (64, 64), "540p": (96, 64), "1080p": (128, 64)},
    steps=2,
    request=TINY.request | {"width": 64, "height": 64},
)
SIZES = {size.name: size for size in (FULL, TINY)}


def of(is_tiny: bool) -> Size:
    """What a script measures, with and without --tiny."""
    return LEAST if is_tiny else FULL


def source(size: Size, folder: Path) -> Path | runtime.synthetic:
    """The distilled model with random weights; the tiny one is written below `folder`."""
    if size is FULL:
        return runtime.synthetic("distill")
    model = folder / "model"
    if not model.exists():
        runtime.write_tiny(model)
    return model


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
