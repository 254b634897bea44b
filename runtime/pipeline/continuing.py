"""Clips that go on from another: what is kept of its end, and what the next begins with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from magihuman.runtime import config
from magihuman.runtime.pipeline.audio import LATENT_SAMPLES, Waveform
from magihuman.runtime.pipeline.decode import Frames
from magihuman.runtime.request import Plan, Request, Tail, Video

# Latents kept of the end. The last becomes the first of the next clip; those before it are context
# for the decoders, which look one latent back and some of the sound's.
VIDEO_LATENTS, AUDIO_LATENTS = 3, 9
MAX_DRIFT = 0.5  # taken back at most, of a latent's standard deviation, at each join
SAMPLES = LATENT_SAMPLES * config.SAMPLE_RATE_HZ // config.LATENT_AUDIO_RATE_HZ  # of a latent


def tail_of(request: Request, plan: Plan, maker: str) -> Tail | None:
    """What a request goes on from in latent space, where this engine made it at the same sizes."""
    before = request.continue_from
    tail = before.tail if isinstance(before, Video) else None
    if tail is None or tail.maker != maker or tail.video.shape[3:] != (plan.rows, plan.columns):
        return None
    if plan.sr_rows is None:
        return tail
    is_alike = tail.sr_video is not None and tail.sr_video.shape[3:] == (
        plan.sr_rows,
        plan.sr_columns,
    )
    return tail if is_alike else None


def new_tail(
    maker: str, base: Tensor, sr: Tensor | None, audio: Tensor, before: Tail | None
) -> Tail:
    """What the next clip can go on from. base, sr: [1, 48, T, H, W]. audio: [1, A, 64]."""
    mean = _host(base.mean(dim=(0, 2, 3, 4)))
    look = mean if before is None else before.look
    return Tail(
        maker,
        _host(base[:, :, -VIDEO_LATENTS:]),
        None if sr is None else _host(sr[:, :, -VIDEO_LATENTS:]),
        _host(audio[:, : config.video_frames(base.shape[2])][:, -AUDIO_LATENTS:]),  # of the picture
        look,
        mean - look,
    )


def first_latents(tail: Tail, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The last of a tail's latents, [1, 48, 1, H, W], before super-resolution and, where there was
    one, after it; their colours and exposure as at the beginning of the row of clips.
    """
    sr = None if tail.sr_video is None else _first_latent(tail, tail.sr_video, device)
    return _first_latent(tail, tail.video, device), sr


def _first_latent(tail: Tail, latents: np.ndarray, device: torch.device) -> Tensor:
    drift = torch.from_numpy(tail.drift.clip(-MAX_DRIFT, MAX_DRIFT)).view(1, -1, 1, 1, 1)
    return (torch.from_numpy(latents[:, :, -1:]) - drift).to(device)


def with_context(latents: Tensor, before: np.ndarray, axis: int) -> Tensor:
    """Latents behind those of the clip before, but for its last, which is their first."""
    context = torch.from_numpy(before).to(latents.device).narrow(axis, 0, before.shape[axis] - 1)
    return torch.cat((context, latents), dim=axis)


def context_frames(tail: Tail) -> int:
    """How many frames at the beginning `with_context` adds."""
    return config.video_frames(tail.video.shape[2]) - 1


def context_samples(tail: Tail) -> int:
    """How many samples of sound at the beginning `with_context` adds."""
    return (tail.audio.shape[1] - 1) * SAMPLES


class Skipping:
    """Takes frames of a clip with context before it, and hands on those of the clip alone."""

    def __init__(self, count: int) -> None:
        self._left = count

    def __call__(self, *windows: Frames | None) -> tuple[Frames | None, ...] | None:
        """What is left of frames, and of all that comes with them; None where that is nothing."""
        count = next(len(window) for window in windows if window is not None)
        skipped, self._left = min(count, self._left), max(0, self._left - count)
        if skipped == count:
            return None
        return tuple(None if window is None else window[skipped:] for window in windows)


def joined(before: Waveform, after: Waveform) -> Waveform:
    """Two sounds of the same moment, [n, 2] each, the first faded into the second."""
    fade = np.linspace(0, 1, len(before), dtype=np.float32)[:, None]
    return before * (1 - fade) + after * fade


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy().copy()
