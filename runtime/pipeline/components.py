"""What an engine is made of, and what the stages of a request hand on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from magihuman.runtime.memory import Residency
from magihuman.runtime.model import DiT, ImageVAE, TextEncoder
from magihuman.runtime.pipeline import denoise
from magihuman.runtime.pipeline.audio import AudioVAE, Waveform
from magihuman.runtime.pipeline.decode import Decoder, DistributedDecoder, VideoDecoder
from magihuman.runtime.request import Plan

if TYPE_CHECKING:
    from PIL.Image import Image


class Captured(Protocol):
    """Something that keeps captured graphs."""

    def release(self) -> None:
        """Give them up."""


@dataclass(frozen=True)
class Components:
    """The loaded models of an engine: where it follows another, those alone that both run.

    Frozen: who needs it otherwise makes another with `dataclasses.replace`.
    """

    dit: DiT
    turbo_vae: VideoDecoder
    text_encoder: TextEncoder | None
    audio_vae: AudioVAE | None
    image_vae: ImageVAE | None = None
    sr_dit: DiT | None = None
    forward: denoise.Forward | None = None  # compiled, in place of the transformer's own
    sr_forward: denoise.Forward | None = None
    decoder: Decoder | None = None  # compiled, in place of the Turbo VAE's own
    distributed: DistributedDecoder | None = None  # on several devices, in place of both
    captured: tuple[Captured, ...] = ()  # those of the last three that are there
    residency: Residency = field(default_factory=Residency)  # which of them are brought for a stage
    # Held while anything is encoded, and while a graph is captured: kernels are timed then, and
    # the encoders keep state.
    encoding: threading.Lock = field(default_factory=threading.Lock)
    encode_stream: torch.cuda.Stream | None = None  # on a GPU
    sound_stream: torch.cuda.Stream | None = None


@dataclass(frozen=True)
class Prepared:
    """A request whose inputs are read and found good."""

    plan: Plan
    image: Image | None
    samples: Waveform | None
    ids: Tensor


@dataclass(frozen=True)
class Encoded:
    """What denoising starts from: embeddings, noise or given sound, latents of the image."""

    plan: Plan
    text: Tensor
    null_text: Tensor | None
    audio: Tensor
    video: Tensor
    image: Tensor | None
    sr_image: Tensor | None

    def tensors(self) -> Iterator[Tensor]:
        """All that are there."""
        return (value for value in vars(self).values() if isinstance(value, Tensor))
