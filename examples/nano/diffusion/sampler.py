"""Latents of many clips at once: what is given and what is made, noise, the 8-step sampler."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from autoencoders.video import CHANNELS
from diffusion.stock import Clips, Pair
from magihuman.runtime.config import VARIANTS
from magihuman.runtime.pipeline import schedulers
from training import autocast

STEPS = VARIANTS["distill"].steps
HOLD_IMAGE = 0.3  # of the clips have a clean first frame
HOLD_FREE_IMAGE = 0.75  # of those whose sound is free, as of a window that goes on
HOLD_SOUND = 0.15  # of those whose captions say it have a clean sound; all free ones do


class Task(NamedTuple):
    """What of the latents is to be made, 1, and what is given, 0."""

    video: Tensor  # [B, 1, T, 1, 1]
    sound: Tensor  # [B, 1, 1]


def draw_task(clips: Clips, generator: torch.Generator) -> Task:
    """First frames held, sounds held: those always of which the caption says nothing."""
    count, frames = len(clips.ids), clips.latents.video.shape[2]
    device = clips.ids.device
    hold_image, hold_sound = torch.rand(2, count, device=device, generator=generator).unbind()
    is_first = torch.arange(frames, device=device) == 0
    share = torch.where(clips.is_free, HOLD_FREE_IMAGE, HOLD_IMAGE)
    video = ~((hold_image < share)[:, None] & is_first)
    sound = ~(clips.is_free | (hold_sound < HOLD_SOUND))
    return Task(video.float()[:, None, :, None, None], sound.float()[:, None, None])


def noise_like(x: Pair, generator: torch.Generator) -> Pair:
    """For both streams; 0 in the channels that say nothing."""
    video, sound = (torch.randn(v.shape, device=v.device, generator=generator) for v in x)
    video[:, CHANNELS:] = 0
    return Pair(video, sound)


def noised(clean: Pair, noise: Pair, sigma: float | Tensor, task: Task) -> Pair:
    """At a noise level, or one for each clip, [B]; what is given stays clean."""
    pairs = zip(clean, noise, task, strict=True)
    return Pair(*((1 - _over(sigma, a) * m) * a + _over(sigma, a) * m * n for a, n, m in pairs))


def cleaned(model: nn.Module, x: Pair, sigma: float | Tensor, clips: Clips, task: Task) -> Pair:
    """What the model takes for the clean clips, with what is given in its place."""
    with autocast(x.video.device):
        velocity = model(*x, clips)
    pairs = zip(x, velocity, clips.latents, task, strict=True)
    video, sound = (m * (a - _over(sigma, a) * v) + (1 - m) * g for a, v, g, m in pairs)
    used = torch.arange(video.shape[1], device=video.device) < CHANNELS
    return Pair(video * used.view(1, -1, 1, 1, 1), sound)


@torch.no_grad()
def sample(
    model: nn.Module, clips: Clips, task: Task, generator: torch.Generator, steps: int = STEPS
) -> Pair:
    """The sampler's state after so many of its 8 steps; after all, the finished clips."""
    levels = schedulers.sigmas(STEPS).tolist()
    x = noised(clips.latents, noise_like(clips.latents, generator), 1.0, task)
    for i in range(steps):
        clean = cleaned(model, x, levels[i], clips, task)
        x = noised(clean, noise_like(clean, generator), levels[i + 1], task)
    return x


def _over(sigma: float | Tensor, x: Tensor) -> float | Tensor:
    """Levels beside latents."""
    return sigma if isinstance(sigma, float) else sigma.view(-1, *[1] * (x.ndim - 1))
