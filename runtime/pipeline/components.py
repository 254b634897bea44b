"""What an engine is made of, and what the stages of a request hand on."""

from __future__ import annotations

import secrets
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
from magihuman.runtime.request import ClipSize, Plan, Tail

if TYPE_CHECKING:
    from PIL.Image import Image


class Captured(Protocol):
    """Something that keeps captured graphs."""

    def release(self) -> None:
        """Give the graphs and their memory up."""


@dataclass(frozen=True)
class Components:
    """The loaded models of an engine: where it follows another, those alone that both run.

    Frozen: who needs it otherwise makes another with `dataclasses.replace`.

    Attributes:
        dit, turbo_vae, text_encoder, audio_vae: the models that every engine needs.
        image_vae: encodes reference images, where the model has it.
        sr_dit: of super-resolution, where that was asked for.
        forward, sr_forward: compiled, in place of the transformers' own.
        decoder: compiled, in place of the Turbo VAE's own.
        distributed: decodes on several devices, in place of `decoder` and `turbo_vae`.
        captured: those of the above that keep captured graphs.
        residency: says which of the models are on the device, and brings them for a stage.
        encoding: held while anything is encoded, and while a graph is captured: kernels are timed
            then, and the encoders keep state.
        learnt: longest and largest clip that the model was trained on, where it tells.
        maker: names this engine in what it keeps of a clip's end.
        encode_stream, sound_stream: on a GPU, where encoders and the audio decoder are launched.
    """

    dit: DiT
    turbo_vae: VideoDecoder
    text_encoder: TextEncoder | None
    audio_vae: AudioVAE | None
    image_vae: ImageVAE | None = None
    sr_dit: DiT | None = None
    forward: denoise.Forward | None = None
    sr_forward: denoise.Forward | None = None
    decoder: Decoder | None = None
    distributed: DistributedDecoder | None = None
    captured: tuple[Captured, ...] = ()
    residency: Residency = field(default_factory=Residency)
    encoding: threading.Lock = field(default_factory=threading.Lock)
    learnt: ClipSize | None = None
    maker: str = field(default_factory=lambda: secrets.token_hex(8))
    encode_stream: torch.cuda.Stream | None = None
    sound_stream: torch.cuda.Stream | None = None


@dataclass(frozen=True)
class Prepared:
    """A request whose inputs are read and found good.

    Attributes:
        plan: what will be made.
        image: the reference, RGB and upright.
        samples: the driving voice, mono float32 at 51.2 kHz.
        ids: the prompt's tokens, int64 [1, L].
        tail: what the clip goes on from in latent space.
    """

    plan: Plan
    image: Image | None
    samples: Waveform | None
    ids: Tensor
    tail: Tail | None = None


@dataclass(frozen=True)
class Encoded:
    """What denoising starts from, fp32 on the engine's device.

    Attributes:
        plan: what will be made, as long as a driving voice.
        text, null_text: embeddings [L, 3584] of the prompt and, for guidance, the negative prompt.
        audio: noise, or the latents of a driving voice, [1, A, 64].
        video: noise [1, 48, T, H, W].
        image, sr_image: latents [1, 48, 1, H, W] of the reference image, at the size of the base
            model and of super-resolution.
        tail: what the clip goes on from in latent space.
    """

    plan: Plan
    text: Tensor
    null_text: Tensor | None
    audio: Tensor
    video: Tensor
    image: Tensor | None
    sr_image: Tensor | None
    tail: Tail | None = None

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that are there, in order."""
        return (value for value in vars(self).values() if isinstance(value, Tensor))
