"""The voice of the nano world: a formant synthesizer (after Klatt, JASA 67, 1980), batched.

Every pitch is a whole multiple of 25 Hz and every noise repeats 25 times a second, so that each
video frame holds whole periods: sounds are sums over a grid of 25 Hz, and the phase of a harmonic
is the same at the start of each frame. A small autoencoder learns such sound well.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from world.captions import CONSONANTS, VOWELS

FRAME = 2048  # samples of a video frame at 51.2 kHz
CONTROLS = 8  # control points of a frame
STEP = FRAME // CONTROLS
GRID_HZ = 25.0
PARTIALS = 340  # of the grid: up to 8.5 kHz
LEAD_FRAMES = 4  # silence before the first syllable
SYLLABLE_FRAMES = 6
FULL_RMS = 0.25  # of a loud vowel; the mouth is then open wide

# Hz: the first three formants of a man's vowels (Peterson and Barney, JASA 24, 1952).
FORMANTS = ((730, 1150, 2450), (480, 1900, 2550), (280, 2250, 2950), (500, 860, 2400), (310, 760, 2250))  # fmt: skip  # noqa: E501
ROUNDING = (0.0, 0.05, 0.0, 0.75, 1.0)  # of the lips, by vowel
SPREAD = (0.2, 0.7, 1.0, 0.0, 0.0)
LOUDNESS = (1.0, 0.82, 0.62, 0.85, 0.66)
FORMANT_SCALE = (1.16, 1.0, 1.3)  # woman, man, child
PITCH = ((9, 8, 7), (5, 5, 4), (12, 11, 10))  # times 25 Hz: even, odd, last syllable


class _Onset(NamedTuple):
    """How a consonant begins a syllable."""

    closure: float  # control points before the vowel
    murmur: float  # voiced loudness meanwhile
    noise: float  # loudness of its noise
    noise_hz: float  # centre of the noise
    noise_at: float  # control points at which the noise begins and ends
    noise_end: float
    locus: tuple[float, float, float]  # formants at its release, Hz


_ONSETS = {
    "b": _Onset(9, 0.06, 0.10, 900, 8, 10, (250, 800, 2200)),
    "d": _Onset(9, 0.06, 0.16, 3800, 8, 10, (250, 1750, 2700)),
    "g": _Onset(9, 0.06, 0.16, 2000, 8, 11, (250, 2200, 2300)),
    "k": _Onset(14, 0.0, 0.26, 2000, 8, 14, (300, 2100, 2350)),
    "l": _Onset(10, 0.22, 0.0, 1000, 0, 0, (340, 1150, 2700)),
    "m": _Onset(11, 0.16, 0.0, 1000, 0, 0, (250, 950, 2200)),
    "n": _Onset(11, 0.16, 0.0, 1000, 0, 0, (250, 1650, 2600)),
    "p": _Onset(14, 0.0, 0.20, 900, 8, 14, (300, 850, 2200)),
    "s": _Onset(15, 0.0, 0.24, 6000, 2, 15, (300, 1700, 2650)),
    "t": _Onset(14, 0.0, 0.28, 4600, 8, 14, (300, 1750, 2700)),
    "w": _Onset(10, 0.22, 0.0, 1000, 0, 0, (290, 650, 2150)),
    "h": _Onset(12, 0.0, 0.14, 1500, 2, 13, (500, 1400, 2500)),
}


class Sound(NamedTuple):
    """wave: [B, 2048 A] fp32 at 51.2 kHz; the rest [B, A], one value a frame, 0 to 1."""

    wave: Tensor
    opening: Tensor
    rounding: Tensor
    spread: Tensor


def speak(
    syllables: Tensor, person: Tensor, frames: int, generator: torch.Generator | None = None
) -> Sound:
    """Say the syllables, one in six frames from frame 4 on; what does not fit is not said.

    syllables: [B, S] indices, -1 after the last; person: [B]. Timbre varies a little from clip to
    clip, where a generator is given.
    """
    device, batch = syllables.device, len(syllables)
    jitter = torch.zeros(2, batch, 1, device=device)
    if generator is not None:
        jitter = torch.rand(jitter.shape, device=device, generator=generator) - 0.5
    steps = torch.arange(frames * CONTROLS + 1, device=device) - LEAD_FRAMES * CONTROLS
    long = SYLLABLE_FRAMES * CONTROLS
    slot = steps.div(long, rounding_mode="floor").clamp(0, syllables.shape[1] - 1)
    since = (steps - slot * long).float().expand(batch, -1)  # of the syllable, in control points
    said = syllables[:, slot]  # [B, K]
    spoken = (said >= 0) & (steps >= 0) & (since < long)
    said = said.clamp(min=0)
    consonant, vowel = said // len(VOWELS), said % len(VOWELS)
    last = (syllables >= 0).sum(1, keepdim=True) - 1 == slot

    closure, murmur, noise, noise_hz, noise_at, noise_end, *locus = _onset_table(device)[
        consonant
    ].unbind(-1)
    # The vowel swells in 20 ms and, before the next consonant, ebbs away.
    swell = _ramp(since, closure - 1, closure + 5)
    ebb = 1 - 0.75 * _ramp(since, long - 9.0, long - 1.0)
    ebb = torch.where(last, 1 - _ramp(since, long - 16.0, float(long)), ebb)
    starts = _ramp(since, 0, 3)
    loud = _table(LOUDNESS, device)[vowel] * swell * ebb + murmur * starts * (1 - swell)
    voiced = loud * spoken
    hiss = (
        noise
        * _ramp(since, noise_at - 1, noise_at)
        * (1 - _ramp(since, noise_end - 1, noise_end + 1))
    )
    hiss = hiss * spoken

    scale = _table(FORMANT_SCALE, device)[person][:, None] * (1 + 0.08 * jitter[0])
    release = _ramp(since, closure - 2, closure + 8)
    targets = _table(FORMANTS, device)[vowel].unbind(-1)
    formants = [
        (start + (target - start) * release) * scale
        for start, target in zip(locus, targets, strict=True)
    ]
    pitches = _table(PITCH, device)[person]  # [B, 3]
    pitch = torch.where(
        last, pitches[:, 2:], pitches[:, :2].gather(1, (slot % 2).expand(batch, -1))
    )
    wave = _synthesize(voiced, hiss, noise_hz, formants, pitch, 0.15 * jitter[1])
    rounding, spread = (
        (_table(table, device)[vowel] * spoken).unfold(1, CONTROLS, CONTROLS).mean(-1)[:, :frames]
        for table in (ROUNDING, SPREAD)
    )
    return with_mouth(wave, _smooth(rounding), _smooth(spread))


def with_mouth(wave: Tensor, rounding: Tensor, spread: Tensor) -> Sound:
    """The sound and how far the mouth is open: as far as each frame is loud."""
    loudness = wave.unflatten(1, (-1, FRAME)).square().mean(-1).sqrt()
    opening = (_smooth(loudness) / FULL_RMS).clamp(0, 1) ** 0.85
    return Sound(wave, opening, rounding, spread)


def freely(sound: Sound, generator: torch.Generator) -> Sound:
    """The same at other speeds, hence pitches, from moment to moment, louder or softer.

    What no caption says: sound to drive a mouth with.
    """
    batch, samples = sound.wave.shape
    device = sound.wave.device
    points = 6
    speed = 0.8 + 0.45 * torch.rand(batch, 1, points, device=device, generator=generator)
    frames = samples // FRAME
    speed = F.interpolate(speed, frames + 1, mode="linear", align_corners=True)[:, 0]
    delay = 6 * torch.rand(batch, 1, device=device, generator=generator) - 3
    place = speed.cumsum(1) - speed[:, :1] + delay  # in frames, at the start of each
    fine = F.interpolate(place[:, None], samples + 1, mode="linear", align_corners=True)[:, 0, :-1]
    gain = 0.6 + 0.6 * torch.rand(batch, 1, device=device, generator=generator)
    wave = _sampled(sound.wave, fine * FRAME) * gain
    middle = (place[:, :-1] + place[:, 1:]) / 2 - 0.5
    return with_mouth(wave, _sampled(sound.rounding, middle), _sampled(sound.spread, middle))


def with_pauses(sound: Sound, generator: torch.Generator) -> Sound:
    """The same with a pause or two of a quarter to a whole second, in which the mouth is shut."""
    batch, frames = sound.opening.shape
    device = sound.wave.device
    middle, half, is_there = torch.rand(3, batch, 2, 1, device=device, generator=generator).unbind()
    is_there[:, 0] = 0
    edges = torch.arange(frames + 1, device=device) - frames * middle
    away = edges.abs() - (3 + 9 * half) + frames * (is_there > 0.5)  # frames beyond each pause
    gate = away.clamp(0, 1).amin(1)  # [B, frames + 1], at the start of each
    fine = F.interpolate(gate[:, None], frames * FRAME + 1, mode="linear", align_corners=True)
    level = (gate[:, :-1] + gate[:, 1:]) / 2
    wave = sound.wave * fine[:, 0, :-1]
    return with_mouth(wave, sound.rounding * level, sound.spread * level)


def _sampled(values: Tensor, place: Tensor) -> Tensor:
    """Values [B, n] at fractional places [B, m]; zero outside."""
    left = place.floor()
    weight = place - left
    index = left.long()
    inside = (index >= 0) & (index < values.shape[1] - 1)
    index = index.clamp(0, values.shape[1] - 2)
    value = values.gather(1, index) * (1 - weight) + values.gather(1, index + 1) * weight
    return value * inside


def _synthesize(
    voiced: Tensor,
    hiss: Tensor,
    noise_hz: Tensor,
    formants: list[Tensor],
    pitch: Tensor,
    tilt: Tensor,
) -> Tensor:
    """All controls [B, K + 1] but pitch, in multiples of the grid; to [B, 256 K]."""
    device = voiced.device
    index = torch.arange(1, PARTIALS + 1, device=device)
    hertz = index * GRID_HZ
    gain = sum(
        level * (1 + ((hertz - centre[..., None]) / width).square()) ** -0.7
        for centre, width, level in zip(
            (*formants, torch.full_like(voiced, 3500.0)),
            (55.0, 70.0, 110.0, 200.0),
            (1.0, 0.75, 0.4, 0.18),
            strict=True,
        )
    )
    slope = (hertz / 300).clamp(min=1) ** -(0.55 + tilt[..., None])
    rumble = (hertz / 120).clamp(max=1)
    harmonic = (index % pitch[..., None] == 0) & (hertz < 5200)
    tones = gain * slope * rumble * harmonic * pitch[..., None].sqrt()
    tones = tones / 4.6 * voiced[..., None]
    band = torch.exp(-((hertz / noise_hz[..., None]).log() / 0.35).square())
    # As loud whatever the width of its band.
    band = band / band.square().sum(-1, keepdim=True).sqrt()
    wave = 0.0
    for amplitude, phase in (
        (tones, _phases(device, True)),
        (band * hiss[..., None], _phases(device, False)),
    ):
        wave = wave + _sum(amplitude, phase)
    return wave


def _sum(amplitude: Tensor, phase: Tensor) -> Tensor:
    """Sum of sines whose amplitudes [B, K + 1, P] move linearly between control points."""
    device = amplitude.device
    time = torch.arange(FRAME, device=device, dtype=torch.float64) / FRAME
    angle = 2 * math.pi * torch.arange(1, PARTIALS + 1, device=device)[:, None] * time
    basis = (angle + phase[:, None]).sin().float().unflatten(1, (CONTROLS, STEP))  # [P, 8, 256]
    fade = torch.arange(STEP, device=device) / STEP
    now = amplitude[:, :-1].unflatten(1, (-1, CONTROLS))  # [B, A, 8, P]
    then = amplitude[:, 1:].unflatten(1, (-1, CONTROLS))
    wave = torch.einsum("bakp,pks->baks", now, basis * (1 - fade))
    wave = wave + torch.einsum("bakp,pks->baks", then, basis * fade)
    return wave.flatten(1)


@functools.cache
def _phases(device: torch.device, tones: bool) -> Tensor:
    """Of the partials: of tones a parabola, which keeps peaks low; of noise at random, the same
    always.
    """
    if tones:
        index = torch.arange(1, PARTIALS + 1, device=device, dtype=torch.float64)
        return math.pi * index * index / 70
    drawn = torch.rand(PARTIALS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (2 * math.pi * drawn).to(device)


@functools.cache
def _onset_table(device: torch.device) -> Tensor:
    rows = [(*onset[:6], *onset.locus) for onset in (_ONSETS[name] for name in CONSONANTS)]
    return torch.tensor(rows, dtype=torch.float32, device=device)


@functools.cache
def _table(values: tuple, device: torch.device) -> Tensor:
    numbers = torch.tensor(values, device=device)
    return numbers if values is PITCH else numbers.float()


def _ramp(x: Tensor, start: Tensor | float, end: Tensor | float) -> Tensor:
    """0 before start, 1 after end, smooth between."""
    t = ((x - start) / (end - start)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _smooth(x: Tensor) -> Tensor:
    """[B, A], averaged over neighbours by 1, 2, 1."""
    padded = F.pad(x[:, None], (1, 1), mode="replicate")
    return ((padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]) / 4)[:, 0]
