"""The nano world: clips of a speaking face, made by formulas, and captions that describe them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from magihuman.runtime.config import FPS, latent_frames, video_frames
from magihuman.runtime.evaluate.model_score import SECONDS, SIZE_PX
from world.captions import Clip, attributes, draw
from world.faces import IRISES, SKINS, render, sway
from world.voice import (
    FRAME,
    LEAD_FRAMES,
    SYLLABLE_FRAMES,
    Sound,
    freely,
    speak,
    with_pauses,
)

AUDIO = round(SECONDS * FPS) + 1  # latents of a clip's sound, one a video frame
LONGEST = (AUDIO - LEAD_FRAMES) // SYLLABLE_FRAMES  # syllables that fit
LATEST_BEGIN = 48  # frames before which a clip that goes on begins
CUT_AUDIO = 101  # of the sound that the autoencoders' clips are cut from: room for any caption


@dataclass(frozen=True)
class Batch:
    """Clips with their picture and sound, on one device.

    frames: [B, 3, T, H, W] fp32 in 0 .. 1, T = 4 n + 1; matters: [B, 1, T, H, W], weights of the
    pixels; sound: of A frames, at 51.2 kHz.
    """

    clips: list[Clip]
    frames: Tensor
    matters: Tensor
    sound: Sound


def make(
    count: int,
    audio: int,
    rng: random.Random,
    generator: torch.Generator,
    *,
    free_voice: float = 0.0,
    size_px: int = SIZE_PX,
    clips: list[Clip] | None = None,
    shown: tuple[int, int] | None = None,
) -> Batch:
    """`count` clips of `audio` audio latents, on the generator's device.

    free_voice: of this share, the first ones, the sound is not what the caption says.
    shown: the first frame drawn and how many; by default all.
    """
    clips = [draw(rng) for _ in range(count)] if clips is None else clips
    looks = _looks(clips, generator)
    sound = voices(looks, audio, generator, free_voice)
    first, frames = shown or (0, video_frames(latent_frames(audio)))
    return _drawn(clips, looks, sound, slice(first, first + frames), generator, size_px)


def go_on(
    count: int,
    audio: int,
    rng: random.Random,
    generator: torch.Generator,
    *,
    size_px: int = SIZE_PX,
) -> Batch:
    """As `make`, of clips that begin in the midst of what is said: what a window of a long one is.

    Nothing of it is in the captions, and there are pauses in it.
    """
    clips = [draw(rng) for _ in range(count)]
    looks = _looks(clips, generator)
    begin = rng.randrange(LEAD_FRAMES, LATEST_BEGIN + 1)
    syllables = looks["syllables"]
    said = [
        torch.cat([row[row >= 0] for row in (syllables[i - 1], syllables[i - 2], syllables[i - 3])])
        for i in range(count)
    ]
    longer = torch.nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=-1)
    person = looks["person"][torch.randperm(count, device=generator.device, generator=generator)]
    sound = freely(speak(longer, person, begin + audio, generator), generator)
    sound = with_pauses(sound, generator)
    cut = Sound(sound.wave[:, begin * FRAME :], *(track[:, begin:] for track in sound[1:]))
    frames = slice(video_frames(latent_frames(audio)))
    return _drawn(clips, looks, cut, frames, generator, size_px)


def _looks(clips: list[Clip], generator: torch.Generator) -> dict[str, Tensor]:
    looks = attributes(clips, generator.device)
    for name, colours in (("skin", SKINS), ("iris", IRISES)):
        looks[name] = torch.randint(
            len(colours), (len(clips),), device=generator.device, generator=generator
        )
    return looks


def _drawn(
    clips: list[Clip],
    looks: dict[str, Tensor],
    sound: Sound,
    shown: slice,
    generator: torch.Generator,
    size_px: int,
) -> Batch:
    mouth = [track[:, shown] for track in (sound.opening, sound.rounding, sound.spread)]
    motion = sway(mouth[0], looks["gaze"], generator)
    pixels, matters = render(looks, motion, *mouth, size_px, size_px)
    return Batch(clips, pixels, matters, sound)


def voices(
    looks: dict[str, Tensor], audio: int, generator: torch.Generator, free_voice: float
) -> Sound:
    """The sound of clips, `audio` frames of it.

    The free ones say what the caption of another clip says, in the voice of its person, so that a
    mouth has to go by the sound; half of them as of `freely`.
    """
    count = round(free_voice * len(looks["person"]))
    syllables, person = (
        torch.cat((looks[name].roll(1, 0)[:count], looks[name][count:]))
        for name in ("syllables", "person")
    )
    sound = speak(syllables, person, audio, generator)
    warped = (count + 1) // 2
    if not warped:
        return sound
    free = freely(Sound(*(track[:warped] for track in sound)), generator)
    return Sound(*(torch.cat((a, b[warped:])) for a, b in zip(free, sound, strict=True)))


def as_stereo(sound: Sound) -> Tensor:
    """[B, 2, samples], as the autoencoder takes it."""
    return sound.wave[:, None].expand(-1, 2, -1)
