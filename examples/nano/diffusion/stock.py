"""Clips as latents with their captions, on the device: drawn while the transformer trains."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoencoders.sound import SoundAutoencoder
from autoencoders.video import VideoAutoencoder
from diffusion import prompts
from magihuman.runtime.config import AUDIO_CHANNELS, LATENT_CHANNELS, VIDEO_STRIDE, latent_frames
from training import autocast, trained
from world import scene
from world.captions import Clip, caption
from world.scene import AUDIO

DRAWN = 16  # clips at a time
FREE = 0.25  # of the clips say what their captions do not
GOING_ON = 0.4  # of the drawings are of clips that begin in the midst of what is said


class Pair(NamedTuple):
    """Latents of both streams, [B, 48, T, h, w] and [B, A, 64], fp32."""

    video: Tensor
    sound: Tensor


class Clips(NamedTuple):
    """Latents; ids of the captions, [B, L], and which of them are text; whether the sound is free
    of its caption, [B].
    """

    latents: Pair
    ids: Tensor
    is_text: Tensor
    is_free: Tensor


def latents_of(vae_steps: int, sound_steps: int) -> str:
    """Which latents they are: those of no other state of the autoencoders."""
    return f"vae {vae_steps} sound {sound_steps} "


class Stock:
    """A ring of clips. `refresh` replaces the oldest by new ones."""

    def __init__(
        self,
        folder: Path,
        count: int,
        size_px: int,
        tokenizer: Any,
        seed: int,
        device: torch.device,
    ) -> None:
        self.pictures, self.sounds = VideoAutoencoder(), SoundAutoencoder()
        steps = []
        for model, name in ((self.pictures, "vae"), (self.sounds, "sound")):
            steps.append(trained(folder, name, model)["steps"])
            model.to(device).eval().requires_grad_(False)
        self.latents = latents_of(*steps)
        self.count = -(-count // DRAWN) * DRAWN
        self.tokenizer, self.size_px, self.device = tokenizer, size_px, device
        self.rng = random.Random(seed)
        self.generator = torch.Generator(device).manual_seed(seed)
        side = size_px // VIDEO_STRIDE[1]
        shape = (self.count, LATENT_CHANNELS, latent_frames(AUDIO), side, side)
        self.video = torch.zeros(shape, dtype=torch.float16, device=device)
        self.sound = torch.zeros(
            self.count, AUDIO, AUDIO_CHANNELS, dtype=torch.float16, device=device
        )
        self.clips: list[Clip] = []
        self.is_free = torch.zeros(self.count, dtype=torch.bool, device=device)
        self.next = 0

    def fill(self) -> None:
        """All of it."""
        for _ in range(self.count // DRAWN):
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Draw `DRAWN` clips into the place of the oldest."""
        drawing = (DRAWN, AUDIO, self.rng, self.generator)
        goes_on = self.rng.random() < GOING_ON
        if goes_on:
            data = scene.go_on(*drawing, size_px=self.size_px)
        else:
            data = scene.make(*drawing, free_voice=FREE, size_px=self.size_px)
        with autocast(self.device):
            video = self.pictures.encode(data.frames * 2 - 1)
        sound = self.sounds.encode(scene.as_stereo(data.sound)).transpose(1, 2)
        place = slice(self.next, self.next + DRAWN)
        self.video[place], self.sound[place] = video.half(), sound.half()
        self.clips[place] = data.clips
        # `voices` has the free ones first.
        free = DRAWN if goes_on else round(FREE * DRAWN)
        self.is_free[place] = torch.arange(DRAWN, device=self.device) < free
        self.next = (self.next + DRAWN) % self.count

    def take(self, count: int, audio: int) -> Clips:
        """Any clips, cut to `audio` latents of sound and the latent frames that go with them.

        Captions are worded anew each time: sentences, languages, what they leave out.
        """
        picked = self.rng.choices(range(len(self.clips)), k=count)
        texts = [caption(self.clips[i], self.rng) for i in picked]
        ids = prompts.tokenize(self.tokenizer, texts)[0].to(self.device, non_blocking=True)
        index = torch.tensor(picked).to(self.device, non_blocking=True)
        latents = Pair(
            self.video[index, :, : latent_frames(audio)].float(),
            self.sound[index, :audio].float(),
        )
        return Clips(latents, ids, ids != prompts.PAD, self.is_free[index])
