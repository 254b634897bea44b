"""What a model makes of held-out prompts, as figures and a picture, without leaving the GPU."""

from __future__ import annotations

import random
import statistics
from typing import TYPE_CHECKING

import torch
from torch import nn

from autoencoders.video import picture
from diffusion import prompts
from diffusion.sampler import Task, sample
from diffusion.stock import Clips, Pair
from magihuman.runtime.config import (
    AUDIO_CHANNELS,
    FPS,
    LATENT_AUDIO_RATE_HZ,
    LATENT_CHANNELS,
    latent_frames,
)
from magihuman.runtime.evaluate.clip_score import score
from training import Run, autocast
from world.captions import caption, draw
from world.scene import AUDIO, LONGEST

if TYPE_CHECKING:
    from diffusion.stock import Stock

COUNT = 16


@torch.no_grad()
def preview(run: Run, model: nn.Module, stock: Stock) -> None:
    """Sample, decode, score; OUT/STAGE.png has eight of the clips."""
    rng, generator = random.Random(1), torch.Generator(run.device).manual_seed(1)
    texts = [caption(draw(rng, LONGEST, held_out=True), rng, "en", full=True) for _ in range(COUNT)]
    ids, _ = prompts.tokenize(stock.tokenizer, texts)
    ids = ids.to(run.device)
    side, frames = stock.video.shape[-1], latent_frames(AUDIO)
    empty = Pair(
        torch.zeros(COUNT, LATENT_CHANNELS, frames, side, side, device=run.device),
        torch.zeros(COUNT, AUDIO, AUDIO_CHANNELS, device=run.device),
    )
    clips = Clips(empty, ids, ids != prompts.PAD, torch.zeros(COUNT, dtype=torch.bool))
    task = Task(
        torch.ones(COUNT, 1, frames, 1, 1, device=run.device),
        torch.ones(COUNT, 1, 1, device=run.device),
    )
    made = sample(model, clips, task, generator)
    waves = stock.sounds.oobleck.decode(made.sound.transpose(1, 2)).float().cpu().numpy()
    pixels = []
    for part in made.video.split(4):
        with autocast(run.device):
            pixels.append((stock.pictures.decode(part, True).float() + 1) / 2)
    shown = torch.cat(pixels)
    bytes_ = (shown.clamp(0, 1) * 255).byte().permute(0, 2, 3, 4, 1).cpu().numpy()
    found = [
        score(clip, wave.T, LATENT_AUDIO_RATE_HZ, FPS, text)
        for clip, wave, text in zip(bytes_, waves, texts, strict=True)
    ]
    right = sum(clip.right for clip in found)
    in_time = [abs(clip.synchrony.lag_frames) <= 1 for clip in found]
    print(
        f"{run.stage}: {right} of {sum(len(clip.named) for clip in found)} colours right; mouth and"
        f" sound correlate by {statistics.fmean(c.synchrony.correlation for c in found):.3f}, in"
        f" {sum(in_time)} of {COUNT} clips at their best within one frame",
        flush=True,
    )
    picture(run.out / f"{run.stage}.png", shown)
