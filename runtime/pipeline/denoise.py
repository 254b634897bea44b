"""The denoising loops of flow matching: distilled, guided, super-resolving. Latents in and out.

Both streams are fp32: video [1, 48, T, H, W] and audio [1, A, 64], with noise levels and solvers
from `schedulers`. `noise(like)` returns fresh normal noise of a tensor's shape; where both streams
draw, video draws first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypedDict, Unpack, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from magihuman.kernels.reference import LocalAttention
from magihuman.runtime import config
from magihuman.runtime.model import DiT, tokens
from magihuman.runtime.pipeline import schedulers

Velocity = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (video, audio) to theirs
Noise = Callable[[Tensor], Tensor]
OnStep = Callable[[int, int], None]  # (steps finished, of how many); may raise to stop


class Forward(Protocol):
    """What the loops need of a DiT: `DiT.forward`, or a compiled stand-in of the same signature."""

    def __call__(
        self, video: Tensor, audio: Tensor, text: Tensor, rope: Tensor, local: LocalAttention | None
    ) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class EmbedsText(Protocol):
    """A `Forward` in two steps, of which the first is the same at every step of a prompt."""

    def embed_text(self, text: Tensor) -> Tensor:
        """What `from_embedded` takes in place of text."""
        ...

    def from_embedded(
        self, video: Tensor, audio: Tensor, text: Tensor, rope: Tensor, local: LocalAttention | None
    ) -> tuple[Tensor, Tensor]:
        """The rest of the forward, text embedded."""
        ...


class LoopOptions(TypedDict, total=False):
    """What both base samplers take beside their streams; each may be left out.

    Attributes:
        image: [1, 48, 1, H, W] fp32, held as latent frame 0.
        keep_audio: whether the audio is given and stays as it is; False by default.
        on_step: called before every step and after the last.
    """

    image: Tensor | None
    keep_audio: bool
    on_step: OnStep


def velocity_of(
    model: DiT,
    layout: tokens.Layout,
    text: Tensor,
    style: config.CoordinateStyle,
    forward: Forward | None = None,
) -> Velocity:
    """The velocity of both streams for one prompt; the rotary table is made once, here, and so is
    the embedding of the text where the forward has a step for it.

    Args:
        model: gives the table and the architecture, and its forward.
        layout: sizes of the streams that the velocity will be asked for.
        text: embeddings [L, C] fp32, L = layout.text.
        style: how coordinates are made, as `tokens.coordinates` says.
        forward: stands in for the model's own.
    """
    rope = model.adapter.rope(tokens.coordinates(layout, style, text.device))
    local = None
    if model.config.local_attention_layers:
        local = LocalAttention(layout.frames, layout.frame_tokens, model.config.frame_reach)
    run: Forward = forward or model
    if isinstance(run, EmbedsText):
        text, run = run.embed_text(text), run.from_embedded

    def velocity(video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        v_video, v_audio = run(tokens.patchify(video), audio[0], text, rope, local)
        return tokens.unpatchify(v_video, layout), v_audio[None]

    return velocity


def distilled(
    velocity: Velocity,
    video: Tensor,
    audio: Tensor,
    *,
    steps: int,
    noise: Noise,
    **options: Unpack[LoopOptions],
) -> tuple[Tensor, Tensor]:
    """The distilled model's sampler: predict the clean clip, noise it afresh, no guidance.

    With `keep_audio` the audio's noise is drawn all the same, so that the video's noise does not
    depend on it. Returns video and audio at noise level 0.
    """
    image, keep_audio, on_step = _defaults(options)
    levels = [float(s) for s in schedulers.sigmas(steps)]
    for step in range(steps):
        on_step(step, steps)
        video = hold_first_frame(video, image)
        v_video, v_audio = velocity(video, audio)
        video_noise, audio_noise = noise(video), noise(audio)
        video = schedulers.renoise_step(video, v_video, levels[step], levels[step + 1], video_noise)
        if not keep_audio:
            audio = schedulers.renoise_step(
                audio, v_audio, levels[step], levels[step + 1], audio_noise
            )
    on_step(steps, steps)
    return hold_first_frame(video, image), audio


def guided(
    velocity: Velocity,
    velocity_null: Velocity | None,
    video: Tensor,
    audio: Tensor,
    *,
    steps: int,
    guidance: float = 5.0,
    **options: Unpack[LoopOptions],
) -> tuple[Tensor, Tensor]:
    """The base model's sampler: UniPC on both streams, with classifier-free guidance.

    Guidance (arXiv 2207.12598) is `null + scale (velocity - null)`, and applies where
    `velocity_null`, that of the negative prompt, is given. The video's scale is `guidance` while
    timestep > 500, then at most 2.0; the audio's is 5.0. Returns video and audio at noise level 0.
    """
    image, keep_audio, on_step = _defaults(options)
    levels, times = schedulers.sigmas(steps), schedulers.timesteps(steps)
    video_solver, audio_solver = schedulers.UniPC(levels), schedulers.UniPC(levels)
    for step in range(steps):
        on_step(step, steps)
        video = hold_first_frame(video, image)
        v_video, v_audio = velocity(video, audio)
        if velocity_null is not None:
            null_video, null_audio = velocity_null(video, audio)
            scale = guidance if times[step] > 500 else min(guidance, config.BASE_LOW_NOISE_GUIDANCE)
            v_video = null_video + scale * (v_video - null_video)
            v_audio = null_audio + config.BASE_AUDIO_GUIDANCE * (v_audio - null_audio)
        video = video_solver.step(v_video, video)
        if not keep_audio:
            audio = audio_solver.step(v_audio, audio)
    on_step(steps, steps)
    return hold_first_frame(video, image), audio


def super_resolve(
    velocity: Velocity,
    velocity_null: Velocity | None,
    video: Tensor,
    audio: Tensor,
    *,
    steps: int,
    guidance: float = config.SR_GUIDANCE,
    image: Tensor | None = None,
    on_step: OnStep = lambda step, of: None,
) -> Tensor:
    """The super-resolution sampler: UniPC on the video alone, which it returns at noise level 0.

    Args:
        velocity, velocity_null: of the prompt and, for guidance as in `guided`, the negative one.
        video, audio: from `sr_start`; the audio stays as it is and conditions the video.
        steps: of the solver.
        guidance: the scale, but at most 2.0 for the first 13 latent frames.
        image: [1, 48, 1, H, W] fp32 at the new size, held as latent frame 0.
        on_step: called before every step and after the last.
    """
    solver = schedulers.UniPC(schedulers.sigmas(steps))
    scale = video.new_full((1, 1, video.shape[2], 1, 1), guidance)
    scale[:, :, : config.SR_EARLY_FRAMES] = min(guidance, config.SR_EARLY_GUIDANCE)
    for step in range(steps):
        on_step(step, steps)
        video = hold_first_frame(video, image)
        v_video, _ = velocity(video, audio)
        if velocity_null is not None:
            null_video, _ = velocity_null(video, audio)
            v_video = null_video + scale * (v_video - null_video)
        video = solver.step(v_video, video)
    on_step(steps, steps)
    return hold_first_frame(video, image)


def sr_start(
    video: Tensor, audio: Tensor, rows: int, columns: int, noise: Noise
) -> tuple[Tensor, Tensor]:
    """What super-resolution starts from: the video resized trilinearly, both partly noised.

    video: clean latents, which keep the square root of alpha 220 of the zero-terminal-SNR schedule
    as their weight, the rest of the variance being noise. audio: becomes 0.3 of itself and 0.7 of
    noise. Returns video [1, 48, T, rows, columns] and audio.
    """
    size = (video.shape[2], rows, columns)
    video = F.interpolate(video, size=size, mode="trilinear", align_corners=True)
    keep = float(schedulers.zero_snr_table()[config.SR_NOISE_INDEX])
    video = video * keep + noise(video) * (1 - keep**2) ** 0.5
    audio = noise(audio) * config.SR_AUDIO_NOISE + audio * (1 - config.SR_AUDIO_NOISE)
    return video, audio


def _defaults(options: LoopOptions) -> tuple[Tensor | None, bool, OnStep]:
    """The options' image, keep_audio and on_step, or what stands for those left out."""
    on_step = options.get("on_step", lambda step, of: None)
    return options.get("image"), options.get("keep_audio", False), on_step


def hold_first_frame(video: Tensor, image: Tensor | None) -> Tensor:
    """`video` with latent frame 0 replaced by the reference image's latent, where there is one."""
    if image is None:
        return video
    return torch.cat((image[:, :, :1], video[:, :, 1:]), dim=2)
